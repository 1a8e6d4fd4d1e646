import json

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from gakd_jax.data import spelling, vocab_map


def test_closest_is_exact_and_takes_the_first(monkeypatch):
  monkeypatch.setattr(vocab_map, '_CHUNK', 7)
  rng = np.random.default_rng(0)

  def words(shortest, n):
    lengths = rng.integers(shortest, 9, n)
    return [None, *(''.join(rng.choice([*'abc'], m)) for m in lengths), None]

  names, queries = words(1, 60), words(0, 200)
  found, distances = vocab_map.closest(names, queries)
  assert found.dtype == distances.dtype == np.int32
  for query, i, distance in zip(queries, found, distances, strict=True):
    if query is None:
      assert (i, distance) == (-1, -1)
      continue
    every = [
      (Levenshtein.distance(name, query), n)
      for n, name in enumerate(names)
      if name is not None
    ]
    assert (distance, i) == min(every)


@pytest.mark.parametrize(
  'key',
  [
    pytest.param('gpt2->qwen3', marks=pytest.mark.slow),
    'qwen3->gpt2',
    'tinyllama->mistral',
    'mistral->tinyllama',
    'gpt2->mistral',
    'mistral->gpt2',
  ],
)
def test_published_maps(kind, shared_dir, key):
  """A part; of two kinds, as published: vocabularies as they are written."""
  file = shared_dir / 'goldens/mined_vocab_sample.json'
  rows = np.array(json.loads(file.read_text())['maps'][key])[::10]
  source, destination = (kind(name) for name in key.split('->'))
  names, queries = spelling.strings(destination.spelling, source.spelling)
  if 'mistral' in key and 'gpt2' in key:
    names, queries = (
      [*map(one.tokenizer.convert_ids_to_tokens, range(len(one.tokenizer)))]
      for one in (destination, source)
    )
    markers = ('\u0120', '\u2581')
    old, new = markers if source.name == 'gpt2' else markers[::-1]
    queries = [name.replace(old, new) for name in queries]
  found, distances = vocab_map.closest(names, [queries[i] for i in rows[:, 0]])
  np.testing.assert_array_equal(found, rows[:, 1])
  np.testing.assert_array_equal(distances, rows[:, 2])
  assert (rows[:, 3] > 1).any()  # There are ties among them.


def test_a_map_is_made_once(kind, tmp_path, monkeypatch):
  tiny, pieces = kind('tiny'), kind('pieces')
  found = vocab_map.nearest(tiny.tokenizer, pieces.tokenizer, root=tmp_path)
  s_strings, t_strings = spelling.strings(tiny.spelling, pieces.spelling)
  assert len(found) == len(t_strings)
  for name in (' the', 'a', '\x01'):
    assert s_strings[found[t_strings.index(name)]] == name
  # Not those of the byte-level alphabet's characters.
  assert s_strings[found[t_strings.index('\xe4\xbd\xa0')]] in ('\xe4', '\xbd')
  monkeypatch.setattr(vocab_map, 'closest', None)
  again = vocab_map.nearest(tiny.tokenizer, pieces.tokenizer, root=tmp_path)
  np.testing.assert_array_equal(again, found)
  with pytest.raises(TypeError):  # Another map is made.
    vocab_map.nearest(pieces.tokenizer, tiny.tokenizer, root=tmp_path)


def test_shared_tokens_spell_the_same(kind):
  tiny, pieces = kind('tiny'), kind('pieces')
  s, t = vocab_map.shared(tiny.tokenizer, pieces.tokenizer)
  assert s.dtype == t.dtype == np.int32
  assert (np.diff(s) > 0).all()
  assert len({*t.tolist()}) == len(t)
  s_strings, t_strings = spelling.strings(tiny.spelling, pieces.spelling)
  assert [s_strings[i] for i in s] == [t_strings[i] for i in t]
  assert {' the', 'a', '\x01'} <= {s_strings[i] for i in s}
  ends = (tiny.end, pieces.end)
  assert ends not in [*zip(s.tolist(), t.tolist(), strict=True)]
  s, t = vocab_map.shared(tiny.tokenizer, pieces.tokenizer, ends)
  assert ends in [*zip(s.tolist(), t.tolist(), strict=True)]
  assert len({*s.tolist()}) == len({*t.tolist()}) == len(s)
  # An end that spells what a token of the other's does is not that one's.
  ends = (tiny.end, t_strings.index('a'))
  s, t = vocab_map.shared(tiny.tokenizer, pieces.tokenizer, ends)
  assert len({*t.tolist()}) == len(t)


def test_one_tokenizer_shares_all(kind):
  one = kind('pieces').tokenizer
  for end in (None, (2, 2)):
    s, t = vocab_map.shared(one, one, end)
    assert s.tolist() == t.tolist() == [*range(len(one))]


def test_real_vocabularies_share(kind):
  s, _ = vocab_map.shared(kind('gpt2').tokenizer, kind('qwen3').tokenizer)
  assert len(s) == 42257


def test_inverse_is_the_first():
  found = vocab_map.inverse(np.array([3, -1, 0, 3, 0]), 5)
  assert found.dtype == np.int32
  assert found.tolist() == [2, -1, -1, 0, -1]
