"""Rollouts on disk: whose words, what a run that goes on keeps, and warnings."""

import itertools
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax import rollout, rollout_log, rundir, sharding
from gakd_jax.data import pipeline, texts
from gakd_jax.data import tokenizer as tokenizer_lib

TEXT = 'né 日本 \U0001f600'


@pytest.fixture(scope='module')
def tokenizer(tiny_tokenizer_dir):
  return tokenizer_lib.load(tiny_tokenizer_dir)


def test_a_character_belongs_to_the_writer_of_its_last_token(tokenizer):
  """Whoever wrote which byte: of all ways to share the tokens, each."""
  ids = np.array(tokenizer(TEXT)['input_ids'])
  last = np.cumsum([len(c.encode()) for c in TEXT]) - 1
  assert len(ids) == last[-1] + 1, 'a token is a byte'
  for cut, end in itertools.combinations(range(len(ids) + 1), 2):
    by_teacher = (np.arange(len(ids)) >= cut) & (np.arange(len(ids)) < end)
    found = rollout_log.pieces(tokenizer, ids, by_teacher)
    assert all(text for text, _ in found)
    got = [(c, is_teachers) for text, is_teachers in found for c in text]
    assert got == [*zip(TEXT, by_teacher[last].tolist(), strict=True)]


def test_a_text_may_be_cut_within_a_character(tokenizer):
  ids = np.array(tokenizer('a日')['input_ids'])[:-1]
  found = rollout_log.pieces(tokenizer, ids, np.array([False, False, True]))
  assert found == [['a', False], ['\ufffd', True]]


def test_what_is_no_character_is_in_the_text_once(tokenizer):
  first = np.array(tokenizer('日')['input_ids'])[:1]
  ids = np.array([*first, *tokenizer('ab')['input_ids']])
  for by_teacher in itertools.product([False, True], repeat=3):
    found = rollout_log.pieces(tokenizer, ids, np.array(by_teacher))
    assert ''.join(text for text, _ in found) == '\ufffdab'


class _Writer:
  """Writes 'ab<|im_end|>', or 'ab' and its step; the teacher wrote the 'b'."""

  room = 3
  needs_responses = True

  def __init__(self, tokenizer):
    self._ids = tokenizer('ab')['input_ids']
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')
    self.ends = rollout.Ends((end,), 0, 300)
    self.keys, self.rows = [], []

  def sample(self, models, params, batch, key):
    del models
    self.keys.append(key)
    self.rows.append(batch.rows_B.tolist())
    tokens = batch.student
    length_B1 = jnp.sum(tokens.segments_BT, axis=1, keepdims=True)
    place_BT = jnp.arange(tokens.ids_BT.shape[1])[None] - length_B1
    last = self.ends.eos_ids[0] if params is None else params
    response = jnp.array([*self._ids, last])
    mask_BT = (place_BT >= 0) & (place_BT < 3) & (length_B1 > 0)
    ids_BT = jnp.where(mask_BT, response[place_BT % 3], tokens.ids_BT)
    return pipeline.Tokens(ids_BT, tokens.segments_BT, mask_BT), place_BT == 1


@pytest.fixture
def run(tokenizer, tmp_path):
  prompts = ['short', 'a longer one', 'x', 'x', 'x']
  rows = [{'instruction': p, 'input': 'in', 'output': 'ref'} for p in prompts]
  data = tmp_path / 'data.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))
  settings = {'train': str(data), 'on_bad_row': 'skip', 'turns': 'last'}
  return types.SimpleNamespace(
    workdir=tmp_path,
    config=types.SimpleNamespace(
      seed=0,
      report=types.SimpleNamespace(rollouts=3),
      data=types.SimpleNamespace(**settings),
    ),
    texts=texts.of([(tokenizer(p)['input_ids'], []) for p in prompts]),
    writer=_Writer(tokenizer),
    reading=((tokenizer, 'chat'),),
    models=types.SimpleNamespace(tokenizer=tokenizer),
    mesh=sharding.make_mesh(),
  )


def test_a_line_has_a_prompt_and_what_was_written(run, tokenizer):
  log = rollout_log.RolloutLog(run, 0, 1)
  log.write(None, 0)
  log.write(tokenizer('c')['input_ids'][0], 1)
  # The other rows fill up the eight devices.
  assert run.writer.rows == [[0, 1, 2, -1, -1, -1, -1, -1]] * 2
  assert run.writer.keys[0] == run.writer.keys[1]
  ended, cut = rundir.read_rollouts(run.workdir)[1::3]
  assert ended == {
    'index': 1,
    'step': 0,
    'instruction': 'a longer one',
    'input': 'in',
    'pieces': [['a', False], ['b', True], ['<|im_end|>', False]],
    'tokens': 3,
    'finished': True,
  }
  assert cut['pieces'] == [['a', False], ['b', True], ['c', False]]
  assert not cut['finished']


def _steps(run):
  return [x['step'] for x in rundir.read_rollouts(run.workdir)[::3]]


def test_prompts_are_answered_eight_times_and_at_the_end(run):
  log = rollout_log.RolloutLog(run, 0, 83)
  for step in range(84):
    log.write(None, step)
  assert _steps(run) == [*range(0, 81, 10), 83]


def test_a_run_that_goes_on_drops_what_it_will_write_again(run):
  log = rollout_log.RolloutLog(run, 0, 80)
  for step in range(46):
    log.write(None, step)
  before = rundir.read_rollouts(run.workdir)
  log = rollout_log.RolloutLog(run, 40, 80)
  assert rundir.read_rollouts(run.workdir) == before[:-3]
  for step in range(40, 81):
    log.write(None, step)
  assert _steps(run) == [*range(0, 81, 10)]
  rollout_log.RolloutLog(run, 0, 80)  # A new run in an old directory.
  assert rundir.read_rollouts(run.workdir) == []


@pytest.mark.parametrize('part', ['writer', 'report'])
def test_without_writer_or_prompts_there_is_no_file(run, part):
  if part == 'writer':
    run.writer = rollout.Dataset()
  else:
    run.config.report.rollouts = 0
  log = rollout_log.RolloutLog(run, 0, 1)
  log.write(None, 0)
  assert [p.name for p in run.workdir.iterdir()] == ['data.jsonl']
  assert rundir.read_rollouts(run.workdir) == []


def test_other_ends_of_lines_end_no_line(tmp_path):
  line = {'step': 1, 'index': 0, 'instruction': '', 'input': ''}
  line |= {'tokens': 3, 'finished': True}
  lines = [line | {'pieces': [[x, True]]} for x in ('a\u2028b\u0085c', 'd')]
  text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines)
  (tmp_path / 'rollouts.jsonl').write_text(text, encoding='utf-8')
  assert rundir.read_rollouts(tmp_path) == lines


def _watched(metrics):
  """Of each step, how many warnings."""
  watch = rollout_log.Watch()
  return [len(watch.warnings(x)) for x in metrics]


@pytest.mark.parametrize('name', ['empty', 'unfinished'])
def test_a_collapse_is_said_once_and_after_twenty_steps(name):
  collapsed = {f'rollout/{name}': np.float32(1.0), 'loss': 1.0}
  assert _watched([collapsed] * 19) == [0] * 19
  assert _watched([collapsed] * 60) == [0] * 19 + [1] + [0] * 40
  # Steps of a batch that was written earlier say nothing, and do not count.
  assert _watched([collapsed, {'loss': 1.0}] * 25).index(1) == 38


def test_only_the_last_steps_tell_a_collapse():
  healthy, collapsed = {'rollout/empty': 0.0}, {'rollout/empty': 1.0}
  # More than half of twenty.
  assert _watched([healthy] * 100 + [collapsed] * 20).index(1) == 110
  assert not any(_watched([healthy, collapsed] * 50))


def test_each_collapse_has_its_own_warning():
  watch = rollout_log.Watch()
  both = {'rollout/empty': 0.6, 'rollout/unfinished': 0.8}
  for _ in range(19):
    assert watch.warnings(both) == []
  empty, unfinished = watch.warnings(both)
  assert empty.startswith("warning: 60% of the last 20 steps' responses are")
  assert unfinished.startswith('warning: 80% of')
  assert 'config.rollout.max_new_tokens' in unfinished
