"""Whole runs: trained, stopped, continued, exported, compared."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from configs import base
from gakd_jax import (
  Interrupted,
  UserError,
  checkpoint,
  fingerprint,
  models,
  report,
  rundir,
  train,
)
from tools import make_goldens

ROWS = [
  {'instruction': f'Repeat {word}.', 'input': '', 'output': [word, word + '!']}
  for word in ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
] * 3


@pytest.fixture(scope='module')
def data_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  return str(path)


@pytest.fixture(scope='module')
def pair(tiny_model_dir):
  return str(tiny_model_dir(seed=0)), str(tiny_model_dir(seed=1, width=48))


@pytest.fixture
def config(pair, data_file):
  c = base.get_config()
  c.student.path, c.teacher.path = pair
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.data.train = c.data.validation = data_file
  c.data.template = 'chat'
  c.data.max_length = 48
  c.data.max_prompt_length = 32
  c.data.buckets = (48,)
  c.objective = {'name': 'kld', 'divergence': 'reverse_kl'}
  c.optimizer.learning_rate = 3e-3
  c.train.batch_size = 8
  c.train.steps = 6
  c.train.head_chunk = 16
  c.mesh.data = 1
  c.evals = {
    'loss': {'batch_size': 8, 'limit': 8},
    'generation': {
      'limit': 4,
      'batch_size': 4,
      'max_new_tokens': 4,
      'seeds': (1, 2),
    },
  }
  c.eval_every = 3
  c.checkpoint.every = 2
  c.checkpoint.best_metric = 'loss/reverse_kl'
  return c


def losses(workdir):
  return {
    row['step']: row['train/loss']
    for row in report.read_metrics(workdir)
    if 'train/loss' in row
  }


def weights(workdir):
  return safetensors.numpy.load_file(workdir / 'best' / 'model.safetensors')


@pytest.fixture(scope='module')
def whole_run(pair, data_file, tmp_path_factory):
  """A run that nothing interrupts, and its results."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  c = config.__wrapped__(pair, data_file)
  return workdir, train.run(c, workdir)


def test_a_run_learns_and_leaves_everything(whole_run):
  workdir, results = whole_run
  rows = report.read_metrics(workdir)
  loss = losses(workdir)
  assert sorted(loss) == [1, 2, 3, 4, 5, 6]
  assert loss[6] < loss[1] - 0.1
  kl = {r['step']: r['loss/reverse_kl'] for r in rows if 'loss/reverse_kl' in r}
  assert sorted(kl) == [3, 6]
  assert results['loss/reverse_kl'] == kl[6]
  assert 0 <= results['loss/agreement'] <= 1
  assert 0 <= results['generation/rouge_l_0-10'] <= 100
  assert 0 <= results['generation/rouge_l'] <= 100
  for name in (
    'config.json',
    'results.json',
    'report.html',
    'best/config.json',
    'best/tokenizer.json',
    'answers/generation-1.jsonl',
    'tensorboard',
  ):
    assert (workdir / name).exists(), name
  recorded = json.loads((workdir / 'config.json').read_text())
  assert recorded['config']['train']['batch_size'] == 8
  assert 'jax' in recorded['versions']


def test_a_finished_run_is_left_alone(whole_run, config):
  workdir, results = whole_run
  before = (workdir / 'metrics.jsonl').read_bytes()
  report_page = (workdir / 'report.html').read_bytes()
  (workdir / 'report.html').unlink()  # Stopped before it was written.
  assert train.run(config, workdir) == results
  assert (workdir / 'metrics.jsonl').read_bytes() == before
  assert (workdir / 'report.html').read_bytes() == report_page


@pytest.mark.parametrize(
  'stop_at', [3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_continues_bit_for_bit(
  whole_run, config, tmp_path, monkeypatch, stop_at
):
  workdir = tmp_path / 'run'

  class Log(train._Log):
    def step(self, now, metrics, tokens):
      super().step(now, metrics, tokens)
      if now == stop_at:
        os.kill(os.getpid(), signal.SIGINT)

  with monkeypatch.context() as patch:
    patch.setattr(train, '_Log', Log)
    with pytest.raises(Interrupted, match=f'step {stop_at} of 6'):
      train.run(config, workdir)
  assert sorted(losses(workdir)) == list(range(1, stop_at + 1))
  results = train.run(config, workdir)
  assert losses(workdir) == losses(whole_run[0])
  results.pop('peak_memory_gb')
  assert results.items() <= whole_run[1].items()
  ours, theirs = weights(workdir), weights(whole_run[0])
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_killed_run_repeats_the_steps_after_its_checkpoint(
  whole_run, config, tmp_path, monkeypatch
):
  class Killed(Exception):
    pass

  class Log(train._Log):
    def step(self, now, metrics, tokens):
      super().step(now, metrics, tokens)
      if now == 5:
        raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(train, '_Log', Log)
    with pytest.raises(Killed):
      train.run(config, tmp_path / 'run')
  loaded, load = [], models.load

  def recorded(path, *args, **settings):
    loaded.append(path)
    return load(path, *args, **settings)

  monkeypatch.setattr(models, 'load', recorded)
  train.run(config, tmp_path / 'run')
  assert losses(tmp_path / 'run') == losses(whole_run[0])
  # The student comes from the checkpoint alone.
  assert loaded == [config.teacher.path]


def test_what_is_saved_has_been_logged(config, tmp_path, monkeypatch):
  """Killed right then, a run would not log that step again."""
  logged = []

  def save(this, now, *_):
    logged.append((now, max(losses(tmp_path / 'run'))))

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save)
  config.eval_every = 0
  train.run(config, tmp_path / 'run')
  assert logged == [(2, 2), (4, 4), (6, 6)]


def test_another_config_is_refused(whole_run, config):
  config.optimizer.learning_rate = 1.0
  with pytest.raises(UserError, match=r'learning_rate was 0\.003 and'):
    train.run(config, whole_run[0])


@pytest.fixture
def unfinished(whole_run, tmp_path):
  """The whole run as it was before its results were written."""
  workdir = tmp_path / 'run'
  shutil.copytree(whole_run[0], workdir)
  (workdir / 'results.json').unlink()
  return workdir


def test_a_run_goes_on_with_other_means_and_says_so(unfinished, config, capsys):
  config.train.microbatch_size = 4
  config.data.cache = str(unfinished / 'cache')
  config.evals.loss.batch_size = 4
  train.run(config, unfinished)
  said = capsys.readouterr().out
  assert f'{unfinished}: train.microbatch_size was None and is 4\n' in said
  recorded = json.loads((unfinished / 'config.json').read_text())['config']
  assert recorded['train']['microbatch_size'] == 4


@pytest.mark.parametrize('what', ['data', 'student'])
def test_other_contents_are_refused_unless_forced(
  unfinished, config, data_file, what, capsys
):
  """Under the same name, rows or weights that are others."""
  if what == 'data':
    path, name = Path(data_file), 'config.data.train; config.evals.generation'
    changed = path.read_text().replace('Repeat two', 'Say two').encode()
  else:
    path = Path(config.student.path) / 'model.safetensors'
    name = 'config.student'
    changed = bytearray(path.read_bytes())
    changed[-3] ^= 64
  before = path.read_bytes()
  try:
    path.write_bytes(changed)
    with pytest.raises(UserError, match=f'than there are now: {name}') as e:
      train.run(config, unfinished)
    assert '--force' in str(e.value)
    train.run(config, unfinished, force=True)
    assert 'forced: other contents of config.' in capsys.readouterr().out
  finally:
    path.write_bytes(before)


def test_two_processes_do_not_share_a_directory(tmp_path, config):
  with (
    fingerprint.lock(tmp_path / 'run'),
    pytest.raises(UserError, match='another process works there'),
  ):
    train.run(config, tmp_path / 'run')


def test_best_is_the_best_and_not_the_last(config, tmp_path, monkeypatch):
  scores = iter([1.0, 5.0, 3.0])
  monkeypatch.setattr(
    train, '_evaluate', lambda this, params, now, _: {'loss/x': next(scores)}
  )
  exported = []
  monkeypatch.setattr(
    train, '_export', lambda this, params, *_: exported.append(True)
  )
  config.eval_every = 2
  config.checkpoint.best_metric = 'loss/x'
  train.run(config, tmp_path / 'run')
  assert len(exported) == 2


@pytest.mark.slow
def test_a_head_of_its_own_is_trained_whatever_config_json_says(
  config, pair, tmp_path
):
  student = tmp_path / 'student'
  shutil.copytree(pair[0], student)
  file = student / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  head = tensors['model.embed_tokens.weight'][::-1].copy()
  safetensors.numpy.save_file(tensors | {'lm_head.weight': head}, file)
  config.student.path = str(student)
  config.evals, config.checkpoint.best_metric = {}, None
  config.train.steps = 1
  train.run(config, tmp_path / 'run')
  best = models.load(tmp_path / 'run' / 'best')
  assert not best.config.tied_head
  assert (
    json.loads((tmp_path / 'run/best/config.json').read_text())[
      'tie_word_embeddings'
    ]
    is False
  )
  trained = weights(tmp_path / 'run')['lm_head.weight']
  assert 0 < np.abs(trained - head).max() < 0.01


@pytest.mark.parametrize(
  'fails_at', [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_export_that_fails_loses_nothing(
  config, tmp_path, monkeypatch, fails_at
):
  """It is made up for from the checkpoint, and only where it was due."""
  scores = {2: 5.0, 4: 7.0, 6: 1.0}
  fails, steps, exported = [fails_at], [], []

  def evaluate(this, params, now, names):
    steps.append(now)
    return {'loss/x': scores[now]}

  def export(this, params, *_):
    if steps[-1:] == fails:
      fails.clear()
      raise OSError('disk full')
    exported.append(np.asarray(params['final_norm']['scale']))

  monkeypatch.setattr(train, '_evaluate', evaluate)
  monkeypatch.setattr(train, '_export', export)
  config.eval_every = config.checkpoint.every = 2
  config.checkpoint.best_metric = 'loss/x'
  with pytest.raises(OSError, match='disk full'):
    train.run(config, tmp_path / 'run')
  train.run(config, tmp_path / 'run')
  assert steps == [2, 4, 6]
  assert len(exported) == 2
  train.run(config, tmp_path / 'whole')
  for ours, theirs in zip(exported[:2], exported[2:], strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_an_evaluator_may_have_a_cadence_of_its_own(
  config, tmp_path, monkeypatch
):
  """And best/ waits for the one that chooses it."""
  seen, exported = {}, []

  def evaluate(this, params, now, names):
    seen[now] = sorted(names)
    return {f'{name}/x': 1.0 for name in names}

  monkeypatch.setattr(train, '_evaluate', evaluate)
  monkeypatch.setattr(train, '_export', lambda *_: exported.append(True))
  config.eval_every = 2
  config.evals = {
    'loss': {},
    'late': {'kind': 'loss', 'every': 0},
    'rare': {'kind': 'loss', 'every': 3},
  }
  config.checkpoint.best_metric = 'rare/x'
  train.run(config, tmp_path / 'run')
  assert seen == {
    2: ['loss'],
    3: ['rare'],
    4: ['loss'],
    6: ['late', 'loss', 'rare'],
  }
  assert len(exported) == 1, 'at step 3; the last is no better'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('family', 'objective'),
  [('gpt2', {'name': 'kld'}), ('gemma2', {'name': 'gakd', 'warmup_steps': 1})],
)
def test_another_family_is_distilled(
  config, family, objective, tmp_path, tiny_tokenizer_dir
):
  """Into a student of one layer; a critic beside soft-capped logits."""
  case = make_goldens.CASES[family] | {'vocab_size': 304}
  path = make_goldens.write_directory(case, tmp_path / 'model')
  models.copy_companions(tiny_tokenizer_dir, path)
  config.student.path = config.teacher.path = str(path)
  config.student.shape = {'layers': 1}
  config.objective = objective
  config.critic.width, config.critic.layers, config.critic.ff_width = 16, 1, 16
  config.train.steps = 2
  config.evals = {
    name: dict(settings) | {'limit': 2, 'batch_size': 2}
    for name, settings in config.evals.items()
  }
  results = train.run(config, tmp_path / 'run')
  assert 0 < results['loss/reverse_kl'] < 10
  best = models.load(tmp_path / 'run' / 'best')
  assert best.config == dataclasses.replace(
    models.read_config(path), layers=1, windows=best.config.windows[:1]
  )


def test_more_positions_than_were_learned_are_refused(config, tmp_path):
  path = make_goldens.write_directory(
    make_goldens.CASES['gpt2'] | {'vocab_size': 304}, tmp_path / 'model'
  )
  models.copy_companions(models.tokenizer_dir(config.student.path), path)
  config.student.path = config.teacher.path = str(path)
  config.data.max_length, config.data.buckets = 65, None
  with pytest.raises(UserError, match='has learned only 64 positions'):
    train.run(config, tmp_path / 'run')


def test_stages_build_on_each_other(config, data_file, tmp_path, capsys):
  def stage(**settings):
    c = config.copy_and_resolve_references()
    c.evals = {'loss': {'batch_size': 8, 'limit': 8}}
    c.train.steps = 1
    c.checkpoint.best_metric = None
    with c.unlocked():
      c.update_from_flattened_dict(settings)
    return c

  teacher = stage(
    **{
      'student.path': config.teacher.path,
      'train.steps': 0,
      'rollout.writer': 'teacher',
      'rollout.max_new_tokens': 64,
      'data.max_length': 96,
    }
  )
  sft = stage()
  sft.objective = {'name': 'sft'}
  kd = stage(**{'student.path': 'stage:sft'})
  with kd.ignore_type():
    kd.data.train = (data_file, 'stage:teacher')
  config.stages = (('teacher', teacher), ('sft', sft), ('kd', kd))
  train.run_stages(config, tmp_path)
  page = (tmp_path / 'report.html').read_text()
  assert 'teacher' in page
  answers = (tmp_path / 'teacher' / 'answers.jsonl').read_text().splitlines()
  assert answers
  assert json.loads(answers[0]).keys() >= {'instruction', 'input', 'output'}
  printed = capsys.readouterr().out
  assert f'data: {len(ROWS) + len(answers)} rows' in printed
  assert rundir.read_results(tmp_path / 'teacher')['loss/reverse_kl'] == (
    pytest.approx(0, abs=1e-6)
  )
  # Stopped before its report was written, that of a stage or of all.
  pages = [tmp_path / 'kd' / 'report.html', tmp_path / 'report.html']
  for page in pages:
    page.unlink()
  train.run_stages(config, tmp_path)
  assert all(page.exists() for page in pages)


def test_a_stage_that_has_not_finished_is_named(config, tmp_path):
  config.student.path = 'stage:sft'
  with pytest.raises(UserError, match='stage:sft: stage sft has not finished'):
    train.run(config, tmp_path / 'kd', root=tmp_path)


@pytest.fixture(scope='module')
def real_run(shared_dir, tiny_model_dir, tmp_path_factory):
  """The recipe, Qwen3's tokenizer and vocabulary, Dolly; stopped, continued.

  Returns the run's directory and the second command's output.
  """
  real = {
    'vocab_size': 151936,
    'dtype': 'bfloat16',
    'tokenizer_dir': shared_dir / 'tokenizers' / 'qwen3',
  }
  student = tiny_model_dir(seed=0, **real)
  teacher = tiny_model_dir(seed=1, width=48, **real)
  data = shared_dir / 'data' / 'dolly'
  workdir = tmp_path_factory.mktemp('real') / 'run'
  settings = {
    'student.path': student,
    'teacher.path': teacher,
    'data.train': data / 'dev.jsonl',
    'data.validation': data / 'test.jsonl',
    'data.max_length': 128,
    'data.max_prompt_length': 64,
    'train.steps': 10,
    'train.batch_size': 4,
    'train.microbatch_size': 4,
    'train.precision': 'float32',
    'train.head_chunk': 128,
    'optimizer.learning_rate': 1e-2,
    'evals.loss.batch_size': 4,
    'evals.generation.batch_size': 2,
  }
  command = [sys.executable, '-m', 'gakd_jax.main', f'--workdir={workdir}']
  command += ['--config=tests/real_config.py']
  command += [f'--config.{key}={value}' for key, value in settings.items()]
  metrics = workdir / 'metrics.jsonl'
  with subprocess.Popen(
    command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
  ) as process:
    while process.poll() is None and (
      not metrics.exists() or metrics.read_text().count('\n') < 3
    ):
      time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
  assert process.returncode == 130, stderr
  assert 'stopped and saved at step' in stderr
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


@pytest.mark.slow
def test_real_input(real_run):
  workdir, stdout = real_run
  assert 'continuing from step' in stdout
  loss = losses(workdir)
  assert sorted(loss) == list(range(1, 11))
  assert loss[10] < loss[1] - 0.1


@pytest.mark.torch
def test_the_exported_student_loads_in_transformers(real_run):
  import torch
  import transformers

  path = real_run[0] / 'best'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  ids = tokenizer('What is it like to live on the moon?')['input_ids']
  with torch.no_grad():
    theirs = model(torch.tensor([ids])).logits.numpy()
  ours = models.load(path, dtype='float32').logits(np.array([ids]))
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_peak_of_memory_is_a_stages_own():
  if not Path('/proc/self/clear_refs').exists():
    pytest.skip('the system does not forget a peak')
  large = np.ones(10**8)  # 0.8 GB
  before = train._peak_memory_gb()
  del large
  assert train._peak_memory_gb() >= before
  train._forget_peak_memory()
  assert train._peak_memory_gb() < before - 0.5
