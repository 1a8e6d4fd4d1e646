"""Log-probabilities of a data file, and what is refused of them."""

import json

import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import encoding, logprobs, sources
from gakd_jax.data import texts as texts_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow

RESPONSE = np.array([5, 6, 7], np.int32)
VALUES = np.log([[0.2, 0.5, 0.1], [0.7, 0.2, 0.05], [0.3, 0.3, 0.4]])
GOOD = {
  'ids': [[5, 1, 2], [6, 5, 4], [7, 0, 1]],
  'values': VALUES.tolist(),
}


def read(size=2, response=RESPONSE, **changes):
  return logprobs.read('f:1', GOOD | changes, response, size, 10)


def test_the_largest_are_read_and_the_rest_is_what_they_leave():
  found = read()
  np.testing.assert_array_equal(found['ids'], [[1, 5], [6, 5], [1, 7]])
  want = np.log([[0.5, 0.2], [0.7, 0.2], [0.4, 0.3]])
  np.testing.assert_allclose(found['log_probs'], want, atol=2e-3)
  np.testing.assert_allclose(found['rest'], np.log([0.3, 0.1, 0.3]), atol=2e-3)
  assert found['is_known'].all()


def test_the_rest_may_be_given_where_all_ids_are_read():
  rest = np.log([0.25, 0.04, 1e-9]).tolist()
  found = read(size=3, rest=rest)
  np.testing.assert_allclose(found['rest'], rest, rtol=1e-3)
  # That of three is not that of two.
  np.testing.assert_allclose(read(rest=rest)['rest'], read()['rest'])


def test_of_as_many_ids_as_the_fewest_have_the_most_likely_are_read():
  """An API adds what was drawn, wherever it stands."""
  more = {
    'ids': [[5, 1, 2, 8], [6, 5, 4], [7, 0, 1]],
    'values': [[*VALUES[0], np.log(0.15)], *VALUES[1:]],
    'rest': [0.0, 0.0, 0.0],
  }
  found = read(size=3, **more)
  assert found['ids'][0].tolist() == [1, 5, 8]
  np.testing.assert_array_equal(found['ids'][1:], read(size=3)['ids'][1:])
  np.testing.assert_allclose(
    np.exp(found['rest'].astype(float)), [0.15, 0.05, 1e-7], atol=1e-3
  )
  with pytest.raises(BadRow, match='have 3 ids'):
    read(size=4, **more)


def test_an_end_that_is_left_out_is_not_known():
  found = read(response=np.append(RESPONSE, 9))
  assert len(found['ids']) == 3
  assert logprobs.read('f:1', None, RESPONSE, 2, 10) == {}


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'ids': None}, 'have no ids'),
    ({'values': 'many'}, 'have no values'),
    ({'values': VALUES[0].tolist()}, 'have no values'),
    ({'values': VALUES[:, :2].tolist()}, 'not of as many tokens'),
    ({'ids': [[5, 1], [6, 5], [7]]}, 'have no ids'),
    ({'ids': [[5, 1], 6, [7]]}, 'have no ids'),
    ({'tokens': [5, 6, 8]}, 'of other tokens'),
    ({'tokens': [5]}, 'of other tokens'),
    ({'ids': [[5, 1, 2], [6, 5, 4], [7, 0, 10]]}, 'ids that are no tokens'),
    ({'ids': [[5, 1, 2], [6, 6, 4], [7, 0, 1]]}, 'an id twice'),
    ({'values': (VALUES + 1).tolist()}, 'no log-probabilities'),
    ({'values': (VALUES * np.nan).tolist()}, 'no log-probabilities'),
  ],
)
def test_what_is_not_of_the_response_is_refused(changes, said):
  with pytest.raises(BadRow, match=said):
    read(**changes)
  with pytest.raises(BadRow, match=r'have 3 ids where .*cache_size asks for 4'):
    read(size=4)
  with pytest.raises(BadRow, match='not of as many tokens'):
    read(response=RESPONSE[:2])
  with pytest.raises(BadRow, match='have no ids'):
    logprobs.read('f:1', [1, 2], RESPONSE, 2, 10)


@pytest.fixture
def load(tiny_model_dir, tmp_path):
  tokenizer = tokenizer_lib.load(tiny_model_dir())

  def load(rows, on_bad_row='skip', max_length=64):
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    rules = sources.Rules(on_bad_row)
    contents = sources.identity(path)
    texts, _ = texts_lib.load(
      path,
      contents,
      tokenizer,
      template='chat',
      rules=rules,
      thinking='refuse',
      root=tmp_path / 'cache',
    )
    texts, bad = logprobs.load(
      *(path, contents, texts, (tokenizer, 'chat')),
      rules=rules,
      size=3,
      root=tmp_path / 'cache',
    )
    texts, _ = texts.fit(max_length, max_length - 1)
    return texts, bad

  load.tokenizer = tokenizer
  return load


def row_of(tokenizer, text, known=True, shift=0):
  row = {'instruction': f'Say {text}.', 'input': '', 'output': text}
  if known:
    made = sources.Row(row['instruction'], references=(text,))
    _, response = encoding.encode(tokenizer, made, 'chat')
    ids = [[x, (x + 1) % 300, (x + 2) % 300] for x in response]
    values = [[-0.5 - shift, -1.5, -3.0]] * len(ids)
    row['logprobs'] = {'tokens': response, 'ids': ids, 'values': values}
  return row


def test_each_text_has_its_own(load):
  rows = [
    row_of(load.tokenizer, text, known=text != 'two', shift=i / 10)
    for i, text in enumerate(['one', 'two', 'three words here', 'four'])
  ]
  rows[3]['logprobs']['tokens'][0] += 1
  rows.insert(1, rows[0] | {'output': ''})  # No row of a text.
  texts, bad = load(rows)
  assert bad == {'logprobs are of other tokens than the response': 1}
  assert [*texts.places] == [0, 2, 3]
  kept = texts.known.kept(texts)
  for i in range(3):
    prompt, response = texts[i]
    found = kept[i]
    n = len(response)
    assert len(found['ids']) == n + 1
    assert found['is_known'].tolist() == [i != 1] * n + [False]
    if i != 1:
      np.testing.assert_array_equal(found['ids'][:n, 0], response)
      np.testing.assert_allclose(
        found['log_probs'][:n, 0], -0.5 - i / 10, rtol=1e-3
      )
  # Cut, and without the first, they are still their own.
  cut, _ = load(rows, max_length=len(prompt) + 2)
  some = cut.take([2])
  found = some.known.kept(some)[0]
  np.testing.assert_array_equal(found['ids'][:2, 0], some[0][1])
  assert len(found['ids']) == 3


def test_a_bad_row_is_fatal_where_that_is_asked(load):
  row = row_of(load.tokenizer, 'one')
  row['logprobs']['values'][0][0] = 5.0
  with pytest.raises(UserError, match=r'rows.jsonl:1.*no log-probabilities'):
    load([row], on_bad_row='fail')
  with pytest.raises(
    UserError, match=r'no row of .* has logprobs .*1 logprobs'
  ):
    load([row])
  with pytest.raises(UserError, match='none has any'):
    load([row_of(load.tokenizer, 'one', known=False)])
