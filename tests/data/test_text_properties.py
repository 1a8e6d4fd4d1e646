"""What holds of any text: as templates show it, as two tokenizers read it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import strategies as st

from gakd_jax.data import align, encoding, pipeline, spelling, templates
from gakd_jax.data.records import BadRow
from gakd_jax.data.sources import Row

pytestmark = pytest.mark.slow  # Many.

MADE = ('tiny', 'pieces')
REAL = ('gpt2', 'qwen3', 'mistral', 'tinyllama')
ENDS = ('<|im_end|>', '<|im_start|>', '<|endoftext|>', '<s>', '</s>', '<unk>')
# Texts of pieces that tokenizers merge, cut, write as bytes, or do not know.
PIECES = (
  'the',
  ' the',
  'er',
  ' ',
  '  ',
  '\n',
  '\u4f60',
  'e\u0301',
  '\U0001f600',
)
TEXT = st.text(max_size=12) | st.lists(
  st.sampled_from([*PIECES, '3', '<', '|', '>', '\u2581', '<0x41>']), max_size=8
).map(''.join)
# And of what looks like special tokens, whole, in parts and within each other.
PARTS = ('<', '|', '>', 's>', '</', 'im_end', '<|im_', 'end|>', '|endoftext|>')
SPECIAL = st.lists(st.sampled_from([*ENDS, *PARTS, 'a', ' ']), max_size=8).map(
  ''.join
)
NAMES = ('gakd', 'alpaca', 'chat', 'qwen3')


@pytest.fixture
def shown(kind):
  """`shown(name)`: a tokenizer that has a chat template."""

  def get(name):
    tokenizer = kind(name).tokenizer
    if not tokenizer.chat_template:
      tokenizer.chat_template = (
        '{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}'
        '{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: '
        '{% endif %}'
      )
    return tokenizer

  return get


def special_ids(tokenizer):
  """But what unknown characters become, where it is no end."""
  ids = {*tokenizer.all_special_ids, tokenizer.eos_token_id}
  return ids - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}


@pytest.mark.parametrize('name', MADE)
def test_the_mask_is_of_the_response_and_nothing_else(holds, shown, kind, name):
  tokenizer = shown(name)

  def check(asked, said, template):
    row = Row(asked, references=(said,))
    try:
      prompt, response = encoding.encode(tokenizer, row, template, 'keep')
    except BadRow:
      return
    tokens = pipeline.collate(
      [[(prompt, response)]], len(prompt) + len(response) + 3, 0
    )
    ids, mask = tokens.ids_BT[0], tokens.mask_BT[0]
    assert ids[mask].tolist() == response
    assert ids[~mask].tolist() == [*prompt, 0, 0, 0]
    assert response[-1] == templates.eos_id(template, tokenizer)
    if name == 'tiny':  # Of bytes: nothing is lost.
      assert tokenizer.decode(response[:-1]) == said
      text = templates.prompt_text(template, row, tokenizer)
      assert tokenizer.decode(prompt) == text
    else:
      found = spelling.read(kind(name).spelling, response).without_blank()
      assert found.text == kind(name).normal(said.replace('\u2581', ' '))

  holds(
    check,
    asked=TEXT.filter(str.strip),
    said=TEXT.filter(str.strip),
    template=st.sampled_from([*NAMES, 'raw']),
  )


@pytest.mark.parametrize('name', [*MADE, *REAL])
def test_no_text_is_a_special_token(holds, shown, name):
  tokenizer = shown(name)
  special = special_ids(tokenizer)

  def count(ids):
    return sum(i in special for i in ids)

  def check(asked, said, template):
    row = Row(asked, said, (said,))
    plain = Row('a', 'b' if said.strip() else '', ('c',))
    prompt, response = encoding.encode(tokenizer, row, template)
    assert count(response[:-1]) == 0
    assert count(prompt) == count(
      encoding.encode(tokenizer, plain, template)[0]
    )
    found = encoding.encode_responses(tokenizer, [said], [False], template)
    assert found == [response[:-1]]
    assert encoding.fit_prompt(tokenizer, row, template, 9999) == prompt
    short = encoding.fit_prompt(tokenizer, row, template, len(prompt) - 1)
    assert count(short) <= count(prompt)

  holds(
    check,
    asked=SPECIAL.filter(str.strip),
    said=SPECIAL.map('x'.__add__),
    template=st.sampled_from(NAMES),
  )


@pytest.mark.parametrize('name', [*MADE, *REAL])
def test_other_texts_are_read_as_they_always_were(holds, shown, name):
  """To the id: what is said stands in the one string that a template writes."""
  tokenizer = shown(name)
  tokens = (*tokenizer.all_special_tokens, *templates.TEMPLATES)
  tokens += (*map(str, tokenizer.added_tokens_decoder.values()),)

  def check(asked, said, template):
    if any(token in asked + said for token in tokens):
      return
    row = Row(asked, references=(said,))
    prompt, response = encoding.encode(tokenizer, row, template, 'keep')
    text = templates.prompt_text(template, row, tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert prompt == templates.start(template, tokenizer) + ids
    ids = tokenizer(said, add_special_tokens=False).input_ids
    assert response == [*ids, templates.eos_id(template, tokenizer)]

  holds(
    check,
    asked=TEXT.filter(str.strip),
    said=TEXT.filter(str.strip),
    template=st.sampled_from([*NAMES, 'raw']),
  )


# As two tokenizers read it.


def readings(one, text):
  """The Reading of a text, and its ids."""
  ids = [*one.ids(text), one.end]
  return spelling.read(one.spelling, ids), ids


@pytest.mark.parametrize('name', MADE)
def test_the_bytes_of_tokens_are_those_of_the_text(holds, kind, name):
  one = kind(name)

  def check(text):
    found, ids = readings(one, text)
    assert found.ended
    assert found.legible.all()
    np.testing.assert_array_equal(found.starts[1:], found.ends[:-1])
    assert [found.starts[0], found.ends[-1]] == [0, len(found.text)]
    of = one.spelling
    spelt = [of.bytes[of.starts[i] :][: of.lengths[i]].tobytes() for i in ids]
    assert b''.join(spelt) == found.text
    if name == 'pieces':  # It writes a blank so: the two are one there.
      text = text.replace('\u2581', ' ')
    assert found.without_blank().text == one.normal(text)

  holds(check, text=TEXT.filter(lambda x: not any(e in x for e in ENDS)))


@pytest.mark.parametrize(
  'names',
  [MADE, MADE[::-1], ('tiny', 'tiny'), ('pieces', 'pieces')],
  ids='-'.join,
)
def test_pieces_and_pairs_of_two_readings(holds, kind, names):
  one, other = map(kind, names)

  def check(text, another):
    s, _ = readings(one, text)
    t, _ = readings(other, another)
    for x in align.spans(s, t):
      # All tokens, but those after the last boundary, in order.
      there = x[x >= 0]
      assert {*np.diff(there)} <= {0, 1}
      assert not len(there) or there[0] == 0
    s_n, t_n = align.exact_pairs(s, t)
    assert (np.diff(s_n) > 0).all()
    assert (np.diff(t_n) > 0).all()
    assert [s_n[-1], t_n[-1]] == [len(s.ends) - 1, len(t.ends) - 1]
    for i, j in zip(s_n[:-1], t_n[:-1], strict=True):
      pieces = [
        x.text[x.starts[n] : x.ends[n]].lstrip(b' ')
        for x, n in ((s, i), (t, j))
      ]
      assert pieces[0] == pieces[1]
    if text == another:
      check_same(s, t)

  def check_same(s, t):
    numbers = align.spans(s, t)
    # Both sides are parted, and into as many pieces of the same bytes.
    assert min(map(min, numbers)) == 0
    assert numbers[0][-1] == numbers[1][-1]
    if names[0] == names[1]:
      np.testing.assert_array_equal(numbers[0], numbers[1])
      there = np.flatnonzero(s.ends > s.starts)
      expected = [*there, len(s.ends) - 1]
      np.testing.assert_array_equal(align.exact_pairs(s, t), [expected] * 2)

  texts = TEXT.filter(lambda x: not any(e in x for e in ENDS))
  holds(check, text=texts, another=texts)
  holds(lambda text: check(text, text), text=texts)


def test_paths_of_warping(holds):
  """Steps of one, from corner to corner, of the least cost that there is."""
  words = st.lists(st.sampled_from(['a', 'ab', 'abc', 'x', '']), max_size=6)

  def check(rows, columns):
    i, j, cost = align.dtw(rows, columns)
    if not (rows and columns):
      assert len(i) == len(j) == len(cost) == 0
      return
    assert [i[0], j[0]] == [0, 0]
    assert [i[-1], j[-1]] == [len(rows) - 1, len(columns) - 1]
    steps = {*zip(np.diff(i).tolist(), np.diff(j).tolist(), strict=True)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    distances = [
      [align.Levenshtein.distance(a, b) for b in columns] for a in rows
    ]
    assert cost.tolist() == [distances[a][b] for a, b in zip(i, j, strict=True)]
    assert cost.sum() == least(distances)
    if rows == columns:
      assert i.tolist() == j.tolist() == [*range(len(rows))]

  def least(distances):
    n, m = len(distances), len(distances[0])
    best = np.full((n + 1, m + 1), 1 << 30)
    best[0, 0] = 0
    for a in range(n):
      for b in range(m):
        before = min(best[a, b], best[a, b + 1], best[a + 1, b])
        best[a + 1, b + 1] = before + distances[a][b]
    return best[n, m]

  holds(check, rows=words, columns=words)
  holds(lambda words: check(words, words), words=words)


def test_a_row_that_is_cut_keeps_whole_pieces(holds, kind):
  s_kind, t_kind = map(kind, MADE)

  def check(text, s_length, t_length):
    s, _ = readings(s_kind, text)
    t, _ = readings(t_kind, text)
    whole = align.spans(s, t)
    cut = align.cut(*whole, s_length, t_length)
    assert [len(x) for x in cut] == [
      min(s_length, len(whole[0])),
      min(t_length, len(whole[1])),
    ]
    for piece in {*cut[0], *cut[1]} - {-1}:
      for x, y in zip(cut, whole, strict=True):
        assert (x == piece).sum() == (y == piece).sum()

  holds(
    check,
    text=TEXT.filter(lambda x: not any(e in x for e in ENDS)),
    s_length=st.integers(0, 20),
    t_length=st.integers(0, 20),
  )


def test_a_prompt_is_cut_to_any_length(holds, kind):
  tokenizer = kind('tiny').tokenizer

  def check(asked, more, length, template):
    row = Row(asked, more if more.strip() else '', where='f:1')
    least = dataclasses.replace(row, instruction='', input='')
    frame, _ = encoding.encode(tokenizer, least, template)
    whole, _ = encoding.encode(tokenizer, row, template)
    ids = encoding.fit_prompt(tokenizer, row, template, len(frame) + length)
    assert len(ids) <= max(len(frame) + length, 0)
    assert (ids == whole) == (len(whole) <= len(frame) + length)

  holds(
    check,
    asked=TEXT.filter(str.strip),
    more=TEXT,
    length=st.integers(0, 60),
    template=st.sampled_from(['gakd', 'chat', 'alpaca']),
  )
