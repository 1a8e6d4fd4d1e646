"""Numbers that are none, in whole runs: said, never the best, an end in time."""

import json
import math
import re
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import base
from gakd_jax import (
  Interrupted,
  UserError,
  chosen,
  fields,
  log,
  loop,
  skip_log,
  skips,
  train,
)
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.evals import loss as loss_lib
from gakd_jax.evals import statistics
from gakd_jax.page import training as training_page
from tests import ending


@pytest.fixture(scope='module')
def data_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'rows.jsonl'
  words = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
  rows = [{'prompt': f'Say {x}.', 'response': f'{x}, {x}'} for x in words * 2]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture(scope='module')
def pair(tiny_model_dir):
  return str(tiny_model_dir(seed=0)), str(tiny_model_dir(seed=1))


@pytest.fixture(scope='module')
def broken(tiny_model_dir):
  """A teacher of finite weights whose logits are none."""
  path = tiny_model_dir(seed=1)
  file = path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors['model.norm.weight'][:] = 3e38
  safetensors.numpy.save_file(tensors, file)
  return str(path)


@pytest.fixture
def config(pair, data_file):
  c = base.get_config()
  c.student.path, c.teacher.path = pair
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.data.train = c.data.validation = data_file
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 48, 32
  c.data.buckets = (48,)
  c.objective = {'name': 'kld'}
  c.optimizer.learning_rate = 3e-3
  c.train.batch_size, c.train.steps, c.train.head_chunk = 8, 6, 64
  c.mesh.data = 1
  c.evals = {'loss': {'batch_size': 8, 'limit': 8}}
  c.eval_every = 0
  c.checkpoint.every = 0
  return c


def _skipped(workdir):
  rows = log.read_metrics(workdir)
  return [row['step'] for row in rows if row.get('train/skipped')]


def _weights(path):
  return safetensors.numpy.load_file(path / 'model.safetensors')


@pytest.mark.slow
def test_a_broken_teacher_ends_a_run_and_moves_nothing(
  config, broken, tmp_path, monkeypatch, capsys
):
  """After so many steps in a row, be it in one go or in several."""
  config.teacher.path, config.train.max_skipped = broken, 3
  with ending.at(2, ending.stop, monkeypatch), pytest.raises(Interrupted):
    train.run(config, tmp_path)
  said = capsys.readouterr().out
  lines = re.findall(r'step \d was skipped.*', said)
  assert len(lines) == 2
  assert re.fullmatch(
    r'step 1 was skipped: loss is not finite; its rows: '
    r'(\S+rows\.jsonl:\d+, ){2}\S+rows\.jsonl:\d+ and 5 more',
    lines[0],
  )
  assert lines[1] == 'step 2 was skipped: loss is not finite'
  with pytest.raises(UserError) as e:
    train.run(config, tmp_path)
  message = str(e.value)
  assert message.startswith('steps 1 to 4 were all skipped (loss is not finite')
  assert 'config.train.max_skipped=3' in message
  assert "the teacher's weights" in message
  assert message.endswith('no step was taken')
  assert '\n' not in message
  assert _skipped(tmp_path) == [1, 2, 3, 4]
  assert not (tmp_path / 'best').exists()
  assert not (tmp_path / 'results.json').exists()
  # Again, it tries two more, which are the last.
  with pytest.raises(UserError, match='steps 1 to 6 were all skipped'):
    train.run(config, tmp_path)
  # And then knows it from the state alone.
  with pytest.raises(UserError, match=r'steps 1 to 6 were all skipped \(see'):
    train.run(config, tmp_path)
  # What was exported of the last step is the student as it was.
  got, want = _weights(tmp_path / 'best'), _weights(Path(config.student.path))
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.slow
@pytest.mark.parametrize('of', ['critic_optimizer', 'optimizer'])
def test_a_rate_beyond_all_measure_ends_a_run(config, of, tmp_path, capsys):
  config[of].learning_rate = 1e30
  config[of].schedule = 'constant'
  config.objective = {'name': 'gakd', 'warmup_steps': 1, 'g': 1.0}
  config.critic.width, config.critic.layers, config.critic.ff_width = 16, 1, 16
  config.train.steps, config.train.max_skipped = 30, 4
  config.checkpoint.every = config.eval_every = 1
  with pytest.raises(UserError, match=f'config.{of}.learning_rate') as e:
    train.run(config, tmp_path)
  assert 'were all skipped' in str(e.value)
  assert len(_skipped(tmp_path)) <= 6
  for x in _weights(tmp_path / 'best').values():
    assert np.all(np.isfinite(x))


@pytest.mark.slow
def test_a_run_that_skips_spikes_continues_bit_for_bit(
  config, tmp_path, monkeypatch
):
  """What they are told from is a part of its state."""
  monkeypatch.setattr(skips, 'WINDOW', 3)
  config.train.skip_spikes, config.train.steps = 0.5, 8
  config.train.max_skipped = 8
  config.optimizer.learning_rate = 0.1
  train.run(config, tmp_path / 'whole')
  want = _skipped(tmp_path / 'whole')
  assert want
  assert len(want) < 5
  assert min(want) > 3
  rows = log.read_metrics(tmp_path / 'whole')
  for row in rows:  # A good step does not say why it would have been.
    if row['step'] not in want and 'train/loss' in row:
      assert [x for x in row if 'skipped' in x] == ['train/skipped']
  with ending.at(3, ending.stop, monkeypatch), pytest.raises(Interrupted):
    train.run(config, tmp_path / 'run')
  train.run(config, tmp_path / 'run')
  assert _skipped(tmp_path / 'run') == want
  ours, theirs = (
    _weights(tmp_path / name / 'best') for name in ('run', 'whole')
  )
  for name in theirs:
    np.testing.assert_array_equal(ours[name], theirs[name])


def _log(total=100, **settings):
  """A `SkipLog` of a run whose rows nobody knows, and a function that feeds it.

  step(in_a_row, *causes): the next step's.
  """
  c = base.get_config()
  c.train.update(settings)
  skipped = skip_log.SkipLog(types.SimpleNamespace(config=c, texts=None), total)
  count = iter(range(1, total + 1))

  def step(in_a_row, *causes):
    names = ('critic', 'generator', 'gradient', 'update', 'no_text', 'spike')
    flags = {f'skipped/{x}': np.float32(x in causes) for x in names}
    flags |= {'skipped/in_a_row': np.int32(in_a_row), 'loss': math.nan}
    skipped.look(next(count), flags, None)

  return skipped, step


@pytest.mark.parametrize(
  ('most', 'bad', 'ends'),
  [
    (1, {5}, 20),
    (3, {5, 6, 7}, 20),
    (3, {5, 6, 7, 8}, None),
    (3, {5, 6, 8, 9}, 20),
    (3, {18, 19, 20}, None),
  ],
)
def test_a_run_goes_on_where_the_step_under_way_is_good(
  tmp_path, monkeypatch, most, bad, ends
):
  """Metrics are known a step late."""
  c = base.get_config()
  c.train.max_skipped, c.evals, c.report.trackers = most, {}, ()
  c.checkpoint.every = c.eval_every = 0
  run = types.SimpleNamespace(
    config=c,
    workdir=tmp_path,
    writer=types.SimpleNamespace(room=0),
    evaluators={},
    models=None,
    texts=None,
  )
  tokens = types.SimpleNamespace(segments_BT=np.ones((2, 2), int))
  batch = types.SimpleNamespace(student=tokens, rows_B=np.zeros(2, int))
  texts = types.SimpleNamespace(
    next=lambda *_: (batch, {}), to_save=lambda: ([], {'data': 0, 'ahead': []})
  )
  checkpoints = types.SimpleNamespace(
    newest=None, save=lambda *_: None, wait=lambda: None
  )

  def state_of(step, in_a_row, total):
    return types.SimpleNamespace(
      step=step,
      params={'student': {}},
      skips=types.SimpleNamespace(in_a_row=in_a_row, total=total),
    )

  def step(state, *_):
    is_bad = state.step + 1 in bad
    in_a_row = state.skips.in_a_row + 1 if is_bad else 0
    skipped = {'skipped/gradient': is_bad, 'skipped/in_a_row': in_a_row}
    new = state_of(state.step + 1, in_a_row, state.skips.total + is_bad)
    return new, {'loss': 1.0, 'skipped': float(is_bad)} | skipped

  monkeypatch.setattr(chosen, 'evaluate', lambda *_: {'evaluators': {}})
  monkeypatch.setattr(chosen, 'choose', lambda *_: None)

  def done():
    host = chosen.start(None)
    return loop.run(run, state_of(0, 0, 0), host, step, texts, 20, checkpoints)

  if ends:
    assert done().step == ends
  else:
    with pytest.raises(UserError, match='were all skipped'):
      done()


def test_it_is_enough_when_so_many_in_a_row_are_known(capsys):
  skipped, step = _log(max_skipped=2)
  seen = []
  for in_a_row in (0, 1, 0, 1, 2, 0, 0):
    step(in_a_row, *['update'] * (in_a_row > 0))
    seen.append(skipped.enough)
  assert seen == [False] * 4 + [True, False, False]
  assert capsys.readouterr().out.splitlines() == [
    f'step {i} was skipped: it would make parameters that are not finite'
    for i in (2, 4, 5)
  ]


def test_a_short_run_of_skipped_steps_alone_is_refused():
  skipped, step = _log(total=2)
  for in_a_row in (1, 2):
    step(in_a_row, 'gradient')
  assert skipped.enough


@pytest.mark.parametrize(
  ('causes', 'words'),
  [
    (['generator'], ['generator is not finite', 'config.optimizer.learning']),
    (['gradient'], ['the gradient is not finite', 'config.optimizer.learning']),
    (
      ['critic', 'generator'],
      ['critic is not finite, generator is', 'config.critic_optimizer.learn'],
    ),
    (['no_text'], ['no token of it is of a response', 'the template']),
    (['spike'], ['far above the last ones', 'config.train.skip_spikes']),
    ([], ['see metrics.jsonl']),
  ],
  ids=str,
)
def test_the_end_of_a_run_says_why_and_what_to_look_at(causes, words):
  skipped, step = _log(max_skipped=3)
  if causes:
    step(3, *causes)

  def state(in_a_row, total):
    counts = {'total': np.int32(total), 'in_a_row': np.int32(in_a_row)}
    return types.SimpleNamespace(
      step=np.int32(40), skips=skips.Skips(**counts, recent={})
    )

  skipped.check(state(2, 7))
  with pytest.raises(UserError) as e:
    skipped.check(state(3, 7))
  message = str(e.value)
  assert message.startswith('steps 38 to 40 were all skipped')
  assert message.endswith('the student of step 37 is saved')
  assert 'config.train.max_skipped=3' in message
  assert '\n' not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  ('setting', 'value'),
  [
    ('max_skipped', 0),
    ('max_skipped', -3),
    ('skip_spikes', 0.0),
    ('skip_spikes', -1.0),
    ('skip_spikes', math.inf),
    ('skip_spikes', math.nan),
  ],
)
def test_settings_by_which_nothing_could_be_skipped_are_refused(setting, value):
  c = base.get_config()
  c.train[setting] = value
  with pytest.raises(UserError, match=f'^config.train.{setting}={value}: exp'):
    fields.check(c)


def test_the_page_has_a_figure_of_whether_and_none_of_why():
  rows = [
    {'step': i, 'train/skipped': i % 2} | {'train/skipped/critic': 1.0}
    for i in range(4)
  ]
  shown = training_page.curves({'a': ('a', rows)}, {'a': 'red'})
  assert len(shown) == 1
  assert 'train/skipped' in shown[0]


@pytest.mark.parametrize(
  ('mean', 'said'), [(math.nan, True), (math.inf, True), (0.5, False)]
)
def test_a_measurement_that_is_no_number_is_said(mean, said, capsys):
  evaluator = types.SimpleNamespace(
    name='mine',
    rows=[0],
    about={},
    run=lambda *_: {'metrics': {'good': 1.0, 'ce': mean}},
  )
  evaluator_lib.measure(evaluator, None, None, 3)
  out = capsys.readouterr().out
  assert out == ('mine: ce: not a number\n' if said else '')


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('metric', ['ce', 'rouge_l', 'my_own'])
def test_what_is_no_number_is_never_the_best(metric, value):
  def found(step, mean):
    metrics = {metric: {'mean': mean}}
    return {'step': step, 'evaluators': {'set': {'metrics': metrics}}}

  c = base.get_config().checkpoint
  c.best_metric, c.patience = f'set/{metric}', 2
  host = chosen.start(None)
  chosen.choose(c, host, found(1, value))
  assert host['best'] is None
  assert not host['is_best']
  chosen.choose(c, host, found(2, 3.0))
  assert host['is_best']
  for now in (3, 4):
    assert not chosen.is_enough(c, host)
    chosen.choose(c, host, found(now, value))
    assert not host['is_best']
  assert host['best']['step'] == 2
  assert chosen.is_enough(c, host)


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_score_that_is_no_number_is_no_proof(value):
  scores = [3.0, 4.0, 5.0, value], [1.0, 2.0, 3.0, 1.0]
  for a, b in (scores, scores[::-1]):
    found = statistics.paired_bootstrap(a, b)
    assert all(math.isnan(x) for x in found.values())


@pytest.mark.parametrize('of', [0, 1])
def test_models_that_say_nothing_agree_on_nothing(of):
  logits = [jnp.ones((2, 5)), jnp.ones((2, 5))]
  logits[of] = logits[of].at[0, 3].set(jnp.inf)
  ids_N = jnp.zeros(2, int)
  targets = ids_N, ids_N, jnp.eye(2)
  _, measured = loss_lib._measure(tuple(logits), targets)
  assert math.isnan(measured['agreement'][0])
  assert measured['agreement'][1] == 1
