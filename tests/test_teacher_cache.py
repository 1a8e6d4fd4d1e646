"""A teacher's hidden states on disk stand in for the teacher."""

import json

import jax
import numpy as np
import pytest

from configs import base
from gakd_jax import (
  UserError,
  answering,
  build,
  check,
  log,
  models,
  plan,
  rollout,
  sharding,
  teacher_cache,
  train,
)
from gakd_jax.data import kept, sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import decoding
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
  c.teacher.cache = 'hidden'
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
  make = teacher_cache._said

  def counted(config, ask, texts, some, *rest):
    found.append(len(some))
    return make(config, ask, texts, some, *rest)

  monkeypatch.setattr(teacher_cache, '_said', counted)
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
    pytest.param(
      {'name': 'kld', 'divergence': 'reverse_kl'},
      False,
      marks=pytest.mark.slow,
    ),
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
  config.teacher.cache = 'none'
  want = _losses(config, tmp_path / 'live')
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('packing', 'divergence', 'temperature'),
  [
    (False, 'reverse_kl', 1.0),
    (True, 'jsd', 2.0),
    (True, 'forward_kl', 0.7),
  ],
)
def test_of_all_ids_but_one_losses_are_those_of_the_live_teacher(
  config, tmp_path, packing, divergence, temperature
):
  config.objective = {
    'name': 'kld',
    'divergence': divergence,
    'temperature': temperature,
  }
  config.data.packing = packing
  config.train.batch_size = 2 if packing else 8
  config.teacher.cache = 'none'
  want = _losses(config, tmp_path / 'live')
  config.teacher.cache = 'top_k'
  tokenizer = tokenizer_lib.load(config.teacher.path)
  config.teacher.cache_size = tokenizer_lib.size(tokenizer) - 1
  got = _losses(config, tmp_path / 'all')
  # Of fp16 log-probabilities; the cross-entropy is exact.
  np.testing.assert_allclose(got, want, rtol=2e-3)
  config.teacher.cache_size = 2
  few = _losses(config, tmp_path / 'few')
  # Outcomes that are taken together are less far apart.
  assert few[0] < want[0] - 1e-3


@pytest.mark.slow
def test_draws_give_the_forward_kl_about(config, tmp_path):
  config.objective = {'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0}
  config.teacher.cache = 'none'
  want = _losses(config, tmp_path / 'live')
  config.teacher.cache = 'sampled'
  got = _losses(config, tmp_path / 'sampled')
  # Some hundred tokens' draws a step, of models that hardly differ.
  np.testing.assert_allclose(got, want, rtol=0.2)
  np.testing.assert_allclose(np.mean(got), np.mean(want), rtol=0.06)
  assert got != want


@pytest.mark.slow
def test_a_teacher_that_is_known_by_few_numbers_is_not_loaded(config, tmp_path):
  config.teacher.cache, config.teacher.cache_size = 'top_k', 4
  config.train.steps = 2
  first = _losses(config, tmp_path / 'first')
  run = _built(config, tmp_path)
  assert run.models.teacher_config is None
  assert 'teacher' not in run.models.frozen
  assert _losses(config, tmp_path / 'second') == first


@pytest.fixture
def answered(config, tmp_path):
  """A file of the teacher's answers, with 5 ids of each token."""
  tokenizer = tokenizer_lib.load(config.teacher.path)
  rows, _ = sources.load(config.data.train, need_response=False)
  answering.write(
    rollout.Teacher(max_new_tokens=10, batch_size=8),
    decoding.unstack(models.load(config.teacher.path)),
    tokenizer,
    rows,
    tmp_path / 'answers.jsonl',
    source={},
    template='chat',
    max_prompt_length=32,
    seed=0,
    keep_unfinished=True,
    logprobs=5,
  )
  config.data.train = str(tmp_path / 'answers.jsonl')
  config.teacher.cache_size = 5
  return config


@pytest.mark.slow
@pytest.mark.parametrize('packing', [False, True])
def test_a_file_with_log_probabilities_is_a_teacher(
  answered, tmp_path, packing
):
  """Without its weights losses are those with the 5 ids that it says."""
  c = answered
  c.data.packing = packing
  c.train.batch_size = 2 if packing else 8
  c.teacher.cache = 'top_k'
  want = _losses(c, tmp_path / 'weights')
  c.teacher.cache, c.teacher.path = 'data', None
  c.objective.kd = 0.5
  got = _losses(c, tmp_path / 'file')
  assert len(got) == 9
  # Of other batches' shapes, in fp16.
  np.testing.assert_allclose(got, want, rtol=2e-3)


@pytest.mark.slow
def test_rows_without_log_probabilities_are_learned_by_their_text(
  answered, tmp_path
):
  """Kept of one row alone, the others' loss is cross-entropy."""
  c = answered
  path = tmp_path / 'answers.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines[1:]:
    del line['logprobs']
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  c.objective.kd, c.train.steps = 1.0, 2
  c.teacher.cache, c.teacher.path = 'data', None
  train.run(c, tmp_path / 'file')
  rows = log.read_metrics(tmp_path / 'file')
  rows = [row for row in rows if 'train/loss' in row]
  share = [row['train/loss'] / row['train/ce'] for row in rows]
  same = [x == pytest.approx(1, rel=1e-6) for x in share]
  assert sorted(same) == [False, True]  # One step has that row.
  del lines[0]['logprobs']
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with pytest.raises(UserError, match=r'none has any.*--logprobs'):
    train.run(c, tmp_path / 'none')


def test_methods_that_cannot_use_them_refuse(answered, tmp_path):
  c = answered
  c.teacher.cache = 'data'
  c.objective.temperature = 2.0
  with pytest.raises(UserError, match='those at temperature 1'):
    train.run(c, tmp_path / 'warm')
  c.objective = {'name': 'gakd', 'warmup_steps': 1}
  with pytest.raises(UserError, match=r"asks more of a teacher .*'hidden'"):
    train.run(c, tmp_path / 'gakd')
  c.objective = {'name': 'kld'}
  c.rollout = {'writer': 'teacher'}
  with pytest.raises(UserError, match='answers has no log-probabilities'):
    train.run(c, tmp_path / 'written')


def test_what_was_drawn_comes_back_by_position():
  rng = np.random.default_rng(0)
  ids = np.sort(rng.integers(0, 9, (7, 5)), axis=1).astype(np.int32)
  log_probs = -ids.astype(np.float16)
  shard = kept.ragged(ids, log_probs)
  assert len(shard['ids']) == sum(len(set(row)) for row in ids)
  found = kept.Kept([shard], np.array([3, 0, 4]), 3, draws=5)
  for i, some in enumerate((ids[:3], ids[:0], ids[3:])):
    assert found[i]['share'].shape == some.shape
    for row, ids_K, p_K, share_K in zip(
      some, *(found[i][k] for k in ('ids', 'log_probs', 'share')), strict=True
    ):
      there = share_K > 0
      want, counts = np.unique(row, return_counts=True)
      np.testing.assert_array_equal(ids_K[there], want)
      np.testing.assert_array_equal(p_K[there], -want)
      np.testing.assert_allclose(share_K[there], counts / 5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['top_k', 'sampled'])
def test_what_is_known_depends_on_temperature_and_size(
  config, tmp_path, forwards, name
):
  config.objective = {'name': 'kld', 'divergence': 'forward_kl'}
  config.teacher.cache = name
  for change in ({}, {'cache_size': 8}, {'temperature': 2.0}):
    config.teacher.cache_size = change.get('cache_size', 4)
    config.objective.temperature = change.get('temperature', 1.0)
    train.run(config, tmp_path / str(change))
    assert forwards == [8, 8, 8, 6]
    del forwards[:]


@pytest.mark.slow
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
  'change',
  ['teacher', 'quantize', 'precision', 'template', 'a row', 'max_length'],
)
def test_of_anything_else_it_is_made_anew(
  config, tmp_path, forwards, change, tiny_model_dir
):
  _losses(config, tmp_path / 'first')
  del forwards[:]
  if change == 'teacher':
    config.teacher.path = str(tiny_model_dir(seed=2, width=48))
  elif change == 'quantize':
    config.teacher.quantize = 'int8'
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
  made, make = [], teacher_cache._said

  def killed(config, ask, texts, some, *rest):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append(len(some))
    return make(config, ask, texts, some, *rest)

  monkeypatch.setattr(teacher_cache, '_said', killed)
  with pytest.raises(KeyboardInterrupt):
    train.run(config, tmp_path / 'run')
  assert made == [8, 8]
  monkeypatch.setattr(
    teacher_cache, '_said', lambda *x: made.append(len(x[3])) or make(*x)
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
    ({'objective': {'name': 'mcw'}}, "'mcw' reads the prompts as well"),
    (
      {'objective': {'name': 'gakd', 'reference': True}, 'data.packing': False},
      "'gakd' reads the prompts as well",
    ),
    (
      {'objective': {'name': 'dskd_cma', 'reference': True}},
      "'dskd_cma' reads the prompts as well",
    ),
    (
      {'objective': {'name': 'gakd'}, 'teacher.cache': 'top_k'},
      "cache='top_k': config.objective asks more.*; take 'hidden'$",
    ),
    (
      {'teacher.cache': 'sampled'},
      "cache='sampled': config.objective asks more.*take 'hidden' or 'top_k'",
    ),
    (
      {'teacher.cache': 'top_k', 'teacher.cache_size': 60_000},
      'cache_size=60000: the teacher has only',
    ),
  ],
)
def test_where_it_cannot_stand_in_it_is_refused(
  config, tmp_path, settings, said
):
  config.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=said):
    _built(config, tmp_path)


@pytest.mark.slow
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
@pytest.mark.parametrize(
  ('kind', 'bytes_each'),
  [('top_k', 4 * 6 + 2), ('data', 4 * 6 + 3), ('sampled', 4 * 10)],
)
def test_a_plan_knows_a_teacher_that_is_not_there(config, kind, bytes_each):
  config.objective = {'name': 'kld', 'divergence': 'forward_kl'}
  mesh = sharding.make_mesh(**config.mesh)
  config.teacher.cache = 'none'
  live = plan.make(config, mesh)
  config.teacher.cache, config.teacher.cache_size = kind, 4
  known = plan.make(config, mesh)
  gone = {'teacher forward', 'teacher head'}
  assert live.flops.keys() - known.flops.keys() == gone
  assert 'teacher' not in known.parameters
  more = known.bytes['batch'] - live.bytes['batch']
  assert more == bytes_each * 8 * 64


@pytest.mark.slow
def test_a_plan_knows_what_is_not_run(config):
  mesh = sharding.make_mesh(**config.mesh)
  cached = plan.make(config, mesh)
  config.teacher.cache = 'none'
  live = plan.make(config, mesh)
  assert live.flops.keys() - cached.flops.keys() == {'teacher forward'}
  # Both keep the vocabulary head; 4 bytes of each of its blocks' numbers.
  blocks = live.parameters['teacher'] - cached.parameters['teacher']
  width, rows = 48, 8 * 64
  assert live.bytes['teacher'] - cached.bytes['teacher'] == 4 * blocks
  more = cached.bytes['batch'] - live.bytes['batch']
  assert more == 4 * rows * width
  # Evaluations that read it have it whole.
  config.teacher.cache = 'hidden'
  config.data.validation = config.data.train
  config.evals = {'loss': {}}
  assert plan.make(config, mesh).bytes['teacher'] == live.bytes['teacher']
