"""What a train step takes, without running it: memory, operations, transfers.

The train step is compiled for shapes: of the models, config.json is read and
nothing else; no array is made, and there need be no data. Arguments of the step
are counted from their shapes and places, temporaries by the compiler, and
operations by formula (`flops`): the compiler's own count takes a loop for one
pass of its body, be it over layers, microbatches or chunks of the head. With a
`targets.Target`, its own compiler says what moves between devices (`hlo`).
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from gakd_jax import UserError, build, flops, hlo, sharding, teacher_cache
from gakd_jax import rollout as rollout_lib
from gakd_jax import training as training_lib
from gakd_jax.data import pipeline
from gakd_jax.objectives.base import Own

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
  # Of a target: what moves between devices, and what a device reads, in bytes.
  transfers: list = dataclasses.field(default_factory=list)
  reads: float = 0.0

  @property
  def peak(self):
    return sum(self.bytes.values())

  def sent(self):
    """{kind: bytes that a device sends}, of those of `hlo.KINDS` there are."""
    sent = {
      kind: sum(t.sent for t in self.transfers if t.kind == kind)
      for kind in hlo.KINDS
    }
    return {kind: n for kind, n in sent.items() if n}

  def hidden(self):
    """Bytes of these while which something is computed, as far as is known."""
    return sum(t.sent for t in self.transfers if t.hidden)

  def seconds(self, target):
    """{what takes them: seconds of a step at the target's peak}.

    A step takes the largest at least, and all of them if none is hidden behind
    another.
    """
    kind = target.kind
    return {
      'arithmetic': sum(self.flops.values()) / (self.devices * kind.flops),
      'memory': self.reads / kind.bandwidth,
      'links': sum(target.seconds(t) for t in self.transfers),
    }


def make(config, mesh, target=None):
  """The `Plan` of a config whose paths are directories or hub ids.

  target: a `targets.Target` whose devices make the mesh; None: this machine.

  Raises:
    UserError: if the target's compiler finds no room.
  """
  with jax.set_mesh(mesh):
    return _make(config, mesh, target)


def _make(config, mesh, target):
  run = build.abstract(config, mesh)
  # How many steps there are changes no shape; 0 an epoch fit any warm-up.
  total = config.train.steps or 10**9
  training = training_lib.make(run, 0, total)
  state, frozen = training.state, run.models.frozen
  batch = shapes_of_batch(config, mesh, run.writer)
  batch = _with_kept(batch, config.teacher, run.models)
  options = None
  if target is not None:
    options = target.options
  elif _hoists(config):
    options = _NO_HOISTING
  compiled = compile_for(
    training.step.lower(state, run.models, batch), target, options
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
  rows, length = batch.student.ids_BT.shape
  microbatches = training_lib.microbatches(config)
  local = rows // microbatches // sharding.batch_ways(mesh)
  moved = []
  if target is not None:
    chunks = -(-local * length // run.objective.head_chunk)
    moved = hlo.transfers(compiled.as_text(), chunks)
  if run.writer.room:
    # Before the step: what it takes more than that.
    rollout = compile_for(
      run.writer.lower(run.models, state.params['student'], batch),
      target,
      target and target.options,
    )
    more = _temporary(rollout) - _temporary(compiled)
    parts['rollout: a copy of the weights, caches'] = max(0, more)
    if target is not None:
      moved += hlo.transfers(rollout.as_text(), run.writer.room)
  return Plan(
    rows=local,
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
      cache=config.teacher.cache,
    )
    | flops.of_rollout(
      run.writer, run.models, state.params['student'], rows, length
    ),
    compiled=compiled,
    transfers=moved,
    reads=_reads(run, parts, _trees(state, frozen), microbatches),
  )


def compile_for(lowered, target, options):
  """Compiled; says so in one line if the target's compiler finds no room."""
  try:
    return lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if target is None or 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    found = re.search(r'Used (\S+) of (\S+) hbm', str(e))
    used = f': {found[1]} of {found[2]}' if found else ''
    raise UserError(
      f'{target.name}: the step does not fit into a device{used}; use smaller '
      'microbatches, more devices or config.mesh.fsdp'
    ) from e


def _reads(run, parts, trees, microbatches):
  """Bytes that a device reads in a step, at least.

  What lies there, once; the weights of both models, in the compute dtype, in
  each microbatch and for each token that is written.
  """
  names = ['student', 'student, frozen']
  if run.config.teacher.cache == 'none':
    names.append('teacher')
  numbers = sum(count(trees[name]) for name in names if name in trees)
  weights = numbers * run.models.dtype.itemsize / run.mesh.shape['tensor']
  return sum(parts.values()) + weights * (microbatches + run.writer.room)


def shapes_of_batch(config, mesh, writer):
  """The longest rows there can be, as shapes; both models read the same."""
  B, T = config.train.batch_size * writer.group, config.data.max_length
  place = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
  scored = writer.room and writer.scores_in is not None

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

  tokens = pipeline.Tokens(shape(B, T), shape(B, T), shape(B, T, dtype=bool))
  return pipeline.Batch(
    tokens,
    tokens,
    rows_B=shape(B),
    written_B=shape(B, dtype=bool) if writer.room else None,
    old_log_BT=shape(B, T, dtype=jnp.float32) if scored else None,
    group=writer.group,
  )


def _with_kept(batch, settings, models):
  """With what is kept of a teacher, as shapes; settings: `config.teacher`."""
  ids_BT = batch.teacher.ids_BT

  def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(
      (*ids_BT.shape, *sizes), dtype, sharding=ids_BT.sharding
    )

  kind, K = settings.cache, settings.cache_size
  if kind == 'none':
    return batch
  if kind == 'hidden':
    hidden_BTE = shape(models.dtype, models.teacher_config.width)
    return batch.replace(cached={'teacher_hidden': hidden_BTE})
  known = {'ids': shape(jnp.int32, K), 'log_probs': shape(jnp.float16, K)}
  if kind in ('top_k', 'data'):
    known |= {'rest': shape(jnp.float16)}
    known |= {'is_known': shape(bool)} if kind == 'data' else {}
    return batch.replace(known=known)
  return batch.replace(known=known | {'share': shape(jnp.float32, K)})


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
    'optimizer state': (state.opt_state, state.step, state.skips),
    # The teacher's tokens are the same arrays.
    'batch': (batch.student, batch.cached, batch.known, batch.old_log_BT),
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
  rows = c.train.batch_size * run.writer.group // sharding.batch_ways(mesh)
  local = rows * c.data.max_length
  tokens = min(run.objective.head_chunk, local // training_lib.microbatches(c))
  logits_of_both = run.objective.needs_teacher and (
    c.teacher.cache not in teacher_cache.NUMBERS
  )
  configs = run.models.configs[: 1 + logits_of_both]
  V = min(config.vocab_size for config in configs)
  ways = mesh.shape['tensor']
  return 4 * len(configs) * tokens * (V // ways if V % ways == 0 else V)


def rows_that_fit(plan, config, mesh, memory, target=None, tries=5):
  """The most microbatch rows found to fit into a device, 0 for none.

  A few sizes are compiled. The peak is the largest of phases that grow with
  the rows in proportion: convex, so that the line between a size that fits and
  one that does not stays above it, and leads to a size that fits.
  """
  # Rows of one prompt are of one microbatch, which is set in prompts.
  group = rollout_lib.make(**config.rollout).group

  def peak(rows):
    bigger = config.copy_and_resolve_references()
    bigger.train.microbatch_size = rows // group * sharding.batch_ways(mesh)
    bigger.train.batch_size = (
      training_lib.microbatches(config) * bigger.train.microbatch_size
    )
    return make(bigger, mesh, target).peak

  low, high = (plan.rows, plan.peak), None
  if plan.peak > memory:
    low, high = (group, peak(group)), low
    if low[1] > memory:
      return 0
  for _ in range(tries):
    rows = 8 * low[0]
    if high:
      slope = (high[1] - low[1]) / (high[0] - low[0])
      rows = low[0] + math.floor((memory - low[1]) / slope)
      rows -= rows % group
      if rows == low[0]:
        break
    new = rows, peak(rows)
    if new[1] <= memory:
      low = new
    else:
      high = new
  return low[0]


def _hoists(config):
  """Whether the compiler would convert weights of all layers at once."""
  kinds = config.student.quantize, config.teacher.quantize
  on_cpu = jax.default_backend() == 'cpu'
  return widens(config) or (on_cpu and 'nf4' in kinds)


def widens(config):
  """Whether the compiler computes in more than the config's precision."""
  return jax.default_backend() == 'cpu' and config.train.precision != 'float32'
