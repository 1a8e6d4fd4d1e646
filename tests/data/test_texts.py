import json

import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import encoding, sources, store, texts
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow, Rules


@pytest.fixture
def load(tmp_path, tiny):
  """Loads the Texts of records in a file."""

  def load(*records, template='raw', thinking='refuse', **rules):
    file = tmp_path / 'data.jsonl'
    file.write_text(''.join(json.dumps(x) + '\n' for x in records))
    return texts.load(
      str(file),
      sources.identity(file),
      tiny,
      template=template,
      rules=Rules(**rules),
      thinking=thinking,
      root=tmp_path / 'cache',
    )

  return load


def pair(prompt, response):
  return {'prompt': prompt, 'response': response}


def test_texts_of_a_file(load, tiny):
  turns = [{'role': r, 'content': 'x'} for r in ('user', 'assistant') * 2]
  found, bad = load(
    pair('ab', ['cd', 'other']),
    {'messages': turns},
    pair('e', ''),
    pair('é😀', 'f'),
  )
  assert bad == {
    'this template holds one user turn only': 1,
    'empty response': 1,
  }
  assert len(found) == 2
  assert found.places.tolist() == [0, 3]
  eos = tiny.eos_token_id
  for text, (prompt, response) in zip(
    found, [('ab', 'cd'), ('é😀', 'f')], strict=True
  ):
    assert text[0].tolist() == tiny(prompt, add_special_tokens=False).input_ids
    assert text[1].tolist() == [
      *tiny(response, add_special_tokens=False).input_ids,
      eos,
    ]
  assert isinstance(found.ids, np.memmap)
  assert found.ids.dtype == np.int32


def test_texts_are_cut_to_what_fits():
  every = texts.of(
    [
      (range(p), range(100, 100 + r))
      for p, r in [(3, 4), (9, 2), (2, 1), (6, 9)]
    ]
  )
  assert every.stats == {'rows': 4, 'prompt_tokens': 20, 'response_tokens': 16}
  same, cut = every.fit(15, 9)
  assert cut == 0
  assert [(len(p), len(r)) for p, r in same] == [(3, 4), (9, 2), (2, 1), (6, 9)]
  fits, cut = every.fit(10, 8)
  assert cut == 1
  assert fits.places.tolist() == [0, 2, 3]
  assert [p.tolist() for p, _ in fits] == [[0, 1, 2], [0, 1], [*range(6)]]
  assert [r.tolist() for _, r in fits][2] == [100, 101, 102, 103]
  few, cut = every.fit(10, 8, prefix=2)
  assert cut == 2
  assert [len(r) for _, r in few] == [2, 1, 2]


def test_chunks_change_nothing(load, monkeypatch):
  records = [pair(f'p{i}', f'r{i}' * (i % 4)) for i in range(20)]
  whole, bad = load(*records)
  monkeypatch.setattr(texts, '_CHUNK', 3)
  parts, bad_too = load(*records, turns='all')  # Another key.
  assert bad == bad_too == {'empty response': 5}
  assert parts.digest == whole.digest
  assert [x[1].tolist() for x in parts] == [x[1].tolist() for x in whole]


def test_a_bad_row_is_raised_when_asked(load):
  rows = [pair('a', 'b'), pair('c', '')]
  with pytest.raises(BadRow, match=r'data.jsonl:2: empty response'):
    load(*rows, on_bad_row='fail')
  turns = [{'role': r, 'content': 'x'} for r in ('user', 'assistant') * 2]
  with pytest.raises(BadRow, match=r'data.jsonl:1: .*one user turn'):
    load({'messages': turns}, on_bad_row='fail')


def test_nothing_left(load):
  with pytest.raises(UserError, match=r'no usable row \(2 empty response\)'):
    load(pair('a', ''), pair('b', ''))
  with pytest.raises(UserError, match='it is empty'):
    load()
  with pytest.raises(UserError, match="turns='first': use 'last' or 'all'"):
    load(pair('a', 'b'), turns='first')


def test_thoughts_are_refused_or_kept(load):
  rows = [pair('a', '<think>b</think>c'), pair('a', 'c')]
  found, bad = load(*rows, template='gakd')
  assert found.places.tolist() == [1]
  assert bad.total() == 1
  found, bad = load(*rows, template='gakd', thinking='keep')
  assert len(found) == 2
  assert not bad


@pytest.fixture
def no_encoding(monkeypatch):
  """A list of how many rows were tokenised since."""
  calls, encode = [], encoding.encode_batch

  def spy(tokenizer, rows, *args):
    calls.append(len(rows))
    return encode(tokenizer, rows, *args)

  monkeypatch.setattr(encoding, 'encode_batch', spy)
  return calls


def test_a_data_set_is_tokenised_once(load, no_encoding, tiny, monkeypatch):
  first, _ = load(pair('a', 'b'), pair('', 'c'), pair('c', 'd'))
  assert no_encoding == [2]
  again, bad = load(pair('a', 'b'), pair('', 'c'), pair('c', 'd'))
  assert no_encoding == [2]
  assert bad == {'empty prompt': 1}
  assert again.digest == first.digest
  np.testing.assert_array_equal(again.ids, first.ids)
  # What any text depends on: rows, template, rules, tokenizer, code.
  load(pair('a', 'b'), pair('', 'c'), pair('c', 'e'))
  load(pair('a', 'b'), pair('', 'c'), pair('c', 'e'), template='gakd')
  load(pair('a', 'b'), pair('', 'c'), pair('c', 'e'), need_response=False)
  monkeypatch.setattr(tiny, 'chat_template', 'another')
  load(pair('a', 'b'), pair('', 'c'), pair('c', 'e'))
  monkeypatch.setattr(store, 'code', lambda *_: 'other')
  load(pair('a', 'b'), pair('', 'c'), pair('c', 'e'))
  assert no_encoding == [2] * 6


def test_a_data_set_of_many_files(tiny, tmp_path):
  files = [tmp_path / f'{i}.jsonl' for i in range(300)]
  for file in files:
    file.write_text(json.dumps(pair('a', 'b')))
  found, _ = texts.load(
    files,
    sources.identity(files),
    tiny,
    template='raw',
    rules=Rules(),
    thinking='refuse',
    root=tmp_path / 'cache',
  )
  assert found.sets.tolist() == [*range(300)]


def test_a_tokenizer_is_what_it_holds(tiny, tiny_tokenizer_dir, tmp_path):
  tiny.save_pretrained(tmp_path)
  copy = tokenizer_lib.load(tmp_path)
  assert tokenizer_lib.identity(copy) == tokenizer_lib.identity(tiny)
  copy.add_tokens(['new'])
  assert tokenizer_lib.identity(copy) != tokenizer_lib.identity(tiny)


def conversation(*turns, **rest):
  roles = {'s': 'system', 'u': 'user', 'a': 'assistant'}
  messages = [
    {'role': roles[t[0]], 'content': t, **({'weight': 0} if '-' in t else {})}
    for t in turns
  ]
  return {'messages': messages, **rest}


@pytest.mark.parametrize(
  ('record', 'expected'),
  [
    (
      conversation('s', 'u1', 'a1', 'u2', 'a2', 'u3', 'a3'),
      [('s u1', 'a1'), ('s u1 a1 u2', 'a2'), ('s u1 a1 u2 a2 u3', 'a3')],
    ),
    (conversation('u1', 'a1'), [('u1', 'a1')]),
    # Neither a turn that nobody asked for, nor one that says nothing.
    (
      conversation('a0', 'u1', 'a1', 'a2', 'u3', 'a3'),
      [('a0 u1', 'a1'), ('a0 u1 a1 a2 u3', 'a3')],
    ),
    # Nor what is weighed with 0.
    (
      conversation('u1', 'a1-', 'u2', 'a2', 'u3', 'a3-'),
      [('u1 a1- u2', 'a2')],
    ),
    # References of a last question.
    (
      conversation('u1', 'a1', 'u2', output=['x', 'y']),
      [('u1', 'a1'), ('u1 a1 u2', 'x')],
    ),
    (pair('u', 'a'), [('u', 'a')]),
    (
      {'prompt': 'u2', 'response': 'a2', 'history': [['u1', 'a1']]},
      [('u1', 'a1'), ('u1 a1 u2', 'a2')],
    ),
  ],
)
def test_all_answers_of_a_conversation_are_rows(tmp_path, record, expected):
  file = tmp_path / 'x.jsonl'
  file.write_text(json.dumps(record))
  rows = [row for _, _, row in sources.stream(file, Rules(turns='all'))]
  found = [
    (
      ' '.join(m['content'] for m in r.messages) if r.messages else r.text,
      r.references[0],
    )
    for r in rows
  ]
  assert found == expected
  last = [row for _, _, row in sources.stream(file, Rules())]
  if 'a3-' in expected[-1][0] or '-' in json.dumps(record):
    assert last[0].reason == 'empty response'
  else:
    assert last == rows[-1:]


def test_a_weight_is_0_or_1(tmp_path):
  record = conversation('u1', 'a1')
  record['messages'][1]['weight'] = 0.5
  file = tmp_path / 'x.jsonl'
  file.write_text(json.dumps(record))
  ((_, _, row),) = sources.stream(file, Rules())
  assert row.reason == "a turn's weight is neither 0 nor 1"


def test_rows_are_found_again_by_their_place(tmp_path):
  files = []
  for name in 'ab':
    file = tmp_path / f'{name}.jsonl'
    lines = [pair(f'{name}{i}', '' if i == 1 else 'x') for i in range(3)]
    file.write_text('\n'.join(map(json.dumps, lines)))
    files.append(str(file))
  every = [*sources.stream(files, Rules())]
  assert [number for number, _, _ in every] == [0, 0, 0, 1, 1, 1]
  assert [place for _, place, _ in every] == [*range(6)]
  found = sources.at(files, Rules(), [5, 0, 4])
  assert [getattr(r, 'instruction', None) for r in found] == ['b2', 'a0', None]
  assert isinstance(found[2], BadRow)
  assert sources.at(files, Rules(), []) == []


def test_a_data_set_is_what_it_holds(tmp_path):
  one, two = tmp_path / 'one.jsonl', tmp_path / 'two.jsonl'
  one.write_text(json.dumps(pair('a', 'b')))
  two.write_text(json.dumps(pair('a', 'b')))
  assert sources.identity(one) == sources.identity(two)
  assert sources.identity([one, two]) == 2 * sources.identity(one)
  two.write_text(json.dumps(pair('a', 'c')))
  assert sources.identity(one) != sources.identity(two)
  # A directory is its files; a made-up language what it says.
  folder = tmp_path / 'folder'
  folder.mkdir()
  one.rename(folder / 'one.jsonl')
  before = sources.identity(folder)
  two.rename(folder / 'two.jsonl')
  assert sources.identity(folder) != before
  names = [f'python:tools.synthetic:rows:train:{n}' for n in (3, 3, 4)]
  first, again, other = map(sources.identity, names)
  assert first == again != other
