import dataclasses
import itertools
import json

import numpy as np
import pytest

from gakd_jax.data import align, spelling

MADE = [('tiny', 'pieces'), ('pieces', 'tiny')]
REAL = [*itertools.permutations(('gpt2', 'qwen3', 'mistral', 'tinyllama'), 2)]


def both(kind, student, teacher, text, end=True):
  return [kind(name).read(text, end) for name in (student, teacher)]


def texts(kind, student, teacher):
  """Those that both make the same text of."""
  s, t = kind(student), kind(teacher)
  found = [x for x in s.texts if x in t.texts and s.normal(x) == t.normal(x)]
  assert len(found) > 5
  return found


def spoken(x):
  """The bytes of each token of a Reading."""
  return [
    x.text[a:b] for a, b in zip(x.starts.tolist(), x.ends.tolist(), strict=True)
  ]


def alike(s, t):
  """Without a blank that only one tokenizer has added."""
  if s.blank == t.blank:
    return s, t
  return s.without_blank(), t.without_blank()


@pytest.mark.parametrize('pair', MADE + REAL, ids='-'.join)
def test_exact_pairs_are_all_that_there_are(kind, pair):
  for text in texts(kind, *pair):
    s, t = both(kind, *pair, text)
    found = zip(*map(np.ndarray.tolist, align.exact_pairs(s, t)), strict=True)
    s, t = alike(s, t)
    by_start = {
      (a, piece): j
      for j, (a, piece) in enumerate(zip(t.starts, spoken(t), strict=True))
      if piece
    }
    expected = [
      (i, by_start[key])
      for i, key in enumerate(zip(s.starts, spoken(s), strict=True))
      if key in by_start
    ]
    assert [*found] == [*expected, (len(s.ends) - 1, len(t.ends) - 1)]


@pytest.mark.parametrize('pair', MADE + REAL, ids='-'.join)
def test_spans_are_the_smallest_pieces_of_equal_text(kind, pair):
  for text in texts(kind, *pair):
    s, t = both(kind, *pair, text)
    numbers = align.spans(s, t)
    s, t = alike(s, t)
    ends = []
    for x, n in zip((s, t), numbers, strict=True):
      assert n.dtype == np.int32
      assert n.min() == 0  # Every token is of a piece,
      assert {*np.diff(n)} <= {0, 1}  # one after the other.
      last = np.append(np.flatnonzero(np.diff(n)), len(n) - 1)
      ends.append(x.ends[last].tolist())
    # The last is of both turns' ends.
    common = sorted({*s.ends[:-1].tolist()} & {*t.ends[:-1].tolist()} - {0})
    assert ends[0] == ends[1] == [*common, len(s.text)]


@pytest.mark.parametrize('name', ['tiny', 'pieces', 'gpt2', 'mistral'])
def test_one_tokenizer_gives_the_identity(kind, name):
  for text in kind(name).texts:
    s, t = both(kind, name, name, text)
    n = len(s.ends)
    for found in (*align.exact_pairs(s, t), *align.spans(s, t)):
      assert found.tolist() == [*range(n)]
    words = [kind(name).spelling.strings[i] for i in kind(name).ids(text)]
    rows, columns, distances = align.dtw(words, words)
    assert rows.tolist() == columns.tolist() == [*range(n - 1)]
    assert not distances.any()


@pytest.mark.parametrize('pair', MADE + REAL[:3], ids='-'.join)
def test_what_is_cut_has_no_partner(kind, pair):
  """Of rows whose ids are cut, and of the alignment of whole rows."""
  for text in texts(kind, *pair):
    s_ids, t_ids = ([*kind(x).ids(text), kind(x).end] for x in pair)
    s, t = both(kind, *pair, text)
    whole = align.spans(s, t)
    for part in (0.3, 0.6, 1):
      # One side reaches further than the other; one has all and its end.
      n, m = int(len(s_ids) * part), int(len(t_ids) * (1 - part / 2))
      cut = [
        spelling.read(kind(x).spelling, ids[:k])
        for x, ids, k in zip(pair, (s_ids, t_ids), (n, m), strict=True)
      ]
      found = align.spans(*cut)
      for a, b in zip(align.cut(*whole, n, m), found, strict=True):
        np.testing.assert_array_equal(a, b)
      i, j = align.exact_pairs(*cut)
      every = zip(*align.exact_pairs(s, t), strict=True)
      assert [*zip(i, j, strict=True)] == [
        (a, b) for a, b in every if a < n and b < m
      ]


def test_characters_in_another_normal_form(kind):
  """Tokens that hold none are paired; those that do are of one piece."""
  tiny = kind('tiny')
  s, t = tiny.read('cafe\u0301 the'), tiny.read('caf\u00e9 the')
  assert [*s.text[3:6]] == [0x65, 0xCC, 0x81]
  pairs = align.exact_pairs(s, t)
  s_words, t_words = spoken(s), spoken(t)
  found = [(s_words[i], t_words[j]) for i, j in zip(*pairs, strict=True)]
  assert found[:3] == [(x, x) for x in (b'c', b'a', b'f')]
  assert found[3:] == [(x, x) for x in t_words[5:]]  # After b'\xc3', b'\xa9'.
  s_n, t_n = align.spans(s, t)
  assert s_n.tolist() == [0, 1, 2, 3, 3, 3, *range(4, s_n[-1] + 1)]
  assert t_n.tolist() == [0, 1, 2, 3, 3, *range(4, s_n[-1] + 1)]


def test_text_that_only_one_side_has(kind):
  """A blank that a tokenizer puts inside, where a special token is cut up."""
  tiny, pieces = kind('tiny'), kind('pieces')
  s = tiny.read('a<s>b')
  ids = [*pieces.ids('a<'), *pieces.ids('s>b'), pieces.end]
  t = spelling.read(pieces.spelling, ids)
  assert t.text == b' a< s>b'
  s_n, t_n = align.spans(s, t)
  assert s_n.tolist() == [*range(6)]
  assert spoken(t)[1:5] == [b'a', b'<', b' ', b's']
  assert t_n[1:].tolist() == [0, 1, 2, 2, 3, 4, 5]
  assert align.exact_pairs(s, t)[0].tolist() == [*range(6)]


def test_no_partner_for_bytes_that_are_no_text(kind):
  tiny = kind('tiny')
  half = tiny.ids('\u00e9')[:1]
  ids = [*tiny.ids('a'), *half, *tiny.ids('bc'), tiny.end]
  s = spelling.read(tiny.spelling, ids)
  t = tiny.read('abc')
  assert [x.tolist() for x in align.exact_pairs(s, t)] == [
    [0, 2, 3, 4],
    [0, 1, 2, 3],
  ]
  assert align.spans(s, t)[0].tolist() == [0, -1, -1, 2, 3]
  assert align.spans(s, t)[1].tolist() == [0, -1, 2, 3]
  # Of one token, some bytes may be text.
  s = dataclasses.replace(t, legible=np.array([True, False, True, True]))
  assert align.exact_pairs(s, t)[0].tolist() == [0, 2, 3]
  assert align.spans(s, t)[1].tolist() == [0, -1, 2, 3]


@pytest.mark.parametrize('function', [align.exact_pairs, align.spans])
def test_the_ends_of_turns_may_be_left_apart(kind, function):
  s, t = both(kind, 'tiny', 'pieces', 'ab')
  s_n, t_n = function(s, t, ends=False)
  assert (s_n.tolist(), t_n.tolist()) in (
    ([0, 1], [1, 2]),  # '\u2581' is a token of its own.
    ([0, 1, -1], [0, 0, 1, -1]),
  )
  # Only one of them has ended.
  unended = kind('pieces').read('ab', end=False)
  for a, b in zip(function(s, unended), (s_n, t_n), strict=True):
    assert a.tolist() == b.tolist()[: len(a)]


def test_texts_with_nothing_in_common(kind):
  s, t = both(kind, 'tiny', 'pieces', 'aaa')[0], kind('pieces').read('bb')
  assert align.exact_pairs(s, t)[0].tolist() == [3]  # Their ends.
  s, t = (kind(x).read('', end=False) for x in ('tiny', 'pieces'))
  for found in (*align.exact_pairs(s, t), *align.spans(s, t)):
    assert found.tolist() == []


def plain_dtw(rows, columns):
  """Cell by cell."""

  def distance(a, b):
    before = [*range(len(b) + 1)]
    for i, x in enumerate(a, start=1):
      here = [i]
      for j, y in enumerate(b):
        edits = before[j] + (x != y), before[j + 1] + 1, here[j] + 1
        here.append(min(edits))
      before = here
    return before[-1]

  cost = {
    (i, j): distance(a, b)
    for i, a in enumerate(rows)
    for j, b in enumerate(columns)
  }
  total, path = {}, {}
  for i, j in cost:
    steps = [c for c in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if c in cost]
    best = min(steps, key=total.get, default=None)
    total[i, j] = cost[i, j] + total.get(best, 0)
    path[i, j] = [*path.get(best, []), (i, j)]
  found = path.get((len(rows) - 1, len(columns) - 1), [])
  return found, [cost[cell] for cell in found]


def test_warping_against_a_plain_one():
  rng = np.random.default_rng(0)

  def words(n):
    return [''.join(rng.choice([*'ab'], rng.integers(4))) for _ in range(n)]

  drawn = [(words(rng.integers(7)), words(rng.integers(7))) for _ in range(60)]
  # From above and from the left it costs the same, and less than by both.
  for rows, columns in [*drawn, (['a', 'bb', 'b'], ['bb', 'a', 'ab'])]:
    i, j, distances = align.dtw(rows, columns)
    path, expected = plain_dtw(rows, columns)
    assert [*zip(i.tolist(), j.tolist(), strict=True)] == path
    assert distances.tolist() == expected


def test_partners_are_single():
  of = np.array([0, 0, 1, 3, 4, 4])
  partner = np.array([5, 6, 6, 7, 8, 9])
  assert align.partners(of, partner, 6).tolist() == [-1, 6, -1, 7, -1, -1]


def test_coverage():
  assert align.coverage(np.array([0, -1, 2, 5])) == 0.75
  assert align.coverage(np.array([], np.int32)) == 0


@pytest.fixture(scope='module')
def golden(shared_dir):
  def load(name):
    return json.loads((shared_dir / f'goldens/{name}.json').read_text())

  return load


def test_published_paths_of_random_strings(golden):
  for case in golden('dtw_synthetic')['cases']:
    i, j, distances = align.dtw(case['rows'], case['columns'])
    assert np.stack([i, j], axis=1).tolist() == case['pairs']
    assert distances.sum() == case['cost']


def test_published_paths_of_responses(kind, golden):
  """GPT-2's bytes against Mistral's characters: of names, not of what they say.

  Published distances compare the vocabularies as they are written, where the
  apostrophe of one is at distance 3 from that of the other; `strings` does not.
  """
  file, marks = golden('alignments_real'), {0x120: '', 0x2581: ''}
  for key, rows in file['dtw'].items():
    student, teacher = (x.partition('=')[2] for x in key.split(','))
    s, t = kind(student), kind(teacher)
    t_strings, s_strings = spelling.strings(t.spelling, s.spelling)
    mixed = (s.spelling.written is None) != (t.spelling.written is None)
    if mixed:
      t_strings, s_strings = (
        [*map(one.tokenizer.convert_ids_to_tokens, range(len(one.tokenizer)))]
        for one in (t, s)
      )
    for n, row in enumerate(rows):
      t_words, s_words = (
        [x.translate(marks) for x in spelling.words(strings, ids)]
        for strings, ids in (
          (t_strings, file['ids'][teacher][n]),
          (s_strings, file['ids'][student][n]),
        )
      )
      i, j, distances = align.dtw(t_words, s_words)
      assert np.stack([i, j], axis=1).tolist() == row['pairs']
      assert distances.sum() == row['cost']


def test_published_paths_with_blanks(kind, golden):
  file = golden('alignments_real')
  for key in ('rows=gpt2,columns=mistral', 'rows=mistral,columns=gpt2'):
    names = [x.partition('=')[2] for x in key.split(',')]
    for n, path in enumerate(file['dtw_raw'][key]):
      words = (
        kind(name).tokenizer.convert_ids_to_tokens(file['ids'][name][n])
        for name in names
      )
      i, j, _ = align.dtw(*words)
      assert np.stack([i, j], axis=1).tolist() == path


def test_published_exact_pairs(kind, golden):
  """All that are published, and, of two kinds of vocabulary, more.

  Published ones compare the vocabularies as they are written, so that GPT-2
  and Mistral agree on nothing after the first line, or the first character
  beyond ASCII.
  """
  file = golden('alignments_real')
  for key, rows in file['exact'].items():
    student, teacher = (x.partition('=')[2] for x in key.split(','))
    for n, (row, response) in enumerate(
      zip(rows, file['responses'], strict=True)
    ):
      s, t = (
        spelling.read(
          kind(name).spelling, [*file['ids'][name][n], kind(name).end]
        )
        for name in (student, teacher)
      )
      i, j = align.exact_pairs(s, t)
      found = np.stack([j, i], axis=1).tolist()
      text = response['text'].rstrip()
      plain = text.isascii() and '\n' not in text
      if {'gpt2', 'mistral'} == {student, teacher} and not plain:
        assert all(pair in found for pair in row)
        assert len(found) > len(row)
      else:
        assert found == row


def test_published_spans(kind, golden):
  file = golden('alignments_real')
  for n, groups in enumerate(file['byte_groups']['a=gpt2,b=qwen3']):
    readings = (
      spelling.read(kind(name).spelling, file['ids'][name][n])
      for name in ('gpt2', 'qwen3')
    )
    for found, group in zip(align.spans(*readings), groups, strict=True):
      expected = [k for k, tokens in enumerate(group) for _ in tokens]
      assert found.tolist() == expected
