"""A student that a critic of its texts rewards, from files to best/."""

import json

import pytest

from configs import base
from gakd_jax import Interrupted, UserError, log, rundir, train
from gakd_jax.data import tokenizer as tokenizer_lib
from tests import ending

ROWS = [
  {'instruction': f'Say {word}.', 'input': '', 'output': word}
  for word in ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
]
STUDENT = {'writer': 'student', 'samples': 2, 'beside': True}


@pytest.fixture
def config(tiny_model_dir, tmp_path):
  data = tmp_path / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  c = base.get_config()
  c.student.path = str(tiny_model_dir(seed=0))
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.data.train = str(data)
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 48, 32
  c.rollout = STUDENT | {'max_new_tokens': 8}
  c.objective = {'name': 'gad', 'warmup_steps': 1}
  c.critic.update(width=8, layers=1, heads=2, ff_width=16)
  c.train.batch_size, c.train.steps, c.train.head_chunk = 4, 3, 16
  c.mesh.data = 1
  c.evals, c.eval_every = {}, 0
  c.report.trackers = ()
  return c


def losses(config, workdir):
  train.run(config, workdir)
  rows = log.read_metrics(workdir)
  return [row for row in rows if 'train/loss' in row]


@pytest.mark.slow
def test_without_a_teacher_text_is_enough(config, tmp_path):
  rows = losses(config, tmp_path / 'run')
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert all(row['train/generator'] != 0 for row in rows)
  assert all(row['train/critic/loss'] > 0 for row in rows)
  assert rows[0]['train/rollout/written'] == pytest.approx(2 / 3)
  assert rundir.is_finished(tmp_path / 'run')


@pytest.mark.slow
def test_a_critic_that_says_nothing_changes_nothing(config, tmp_path):
  """In the warm-up it is not heard, g=0 has none, and SFT is what is left."""
  config.optimizer.learning_rate = 1e-2
  config.train.steps, config.objective.warmup_steps = 5, 4
  config.data.buckets = (40,)
  runs = {'warm': losses(config, tmp_path / 'warm')}
  config.objective.g = 0.0
  runs['g=0'] = losses(config, tmp_path / 'without')
  config.objective, config.rollout = {'name': 'sft'}, {'writer': 'dataset'}
  config.data.buckets = (48,)
  runs['sft'] = losses(config, tmp_path / 'sft')
  for name in ('train/loss', 'train/ce', 'train/grad_norm'):
    warm, without, sft = ([x[name] for x in rows] for rows in runs.values())
    # Other programs round otherwise.
    assert warm[:4] == pytest.approx(without[:4], rel=1e-5), name
    assert sft == pytest.approx(without, rel=1e-5), name
  assert 'train/critic/loss' not in runs['g=0'][0]


@pytest.mark.slow
def test_text_that_serves_two_steps_is_old_in_the_second(config, tmp_path):
  """The writer's log-probabilities are the step's own, one step long."""
  config.optimizer.learning_rate = 3e-2
  config.train.steps, config.objective.warmup_steps = 4, 0
  config.rollout.every = 2
  rows = losses(config, tmp_path / 'run')
  clipped = [row['train/clipped'] for row in rows]
  assert clipped[0] == clipped[2] == 0
  assert clipped[1] > 0
  # r is 1: what is left is the mean of advantages, weighted by lengths.
  config.rollout.every = 1
  alone = losses(config, tmp_path / 'alone')
  assert rows[0]['train/generator'] == pytest.approx(
    alone[0]['train/generator'], abs=1e-5
  )


@pytest.mark.slow
def test_text_that_was_written_ahead_is_saved_as_it_was_scored(
  config, tmp_path, monkeypatch
):
  config.train.steps, config.objective.warmup_steps = 4, 0
  config.rollout.every, config.checkpoint.every = 3, 0
  want = losses(config, tmp_path / 'whole')

  with (
    ending.at(2, ending.stop, monkeypatch),
    pytest.raises(Interrupted, match='step 2 of 4'),
  ):
    train.run(config, tmp_path / 'run')
  got = losses(config, tmp_path / 'run')
  for name in ('train/loss', 'train/generator', 'train/clipped'):
    assert [x[name] for x in got] == [x[name] for x in want], name


@pytest.mark.slow
def test_microbatches_keep_groups_whole(config, tmp_path):
  want = losses(config, tmp_path / 'whole')
  config.train.microbatch_size = 2
  got = losses(config, tmp_path / 'parts')
  for name in ('train/loss', 'train/generator', 'train/critic/loss'):
    assert [x[name] for x in got] == pytest.approx(
      [x[name] for x in want], rel=1e-4, abs=1e-6
    ), name


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['hidden', 'top_k'])
def test_what_is_kept_of_a_teacher_serves_the_rows_of_the_data(
  config, tmp_path, tiny_model_dir, kind
):
  config.teacher.path = str(tiny_model_dir(seed=1, width=48))
  config.data.cache = str(tmp_path / 'cache')
  config.objective.kd = 0.5
  want = losses(config, tmp_path / 'live')
  size = tokenizer_lib.size(tokenizer_lib.load(config.teacher.path))
  config.teacher.cache, config.teacher.cache_size = kind, size - 1
  got = losses(config, tmp_path / 'kept')
  for name in ('train/loss', 'train/reverse_kl'):
    assert [x[name] for x in got] == pytest.approx(
      [x[name] for x in want], rel=1e-5 if kind == 'hidden' else 1e-2
    ), name
  config.objective.oracle = True
  with pytest.raises(UserError, match='text that is new in every step'):
    train.run(config, tmp_path / 'oracle')


@pytest.mark.parametrize(
  ('rollout', 'said'),
  [
    ({'writer': 'dataset'}, "set config.rollout to {'writer': 'student'"),
    (STUDENT | {'samples': 1}, 'compares several answers'),
    (STUDENT | {'end': 0.5}, r'rollout\.end=0\.5: gad learns from whole'),
    (STUDENT | {'temperature': 0.7}, 'drawn from all of the student'),
    (STUDENT | {'top_p': 0.9}, 'drawn from all of the student'),
    (STUDENT | {'top_k': 20}, 'drawn from all of the student'),
    (STUDENT | {'share': 0.5}, r'rollout\.share=0\.5: gad learns'),
    (STUDENT | {'prefix': 3}, r'rollout\.prefix=3: gad learns'),
  ],
)
def test_what_it_cannot_learn_from_is_refused(config, tmp_path, rollout, said):
  config.rollout = rollout
  with pytest.raises(UserError, match=said):
    train.run(config, tmp_path / 'run')


@pytest.mark.parametrize('credit', ['mean', 'token'])
def test_a_critic_has_no_credit_for_tokens(config, tmp_path, credit):
  config.objective.credit = credit
  with pytest.raises(UserError, match='a critic scores whole answers'):
    train.run(config, tmp_path / 'run')
