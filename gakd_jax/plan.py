"""What a run would take, without running it: memory, operations, time.

  python -m gakd_jax.main --config=configs/rkl_0p6b.py --plan \\
    --plan_devices=8 --plan_memory_gb=80 --plan_tflops=400

The train step is compiled for shapes: of the models, config.json is read and
nothing else; no array is made, and there need be no data. Arguments of the step
are counted from their shapes and places, temporaries by the compiler, and
operations by formula (`flops`): the compiler's own count takes a loop for one
pass of its body, be it over layers, microbatches or chunks of the head.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gakd_jax import UserError, build, flops, log, rundir, sharding
from gakd_jax.data import pipeline
from gakd_jax.objectives.base import Own

GB = 1e9

# A CPU multiplies in float32, and has no 4-bit integers. Left to itself, its
# compiler takes the conversion of all layers' weights out of the loop over
# layers: a second copy of a model in twice the bytes, which no accelerator has.
_NO_HOISTING = {
  'xla_disable_hlo_passes': 'while-loop-invariant-code-motion,'
  'while-loop-expensive-invariant-code-motion'
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step's needs; bytes are of one device, FLOPs of all of them."""

  rows: int  # of a microbatch, on each device
  tokens: int  # of an optimizer step
  devices: int
  parameters: dict  # part: number
  bytes: dict  # part: number; their sum is the peak
  flops: dict  # part: number
  compiled: Any

  @property
  def peak(self):
    return sum(self.bytes.values())


def run(config, memory_gb=None, tflops=None):
  """Prints the plan of a config, or of each of its stages.

  Args:
    config: see configs/base.py.
    memory_gb: of a device; the rows that fit into it are estimated.
    tflops: what a device sustains, 10^12 a second; gives the time of a step.
  """
  for name, limit in (('memory_gb', memory_gb), ('tflops', tflops)):
    if limit is not None and not limit > 0:
      raise UserError(f'--plan_{name}={limit} must be positive')
  stages = dict(config.stages)
  for name, stage in stages.items() or [('', config)]:
    if name:
      print(f'== {name}')
    stage = rundir.stage_shapes(stage, stages)
    if stage.train.steps == 0:
      print('it trains nothing: there is no step to plan')
      continue
    mesh = _make_mesh(stage.mesh)
    with jax.set_mesh(mesh):
      _show(make(stage, mesh), stage, mesh, memory_gb, tflops)


def make(config, mesh):
  """The `Plan` of a config whose paths are directories or hub ids."""
  run = build.abstract(config, mesh)
  # How many steps there are changes no shape; 0 an epoch fit any warm-up.
  total = config.train.steps or 10**9
  training = build.training(run, 0, total)
  state, frozen = training.state, run.models.frozen
  batch = _batch(config, mesh, run.writer)
  compiled = training.step.lower(state, run.models, batch).compile(
    compiler_options=_NO_HOISTING if _hoists(config) else None
  )
  parts = _resident(state, frozen, batch)
  temporary = _temporary(compiled)
  # Gradients and logits are among the temporaries, but need not be there at
  # the same time: what is over is activations and all else.
  for name, size in (
    ('gradients', device_bytes(state.params)),
    ('head: logits of a chunk', _chunk_bytes(run)),
  ):
    parts[name] = min(size, temporary)
    temporary -= parts[name]
  parts['activations and other temporaries'] = temporary
  if run.writer.room:
    # Before the step: what it takes more than that.
    rollout = run.writer.lower(run.models, state.params['student'], batch)
    more = _temporary(rollout.compile()) - _temporary(compiled)
    parts['rollout: a copy of the weights, caches'] = max(0, more)
  rows, length = batch.student.ids_BT.shape
  microbatches = build.microbatches(config)
  return Plan(
    rows=rows // microbatches // sharding.batch_ways(mesh),
    tokens=rows * length,
    devices=mesh.size,
    parameters=parameters(state, frozen),
    bytes=parts,
    flops=flops.of_step(
      run.objective,
      run.models,
      state.params['student'],
      Own(critic=state.critic),
      rows=rows,
      length=length,
      microbatches=microbatches,
    )
    | flops.of_rollout(
      run.writer, run.models, state.params['student'], rows, length
    ),
    compiled=compiled,
  )


def _batch(config, mesh, writer):
  """The longest rows there can be, as shapes; both models read the same."""
  B, T = config.train.batch_size, config.data.max_length
  place = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

  tokens = pipeline.Tokens(shape(B, T), shape(B, T), shape(B, T, dtype=bool))
  return pipeline.Batch(
    tokens,
    tokens,
    rows_B=shape(B),
    written_B=shape(B, dtype=bool) if writer.room else None,
  )


def count(tree):
  """Numbers in a tree of arrays or shapes; scales of others are none."""
  return sum(
    math.prod(x.shape)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
    if not sharding.path_name(path).endswith('kernel_scale')
  )


def device_bytes(tree):
  """Bytes of a placed tree on each device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape))
    * jax.dtypes.itemsize_bits(x.dtype)  # Two of 4 bits share a byte.
    // 8
    for x in jax.tree.leaves(tree)
  )


def _trees(state, frozen):
  """{part: its parameters}; those that a method or run lacks are left out."""
  trees = {
    'student': state.params['student'],
    'student, frozen': frozen.get('student'),
    'teacher': frozen.get('teacher'),
    'critic': state.critic,
    'extra': state.params['extra'],
    'memory': state.memory,
  }
  return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def parameters(state, frozen):
  """{part: numbers in it}, of a `TrainState` and `Models.frozen`."""
  return {name: count(tree) for name, tree in _trees(state, frozen).items()}


def _resident(state, frozen, batch):
  """{part: bytes on each device} of what is there between two steps.

  The critic's include its optimizer state.
  """
  trees = _trees(state, frozen)
  if 'critic' in trees:
    trees['critic'] = trees['critic'], state.critic_opt_state
  parts = {
    'optimizer state': (state.opt_state, state.step),
    'batch': batch.student,  # The teacher's are the same arrays.
  }
  return {k: device_bytes(tree) for k, tree in (trees | parts).items()}


def _temporary(compiled):
  """Bytes on each device of what a step makes, but for the state it returns.

  That takes the place of the one it was given. What is resident is not taken
  from the compiler, which leaves out arguments that the step does not read,
  such as a teacher for evaluations alone.
  """
  memory = compiled.memory_analysis()
  return (
    memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def _chunk_bytes(run):
  """fp32 logits of one chunk, of every model that takes part."""
  c, mesh = run.config, run.mesh
  local = c.train.batch_size // sharding.batch_ways(mesh) * c.data.max_length
  tokens = min(c.train.head_chunk, local // build.microbatches(c))
  configs = run.models.configs[: 1 + run.objective.needs_teacher]
  V = min(config.vocab_size for config in configs)
  ways = mesh.shape['tensor']
  return 4 * len(configs) * tokens * (V // ways if V % ways == 0 else V)


def rows_that_fit(plan, config, mesh, memory, tries=5):
  """The most microbatch rows found to fit into a device, 0 for none.

  A few sizes are compiled. The peak is the largest of phases that grow with
  the rows in proportion: convex, so that the line between a size that fits and
  one that does not stays above it, and leads to a size that fits.
  """

  def peak(rows):
    bigger = config.copy_and_resolve_references()
    bigger.train.microbatch_size = rows * sharding.batch_ways(mesh)
    bigger.train.batch_size = (
      build.microbatches(config) * bigger.train.microbatch_size
    )
    return make(bigger, mesh).peak

  low, high = (plan.rows, plan.peak), None
  if plan.peak > memory:
    low, high = (1, peak(1)), low
    if low[1] > memory:
      return 0
  for _ in range(tries):
    rows = 8 * low[0]
    if high:
      slope = (high[1] - low[1]) / (high[0] - low[0])
      rows = low[0] + math.floor((memory - low[1]) / slope)
      if rows == low[0]:
        break
    new = rows, peak(rows)
    if new[1] <= memory:
      low = new
    else:
      high = new
  return low[0]


def _make_mesh(sizes):
  """The mesh; says how to plan for more devices than there are."""
  needed = math.prod(size for size in sizes.values() if size > 0)
  if needed > jax.device_count():
    raise UserError(
      f'config.mesh needs {needed} devices and this host has '
      f'{jax.device_count()}; add --plan_devices={needed} to plan for them '
      'here, on the CPU'
    )
  return sharding.make_mesh(**sizes)


def _show(plan, config, mesh, memory_gb, tflops):
  c = config
  shape = ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  print(f'mesh: {shape} ({plan.devices} devices)')
  print(
    f'step: {c.train.batch_size} rows of {c.data.max_length} tokens, '
    f'{plan.rows} rows a microbatch and device'
  )
  log.print_table(
    ('part', 'parameters'),
    [(name, f'{n:,}') for name, n in plan.parameters.items()],
    'Parameters',
  )
  log.print_table(
    ('part', 'GB'),
    [
      (name, f'{n / GB:.2f}')
      for name, n in [*plan.bytes.items(), ('peak', plan.peak)]
    ],
    'Memory of a device',
  )
  total = sum(plan.flops.values())
  log.print_table(
    ('part', 'GFLOP a token', 'TFLOP a step', 'share'),
    [
      (
        name,
        f'{n / plan.tokens / 1e9:.3f}',
        f'{n / 1e12:.3f}',
        f'{n / total:.0%}',
      )
      for name, n in [*plan.flops.items(), ('total', total)]
    ],
    'Operations',
  )
  if memory_gb is not None:
    rows = rows_that_fit(plan, config, mesh, memory_gb * GB)
    verdict = 'fits' if plan.peak <= memory_gb * GB else 'does not fit'
    print(
      f'this step {verdict} in {memory_gb:g} GB; '
      f'{rows or "not even 1"} rows a microbatch and device do'
    )
  if tflops is not None:
    seconds = total / (plan.devices * tflops * 1e12)
    print(
      f'a step takes {seconds:.3g} s at {tflops:g} TFLOP/s a device: '
      f'{plan.tokens / seconds:,.0f} tokens/s'
    )
  print(_sources(config))


def _hoists(config):
  """Whether the compiler would convert weights of all layers at once."""
  kinds = config.student.quantize, config.teacher.quantize
  on_cpu = jax.default_backend() == 'cpu'
  return _widens(config) or (on_cpu and 'nf4' in kinds)


def _widens(config):
  """Whether the compiler computes in more than the config's precision."""
  return jax.default_backend() == 'cpu' and config.train.precision != 'float32'


def _sources(config):
  text = (
    'from: shapes and shardings; temporaries by the compiler for '
    f'{jax.default_backend()} (jax {jax.__version__}); operations by formula, '
    'every token a response; evaluations not included'
  )
  if _widens(config):
    text += (
      f'; a CPU multiplies {config.train.precision} in float32, so that '
      'temporaries are larger here than on an accelerator'
    )
  return text
