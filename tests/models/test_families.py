"""config.json of either generation in, one that both read out."""

import pytest

from gakd_jax import UserError
from gakd_jax.models import families

# config.json of Qwen3-0.6B.
QWEN3_06B = {
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 151643,
  'eos_token_id': 151645,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 1024,
  'initializer_range': 0.02,
  'intermediate_size': 3072,
  'max_position_embeddings': 40960,
  'max_window_layers': 28,
  'model_type': 'qwen3',
  'num_attention_heads': 16,
  'num_hidden_layers': 28,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': None,
  'tie_word_embeddings': True,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.51.0',
  'use_cache': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}


def read(**changes):
  """The config of `QWEN3_06B` with fields changed, or removed by `...`."""
  hf = {k: v for k, v in (QWEN3_06B | changes).items() if v is not ...}
  return families.config_from_hf(hf, 'dir/config.json')


def test_reads_a_published_config():
  config = read()
  assert (config.width, config.layers, config.ff_width) == (1024, 28, 3072)
  assert (config.heads, config.kv_heads, config.head_dim) == (16, 8, 128)
  assert (config.vocab_size, config.max_length) == (151936, 40960)
  assert (config.rope_theta, config.norm_eps) == (1e6, 1e-6)
  assert config.tied_head
  assert config.family == 'qwen3'


def test_reads_the_spelling_of_transformers_5():
  rope = {'rope_type': 'default', 'rope_theta': 1000000}
  new = {'torch_dtype': ..., 'rope_theta': ..., 'rope_scaling': ...}
  assert read(dtype='bfloat16', rope_parameters=rope, **new) == read()
  other = read(rope_parameters=rope | {'rope_theta': 5.0}, **new)
  assert other.rope_theta == 5.0


def test_absent_fields_have_the_defaults_of_transformers():
  config = read(
    rope_theta=..., tie_word_embeddings=..., num_key_value_heads=None
  )
  assert config.rope_theta == 10000.0
  assert not config.tied_head
  assert config.kv_heads == config.heads


def test_what_is_written_reads_back_the_same():
  config = read(tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=7.0)
  hf = families.FAMILIES['qwen3'].to_hf(config)
  assert families.config_from_hf(hf, '') == config
  # transformers 4 looks here, transformers 5 there.
  assert hf['rope_theta'] == hf['rope_parameters']['rope_theta'] == 7.0


YARN = {'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 1e6}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'model_type': 'mamba'}, ['dir/config.json', "'mamba'", 'qwen3']),
    ({'model_type': ...}, ['dir/config.json', 'model_type']),
    ({'attention_bias': True}, ['attention_bias=True', 'qwen3']),
    ({'hidden_act': 'gelu'}, ["hidden_act='gelu'", 'qwen3']),
    (
      {'use_sliding_window': True, 'sliding_window': 8, 'layer_types': ['x']},
      ['layer_types', 'full_attention'],
    ),
    ({'rope_scaling': {'type': 'linear'}}, ["'linear'"]),
    ({'rope_parameters': YARN}, ["'yarn'"]),
    ({'hidden_size': None}, ['dir/config.json', 'hidden_size=None']),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_refuses_by_name_what_it_does_not_compute(changes, words):
  with pytest.raises(UserError) as e:
    read(**changes)
  assert '\n' not in str(e.value)
  for word in words:
    assert word in str(e.value)
