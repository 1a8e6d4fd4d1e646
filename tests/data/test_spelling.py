import json
from types import SimpleNamespace

import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import spelling
from gakd_jax.data import tokenizer as tokenizer_lib

NAMES = ('tiny', 'pieces', 'gpt2', 'qwen3', 'mistral', 'tinyllama')


@pytest.mark.parametrize('name', NAMES)
def test_tokens_cover_every_byte_of_a_text_once(kind, name):
  one = kind(name)
  for text in one.texts:
    found = one.read(text).without_blank()
    assert found.text == one.normal(text)
    assert found.legible.all()
    assert found.ended
    edges = np.append(found.starts, len(found.text))
    np.testing.assert_array_equal(edges[1:], found.ends)
    assert edges[0] == 0
    assert found.starts[-1] == found.ends[-1] == len(found.text)  # its end


def test_published_offsets(kind, shared_dir):
  file = shared_dir / 'goldens/alignments_real.json'
  golden = json.loads(file.read_text())
  for name, rows in golden['byte_offsets'].items():
    for ids, expected in zip(golden['ids'][name], rows, strict=True):
      found = spelling.read(kind(name).spelling, ids)
      offsets = np.stack([found.starts, found.ends], axis=1)
      assert offsets.tolist() == expected


def test_a_token_may_be_half_a_character(kind):
  found = kind('tiny').read('\u00e9')
  assert found.text == b'\xc3\xa9'
  assert found.starts.tolist() == [0, 1, 2]
  found = kind('pieces').read('\u00e9')
  assert found.text == b' \xc3\xa9'
  assert found.without_blank().starts.tolist() == [0, 0, 1, 2]


def test_only_a_blank_that_was_added_is_taken_off(kind):
  assert kind('tiny').read(' the').without_blank().text == b' the'
  assert kind('pieces').read(' the').without_blank().text == b' the'
  # Written by a model that has left it out.
  pieces = kind('pieces')
  ids = pieces.tokenizer.convert_tokens_to_ids(['th', 'e'])
  found = spelling.read(pieces.spelling, ids)
  assert not found.blank
  assert found.text == b'the'


def test_special_tokens_cover_nothing(kind):
  tiny = kind('tiny')
  start = tiny.tokenizer.convert_tokens_to_ids('<|im_start|>')
  beyond = len(tiny.tokenizer) + 3  # Of the model's head alone.
  found = spelling.read(
    tiny.spelling, [start, *tiny.ids('a'), beyond, *tiny.ids('b'), start]
  )
  assert found.text == b'ab'
  assert found.ends.tolist() == [0, 1, 1, 2, 2]
  assert not found.ended


def test_tokens_that_were_added_are_text_as_they_are(tiny_tokenizer_dir):
  tiny = tokenizer_lib.load(tiny_tokenizer_dir)
  tiny.add_tokens(['\u4f60 \u0120'])
  ids = tiny('a\u4f60 \u0120b', add_special_tokens=False).input_ids
  assert len(ids) == 3
  found = spelling.read(spelling.of(tiny), ids)
  assert found.text.decode() == 'a\u4f60 \u0120b'
  assert found.ends.tolist() == [1, 7, 8]


def test_bytes_that_are_no_text_are_left_out(kind):
  tiny = kind('tiny')
  half = tiny.ids('\u00e9')[:1]
  a, b = tiny.ids('a'), tiny.ids('b')
  found = spelling.read(tiny.spelling, a + half + b + [tiny.end])
  assert found.text == b'ab'
  assert found.legible.tolist() == [True, False, True, True]
  assert found.starts.tolist() == [0, 1, 1, 2]
  # Where a row is cut, the character may go on; where it ends, it does not.
  assert spelling.read(tiny.spelling, a + half).text == b'a\xc3'
  assert spelling.read(tiny.spelling, a + half + [tiny.end]).text == b'a'


def test_no_ids_spell_nothing(kind):
  found = spelling.read(kind('pieces').spelling, [])
  assert found.text == b''
  assert not found.ended


def test_strings_are_of_characters_only_where_both_are(kind):
  tiny, pieces = kind('tiny').spelling, kind('pieces').spelling
  (you,) = [i for i, s in enumerate(pieces.written) if s == '\u4f60']
  assert spelling.strings(pieces, pieces)[0][you] == '\u4f60'
  assert spelling.strings(pieces, tiny)[0][you] == '\xe4\xbd\xa0'
  the = pieces.written.index(' the')
  assert spelling.strings(tiny, pieces)[1][the] == ' the'
  # <0x61> is another token than a; <0x01> is the only one.
  strings = spelling.strings(pieces, tiny)[0]
  assert strings[3 + ord('a')] == '<0x61>'
  assert strings[3 + 1] == '\x01'
  assert strings[1] == '<s>'
  assert len({*strings}) == len(strings)


def test_words_of_ids():
  strings = (' a b', None, 'c')
  assert spelling.words(strings, [0, 1, 2, 3]) == ['ab', '', 'c', '']
  found = spelling.words(strings, np.array([0, 2]), blanks=True)
  assert found == [' a b', 'c']


def test_thoughts_are_text_where_their_tokens_are_special(bytes_tokenizer):
  made = bytes_tokenizer('<think></think>', '<end>')
  found = spelling.of(made)
  ids = made('<think>x</think>', add_special_tokens=False).input_ids
  assert len(ids) == 3
  read = spelling.read(found, [*ids, made.eos_token_id])
  assert read.text == b'<think>x</think>'
  assert read.ended


def test_a_tokenizer_of_another_kind(kind):
  decoder = SimpleNamespace(__getstate__=lambda: b'{"type":"WordPiece"}')
  other = SimpleNamespace(
    name_or_path='bert', backend_tokenizer=SimpleNamespace(decoder=decoder)
  )
  with pytest.raises(UserError, match='bert: it is neither byte-level'):
    spelling.of(other)
  other.backend_tokenizer = None
  with pytest.raises(UserError, match='bert: it is neither byte-level'):
    spelling.of(other)
