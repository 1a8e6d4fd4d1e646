"""Whole runs: trained, stopped, continued, exported, compared."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import base
from gakd_jax import (
  Interrupted,
  UserError,
  checkpoint,
  chosen,
  fingerprint,
  log,
  loop,
  models,
  rundir,
  train,
)
from gakd_jax.evals import answers, generation
from gakd_jax.page import tables
from tests import ending
from tests.written import value
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


METRIC = 'loss/reverse_kl'


def measured(**values):
  """`chosen.evaluate` that finds {set: value of its `ce`, by step or not}."""

  def evaluate(this, params, step, names, workdir):
    found = {
      name: {'metrics': {'ce': {'mean': x[step] if x else 0.0}}}
      for name, x in values.items()
      if name in names
    }
    return {'step': step, 'evaluators': found}

  return evaluate


def losses(workdir):
  return {
    row['step']: row['train/loss']
    for row in log.read_metrics(workdir)
    if 'train/loss' in row
  }


def weights(workdir):
  return safetensors.numpy.load_file(workdir / 'best' / 'model.safetensors')


# Of each compilation in `whole_run`, how many steps had been logged before.
COMPILED = []


@pytest.fixture(scope='module')
def whole_run(pair, data_file, tmp_path_factory):
  """A run that nothing interrupts, and its results."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  c = config.__wrapped__(pair, data_file)
  steps = 0

  class Log(loop._Log):
    def step(self, now, *found):
      nonlocal steps
      super().step(now, *found)
      steps = now

  def listen(event, *_, **__):
    if event.endswith('backend_compile_duration'):
      COMPILED.append(steps)

  jax.monitoring.register_event_duration_secs_listener(listen)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, '_Log', Log)
    results = train.run(c, workdir)
  jax.monitoring.unregister_event_duration_listener(listen)
  return workdir, results


def test_nothing_is_compiled_after_the_first_evaluation(whole_run):
  """Of six steps with evaluations at 3 and 6, checkpoints at 2, 4 and 6."""
  del whole_run
  assert 0 in COMPILED  # The step itself, for one.
  assert max(COMPILED) <= 3


def test_a_run_learns_and_leaves_everything(whole_run):
  workdir, results = whole_run
  rows = log.read_metrics(workdir)
  loss = losses(workdir)
  assert sorted(loss) == [1, 2, 3, 4, 5, 6]
  assert loss[6] < loss[1] - 0.1
  kl = {r['step']: r['loss/reverse_kl'] for r in rows if 'loss/reverse_kl' in r}
  assert sorted(kl) == [3, 6]
  assert results == rundir.read_results(workdir)
  assert (results['step'], results['seed']) == (6, 0)
  assert (results['template'], results['is_teacher']) == ('chat', False)
  best, last = results['best'], results['last']
  assert (best['step'], best['metric']) == (min(kl, key=kl.get), METRIC)
  assert best['value'] == kl[best['step']] == value(best, METRIC)
  assert last['step'] == 6
  assert value(last, METRIC) == kl[6]
  for found in (best, last):
    generation, loss = found['evaluators'].values()
    assert 0 <= loss['metrics']['agreement']['mean'] <= 1
    assert (generation['rows'], generation['dropped']) == (4, {})
    assert generation['task'] == 'instruct'
    rouge = generation['metrics']['rouge_l']
    assert rouge['by_seed'].keys() == {'1', '2'}
    assert {'mean', 'std'} <= rouge['by_length']['0-10'].keys()
  # Rows of one name are told from others.
  assert {len(x['data']) for x in best['evaluators'].values()} == {16}
  about = json.loads((workdir / 'best/gakd_jax.json').read_text())
  assert {k: about[k] for k in ('recipe', 'seed')} == {
    k: results[k] for k in ('recipe', 'seed')
  }
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
  # Of a model that is another by now it is no answer, of one that is gone
  # it is.
  model = Path(config.student.path)
  file = model / 'model.safetensors'
  weights = file.read_bytes()
  try:
    file.write_bytes(weights[:-3] + bytes([weights[-3] ^ 64]) + weights[-2:])
    with pytest.raises(UserError, match=r'config\.student was'):
      train.run(config, workdir)
  finally:
    file.write_bytes(weights)
  gone = model.rename(model.with_name('gone'))
  try:
    assert train.run(config, workdir) == results
  finally:
    gone.rename(model)


@pytest.mark.parametrize(
  'stop_at', [3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_continues_bit_for_bit(
  whole_run, config, tmp_path, monkeypatch, stop_at
):
  workdir = tmp_path / 'run'

  with (
    ending.at(stop_at, ending.stop, monkeypatch),
    pytest.raises(Interrupted, match=f'step {stop_at} of 6'),
  ):
    train.run(config, workdir)
  assert sorted(losses(workdir)) == list(range(1, stop_at + 1))
  same_run(workdir, train.run(config, workdir), whole_run)
  for file in ('generation-1', 'generation-2'):
    ours, theirs = (
      (path / 'answers' / f'{file}.jsonl').read_text()
      for path in (workdir, whole_run[0])
    )
    assert ours == theirs


def same_run(workdir, results, whole_run):
  """Whether all that was measured is that of the run without interruption."""
  assert losses(workdir) == losses(whole_run[0])
  ours, theirs = (
    [
      {k: x for k, x in row.items() if k not in TIMES}
      for row in log.read_metrics(path)
    ]
    for path in (workdir, whole_run[0])
  )
  assert ours == theirs
  assert results | {'peak_memory_gb': 0} == whole_run[1] | {'peak_memory_gb': 0}
  ours, theirs = weights(workdir), weights(whole_run[0])
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name])


TIMES = ('train/seconds', 'train/tokens_per_second')


@pytest.mark.slow
@pytest.mark.parametrize(('evaluation', 'step'), [(1, 3), (2, 6)])
def test_an_evaluation_does_not_hold_up_a_stop(
  whole_run, config, tmp_path, monkeypatch, evaluation, step
):
  """It is made up for, whether a checkpoint was due at its step or not."""
  workdir = tmp_path / 'run'
  begun, scored = [], []
  run, score = generation.Generation.run, generation.Generation._answers

  def asked_to_stop(*args):
    begun.append(1)
    if len(begun) == evaluation:
      os.kill(os.getpid(), signal.SIGTERM)
    return run(*args)

  def scoring(*args):
    found = score(*args)
    scored.append(1)
    return found

  with monkeypatch.context() as patch:
    patch.setattr(generation.Generation, 'run', asked_to_stop)
    patch.setattr(generation.Generation, '_answers', scoring)
    with pytest.raises(Interrupted, match=f'saved at step {step} of 6'):
      train.run(config, workdir)
  assert len(scored) == 2 * (evaluation - 1)  # Two seeds each.
  assert not rundir.is_finished(workdir)
  same_run(workdir, train.run(config, workdir), whole_run)


@pytest.mark.slow
def test_a_killed_run_repeats_the_steps_after_its_checkpoint(
  whole_run, config, tmp_path, monkeypatch
):
  with ending.at(5, ending.kill, monkeypatch), pytest.raises(ending.Killed):
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
    this.newest = now
    logged.append((now, max(losses(tmp_path / 'run'))))

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save)
  monkeypatch.setattr(checkpoint.Checkpoints, 'amend', lambda *_: None)
  config.eval_every = 0
  train.run(config, tmp_path / 'run')
  assert logged == [(2, 2), (4, 4), (6, 6)]


def test_another_config_is_refused(whole_run, config):
  config.optimizer.learning_rate = 1.0
  with pytest.raises(UserError, match=r'learning_rate was 0\.003 and'):
    train.run(config, whole_run[0])


@pytest.mark.slow
def test_what_is_refused_may_come_again_put_right(config, tmp_path):
  data, config.data.train = config.data.train, str(tmp_path / 'none.jsonl')
  with pytest.raises(UserError, match=r'none\.jsonl'):
    train.run(config, tmp_path / 'run')
  config.data.train = data
  config.optimizer.name = 'rmsprop'
  config.train.steps = 1
  config.evals = {}
  config.checkpoint.best_metric = None
  assert train.run(config, tmp_path / 'run')['step'] == 1
  config.optimizer.name = 'adamw'
  with pytest.raises(UserError, match='was begun with something else'):
    train.run(config, tmp_path / 'run')


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
  assert f'{unfinished}: config.train.microbatch_size was None and is 4' in said
  recorded = json.loads((unfinished / 'config.json').read_text())['config']
  assert recorded['train']['microbatch_size'] == 4


@pytest.mark.parametrize('what', ['data', 'student'])
def test_other_contents_are_refused_unless_forced(
  unfinished, config, data_file, what, capsys
):
  """Under the same name, rows or weights that are others."""
  if what == 'data':
    path, name = Path(data_file), 'config.data.train was .*config.evals.gener'
    changed = path.read_text().replace('Repeat two', 'Say two').encode()
  else:
    path = Path(config.student.path) / 'model.safetensors'
    name = 'config.student was'
    changed = bytearray(path.read_bytes())
    changed[-3] ^= 64
  before = path.read_bytes()
  try:
    path.write_bytes(changed)
    with pytest.raises(UserError, match=f'contents.{name}') as e:
      train.run(config, unfinished)
    assert '--force' in str(e.value)
    train.run(config, unfinished, force=True)
    assert 'forced: contents.config.' in capsys.readouterr().out
  finally:
    path.write_bytes(before)


def test_two_processes_do_not_share_a_directory(tmp_path, config):
  with (
    fingerprint.lock(tmp_path / 'run'),
    pytest.raises(UserError, match='another process works there'),
  ):
    train.run(config, tmp_path / 'run')


@pytest.fixture
def quick(config, monkeypatch):
  """`quick(loss={step: ce}, ...)`: what is measured; gives the steps exported.

  A run of six steps that nothing is measured in.
  """
  exported = []
  export = chosen.export

  def recorded(run, params, found):
    exported.append(found['step'])
    export(run, params, found)

  def prepare(**values):
    monkeypatch.setattr(chosen, 'evaluate', measured(**values))
    return exported

  monkeypatch.setattr(chosen, 'export', recorded)
  config.evals = {'loss': {'limit': 1}}
  config.eval_every = config.checkpoint.every = 1
  config.checkpoint.best_metric = 'loss/ce'
  return prepare


def test_best_is_the_best_and_not_the_last(quick, config, tmp_path):
  exported = quick(loss={0: 4.0, 2: 5.0, 4: 3.0, 6: float('nan')})
  config.eval_every, config.eval_first = 2, True
  results = train.run(config, tmp_path / 'run')
  assert exported == [0, 4]
  assert (results['best']['step'], results['last']['step']) == (4, 6)
  assert results['best']['value'] == 3.0
  assert value(results['last'], 'loss/ce') is None
  # What the page and the table show is of best/.
  tables.write(tmp_path, {'run': tmp_path / 'run'})
  assert '3.000' in (tmp_path / 'table.md').read_text()
  steps = [row['step'] for row in log.read_metrics(tmp_path / 'run')]
  assert steps[0] == 0


@pytest.mark.slow
def test_best_is_never_of_a_step_that_a_kill_loses(
  quick, config, tmp_path, monkeypatch
):
  """Though the next start finds other numbers, as on a GPU."""
  exported = quick(loss={2: 5.0, 4: 3.0, 6: 9.0})
  config.eval_every, config.checkpoint.every = 2, 100
  with ending.at(5, ending.kill, monkeypatch), pytest.raises(ending.Killed):
    train.run(config, tmp_path / 'run')
  assert exported == [2, 4]
  quick(loss={2: 5.0, 4: 6.0, 6: 9.0})
  results = train.run(config, tmp_path / 'run')
  best = json.loads((tmp_path / 'run/best/gakd_jax.json').read_text())
  assert best['step'] == results['best']['step'] == 4


@pytest.mark.slow
def test_a_run_cannot_be_shorter_than_it_is(quick, config, tmp_path):
  quick(loss=dict.fromkeys(range(7), 1.0))
  train.run(config, tmp_path / 'run')
  config.train.steps = 4
  with pytest.raises(
    UserError, match=r'stands at step 6, and .* to have 4; ask'
  ):
    train.run(config, tmp_path / 'run', force=True)


@pytest.mark.slow
def test_without_a_number_best_is_the_last(quick, config, tmp_path, capsys):
  exported = quick(loss=dict.fromkeys((3, 6), float('nan')))
  config.eval_every = 3
  results = train.run(config, tmp_path / 'run')
  assert exported == [6]
  assert results['best']['step'] == 6
  assert 'loss/ce was never a number; best/ is' in capsys.readouterr().out


@pytest.mark.slow
def test_patience_ends_a_run_wherever_it_is_interrupted(
  quick, config, tmp_path, monkeypatch, capsys
):
  ce = {1: 3.0, 2: 4.0, 3: 2.0, 4: 2.0, 5: float('nan'), 6: 0.0}
  exported = quick(loss=ce)
  config.checkpoint.patience, config.checkpoint.every = 2, 4
  results = train.run(config, tmp_path / 'whole')
  said = 'stopped at step 5 of 6: loss/ce was no better 2 times'
  assert said in capsys.readouterr().out
  assert exported == [1, 3]
  assert (results['step'], results['best']['step']) == (5, 3)

  # Killed after the fourth step, and once more before it has finished.
  with ending.at(5, ending.kill, monkeypatch), pytest.raises(ending.Killed):
    train.run(config, tmp_path / 'run')
  with monkeypatch.context() as patch:
    patch.setattr(chosen, 'of_best', lambda *_: ending.kill())
    with pytest.raises(ending.Killed):
      train.run(config, tmp_path / 'run')
  capsys.readouterr()
  found = train.run(config, tmp_path / 'run')
  out = capsys.readouterr().out
  assert 'continuing from step 5' in out
  assert said in out
  assert found | {'peak_memory_gb': 0} == results | {'peak_memory_gb': 0}
  assert losses(tmp_path / 'run') == losses(tmp_path / 'whole')
  ours, theirs = weights(tmp_path / 'run'), weights(tmp_path / 'whole')
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
  ('best_metric', 'patience', 'message'),
  [
    ('loss/cee', None, "='loss/cee' is not measured; known are gener"),
    ('lost/ce', None, 'distinct_2_of_prompt, loss/ce, loss/ece, '),
    ('loss/rouge_l', None, 'is not measured'),
    (None, 2, 'patience=2: it takes a config.checkpoint.best_metric'),
    ('loss/ce', 0, 'patience=0: expected a whole number (1 or more)'),
  ],
)
def test_what_nothing_can_be_chosen_by_is_refused_at_once(
  config, tmp_path, monkeypatch, best_metric, patience, message
):
  monkeypatch.setattr(models, 'load', lambda *_, **__: pytest.fail('too late'))
  config.checkpoint.best_metric = best_metric
  config.checkpoint.patience = patience
  with pytest.raises(UserError, match=re.escape(message)):
    train.run(config, tmp_path / 'run')


def test_answers_of_another_step_are_not_kept(tmp_path):
  """As after a later evaluation than the one that is gone on from."""
  for name, step in (('a', 4), ('b', 6)):
    line = {'instruction': 'q', 'answer': 'a'}
    answers.write(tmp_path / 'last', name, 0, [line | {'step': step}] * 2)
    answers.write(tmp_path, name, 0, [line | {'step': 2}])
  answers.keep(tmp_path / 'last', tmp_path, 4)
  for name, steps in (('a', [4, 4]), ('b', [2])):
    lines = rundir.read_answers(answers.path_of(tmp_path, name, 0))
    assert [line['step'] for line in lines] == steps


def test_what_reads_answers_is_due_with_them():
  c = base.get_config()
  c.eval_every = 2
  c.evals = {
    'loss': {},
    'sampled': {'kind': 'generation', 'every': 4},
    'fidelity': {'of': 'sampled'},
  }
  due = {now: loop._due(c, now, 9) for now in (1, 2, 4, 9)}
  assert due == {1: None, 2: ['loss'], 4: [*c.evals], 9: [*c.evals]}


@pytest.mark.slow
def test_results_and_answers_are_of_the_step_that_is_exported(
  config, tmp_path, monkeypatch
):
  """Also of the sets that were not measured at that step."""
  scores = {2: 5.0, 4: 1.0, 6: 3.0}
  evaluate = chosen.evaluate

  def scored(run, params, step, names, workdir):
    found = evaluate(run, params, step, names, workdir)
    if 'loss' in found['evaluators'] and step in scores:
      found['evaluators']['loss']['metrics']['ce']['mean'] = scores[step]
    return found

  monkeypatch.setattr(chosen, 'evaluate', scored)
  config.eval_every = 2
  config.checkpoint.best_metric = 'loss/ce'
  often = config.evals.generation.to_dict() | {'kind': 'generation'}
  often |= {'seeds': (1,), 'temperature': 0.0}
  config.evals = {
    'loss': {'batch_size': 8, 'limit': 8},
    'often': often,
    'rare': often | {'every': 3},
  }
  results = train.run(config, tmp_path / 'run')
  best = results['best']
  assert best['step'] == 4
  assert list(best['evaluators']) == ['loss', 'often', 'rare']
  found = {}
  for name in ('often', 'rare'):
    file = tmp_path / f'run/answers/{name}-1.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line.pop('step') for line in lines} == {4}
    found[name] = lines
  # best/ answers what the student of that step did.
  assert found['often'] == found['rare']
  last = (tmp_path / 'run/last/answers/often-1.jsonl').read_text()
  assert '"step": 6' in last
  metrics = [x['metrics'] for x in best['evaluators'].values()][1:]
  assert metrics[0] == metrics[1]


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


@pytest.mark.slow
@pytest.mark.parametrize(
  'fails_at', [2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_an_export_that_fails_loses_nothing(
  config, tmp_path, monkeypatch, fails_at
):
  """It is made up for from the checkpoint, and only where it was due."""
  scores = {2: 5.0, 4: 3.0, 6: 9.0}
  fails, steps, exported = [fails_at], [], []

  evaluate = measured(loss=scores)

  def evaluated(this, params, now, names, workdir):
    steps.append(now)
    return evaluate(this, params, now, names, workdir)

  def export(this, params, *_):
    if steps[-1:] == fails:
      fails.clear()
      raise OSError('disk full')
    exported.append(np.asarray(params['final_norm']['scale']))

  monkeypatch.setattr(chosen, 'evaluate', evaluated)
  monkeypatch.setattr(chosen, 'export', export)
  config.evals = {'loss': {'limit': 8}}
  config.eval_every = config.checkpoint.every = 2
  config.checkpoint.best_metric = 'loss/ce'
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

  evaluate = measured(loss=None, late=None, rare=None)

  def evaluated(this, params, now, names, workdir):
    seen.setdefault(now, []).append(sorted(names))
    return evaluate(this, params, now, names, workdir)

  monkeypatch.setattr(chosen, 'evaluate', evaluated)
  monkeypatch.setattr(chosen, '_exported', lambda run: None)
  monkeypatch.setattr(chosen, 'export', lambda *_: exported.append(True))
  config.eval_every = 2
  config.evals = {
    'loss': {},
    'late': {'kind': 'loss', 'every': 0},
    'rare': {'kind': 'loss', 'every': 3},
  }
  config.checkpoint.best_metric = 'rare/ce'
  train.run(config, tmp_path / 'run')
  assert seen == {
    2: [['loss']],
    3: [['rare'], ['late', 'loss']],  # and at the end, of best/
    4: [['loss']],
    6: [['late', 'loss', 'rare']],
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
  assert 0 < value(results['best'], METRIC) < 10
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


@pytest.mark.slow
def test_a_stage_lets_go_of_its_programs(config, tmp_path, monkeypatch):
  traced = []

  @jax.jit
  def program(x):
    traced.append(x)
    return x

  monkeypatch.setattr(train, 'run', lambda *_: program(1.0))
  monkeypatch.setattr(train.page, 'write', lambda *_, **__: None)
  config.stages = (('first', config.copy_and_resolve_references()),) * 2
  train.run_stages(config, tmp_path)
  assert len(traced) == 2


@pytest.mark.slow
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
  sft.teacher.path = sft.student.path  # It will not be the same.
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
  found = {
    name: rundir.read_results(tmp_path / name) for name, _ in config.stages
  }
  assert value(found['teacher']['best'], METRIC) == pytest.approx(0, abs=1e-6)
  assert [x['is_teacher'] for x in found.values()] == [True, False, False]
  # Stopped before its report was written, that of a stage or of all.
  pages = [tmp_path / 'kd' / 'report.html', tmp_path / 'report.html']
  for page in pages:
    page.unlink()
  train.run_stages(config, tmp_path)
  assert all(page.exists() for page in pages)
  # What a stage was built on has been made anew.
  path = tmp_path / 'sft/best/model.safetensors'
  changed = bytearray(path.read_bytes())
  changed[-3] ^= 64
  path.write_bytes(changed)
  with pytest.raises(UserError, match=r'kd: contents .*config.student was'):
    train.run_stages(config, tmp_path)
  train.run_stages(config, tmp_path, force=True)
  with (tmp_path / 'teacher/answers.jsonl').open('a') as file:
    print(answers[0], file=file)
  with pytest.raises(UserError, match=r'kd: contents .*: stage:teacher was'):
    train.run_stages(config, tmp_path)


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
    'train.epochs': None,
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
  # The system counts by the page, and not at once.
  assert train._peak_memory_gb() >= before - 0.01
  train._forget_peak_memory()
  assert train._peak_memory_gb() < before - 0.5
