import json

import pytest

from gakd_jax.data import encoding, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import Row
from gakd_jax.models import prompts

ROW = Row('Name a bird.')


@pytest.fixture
def directory(tmp_path, tiny_tokenizer_dir):
  """`directory(**config)`: a tokenizer whose config has other values."""

  def make(**changes):
    path = tmp_path / 'model'
    path.mkdir()
    for file in tiny_tokenizer_dir.iterdir():
      (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / 'tokenizer_config.json').read_text())
    (path / 'tokenizer_config.json').write_text(json.dumps(config | changes))
    return path

  return make


def contents(path):
  return {file.name: file.read_bytes() for file in path.iterdir()}


def ends(path):
  return json.loads((path / 'generation_config.json').read_text())


def test_the_end_of_the_template_is_added_to_what_is_listed(directory):
  # A base model with a chat template.
  path = directory(eos_token='<|endoftext|>')
  listed = {'eos_token_id': 0, 'pad_token_id': 0, 'temperature': 0.7}
  (path / 'generation_config.json').write_text(json.dumps(listed))
  prompts.say_ends(path)
  assert ends(path) == listed | {'eos_token_id': [0, 2]}
  before = contents(path)
  prompts.say_ends(path)
  assert contents(path) == before


@pytest.mark.parametrize(
  ('config', 'written'),
  [
    (None, {'eos_token_id': 2}),
    ({'eos_token_id': 2, 'bos_token_id': 1}, None),
    (
      {'eos_token_id': 0, 'bos_token_id': 1, 'pad_token_id': None},
      {'bos_token_id': 1, 'eos_token_id': [0, 2]},
    ),
  ],
)
def test_without_a_list_config_json_is_one(directory, config, written):
  path = directory()
  if config:
    (path / 'config.json').write_text(json.dumps(config))
  prompts.say_ends(path)
  if written is None:
    assert not (path / 'generation_config.json').exists()
  else:
    assert ends(path) == written


def test_a_directory_without_a_tokenizer_stays_as_it_is(tmp_path):
  prompts.say_ends(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('broken')
  prompts.say_ends(tmp_path)
  assert [file.name for file in tmp_path.iterdir()] == ['tokenizer.json']


@pytest.mark.parametrize('name', ['alpaca', 'gakd', 'qwen3'])
def test_a_student_is_asked_as_it_was_trained(directory, name):
  path = directory(eos_token='<|endoftext|>', add_bos_token=False)
  trained = tokenizer_lib.load(path)
  prompt, _ = encoding.encode(trained, ROW, name)
  end = templates.eos_id(name, trained)
  prompts.say_template(path, name)
  prompts.say_ends(path)
  found = tokenizer_lib.load(path)
  turn = [{'role': 'user', 'content': ROW.instruction}]
  assert prompt == found.apply_chat_template(
    turn, add_generation_prompt=True, return_dict=False
  )
  assert found.eos_token_id == end
  listed = ends(path)['eos_token_id']
  assert end in (listed if isinstance(listed, list) else [listed])
  config = json.loads((path / 'tokenizer_config.json').read_text())
  assert config['add_bos_token'] is False  # What is not ours is kept.
  # Trained on once more, nothing changes.
  before = contents(path)
  prompts.say_template(path, 'chat')
  prompts.say_ends(path)
  assert contents(path) == before


def test_a_tokenizer_that_says_it_already_stays_as_it_is(directory):
  path = directory()
  before = contents(path)
  prompts.say_template(path, 'chat')
  assert contents(path) == before


def test_a_bare_tokenizer_gets_a_config(tmp_path, tiny_tokenizer_dir):
  file = tiny_tokenizer_dir / 'tokenizer.json'
  (tmp_path / 'tokenizer.json').write_bytes(file.read_bytes())
  config = {'model_type': 'qwen2', 'eos_token_id': 2}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  bare = tokenizer_lib.load(tmp_path)
  bare.eos_token = '<|im_end|>'
  (tmp_path / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': {'content': '<|endoftext|>', 'special': True}})
  )
  (tmp_path / 'special_tokens_map.json').write_text(
    json.dumps({'eos_token': '<|endoftext|>', 'pad_token': '<|endoftext|>'})
  )
  prompts.say_template(tmp_path, 'gakd')
  found = tokenizer_lib.load(tmp_path)
  assert found.eos_token == '<|im_end|>'
  assert found.get_vocab() == bare.get_vocab()
  special = json.loads((tmp_path / 'special_tokens_map.json').read_text())
  assert special == {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}
