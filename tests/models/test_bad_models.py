"""Configs, tokenizers, places and adapters that cannot be: one line each.

Each case is a directory that is good but for one thing; for weights see
test_bad_weights.py.
"""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import models
from gakd_jax.data import encoding
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import Row
from gakd_jax.models import peft, prompts
from tests.refused import refusal
from tests.test_json_file import SOME

pytestmark = pytest.mark.slow  # Many.


@pytest.fixture(scope='module')
def good(tiny_model_dir):
  return tiny_model_dir(dtype='bfloat16')


@pytest.fixture
def model(good, tmp_path):
  """A copy, to be spoilt."""
  return shutil.copytree(good, tmp_path / 'model')


def change(file, **values):
  """Sets values of a JSON file, which may not be there."""
  content = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(content | values))


# config.json; field by field in test_hf_config.py.


@pytest.mark.parametrize('content', SOME.values(), ids=SOME)
def test_a_broken_config_is_refused(model, content):
  (model / 'config.json').write_bytes(content)
  for function in (models.load, models.read_config):
    assert refusal(function, model).startswith(f'{model / "config.json"}: ')


@pytest.mark.parametrize(
  'field',
  [
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers'),
    *('num_attention_heads', 'num_key_value_heads', 'head_dim'),
  ],
)
@pytest.mark.parametrize('value', [2**24, 2**31 - 2, 10**9, 10**12])
def test_absurd_sizes_take_no_memory(model, field, value):
  change(model / 'config.json', layer_types=None, **{field: value})
  assert refusal(models.load, model).startswith(str(model))


@pytest.mark.parametrize('kind', ['llama', 'mistral', 'gemma2', 'gpt2'])
def test_absurd_numbers_of_layers_are_refused(model, kind):
  layers = {'num_hidden_layers': 10**9, 'layer_types': None}
  change(model / 'config.json', model_type=kind, **layers)
  assert 'num_hidden_layers=1000000000 must' in refusal(models.load, model)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('eos_token_id', '<|im_end|>'),
    ('eos_token_id', [2, '3']),
    ('eos_token_id', {}),
    ('eos_token_id', -5),
    ('eos_token_id', 1.5),
    ('bos_token_id', True),
    ('pad_token_id', 10**12),
    ('rms_norm_eps', 2.0),
  ],
)
def test_what_a_config_says_of_others_is_looked_at(model, field, value):
  change(model / 'config.json', **{field: value})
  assert f'config.json: {field}=' in refusal(models.load, model)


# generation_config.json, of which the ends of turns are read.


def encode(path):
  return encoding.encode(
    tokenizer_lib.load(path), Row('Which?', references=('This.',)), 'chat'
  )


@pytest.mark.parametrize('content', SOME.values(), ids=SOME)
def test_a_broken_generation_config_is_refused(model, content):
  file = model / 'generation_config.json'
  file.write_bytes(content)
  for function in (encode, prompts.say_ends):
    assert refusal(function, model).startswith(f'{file}: ')


@pytest.mark.parametrize(
  'ids',
  [
    '2',
    [['a']],
    {},
    -2,
    10**9,
    10**12,
    True,
    1.5,
    [2, 'b'],
    [2, None],
    299 + 5,
  ],
)
def test_ends_that_are_no_tokens_are_refused(model, ids):
  file = model / 'generation_config.json'
  change(file, eos_token_id=ids)
  for function in (encode, prompts.say_ends):
    assert refusal(function, model).startswith(f'{file}: eos_token_id')


def test_what_is_copied_is_looked_at_before_it_takes_a_place(model, tmp_path):
  (model / 'generation_config.json').write_text('[]')
  refusal(models.save, models.load(model), tmp_path / 'out')
  assert [f.name for f in tmp_path.iterdir()] == ['model']


# Tokenizers.


@pytest.mark.parametrize(
  'name', ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']
)
@pytest.mark.parametrize('content', SOME.values(), ids=SOME)
def test_a_broken_file_of_a_tokenizer_is_named(model, name, content):
  (model / name).write_bytes(content)
  assert refusal(encode, model).startswith(f'{model / name}: ')


@pytest.mark.parametrize(
  ('name', 'change_to'),
  [
    ('tokenizer.json', {}),
    ('tokenizer.json', {'model': None}),
    ('tokenizer.json', {'model': {'type': 'Odd', 'vocab': {}}}),
    ('tokenizer.json', {'added_tokens': [{'id': 'x'}]}),
    ('tokenizer.json', {'pre_tokenizer': {'type': 'Odd'}}),
    ('tokenizer_config.json', {'chat_template': 3}),
    ('tokenizer_config.json', {'chat_template': {'default': 3}}),
    ('tokenizer_config.json', {'chat_template': [1]}),
    ('tokenizer_config.json', {'eos_token': 3}),
    ('tokenizer_config.json', {'eos_token': {}}),
    ('tokenizer_config.json', {'tokenizer_class': 3}),
    ('tokenizer_config.json', {'model_max_length': 'long'}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'x': 3}}),
    ('tokenizer_config.json', {'added_tokens_decoder': []}),
    ('tokenizer_config.json', {'extra_special_tokens': 3}),
    ('tokenizer_config.json', {'padding_side': 'middle'}),
  ],
)
def test_a_tokenizer_that_cannot_be_is_refused(model, name, change_to):
  if change_to:
    change(model / name, **change_to)
  else:
    (model / name).write_text('{}')
  (model / 'chat_template.jinja').unlink(missing_ok=True)
  assert refusal(tokenizer_lib.load, model).startswith(str(model))


@pytest.mark.parametrize(
  'name',
  [
    *('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'),
    *('added_tokens.json', 'config.json', 'chat_template.jinja'),
  ],
)
def test_a_pipe_of_a_tokenizer_is_not_waited_for(model, name):
  (model / name).unlink(missing_ok=True)
  os.mkfifo(model / name)
  message = refusal(tokenizer_lib.load, model)
  assert message == f'{model / name}: not a file'


@pytest.mark.parametrize('kind', ['gpt2', 'qwen3', 'gemma', 'llama'])
def test_a_model_without_a_tokenizer_is_refused(tmp_path, kind):
  """Of some families transformers makes one of special tokens alone."""
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': kind}))
  message = refusal(tokenizer_lib.load, tmp_path)
  assert message.startswith(f'{tmp_path}: no tokenizer can be loaded')


@pytest.mark.parametrize(
  'path',
  [
    *('/no/such/place', 'no/such/place', 'x' * 5000, 'a/' * 3000, 'org/none'),
    *(
      '',
      '/dev/null',
      '/',
      'a\nb',
      'a b/c',
      '~nobody/x',
      'org/..',
      'org/name@',
    ),
    *('https://huggingface.co/org/name', 's3://bucket/x', 'C:\\models'),
    *('org/name@../../x', '\x1b[31mred/x'),
  ],
)
def test_places_without_a_model_are_one_line(path):
  for function in (models.load, models.read_config):
    assert 'model' in refusal(function, path)


# Adapters; option by option in test_peft.py.


@pytest.fixture
def adapter(model, tmp_path):
  """`adapter(change of its tensors, **options)`: its directory."""

  def make(spoil=None, **options):
    path = tmp_path / 'adapter'
    path.mkdir(exist_ok=True)
    settings = {
      'peft_type': 'LORA',
      'base_model_name_or_path': str(model),
      'target_modules': ['down_proj'],
      'r': 2,
    }
    (path / peft.CONFIG).write_text(json.dumps(settings | options))
    tensors = {
      f'base_model.model.model.layers.{l}.mlp.down_proj.lora_{side}.weight': x
      for l in range(2)
      for side, x in (
        ('A', np.ones((2, 48), 'f4')),
        ('B', np.ones((32, 2), 'f4')),
      )
    }
    if spoil:
      spoil(tensors)
    safetensors.numpy.save_file(tensors, path / peft.WEIGHTS)
    return path

  return make


A = 'base_model.model.model.layers.1.mlp.down_proj.lora_A.weight'


def _with(value, dtype='float32'):
  def spoil(tensors):
    tensors[A] = tensors[A].astype(dtype)
    tensors[A][1, 5] = value

  return spoil


@pytest.mark.parametrize(
  'spoil',
  [
    *(_with(np.nan), _with(np.inf), _with(-np.inf), _with(np.nan, 'float16')),
    *(_with(np.nan, 'float64'), _with(1e300, 'float64')),
  ],
)
def test_adapters_that_are_not_finite_are_named(adapter, spoil):
  message = refusal(models.load, adapter(spoil))
  assert f'{peft.WEIGHTS}: {A} has values that are not finite' in message


@pytest.mark.parametrize('content', SOME.values(), ids=SOME)
def test_a_broken_adapter_config_is_refused(adapter, content):
  path = adapter()
  (path / peft.CONFIG).write_bytes(content)
  assert refusal(models.load, path).startswith(f'{path / peft.CONFIG}: ')


@pytest.mark.parametrize(
  'options',
  [
    {'r': 10**30},
    {'lora_alpha': 1e308},
    {'lora_alpha': 10**400},
    {'r': 10**400, 'use_rslora': True},
    {'rank_pattern': {'down_proj': 10**9}},
    {'target_modules': '('},
    {'target_modules': []},
    {'target_modules': ['x' * 10**5]},
    {'odd': 'y' * 10**5},
    {'odd': {'y' * 100: ['z' * 100] * 9}},
    {'bias': ['none']},
    {'base_model_name_or_path': '/no/such/base'},
    {'base_model_name_or_path': 'x' * 5000},
    {'base_model_name_or_path': '\x00'},
    {'base_model_name_or_path': ['a']},
    {'revision': 3},
  ],
)
def test_adapters_that_cannot_be_are_refused(adapter, options):
  refusal(models.load, adapter(**options))


def test_an_adapter_of_an_adapter_or_of_itself_is_refused(adapter, tmp_path):
  path = adapter()
  other = shutil.copytree(path, tmp_path / 'other')
  for base in (path, other):
    change(path / peft.CONFIG, base_model_name_or_path=str(base))
    assert refusal(models.load, path).startswith(str(base))


@pytest.mark.parametrize('content', [b'', b'x' * 99, b'\x80\x04pickle', None])
def test_adapters_without_weights_are_refused(adapter, content):
  path = adapter()
  (path / peft.WEIGHTS).unlink()
  if content is not None:
    (path / peft.WEIGHTS).write_bytes(content)
  assert refusal(models.load, path).startswith(f'{path / peft.WEIGHTS}: not')
