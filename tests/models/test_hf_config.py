"""config.json, field by field: absent, null, of a wrong type, out of range."""

import copy
import json

import jax
import numpy as np
import pytest

from gakd_jax import UserError, models
from gakd_jax.models import families, hf_config
from gakd_jax.models.transformer import split

_ROTARY = {
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}
_GPT2 = {'vocab_size': 40, 'n_embd': 16, 'n_layer': 2, 'n_head': 4}
KINDS = sorted(families.FAMILIES)
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
}


def file_of(kind, **changes):
  """A small config.json with fields changed, or removed by `...`."""
  hf = {'model_type': kind} | (_GPT2 if kind == 'gpt2' else _ROTARY) | changes
  return {k: copy.deepcopy(v) for k, v in hf.items() if v is not ...}


def read(kind, **changes):
  return families.config_from_hf(file_of(kind, **changes), 'dir/config.json')


def names_of(kind):
  """Of all fields, aliases too."""
  fields = families.FAMILIES[kind].fields
  return [*fields, *(f.alias for f in fields.values() if f.alias)]


def refusal(kind, **changes):
  with pytest.raises(UserError) as e:
    read(kind, **changes)
  message = str(e.value)
  assert message.startswith('dir/config.json: ')
  assert '\n' not in message
  assert len(message) < 400
  return message


@pytest.mark.parametrize('kind', KINDS)
def test_a_wrong_type_is_one_line_that_names_the_field(kind):
  numbers = [['x' * 1000] * 1000, 'x', {'x': 1}, True, float('nan')]
  for name in names_of(kind):
    field = next(
      f
      for n, f in families.FAMILIES[kind].fields.items()
      if name in (n, f.alias)
    )
    for value in numbers:
      if not field.fits(value):
        assert name in refusal(kind, **{name: value})
    if not field.null:
      assert name in refusal(kind, **{name: None})


@pytest.mark.parametrize(
  ('kind', 'changes', 'word'),
  [
    ('llama', {'hidden_size': 0}, 'hidden_size=0'),
    ('llama', {'hidden_size': -16}, 'hidden_size=-16'),
    ('llama', {'hidden_size': 16.0}, 'hidden_size=16.0'),
    ('llama', {'num_hidden_layers': True}, 'num_hidden_layers=True'),
    ('llama', {'num_hidden_layers': '2'}, "num_hidden_layers='2'"),
    ('llama', {'rms_norm_eps': True}, 'rms_norm_eps=True'),
    ('llama', {'rms_norm_eps': '1e-6'}, "rms_norm_eps='1e-6'"),
    ('llama', {'rms_norm_eps': -1.0}, 'rms_norm_eps=-1.0'),
    ('llama', {'tie_word_embeddings': 1}, 'tie_word_embeddings=1'),
    ('mistral', {'sliding_window': [8, None]}, 'sliding_window=[8, None]'),
    ('llama', {'hidden_size': 18}, 'num_attention_heads=4'),
    ('llama', {'hidden_size': 10**400}, 'hidden_size='),
    ('llama', {'num_key_value_heads': 3}, 'num_key_value_heads=3'),
    ('llama', {'head_dim': 5}, 'head_dim=5 must be even'),
    ('llama', {'rms_norm_eps': 10**400}, 'rms_norm_eps='),
    ('llama', {'rope_theta': 0}, 'rope_theta=0'),
    ('llama', {'rope_theta': None}, 'rope_theta=None'),
    ('llama', {'rope_scaling': LLAMA3 | {'factor': '4'}}, 'scaling.factor='),
    ('llama', {'rope_scaling': {'rope_type': 'llama3'}}, 'factor'),
    ('llama', {'rope_scaling': LLAMA3 | {'low_freq_factor': 4}}, 'high_freq'),
    ('llama', {'rope_parameters': {'rope_type': ['x']}}, "rope type ['x']"),
    ('llama', {'rope_parameters': {'full_attention': {}}}, "'full_attention'"),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ('llama', {'is_causal': False}, 'is_causal=False'),
    ('llama', {'per_layer_config': {'0': {}}}, 'per_layer_config='),
    ('llama', {'model_type': ['llama']}, "model_type ['llama']"),
    ('mistral', {'sliding_window': 0}, 'sliding_window=0'),
    ('gemma2', {'query_pre_attn_scalar': 0}, 'query_pre_attn_scalar=0'),
    ('gemma2', {'final_logit_softcapping': 0.0}, 'final_logit_softcapping=0.0'),
    ('gemma2', {'layer_types': ['full_attention']}, 'layer_types='),
    ('gpt2', {'n_head': 3}, 'n_embd=16'),
    ('gpt2', {'hidden_size': '16'}, "hidden_size='16'"),
  ],
)
def test_what_cannot_be_is_refused_by_name(kind, changes, word):
  assert word in refusal(kind, **changes)


def test_an_absent_window_is_not_a_window_of_null():
  assert read('mistral').windows == (4096, 4096)
  assert read('mistral', sliding_window=None).windows == ()
  assert read('gemma2').windows == (4096, 0)
  used = {'use_sliding_window': True, 'max_window_layers': 1}
  assert read('qwen2', **used).windows == (0, 4096)
  assert read('qwen2').windows == ()


def test_absent_sizes_are_those_of_the_family():
  def of(kind, name):
    wide = {'num_attention_heads': 32, 'hidden_size': 64}
    return getattr(read(kind, num_key_value_heads=..., **wide), name)

  assert [
    of(k, 'kv_heads') for k in ('qwen3', 'llama', 'mistral', 'gemma2')
  ] == [*(32, 32, 8, 4)]
  assert [of(k, 'head_dim') for k in ('qwen3', 'llama', 'gemma')] == [
    128,
    2,
    256,
  ]
  assert of('mistral', 'max_length') == 131072
  sizes = ('vocab_size', 'width', 'ff_width', 'layers', 'heads')
  for kind, expected in {
    'qwen3': (151936, 4096, 22016, 32, 32),
    'llama': (32000, 4096, 11008, 32, 32),
    'gemma2': (256000, 2304, 9216, 26, 8),
    'gpt2': (50257, 768, 4 * 768, 12, 12),
  }.items():
    config = families.config_from_hf({'model_type': kind}, '')
    assert tuple(getattr(config, size) for size in sizes) == expected
  assert read('gpt2').max_length == 1024
  assert read('gpt2', n_inner=None).ff_width == 64


def test_another_name_of_a_size_wins():
  config = read(
    'gpt2',
    hidden_size=32,
    num_hidden_layers=3,
    n_head=...,
    num_attention_heads=2,
  )
  assert (config.width, config.layers, config.heads) == (32, 3, 2)


def test_rope_added_by_hand_counts_alone():
  saved = {'rope_theta': 7.0, 'rope_type': 'default'}
  yarn = {'rope_type': 'yarn', 'factor': 4.0}
  by_hand = {'rope_parameters': saved, 'rope_scaling': yarn}
  assert "rope type 'yarn'" in refusal('qwen3', **by_hand)
  config = read('llama', **by_hand | {'rope_scaling': LLAMA3})
  assert (config.rope_theta, config.rope_scaling[0]) == (10000.0, 4.0)
  assert read('llama', rope_parameters=saved, rope_scaling={}).rope_theta == 7.0


def test_the_length_before_scaling_is_where_transformers_looks():
  def length(**changes):
    return read('llama', max_position_embeddings=64, **changes).rope_scaling[3]

  key = 'original_max_position_embeddings'
  assert length(rope_scaling=LLAMA3) == 64
  assert length(rope_scaling=LLAMA3 | {key: 16}) == 16
  assert length(rope_scaling=LLAMA3 | {key: 16}, **{key: 32}) == 32


def test_names_of_one_function_are_one_function():
  assert read('llama', hidden_act='swish') == read('llama')
  tanh = read('gpt2')
  assert (tanh.gelu, tanh.gelu_exact) == (True, False)
  for name in ('gelu_fast', 'gelu_pytorch_tanh', 'gelu_new', 'gelu_accurate'):
    assert read('gpt2', activation_function=name) == tanh
  assert read('gpt2', activation_function='gelu').gelu_exact
  assert read('gemma2', hidden_activation='gelu').gelu_exact
  assert not read('gemma', hidden_act='gelu').gelu_exact


def test_what_says_nothing_any_more_is_not_carried_on():
  source = file_of(
    'gpt2', hidden_size=32, quantization_config={'bits': 4}, eos_token_id=3
  )
  config = read('gpt2', n_embd=8)
  written = families.config_to_hf(config, source)
  assert families.config_from_hf(written, '') == config
  assert 'quantization_config' not in written
  assert written['eos_token_id'] == 3
  source = file_of('llama', pretraining_tp=2, rope_scaling=LLAMA3)
  config = families.config_from_hf(source, '')
  config = families.config_from_hf(families.config_to_hf(config, source), '')
  assert config == families.config_from_hf(source, '')
  assert 'pretraining_tp' not in families.config_to_hf(config, source)


_VALUES = (
  *(..., None, True, False, 0, 1, -1, 2, 8, 1.0, 2.5, float('nan'), '4', ''),
  *('gelu', 'gelu_new', 'gelu_fast', 'gelu_python', 'gelu_python_tanh'),
  *('gelu_accurate', 'gelu_10', 'quick_gelu', 'silu', 'swish', 'relu'),
  *([], [1, 2], ['full_attention', 'sliding_attention'], ['attention'] * 2),
  *({}, {'rope_type': 'default'}, {'rope_theta': 5.0}, {'rope_theta': None}),
  *({'type': 'yarn', 'factor': 2.0}, {'full_attention': {'rope_theta': 3.0}}),
  *(LLAMA3, LLAMA3 | {'original_max_position_embeddings': 16}),
)


def _theirs(path):
  """What `DecoderConfig` must be by transformers; None where it refuses."""
  import transformers
  from huggingface_hub.errors import StrictDataclassError

  try:
    c = transformers.AutoConfig.from_pretrained(path)
  except (StrictDataclassError, ValueError, TypeError, KeyError):
    return None
  values = {
    'vocab_size': c.vocab_size,
    'width': c.hidden_size,
    'layers': c.num_hidden_layers,
    'heads': c.num_attention_heads,
    'tied_head': c.tie_word_embeddings,
    'max_length': c.max_position_embeddings,
  }
  if c.model_type == 'gpt2':
    ff_width = 4 * c.n_embd if c.n_inner is None else c.n_inner
    return values | {'ff_width': ff_width, 'norm_eps': c.layer_norm_epsilon}
  head_dim = getattr(c, 'head_dim', c.hidden_size // c.num_attention_heads)
  if head_dim is None:  # The model does not.
    return None
  values |= {
    'kv_heads': c.num_key_value_heads,
    'head_dim': head_dim,
    'ff_width': c.intermediate_size,
    'norm_eps': c.rms_norm_eps,
    'rope_theta': c.rope_parameters['rope_theta'],
    'windows': _their_windows(c),
  }
  c.standardize_rope_params()  # As the model does once more.
  rope = c.rope_parameters
  is_scaled = rope['rope_type'] == 'llama3'
  scaling = tuple(rope[k] for k in hf_config.LLAMA3) if is_scaled else None
  values['rope_scaling'] = scaling
  if c.model_type == 'gemma2':
    values |= {
      'attention_scale': c.query_pre_attn_scalar**-0.5,
      'attention_cap': c.attn_logit_softcapping,
      'head_cap': c.final_logit_softcapping,
    }
  return values


def _their_windows(c):
  size = getattr(c, 'sliding_window', None)
  if c.model_type in ('llama', 'gemma') or size is None:
    return ()
  if not hasattr(c, 'layer_types'):  # Mistral; with these, Ministral.
    return (size,) * c.num_hidden_layers
  windows = [size * (k == 'sliding_attention') for k in c.layer_types]
  return tuple(windows) if any(windows) else ()


@pytest.mark.torch
@pytest.mark.parametrize('kind', KINDS)
def test_every_field_reads_as_transformers_reads_it_or_is_refused(
  kind, tmp_path
):
  import transformers

  transformers.logging.set_verbosity_error()
  read_alike = 0
  for name in names_of(kind):
    for value in _VALUES:
      hf = file_of(kind, **{name: value})
      try:
        ours = families.config_from_hf(hf, 'config.json')
      except UserError:  # In one line, as another test has it.
        continue
      (tmp_path / 'config.json').write_text(json.dumps(hf))
      theirs = _theirs(tmp_path)
      if theirs is not None:
        got = {k: getattr(ours, k) for k in theirs}
        assert got == theirs, (name, value)
        read_alike += 1
  assert read_alike > 40


_WINDOW = {'sliding_window': 3, 'num_hidden_layers': 2}
_SAVED = {'rope_theta': 7.0, 'rope_type': 'default'}
_ODD = {
  'swish': ('qwen3', {'hidden_act': 'swish'}),
  'another_head_size': ('qwen2', {'head_dim': 6}),
  'no_length': (
    'llama',
    {'rope_scaling': LLAMA3, 'max_position_embeddings': 16},
  ),
  'length_outside': (
    'llama',
    {
      'rope_scaling': LLAMA3 | {'original_max_position_embeddings': 64},
      'original_max_position_embeddings': 8,
    },
  ),
  'scaling_beside': (
    'llama',
    {'rope_scaling': LLAMA3, 'rope_parameters': _SAVED, 'pretraining_tp': 2},
  ),
  'layer_types_of_mistral': (
    'mistral',
    _WINDOW
    | {'layer_types': ['full_attention', 'sliding_attention'], 'head_dim': 4},
  ),
  'no_window_in_any_layer': (
    'gemma2',
    _WINDOW | {'layer_types': ['full_attention'] * 2, 'head_dim': 8},
  ),
  'exact_gelu_of_gemma2': (
    'gemma2',
    _WINDOW | {'hidden_activation': 'gelu', 'head_dim': 8},
  ),
  'gelu_of_gemma': ('gemma', {'hidden_act': 'gelu', 'head_dim': 8}),
  'exact_gelu_of_gemma': (
    'gemma',
    {'hidden_act': 'gelu_python', 'head_dim': 8},
  ),
  'exact_gelu_of_gpt2': ('gpt2', {'activation_function': 'gelu'}),
  'fast_gelu_of_gpt2': ('gpt2', {'activation_function': 'gelu_fast'}),
  'names_of_gpt2': (
    'gpt2',
    {'hidden_size': 32, 'num_hidden_layers': 1, 'n_positions': 16},
  ),
}


@pytest.mark.torch
@pytest.mark.parametrize('name', _ODD)
def test_odd_files_compute_what_transformers_computes(name, tmp_path):
  """And what is saved of them, too."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  kind, changes = _ODD[name]
  hf = file_of(kind, **changes) | {'initializer_range': 0.4}
  ids_BT = np.random.default_rng(0).integers(0, 40, (2, 12))

  def theirs(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
      return model(torch.tensor(ids_BT)).logits.numpy()

  torch.manual_seed(0)
  file = tmp_path / 'model' / 'config.json'
  file.parent.mkdir()
  file.write_text(json.dumps(hf))
  config = transformers.AutoConfig.from_pretrained(file.parent)
  model = transformers.AutoModelForCausalLM.from_config(config)
  model.save_pretrained(file.parent)
  file.write_text(json.dumps(hf))
  want_BTV = theirs(tmp_path / 'model')
  model = models.load(tmp_path / 'model')
  assert want_BTV.std() > 0.5
  got_BTV = jax.jit(lambda m, ids: m.logits(ids))(model, ids_BT)
  np.testing.assert_allclose(got_BTV, want_BTV, atol=1e-4, rtol=0)
  models.save(model, tmp_path / 'saved')
  np.testing.assert_allclose(
    theirs(tmp_path / 'saved'), want_BTV, atol=1e-4, rtol=0
  )
  assert models.read_config(tmp_path / 'saved') == model.config
  assert jax.tree.leaves(split(model)[1])
