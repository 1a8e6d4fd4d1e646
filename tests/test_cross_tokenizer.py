"""Training with a teacher whose tokenizer is another, from files to best/."""

import json

import jax
import numpy as np
import pytest

from configs import base, cross
from gakd_jax import (
  UserError,
  answering,
  check,
  inputs,
  log,
  models,
  rereading,
  rundir,
  train,
)
from gakd_jax.data import tokenizer as tokenizer_lib
from tests.shrink import shrink

ROWS = [
  {
    'instruction': f'Say the {word}.',
    'input': '',
    'output': f'the other {word}',
  }
  for word in ('sea', 'sun', 'bread', 'north', 'shore', 'tide', 'hour', 'other')
] * 2
METHODS = (
  'uld',
  'overlap',
  'mined',
  'dskd_cma',
  'gold',
  'alm',
  'multilevel_ot',
  'mcw',
  'dskd_v2',
  'xtoken',
)


@pytest.fixture(scope='module')
def models_of(tiny_model_dir, pieces_tokenizer_dir):
  student = tiny_model_dir()
  teacher = tiny_model_dir(
    seed=1, tokenizer_dir=pieces_tokenizer_dir, vocab_size=288, width=48
  )
  return str(student), str(teacher)


@pytest.fixture
def config(models_of, tmp_path, monkeypatch):
  data = tmp_path / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  c = base.get_config()
  c.student.path, c.teacher.path = models_of
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.data.train = c.data.validation = str(data)
  c.data.template = 'raw'
  c.data.max_length, c.data.max_prompt_length = 64, 32
  c.data.buckets = (64,)
  c.train.steps, c.train.batch_size = 2, 8
  c.mesh.data = 1
  c.report.trackers = ()
  return c


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != 'overlap'))
    for name in METHODS
  ],
)
def test_a_student_learns_from_another_tokenizer(
  name, config, tmp_path, capsys
):
  config.objective = {'name': name}
  config.optimizer.learning_rate = 1e-3
  results = train.run(config, tmp_path / 'run')
  steps = [
    row for row in log.read_metrics(tmp_path / 'run') if 'train/loss' in row
  ]
  assert [row['step'] for row in steps] == [1, 2]
  assert all(row['train/grad_norm'] > 0 for row in steps)
  # What would read the student's ids is not there.
  assert results['best']['evaluators']['loss']['metrics'].keys() == {
    'ce',
    'ece',
  }
  said = capsys.readouterr().out
  if name in ('overlap', 'mined', 'gold', 'alm'):
    assert '% of response tokens have a partner' in said
  assert rundir.is_finished(tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted({*METHODS} - {'mcw'}))
def test_hidden_states_on_disk_are_as_good_as_their_teacher(
  name, config, tmp_path
):
  config.objective = {'name': name}
  config.data.packing = name not in ('multilevel_ot', 'uld')
  config.train.batch_size = 4
  config.data.cache = str(tmp_path / 'cache')
  config.optimizer.learning_rate = 1e-3
  config.eval_every, config.evals = 0, {}
  losses = {}
  # The last has none of the teacher's blocks.
  for kind, workdir in (('none', 'live'), ('hidden', 'a'), ('hidden', 'b')):
    config.teacher.cache = kind
    train.run(config, tmp_path / workdir)
    rows = log.read_metrics(tmp_path / workdir)
    losses[workdir] = [x['train/loss'] for x in rows if 'train/loss' in x]
  assert len(losses['live']) == 2
  np.testing.assert_allclose(losses['a'], losses['live'], rtol=1e-5)
  assert losses['b'] == losses['a']


@pytest.mark.slow
def test_sft_on_what_a_teacher_of_another_tokenizer_writes(
  config, models_of, tmp_path, monkeypatch
):
  """The teacher writes as it reads; then nobody but the student reads."""

  def write(writer, model, tokenizer, rows, path, *, template, **_):
    assert template == 'gakd'
    assert tokenizer.name_or_path == models_of[1]
    path.write_text(''.join(json.dumps(row) + '\n' for row in ROWS[:8]))

  monkeypatch.setattr(answering, 'write', write)
  config.objective = {'name': 'sft'}
  config.rollout = {'writer': 'teacher'}
  config.teacher.template = 'gakd'
  config.train.steps = 1
  results = train.run(config, tmp_path / 'run')
  metrics = results['best']['evaluators']['loss']['metrics']
  assert metrics.keys() == {'ce', 'ece'}


def test_what_needs_one_tokenizer_says_so(config, tmp_path):
  config.objective = {'name': 'kld'}
  with pytest.raises(UserError, match='have different tokenizers'):
    train.run(config, tmp_path / 'run')
  config.objective = {'name': 'overlap'}
  config.rollout.writer = 'speculative'
  config.rollout.max_new_tokens = 8
  with pytest.raises(UserError, match="writer 'speculative' needs one"):
    train.run(config, tmp_path / 'other')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gold', 'mcw', 'uld'])
def test_the_student_writes_and_its_teacher_reads(name, config, tmp_path):
  config.objective = {'name': name}
  config.rollout = {
    'writer': 'student',
    'share': 0.5,
    'max_new_tokens': 24,
    'every': 2,
  }
  config.data.buckets = None
  config.train.steps = 4
  train.run(config, tmp_path / 'run')
  steps = [
    row for row in log.read_metrics(tmp_path / 'run') if 'train/loss' in row
  ]
  assert [row['step'] for row in steps] == [1, 2, 3, 4]
  assert all(row['train/grad_norm'] > 0 for row in steps)
  if name == 'gold':
    assert all(0 < row['train/coverage/span_s'] <= 1 for row in steps)


@pytest.mark.slow
def test_the_best_critic_of_text_crosses_tokenizers(
  config, tmp_path, monkeypatch
):
  """D* is log p of the text, in the teacher's tokens, - log q, in its own."""
  config.objective = {'name': 'gad', 'oracle': True, 'warmup_steps': 0}
  config.rollout = {
    'writer': 'student',
    'samples': 2,
    'beside': True,
    'max_new_tokens': 3,
  }
  config.data.buckets = None
  config.train.batch_size = 8
  seen = []
  read = rereading.Reader.read

  def reads(*args):
    seen.append(read(*args))
    return seen[-1]

  monkeypatch.setattr(rereading.Reader, 'read', reads)
  train.run(config, tmp_path / 'run')
  rows = log.read_metrics(tmp_path / 'run')
  rewards = [x['train/reward'] for x in rows if 'train/reward' in x]
  assert len(rewards) == len(seen) == 2
  # The first step's, by hand: each row alone, without padding.
  batch = jax.tree.map(np.asarray, seen[0][0])
  paths = config.student.path, config.teacher.path
  student, teacher = map(models.load, paths)
  s_tokenizer, t_tokenizer = map(tokenizer_lib.load, paths)
  rewards_of = []
  for b in np.flatnonzero(batch.written_B):
    mine, theirs = (
      (x.ids_BT[b][x.segments_BT[b] > 0], x.mask_BT[b].sum())
      for x in (batch.student, batch.teacher)
    )
    text = s_tokenizer.decode(mine[0][-mine[1] :]).removesuffix('<|im_end|>')
    again = t_tokenizer.decode(theirs[0][-theirs[1] :]).removesuffix('</s>')
    is_read = text == again  # No bytes that are no text, nor special tokens.
    rewards_of.append(
      log_prob(teacher, t_tokenizer, *theirs)
      - log_prob(student, s_tokenizer, *mine)
      if is_read
      else np.inf
    )
  reward_Bm = np.reshape(rewards_of, (-1, 2))
  unread_Bm = np.isinf(reward_Bm)
  assert 0 < unread_Bm.mean() < 1
  least_B1 = reward_Bm.min(axis=1, keepdims=True)
  least_B1[np.isinf(least_B1)] = 0
  want = np.where(unread_Bm, least_B1, reward_Bm).mean()
  np.testing.assert_allclose(rewards[0], want, rtol=1e-4)
  first = next(x for x in rows if 'train/unread' in x)
  assert first['train/unread'] == unread_Bm.mean()


def log_prob(model, tokenizer, ids, response):
  """Of the last so many tokens of a text."""
  logits_TV = model.logits(ids[None])[0, :, : tokenizer_lib.size(tokenizer)]
  log_TV = np.array(jax.nn.log_softmax(logits_TV))
  at = np.arange(len(ids))[-response:]
  return log_TV[at - 1, ids[at]].sum()


def test_one_tokenizer_with_two_templates_is_all_pairs(
  config, tmp_path, capsys
):
  config.teacher.path = config.student.path
  config.teacher.template = 'alpaca'
  config.objective = {'name': 'overlap'}
  config.data.max_length, config.data.max_prompt_length = 1024, 512
  config.data.buckets = (1024,)
  check.run(config, tmp_path / 'run')
  said = capsys.readouterr().out
  assert 'pairs_t: 100.0% of response tokens have a partner' in said
  assert 'data: 16 rows' in said
  config.teacher.template = 'raw'  # One text: nothing is related.
  check.run(config, tmp_path / 'run')
  assert 'partner' not in capsys.readouterr().out


def test_too_little_in_common_is_refused(config, tmp_path, monkeypatch):
  config.objective = {'name': 'overlap'}
  monkeypatch.setattr(inputs, '_LEAST_COVERAGE', 0.9)
  with pytest.raises(UserError, match=r"pairs_t: only .* reads 'the other sea"):
    check.run(config, tmp_path / 'run')


@pytest.mark.slow
def test_a_pair_from_two_models_to_a_table(
  tiny_model_dir, shared_dir, tmp_path
):
  """GPT-2's tokenizer from Qwen's, on real rows: `configs/cross.py`, small."""
  student, teacher = (
    str(
      tiny_model_dir(
        tokenizer_dir=shared_dir / 'tokenizers' / name, vocab_size=n, width=16
      )
    )
    for name, n in (('gpt2', 50_257), ('qwen3', 151_936))
  )
  data = tmp_path / 'rows.jsonl'
  lines = (shared_dir / 'data/dolly/test.jsonl').read_text().splitlines()
  data.write_text('\n'.join(lines[:24]) + '\n')
  config = cross.get_config('gpt2_qwen1p5,overlap')
  config = shrink(config, model=student, data=str(data))
  stages = dict(config.stages)
  stages['teacher'].student.path = teacher
  for stage in stages.values():
    stage.data.max_length, stage.data.max_prompt_length = 256, 160
  config.stages = tuple(stages.items())
  train.run_stages(config, tmp_path / 'run')
  found = rundir.read_results(tmp_path / 'run' / 'test_overlap')
  assert found['best']['evaluators']['generation']['rows'] == 4
  page = (tmp_path / 'run' / 'report.html').read_text()
  assert 'test_overlap' in page
