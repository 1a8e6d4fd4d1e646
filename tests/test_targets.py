"""Programs at full size, compiled for machines that are not here.

Qwen3-8B teaches Qwen3-0.6B: what is on a device, and what moves between them.
"""

import collections
import functools
import importlib.util
import json
import math
import types

import jax
import numpy as np
import pytest

from configs import rgan_0p6b, rkl_0p6b
from gakd_jax import UserError, build, hlo, plan, planning, sharding, targets
from gakd_jax import training as training_lib

pytestmark = pytest.mark.usefixtures('whole_compiler')

# No width is this, nor what is left of one on a device.
B, T = 64, 448
V, D, E = 151936, 1024, 4096
STUDENT, TEACHER = 28, 36  # layers
CONFIGS = {'rkl': rkl_0p6b, 'rgan': rgan_0p6b}
MESHES = {
  'fsdp': {'data': 1, 'fsdp': 8},
  'tensor': {'data': 1, 'fsdp': 4, 'tensor': 2},
  'data': {'data': 2, 'fsdp': 4},
}


def has(module):
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


GPU = pytest.mark.skipif(
  not (has('jax_cuda12_plugin') and has('nvidia.cuda_nvcc')),
  reason='the GPU compiler is not installed (the `plan-gpu` extra)',
)
TPU = pytest.mark.skipif(
  not has('libtpu'),
  reason='the TPU compiler is not installed (the `plan-tpu` extra)',
)


@pytest.fixture(scope='session')
def pair(tmp_path_factory):
  """Directories of student and teacher, with a config.json each."""
  shared = {
    'model_type': 'qwen3',
    'vocab_size': V,
    'head_dim': 128,
    'num_key_value_heads': 8,
    'max_position_embeddings': 40960,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000,
    'hidden_act': 'silu',
  }
  sizes = [(D, 3072, STUDENT, 16, True), (E, 12288, TEACHER, 32, False)]
  paths = []
  for width, ff, layers, heads, tied in sizes:
    path = tmp_path_factory.mktemp('qwen3')
    hf = shared | {
      'hidden_size': width,
      'intermediate_size': ff,
      'num_hidden_layers': layers,
      'num_attention_heads': heads,
      'tie_word_embeddings': tied,
    }
    (path / 'config.json').write_text(json.dumps(hf))
    paths.append(str(path))
  return tuple(paths)


def config_of(pair, method, mesh, attention):
  """All weights trained, all rows at once."""
  c = CONFIGS[method].get_config()
  c.student.path, c.teacher.path = pair
  c.student.lora = None
  c.train.steps, c.train.epochs = 1000, None
  c.train.batch_size = c.train.microbatch_size = B
  c.data.max_length = T
  c.attention = attention
  c.mesh.update(MESHES[mesh])
  return c


@functools.cache
def planned(pair, name, method, mesh):
  """(target, `plan.Plan`, arrays of the program) of a step."""
  target = targets.of(name)
  # cuDNN's calls do not compile without a card.
  attention = 'chunked' if target.is_gpu else 'auto'
  c = config_of(pair, method, mesh, attention)
  devices = sharding.make_mesh(**c.mesh, devices=target.devices)
  made = plan.make(c, devices, target)
  return target, made, hlo.arrays(made.compiled.as_text())


H100 = functools.partial(pytest.param, 'h100:8', marks=GPU)
V5P = functools.partial(pytest.param, 'v5p:2x2x2', marks=TPU)
STEPS = pytest.mark.parametrize(
  ('name', 'method', 'mesh'),
  [
    H100('rkl', 'fsdp'),
    H100('rkl', 'data'),
    H100('rkl', 'tensor'),
    H100('rgan', 'fsdp'),
    H100('rgan', 'tensor'),
    V5P('rkl', 'fsdp'),
  ],
)


def has_tokens(shape):
  return T in shape or any(n % T == 0 and n >= T for n in shape)


def tokens_moved(made, kind):
  """Transfers of activations."""
  return [
    t
    for t in made.transfers
    if t.kind == kind
    # A vector is of parameters: a critic's width is twice T.
    and any(len(dims) > 1 and has_tokens(dims) for _, dims in t.shapes)
  ]


@pytest.mark.targets
@STEPS
def test_fits_and_no_array_is_of_logits_or_scores(pair, name, method, mesh):
  target, made, arrays = planned(pair, name, method, mesh)
  assert made.peak < target.kind.memory
  part = V // MESHES[mesh].get('tensor', 1)
  with_vocabulary = [dims for _, dims in arrays if {V, part} & {*dims}]
  assert max(map(math.prod, with_vocabulary)) <= V * E
  assert not [dims for dims in with_vocabulary if has_tokens(dims)]
  assert not [dims for _, dims in arrays if dims[-2:] == (T, T)]


@pytest.mark.targets
@STEPS
def test_activations_stay_where_their_rows_are(pair, name, method, mesh):
  """But for the embedding, looked up where its columns are."""
  _, made, arrays = planned(pair, name, method, mesh)
  fsdp = MESHES[mesh]['fsdp']
  own = 2 * made.rows  # A critic stacks both models'.
  tensor = MESHES[mesh].get('tensor', 1)
  widths = {n // tensor for n in (3072, 12288)} | {D, E}
  widths -= {D // fsdp, E // fsdp}
  together = {
    dims
    for dtype, dims in arrays
    if dtype in ('f32', 'bf16')
    and len(dims) > 1
    and dims[-1] in widths
    and (
      (dims[0] > own and dims[1] == T)
      or (dims[0] > own * T and has_tokens(dims))
    )
  }
  assert not together
  if mesh != 'tensor':
    assert not tokens_moved(made, 'all-reduce')
    exchanged = {
      math.prod(dims)
      for t in tokens_moved(made, 'all-to-all')
      for _, dims in t.shapes
    }
    rows = B // MESHES[mesh]['data']
    assert exchanged == {rows * T * width // fsdp for width in (D, E)}


@pytest.mark.targets
@STEPS
def test_two_sums_over_tensor_a_layer_and_direction(pair, name, method, mesh):
  _, made, _ = planned(pair, name, method, mesh)
  sums = collections.Counter(
    (t.times, dims[-1])
    for t in tokens_moved(made, 'all-reduce')
    for _, dims in t.shapes
    if t.loops
  )
  if mesh != 'tensor':
    assert not sums
    return
  assert sums[TEACHER, E] == 2
  # And one for the gradient of queries, which attention in blocks has apart from
  # that of keys and values.
  assert sums[STUDENT, D] <= 5
  chunk = CONFIGS[method].get_config().train.head_chunk
  in_head = [
    dims
    for t in made.transfers
    if 'shard_map/while' in t.name
    for _, dims in t.shapes
  ]
  # A number for each token of a chunk; several may go together.
  assert in_head
  assert all(len(d) == 1 and d[0] <= 4 * chunk for d in in_head)


@pytest.mark.targets
@STEPS
def test_weights_are_gathered_a_layer_at_a_time(pair, name, method, mesh):
  _, made, _ = planned(pair, name, method, mesh)
  gathers = [t for t in made.transfers if t.kind == 'all-gather']
  fsdp, tensor = (MESHES[mesh].get(axis, 1) for axis in ('fsdp', 'tensor'))
  heads = sorted(
    t.size for t in gathers if V // tensor in t.shapes[0][1] and t.size > 1e8
  )
  assert heads == [2 * V // tensor * width for width in (D, E)]
  # In bf16; what two models' blocks have, of the student twice.
  block = {D: 3 * 3072 + 6 * 1024, E: 3 * 12288 + 2 * 4096 + 2 * 1024}
  want = 2 * (fsdp - 1) / fsdp / tensor
  want *= TEACHER * E * block[E] + 2 * STUDENT * D * block[D]
  in_layers = [
    t
    for t in made.transfers
    if t.loops and t.kind in ('all-gather', 'collective-permute')
  ]
  # A TPU passes weights on from one to the next while it multiplies, 1.36 times
  # as much as gathering them is.
  slack = 1.4 if name.startswith('v') else 1.02
  assert want <= sum(t.sent for t in in_layers) <= slack * want
  assert max(t.size for t in in_layers) <= 2 * D * block[D] * 2 + 2 * E * 12288
  if name.startswith('h'):
    scattered = [t for t in made.transfers if t.kind == 'reduce-scatter']
    assert {t.times for t in scattered} >= {1, STUDENT}


@pytest.mark.targets
@GPU
@pytest.mark.parametrize('mesh', ['fsdp', 'tensor'])
def test_writing_gathers_weights_once(pair, mesh):
  target = targets.of('h100:8')
  c = config_of(pair, 'rkl', mesh, 'chunked')
  c.rollout = {'writer': 'student', 'max_new_tokens': 128}
  devices = sharding.make_mesh(**c.mesh, devices=target.devices)
  with jax.set_mesh(devices):
    run = build.abstract(c, devices)
    state = training_lib.make(run, 0, 1000).state
    batch = plan.shapes_of_batch(c, devices, run.writer)
    lowered = run.writer.lower(run.models, state.params['student'], batch)
    text = lowered.compile(compiler_options=target.options).as_text()
  found = hlo.transfers(text, run.writer.room)
  gathered = sum(
    t.sent for t in found if t.kind == 'all-gather' and not t.loops
  )
  fsdp, tensor = (MESHES[mesh].get(axis, 1) for axis in ('fsdp', 'tensor'))
  weights = 2 * 596_049_920 / tensor
  assert gathered == pytest.approx(weights * (fsdp - 1) / fsdp, rel=0.01)
  in_loop = [t for t in found if t.loops]
  if mesh == 'fsdp':
    assert not in_loop
  else:  # Two sums a layer for each token, and one of its embedding.
    rows = B // fsdp
    sums = [t for t in in_loop if t.shapes == (('bf16', (rows, D)),)]
    sums += [t for t in in_loop if t.shapes == (('bf16', (rows, 1, D)),)]
    assert len(sums) == 2 * STUDENT + 1


# What needs no compiler of others.


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('x9', 'expected all, or one of a100, '),
    ('h100:', 'expected all'),
    ('h100:2x2', 'name how many, as in h100:8'),
    ('h100:12', '1 to 8, or hosts of 8'),
    ('v5p', 'name the slice, as in v5p:2x2x1'),
  ],
)
def test_an_unknown_target_is_one_line(name, message, monkeypatch):
  monkeypatch.setattr(targets, '_require', lambda *_: None)
  with pytest.raises(UserError, match=message):
    targets.of(name)


@pytest.mark.parametrize(
  ('name', 'extra'), [('h100:8', 'plan-gpu'), ('v5e:4x4', 'plan-tpu')]
)
def test_a_compiler_that_is_not_there_is_one_line(name, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(UserError, match=rf"install 'gakd_jax\[{extra}\]'"):
    targets.of(name)


def fake(kind, hosts):
  """A target of 8 devices a host."""
  devices = tuple(
    types.SimpleNamespace(id=i, process_index=i // 8) for i in range(8 * hosts)
  )
  return targets.Target('fake', targets.KINDS[kind], devices, {})


def transfer(kind, groups, size=8e9):
  shapes = (('s8', (int(size),)),)
  return hlo.Transfer(kind, shapes, np.array(groups), 1, 0, '')


def test_time_on_links_is_by_hand():
  one, two = fake('h100', 1), fake('h100', 2)
  near, far = [[*range(8)]], [[*range(16)]]
  assert one.seconds(transfer('all-gather', near)) == 7e9 / 450e9
  assert one.seconds(transfer('all-reduce', near)) == 14e9 / 450e9
  assert one.seconds(transfer('reduce-scatter', near)) == 56e9 / 450e9
  assert two.seconds(transfer('all-gather', near)) == 7e9 / 450e9
  # Half of it comes from the other host, an eighth of that by each card.
  assert two.seconds(transfer('all-gather', far)) == max(
    7.5e9 / 450e9, 0.5e9 / 50e9
  )
  pairs = [[i, i + 8] for i in range(8)]
  assert two.seconds(transfer('all-reduce', pairs)) == 8e9 / 50e9
  assert two.seconds(transfer('all-to-all', far)) == 4e9 / 50e9
  pod = fake('v5p', 2)
  assert pod.seconds(transfer('all-gather', far)) == 7.5e9 / 600e9


def test_a_plan_bounds_its_step():
  made = plan.Plan(
    rows=1,
    tokens=100,
    devices=8,
    parameters={},
    bytes={'student': 1},
    flops={'all': 8 * 989e12},
    compiled=None,
    transfers=[transfer('all-gather', [[*range(8)]])],
    reads=3.35e12 / 2,
  )
  assert made.sent() == {'all-gather': 7e9}
  assert made.seconds(fake('h100', 1)) == {
    'arithmetic': 1.0,
    'memory': 0.5,
    'links': 7e9 / 450e9,
  }


def test_no_room_on_a_target_is_one_line():
  class Lowered:
    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used '
        '20.49G of 15.75G hbm. Exceeded hbm capacity by 4.74G.'
      )

  with pytest.raises(UserError, match=r'fit into a device: 20.49G of 15.75G'):
    plan.compile_for(Lowered(), fake('v5e', 1), {})


def test_all_compares_targets_and_goes_on_past_one(monkeypatch, capsys):
  def planned(config, target):
    if target.name == 'a100:8':
      raise UserError('config.mesh: no')
    made = types.SimpleNamespace(
      peak=90e9,
      tokens=1000,
      sent=lambda: {'all-gather': 3e9},
      seconds=lambda _: {'arithmetic': 0.5, 'memory': 0.1, 'links': 0.25},
    )
    return config, None, made

  monkeypatch.setattr(planning, '_planned', planned)
  monkeypatch.setattr(
    targets,
    'of',
    lambda name: targets.Target(
      name, targets.KINDS[name.partition(':')[0]], (), {}
    ),
  )
  c = rkl_0p6b.get_config()
  c.train.steps = 10
  planning.run(c, target='all')
  text = capsys.readouterr().out
  rows = [line for line in text.splitlines() if line.startswith('| ')][1:]
  assert [row.split()[1] for row in rows] == list(targets.ALL)
  row = {name: r for name, r in zip(targets.ALL, rows, strict=True)}
  assert 'config.mesh: no' in row['a100:8']
  assert 'does not fit' in row['h100:8']
  assert 'does not fit' not in row['v5p:2x2x2']
  assert '2,000' in row['v5p:2x2x2']
