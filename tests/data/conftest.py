"""Tokenizers of every kind, and texts that they split in different places."""

import functools
import json
import shutil
import unicodedata

import pytest

from gakd_jax.data import spelling
from gakd_jax.data import tokenizer as tokenizer_lib

_TEXTS = (
  'The teacher shows the student the answer, then 12345 more.',
  ' two  spaces\n\n\n\ttabs \r\n and a trailing one ',
  'na\u00efve caf\u00e9 \ufb01n \u00bd \u201cquoted\u201d \u2014 \u2026',
  '\u4f60\u597d\u4e16\u754c \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627',
  '\U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f600\U0001f600',
  'Donaudampfschifffahrtsgesellschaft' * 3,
  'control \x00\x07\x1b characters\x7f and a literal <0x41> <s> \u2581 \u0120',
  'cafe\u0301 and cafe\u0301, the \u2126',  # One normal form of two.
  ' ',
  '',
)
_REAL = ('gpt2', 'qwen3', 'mistral', 'tinyllama')


class Kind:
  """A tokenizer, what it spells, and the text that it makes of a text."""

  def __init__(self, name, tokenizer):
    self.name = name
    self.tokenizer = tokenizer
    self.spelling = spelling.of(tokenizer)
    self.end = tokenizer.eos_token_id

  def ids(self, text):
    return self.tokenizer(text, add_special_tokens=False).input_ids

  def read(self, text, end=True):
    ids = self.ids(text) + [self.end] * end
    return spelling.read(self.spelling, ids)

  def normal(self, text):
    """The bytes of a text as this tokenizer changes it."""
    if self.name == 'qwen3':
      text = unicodedata.normalize('NFC', text)
    # Some put a blank before a text unless there is one.
    alike = self.ids('x') == self.ids(' x')
    return text[alike and text.startswith(' ') :].encode()

  @property
  def texts(self):
    """Without those that hold what this tokenizer reads as a special token."""
    special = self.tokenizer.all_special_tokens
    return [x for x in _TEXTS if not any(token in x for token in special)]


@pytest.fixture
def tiny(tiny_tokenizer_dir):
  return tokenizer_lib.load(tiny_tokenizer_dir)


@pytest.fixture
def changed(tiny_tokenizer_dir, tmp_path):
  """The tiny tokenizer, whose tokenizer.json `change` has been given."""

  def load(change):
    path = tmp_path / 'changed'
    shutil.copytree(tiny_tokenizer_dir, path)
    content = json.loads((path / 'tokenizer.json').read_text())
    change(content)
    (path / 'tokenizer.json').write_text(json.dumps(content))
    return tokenizer_lib.load(path)

  return load


@pytest.fixture(scope='session')
def real(shared_dir):
  """name -> one of the real tokenizers, loaded once."""
  return functools.cache(
    lambda name: tokenizer_lib.load(shared_dir / 'tokenizers' / name)
  )


@pytest.fixture(scope='session')
def kind(tiny_tokenizer_dir, pieces_tokenizer_dir, request):
  """`kind(name)`: 'tiny' (bytes), 'pieces' (SentencePiece), or a real one."""
  made = {}

  def get(name):
    if name not in made:
      if name in _REAL:
        folder = request.getfixturevalue('shared_dir') / 'tokenizers' / name
      elif name == 'pieces':
        folder = pieces_tokenizer_dir
      else:
        folder = tiny_tokenizer_dir
      made[name] = Kind(name, tokenizer_lib.load(folder))
    return made[name]

  return get
