"""What is read of a run's data, and what is said of it."""

import json

import pytest

from configs import base
from gakd_jax import UserError, inputs, rollout
from gakd_jax.data import sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow


@pytest.fixture(scope='module')
def tokenizer(tiny_tokenizer_dir):
  return tokenizer_lib.load(tiny_tokenizer_dir)


@pytest.fixture
def config(tmp_path):
  c = base.get_config()
  rows = [('a' * n, 'b' * m) for n, m in [(5, 3), (21, 3), (10, 50), (5, 5)]]
  file = tmp_path / 'rows.jsonl'
  file.write_text(
    '\n'.join(json.dumps({'prompt': p, 'response': r}) for p, r in rows)
  )
  c.data.train = str(file)
  c.data.template = 'raw'
  c.data.max_length = 40
  c.data.max_prompt_length = 20
  return c


def texts_of(config, tokenizer, **writer):
  writer = rollout.make(**({'writer': 'dataset'} | writer))
  return inputs.texts(
    config, config.data.train, [(tokenizer, config.data.template)], writer
  )


def test_what_is_read_and_left_out_is_said(config, tokenizer, capsys):
  found = texts_of(config, tokenizer)
  assert found.places.tolist() == [0, 2, 3]
  assert found.lengths.tolist() == [9, 40, 11]
  assert capsys.readouterr().out == (
    'data: 3 rows; tokens: 20 of prompts, 40 of responses; 1 truncated; '
    '1 skipped: prompt too long\n'
  )
  config.data.max_prompt_length = 4
  message = r'no row is left \(4 prompt too long\); max.* the shortest .* 5 tok'
  with pytest.raises(UserError, match=message):
    texts_of(config, tokenizer)


def test_a_long_prompt_is_refused_when_bad_rows_are(config, tokenizer):
  config.data.on_bad_row = 'fail'
  with pytest.raises(BadRow, match=r'rows.jsonl:2: prompt too long'):
    texts_of(config, tokenizer)
  config.data.max_prompt_length = 30
  assert len(texts_of(config, tokenizer)) == 4


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'max_prompt_length': 40}, 'must leave room for a response'),
    ({'train': None}, 'config.data.train is not set'),
    ({'weights': (1.0, 2.0)}, r'weights=\(1.0, 2.0\): .* each of the 1 parts'),
    ({'weights': (1e9,)}, 'a number, at most 1000'),
    ({'weights': ()}, r'weights=\(\): .* each of the 1 parts'),
    ({'turns': 'first'}, "config.data.turns='first': use 'last' or 'all'"),
  ],
)
def test_settings_that_do_not_fit(config, tokenizer, settings, said):
  config.data.update(settings)
  with pytest.raises(UserError, match=said):
    texts_of(config, tokenizer)


def test_parts_that_no_epoch_would_have_are_refused(config, tokenizer):
  texts = texts_of(config, tokenizer)
  inputs._refuse_unseen((0.2,), texts)  # of three rows, one
  with pytest.raises(UserError, match=r'0.1 of 3 rows is none in any epoch'):
    inputs._refuse_unseen((0.1,), texts)


def test_importance_may_be_measured_on_prompts(config, tokenizer):
  with open(config.data.train, 'w') as file:
    file.write(json.dumps({'prompt': 'abc'}) + '\n')
  [(_, segments_BT)] = inputs.first_rows(config, tokenizer, 4)
  assert segments_BT.sum() >= 3


def test_rows_are_those_of_the_texts(config, tokenizer):
  found = texts_of(config, tokenizer)
  writer = rollout.make('dataset')
  rows = inputs.rows(config, writer, found.places)
  assert [len(row.instruction) for row in rows] == [5, 10, 5]


def test_the_data_is_looked_at_once_for_both_models(
  config, tokenizer, pieces_tokenizer_dir, monkeypatch, capsys
):
  """A large file takes seconds to digest."""
  looked, identity = [], sources.identity

  def spy(spec):
    looked.append(spec)
    return identity(spec)

  monkeypatch.setattr(sources, 'identity', spy)
  teacher = tokenizer_lib.load(pieces_tokenizer_dir)
  found = inputs.texts(
    config,
    config.data.train,
    [(tokenizer, 'raw'), (teacher, 'raw')],
    rollout.make('dataset'),
    ('span',),
  )
  assert looked == [config.data.train]
  assert found.places.tolist() == [0, 2, 3]
  assert 'span_t: 100.0% of response tokens' in capsys.readouterr().out
