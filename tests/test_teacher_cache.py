"""A teacher's hidden states on disk stand in for the teacher."""

import json

import jax
import numpy as np
import pytest

from configs import base
from gakd_jax import (
  UserError,
  build,
  check,
  log,
  plan,
  sharding,
  teacher_cache,
  train,
)
from tools import cache_teacher

ROWS = [
  {'instruction': f'Say {i}.', 'output': ' '.join(['word'] * (1 + i % 7))}
  for i in range(30)
]


@pytest.fixture
def config(tiny_model_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(teacher_cache, '_SHARD', 8)
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  c = base.get_config()
  c.student.path = str(tiny_model_dir(seed=0))
  c.teacher.path = str(tiny_model_dir(seed=1, width=48))
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.teacher.cache = True
  c.data.train = str(rows)
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 64, 32
  c.data.cache = str(tmp_path / 'cache')
  c.objective = {'name': 'kld', 'divergence': 'reverse_kl'}
  c.train.batch_size = 8
  c.train.steps, c.train.head_chunk = 9, 16
  c.mesh.data = 1
  c.evals, c.eval_every = {}, 0
  return c


@pytest.fixture
def forwards(monkeypatch):
  """Rows that a teacher has read to be kept, a list that grows."""
  found = []
  make = teacher_cache._hidden

  def counted(config, read, texts, *rest):
    found.append(len(texts))
    return make(config, read, texts, *rest)

  monkeypatch.setattr(teacher_cache, '_hidden', counted)
  return found


def _losses(config, workdir):
  train.run(config, workdir)
  rows = log.read_metrics(workdir)
  return [row['train/loss'] for row in rows if 'train/loss' in row]


def _built(config, tmp_path):
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    return build.build(config, tmp_path / 'run', mesh)


@pytest.mark.parametrize(
  ('objective', 'packing'),
  [
    ({'name': 'kld', 'divergence': 'reverse_kl'}, False),
    pytest.param({'name': 'kld'}, True, marks=pytest.mark.slow),
    pytest.param(
      {'name': 'gakd', 'kind': 'rgan', 'warmup_steps': 1},
      False,
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'name': 'dskd_cma', 'attention': False},
      True,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_losses_are_those_of_the_live_teacher(
  config, tmp_path, objective, packing, forwards
):
  config.objective, config.data.packing = objective, packing
  if packing:
    config.train.batch_size = 2
  got = _losses(config, tmp_path / 'cached')
  assert forwards == [8, 8, 8, 6]
  # More than an epoch, and the texts are read once.
  assert len(got) == 9
  config.teacher.cache = False
  want = _losses(config, tmp_path / 'live')
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_is_there_is_not_made_again(config, tmp_path, forwards):
  first = _losses(config, tmp_path / 'first')
  del forwards[:]
  run = _built(config, tmp_path)
  assert run.models.teacher_config.layers == 0
  assert not jax.tree.leaves(run.models.frozen['teacher']['blocks'])[0].size
  assert _losses(config, tmp_path / 'second') == first
  assert forwards == []


@pytest.mark.slow
@pytest.mark.parametrize(
  'change', ['teacher', 'precision', 'template', 'a row', 'max_length']
)
def test_of_anything_else_it_is_made_anew(
  config, tmp_path, forwards, change, tiny_model_dir
):
  _losses(config, tmp_path / 'first')
  del forwards[:]
  if change == 'teacher':
    config.teacher.path = str(tiny_model_dir(seed=2, width=48))
  elif change == 'precision':
    config.train.precision = 'bfloat16'
  elif change == 'template':
    config.data.template = 'alpaca'
    config.data.max_length, config.data.max_prompt_length = 256, 240
  elif change == 'max_length':
    config.data.max_length = 33
  else:
    rows = [*ROWS[:20], {'instruction': 'New.', 'output': 'x'}, *ROWS[21:]]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  train.run(config, tmp_path / 'second')
  # Of another row, its shard alone.
  assert forwards == ([8] if change == 'a row' else [8, 8, 8, 6])


def test_interrupted_it_goes_on(config, tmp_path, monkeypatch):
  made, make = [], teacher_cache._hidden

  def killed(config, read, texts, *rest):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append(len(texts))
    return make(config, read, texts, *rest)

  monkeypatch.setattr(teacher_cache, '_hidden', killed)
  with pytest.raises(KeyboardInterrupt):
    train.run(config, tmp_path / 'run')
  assert made == [8, 8]
  monkeypatch.setattr(
    teacher_cache, '_hidden', lambda *x: made.append(len(x[2])) or make(*x)
  )
  train.run(config, tmp_path / 'run')
  assert made == [8, 8, 8, 6]


@pytest.mark.slow
def test_what_is_damaged_is_made_again(config, tmp_path, forwards):
  want = _losses(config, tmp_path / 'first')
  del forwards[:]
  file = max((tmp_path / 'cache').glob('*/hidden.bin'), key=str)
  content = bytearray(file.read_bytes())
  content[100] ^= 1
  file.write_bytes(content)
  # Its blocks were left in their file: all seemed to be there.
  with pytest.raises(UserError, match='is damaged; start again'):
    train.run(config, tmp_path / 'second')
  assert _losses(config, tmp_path / 'second') == want
  assert len(forwards) == 1


@pytest.mark.slow
def test_evaluations_have_the_whole_teacher(config, tmp_path):
  config.data.validation = config.data.train
  config.evals = {'loss': {'batch_size': 8, 'limit': 8}}
  for name in ('first', 'second'):
    results = train.run(config, tmp_path / name)
    metrics = results['last']['evaluators']['loss']['metrics']
    assert metrics['reverse_kl']['mean'] > 0


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'objective': {'name': 'sft'}}, "'sft' asks nothing of a teacher"),
    (
      {'rollout': {'writer': 'student', 'max_new_tokens': 8}},
      'reads text that is new in every step',
    ),
    ({'objective': {'name': 'mcw'}}, "'mcw', for two tokenizers, may ask"),
  ],
)
def test_where_it_cannot_stand_in_it_is_refused(
  config, tmp_path, settings, said
):
  config.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=said):
    _built(config, tmp_path)


def test_the_tool_makes_it_and_a_look_does_not(config, tmp_path, forwards):
  check.run(config, tmp_path / 'run')
  assert forwards == []
  cache = cache_teacher.make(config)
  assert forwards == [8, 8, 8, 6]
  # Of each response its tokens, and the position that predicts the first.
  texts = _built(config, tmp_path).texts
  assert cache.lengths.sum() == texts.stats['response_tokens'] + len(ROWS)
  _losses(config, tmp_path / 'run')
  assert len(forwards) == 4


@pytest.mark.slow
def test_a_plan_knows_what_is_not_run(config):
  mesh = sharding.make_mesh(**config.mesh)
  cached = plan.make(config, mesh)
  config.teacher.cache = False
  live = plan.make(config, mesh)
  assert live.flops.keys() - cached.flops.keys() == {'teacher forward'}
  # Both keep the vocabulary head; 4 bytes of each of its blocks' numbers.
  blocks = live.parameters['teacher'] - cached.parameters['teacher']
  width, rows = 48, 8 * 64
  assert live.bytes['teacher'] - cached.bytes['teacher'] == 4 * blocks
  more = cached.bytes['batch'] - live.bytes['batch']
  assert more == 4 * rows * width
  # Evaluations that read it have it whole.
  config.teacher.cache = True
  config.data.validation = config.data.train
  config.evals = {'loss': {}}
  assert plan.make(config, mesh).bytes['teacher'] == live.bytes['teacher']
