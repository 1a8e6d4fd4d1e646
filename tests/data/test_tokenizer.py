import json
import shutil

import pytest

from gakd_jax import UserError
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import Row

ROW = Row('Name a bird.', 'Not a duck.', ('Crow', 'Raven'))


@pytest.mark.parametrize(
  ('name', 'size', 'eos'),
  [
    ('qwen3', 151669, 151645),
    ('gpt2', 50257, 50256),
    ('mistral', 32000, 2),
    ('tinyllama', 32000, 2),
  ],
)
def test_load_real(real, name, size, eos):
  tokenizer = real(name)
  assert (len(tokenizer), tokenizer.eos_token_id) == (size, eos)


def test_load_without_a_usable_config(tmp_path, tiny, tiny_tokenizer_dir):
  shutil.copy(tiny_tokenizer_dir / 'tokenizer.json', tmp_path)
  bare = tokenizer_lib.load(tmp_path)
  assert bare.get_vocab() == tiny.get_vocab()
  (tmp_path / 'config.json').write_text('{"model_type": "of-tomorrow"}')
  assert tokenizer_lib.load(tmp_path).get_vocab() == tiny.get_vocab()
  with pytest.raises(UserError, match='neither a pad nor an EOS'):
    tokenizer_lib.pad_id(bare)


def test_load_never_asks_for_remote_code(
  tmp_path, tiny_tokenizer_dir, monkeypatch
):
  monkeypatch.setattr('builtins.input', lambda *_: pytest.fail('it asked'))
  shutil.copy(tiny_tokenizer_dir / 'tokenizer.json', tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'Odd',
        'auto_map': {'AutoTokenizer': ['code.Odd', None]},
      }
    )
  )
  with pytest.raises(UserError, match='contains custom code'):
    tokenizer_lib.load(tmp_path)


@pytest.mark.parametrize('path', ['/no/such/place', 'org/none', 'nothing'])
def test_load_fails_in_one_line(path):
  with pytest.raises(UserError) as error:
    tokenizer_lib.load(path)
  assert str(error.value).startswith(f'{path}: no tokenizer can be loaded')
  assert '\n' not in str(error.value)


def test_pad_falls_back_to_eos(tiny):
  assert tokenizer_lib.pad_id(tiny) == tiny.pad_token_id != tiny.eos_token_id
  tiny.pad_token = None
  assert tokenizer_lib.pad_id(tiny) == tiny.eos_token_id


def test_same_tokenizers_pass(tiny, tiny_tokenizer_dir):
  other = tokenizer_lib.load(tiny_tokenizer_dir)
  tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_one_swapped_pair_of_tokens_is_found(tiny, changed):
  def swap(content):
    vocab = content['model']['vocab']
    vocab['A'], vocab['B'] = vocab['B'], vocab['A']

  other = changed(swap)
  assert len(other) == len(tiny)
  first = tiny.convert_tokens_to_ids('A')
  with pytest.raises(
    UserError,
    match=f"a and b .* token {first} is 'A' in the first and 'B' in the other",
  ):
    tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_an_added_token_is_found(tiny, tiny_tokenizer_dir):
  other = tokenizer_lib.load(tiny_tokenizer_dir)
  other.add_tokens(['<new>'])
  with pytest.raises(UserError, match=r"300 is absent .* and '<new>' in"):
    tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_one_vocabulary_with_other_splits_is_found(tiny, changed):
  def drop_merges(content):
    content['model']['merges'] = content['model']['merges'][:1]

  other = changed(drop_merges)
  assert other.get_vocab() == tiny.get_vocab()
  with pytest.raises(UserError, match=r'split .* differently; use a teacher'):
    tokenizer_lib.check_same(tiny, other, 'a', 'b')


def test_real_tokenizers_of_one_size_differ(real):
  mistral, tinyllama = real('mistral'), real('tinyllama')
  assert len(mistral) == len(tinyllama)
  with pytest.raises(UserError, match='have different tokenizers: token'):
    tokenizer_lib.check_same(mistral, tinyllama, 'mistral', 'tinyllama')
  tokenizer_lib.check_same(real('qwen3'), real('qwen3'), 'a', 'b')


def test_ids_are_counted_by_the_largest(tiny, changed):
  def leave_a_hole(content):
    vocab = content['model']['vocab']
    vocab[max(vocab, key=vocab.get)] = 400
    content['model']['merges'] = []

  assert tokenizer_lib.size(tiny) == len(tiny) == 300
  found = changed(leave_a_hole)
  assert (len(found), tokenizer_lib.size(found)) == (300, 401)


def test_what_ends_a_turn_is_part_of_its_identity(tiny_tokenizer_dir, tmp_path):
  shutil.copytree(tiny_tokenizer_dir, tmp_path / 'copy')
  before = tokenizer_lib.identity(tokenizer_lib.load(tmp_path / 'copy'))
  assert before == tokenizer_lib.identity(
    tokenizer_lib.load(tiny_tokenizer_dir)
  )
  file = tmp_path / 'copy/generation_config.json'
  file.write_text('{"eos_token_id": [7, 9]}')
  after = tokenizer_lib.identity(tokenizer_lib.load(tmp_path / 'copy'))
  assert after != before
