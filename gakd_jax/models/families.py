"""Model families: how a Hugging Face config and its tensor names read here.

A family is a value: a function from `config.json` to `DecoderConfig`, one
back, and a table from our parameter paths to tensor names. `{}` in a name is
the layer; a path that ends in `kernel` is transposed, since Hugging Face keeps
linear layers as [out, in].
"""

import dataclasses
from collections.abc import Callable

from gakd_jax import UserError
from gakd_jax.models.transformer import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
  to_config: Callable[[dict], DecoderConfig]
  to_hf: Callable[[DecoderConfig], dict]
  names: dict[str, str]


def rope_theta(hf):
  """transformers 5 moved `rope_theta` into `rope_parameters`; read both."""
  rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default':
    raise UserError(
      f'config.json: rope type {kind!r} is not supported for '
      f'{hf["model_type"]}; remove it or use a checkpoint without it'
    )
  return float(rope.get('rope_theta', hf.get('rope_theta', 10000.0)))


def _refuse(hf, **expected):
  """Refuses, by name, a switch that is not what the decoder computes."""
  for key, value in expected.items():
    if hf.get(key, value) != value:
      raise UserError(
        f'config.json: {key}={hf[key]!r} is not supported for '
        f'{hf["model_type"]} (expected {value!r})'
      )


def _qwen3(hf):
  _refuse(hf, attention_bias=False, hidden_act='silu', use_sliding_window=False)
  heads = hf['num_attention_heads']
  return DecoderConfig(
    vocab_size=hf['vocab_size'],
    width=hf['hidden_size'],
    layers=hf['num_hidden_layers'],
    heads=heads,
    kv_heads=hf.get('num_key_value_heads') or heads,
    head_dim=hf.get('head_dim', 128),
    ff_width=hf['intermediate_size'],
    tied_head=hf.get('tie_word_embeddings', False),
    rope_theta=rope_theta(hf),
    norm_eps=hf.get('rms_norm_eps', 1e-6),
    max_length=hf.get('max_position_embeddings', 32768),
    family='qwen3',
  )


def _qwen3_to_hf(c):
  return {
    'architectures': ['Qwen3ForCausalLM'],
    'model_type': 'qwen3',
    'vocab_size': c.vocab_size,
    'hidden_size': c.width,
    'num_hidden_layers': c.layers,
    'num_attention_heads': c.heads,
    'num_key_value_heads': c.kv_heads,
    'head_dim': c.head_dim,
    'intermediate_size': c.ff_width,
    'tie_word_embeddings': c.tied_head,
    # Both spellings: transformers 5 reads the second, everyone else the first.
    'rope_theta': c.rope_theta,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
    'rms_norm_eps': c.norm_eps,
    'max_position_embeddings': c.max_length,
    'max_window_layers': c.layers,
    'layer_types': ['full_attention'] * c.layers,
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'use_sliding_window': False,
  }


_LLAMA_NAMES = {
  'embedding': 'model.embed_tokens.weight',
  'blocks/attention_norm/scale': 'model.layers.{}.input_layernorm.weight',
  'blocks/attention/query/kernel': 'model.layers.{}.self_attn.q_proj.weight',
  'blocks/attention/key/kernel': 'model.layers.{}.self_attn.k_proj.weight',
  'blocks/attention/value/kernel': 'model.layers.{}.self_attn.v_proj.weight',
  'blocks/attention/out/kernel': 'model.layers.{}.self_attn.o_proj.weight',
  'blocks/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  'blocks/mlp/gate/kernel': 'model.layers.{}.mlp.gate_proj.weight',
  'blocks/mlp/up/kernel': 'model.layers.{}.mlp.up_proj.weight',
  'blocks/mlp/down/kernel': 'model.layers.{}.mlp.down_proj.weight',
  'final_norm/scale': 'model.norm.weight',
  'head_weight': 'lm_head.weight',
}
_ATTENTION = 'model.layers.{}.self_attn.'
_QWEN3_NAMES = _LLAMA_NAMES | {
  'blocks/attention/query_norm/scale': _ATTENTION + 'q_norm.weight',
  'blocks/attention/key_norm/scale': _ATTENTION + 'k_norm.weight',
}

FAMILIES = {'qwen3': Family(_qwen3, _qwen3_to_hf, _QWEN3_NAMES)}


def config_from_hf(hf, where):
  """`DecoderConfig` of a parsed config.json; refuses what is not supported."""
  kind = hf.get('model_type')
  if kind not in FAMILIES:
    raise UserError(
      f'{where}: model_type {kind!r} is not supported; '
      f'supported are {", ".join(sorted(FAMILIES))}'
    )
  try:
    return FAMILIES[kind].to_config(hf)
  except KeyError as e:
    raise UserError(f'{where}: field {e.args[0]!r} is missing') from None
