"""Model families: how a Hugging Face config reads here, and is written.

A family is a value: a function from `config.json` to `DecoderConfig`, one
back, and a table of its tensor names (`tensor_names.py`).
"""

import dataclasses
from collections.abc import Callable

from gakd_jax import UserError
from gakd_jax.models import tensor_names
from gakd_jax.models.transformer import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
  to_config: Callable[[dict], DecoderConfig]
  to_hf: Callable[[DecoderConfig], dict]
  names: dict[str, str | tensor_names.Part]
  prefix: str = 'model.'  # of all tensors but the head; some files leave it out
  transposed: bool = True  # linear layers are [out, in]


# The fields of llama3's rope scaling, in the order of `rope_tables`.
_LLAMA3 = (
  'factor',
  'low_freq_factor',
  'high_freq_factor',
  'original_max_position_embeddings',
)


def _rope(hf):
  """{rope_theta, rope_scaling}: transformers 5 has `rope_parameters`."""
  rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'llama3'):
    raise UserError(
      f'config.json: rope type {kind!r} is not supported for '
      f'{hf["model_type"]}; remove it or use a checkpoint without it'
    )
  scaling = tuple(rope[key] for key in _LLAMA3) if kind == 'llama3' else None
  theta = rope.get('rope_theta', hf.get('rope_theta', 10000.0))
  return {'rope_theta': float(theta), 'rope_scaling': scaling}


def _rope_to_hf(c):
  """Both spellings: transformers 5 reads the last, everyone else the others."""
  rope = {'rope_type': 'default'}
  if c.rope_scaling:
    fields = zip(_LLAMA3, c.rope_scaling, strict=True)
    rope = {'rope_type': 'llama3'} | dict(fields)
  return {
    'rope_theta': c.rope_theta,
    'rope_scaling': rope if c.rope_scaling else None,
    'rope_parameters': rope | {'rope_theta': c.rope_theta},
  }


def _refuse(hf, **expected):
  """Refuses, by name, a switch that is not what the decoder computes."""
  for key, value in expected.items():
    if hf.get(key, value) != value:
      raise UserError(
        f'config.json: {key}={hf[key]!r} is not supported for '
        f'{hf["model_type"]} (expected {value!r})'
      )


def _windows(hf, default):
  """The window of each layer, 0 for none; () if no layer has one.

  default: whether layer l has one if `layer_types` does not say.
  """
  size, layers = hf.get('sliding_window'), hf['num_hidden_layers']
  if not size:
    return ()
  kinds = hf.get('layer_types') or [
    'sliding_attention' if default(l) else 'full_attention'
    for l in range(layers)
  ]
  unknown = set(kinds) - {'sliding_attention', 'full_attention'}
  if unknown or len(kinds) != layers:
    raise UserError(
      f'config.json: layer_types={kinds!r} are not supported for '
      f'{hf["model_type"]} (expected sliding_attention or full_attention for '
      f'each of {layers} layers)'
    )
  windows = tuple(size if k == 'sliding_attention' else 0 for k in kinds)
  return windows if any(windows) else ()


def _layer_types(c):
  kinds = ('full_attention', 'sliding_attention')
  return [kinds[w > 0] for w in c.windows or (0,) * c.layers]


def _read(hf, family, **switches):
  """What all families but GPT-2 spell alike."""
  heads = hf['num_attention_heads']
  return DecoderConfig(
    **{
      'vocab_size': hf['vocab_size'],
      'width': hf['hidden_size'],
      'layers': hf['num_hidden_layers'],
      'heads': heads,
      'kv_heads': hf.get('num_key_value_heads') or heads,
      'head_dim': hf.get('head_dim') or hf['hidden_size'] // heads,
      'ff_width': hf['intermediate_size'],
      'tied_head': hf.get('tie_word_embeddings', False),
      'norm_eps': hf.get('rms_norm_eps', 1e-6),
      'max_length': hf.get('max_position_embeddings', 32768),
      'family': family,
      'qk_norm': False,
    }
    | _rope(hf)
    | switches
  )


def _write(c, architecture, **fields):
  """The inverse of `_read`."""
  return {
    'architectures': [architecture + 'ForCausalLM'],
    'model_type': c.family,
    'vocab_size': c.vocab_size,
    'hidden_size': c.width,
    'num_hidden_layers': c.layers,
    'num_attention_heads': c.heads,
    'num_key_value_heads': c.kv_heads,
    'head_dim': c.head_dim,
    'intermediate_size': c.ff_width,
    'tie_word_embeddings': c.tied_head,
    'rms_norm_eps': c.norm_eps,
    'max_position_embeddings': c.max_length,
    'hidden_act': 'silu',
    'attention_dropout': 0.0,
    **_rope_to_hf(c),
    **fields,
  }


def _qwen_windows(hf):
  if not hf.get('use_sliding_window', False):
    return ()
  first = hf.get('max_window_layers', 28)
  return _windows(hf, lambda l: l >= first)


def _qwen_windows_to_hf(c):
  return {
    'use_sliding_window': bool(c.windows),
    'sliding_window': max(c.windows, default=None),
    'max_window_layers': c.layers,
    'layer_types': _layer_types(c),
  }


def _qwen3(hf):
  _refuse(hf, attention_bias=False, hidden_act='silu')
  return _read(
    hf,
    'qwen3',
    head_dim=hf.get('head_dim', 128),
    qk_norm=True,
    windows=_qwen_windows(hf),
  )


def _qwen3_to_hf(c):
  return _write(c, 'Qwen3', attention_bias=False, **_qwen_windows_to_hf(c))


def _qwen2(hf):
  _refuse(hf, hidden_act='silu')
  return _read(hf, 'qwen2', qkv_bias=True, windows=_qwen_windows(hf))


def _qwen2_to_hf(c):
  hf = _write(c, 'Qwen2', **_qwen_windows_to_hf(c))
  del hf['head_dim']  # It has none: width / heads.
  return hf


def _llama(hf):
  _refuse(
    hf,
    attention_bias=False,
    mlp_bias=False,
    hidden_act='silu',
    pretraining_tp=1,
  )
  return _read(hf, 'llama')


def _llama_to_hf(c):
  return _write(
    c, 'Llama', attention_bias=False, mlp_bias=False, pretraining_tp=1
  )


def _mistral(hf):
  _refuse(hf, hidden_act='silu')
  return _read(hf, 'mistral', windows=_windows(hf, lambda l: True))


def _mistral_to_hf(c):
  return _write(c, 'Mistral', sliding_window=max(c.windows, default=None))


_GEMMA = {
  'gelu': True,
  'norm_from_one': True,
  'scaled_embedding': True,
}


def _check_gemma(hf, activation):
  hf = {activation: 'gelu_pytorch_tanh'} | hf
  if hf[activation] == 'gelu':  # Written by mistake for the approximation.
    hf[activation] = 'gelu_pytorch_tanh'
  _refuse(
    hf,
    attention_bias=False,
    use_bidirectional_attention=None,
    **{activation: 'gelu_pytorch_tanh'},
  )


def _gemma(hf):
  _check_gemma(hf, 'hidden_act')
  return _read(
    hf, 'gemma', tied_head=hf.get('tie_word_embeddings', True), **_GEMMA
  )


def _gemma_to_hf(c):
  gelu = 'gelu_pytorch_tanh'
  return _write(
    c, 'Gemma', hidden_act=gelu, hidden_activation=gelu, attention_bias=False
  )


def _gemma2(hf):
  _check_gemma(hf, 'hidden_activation')
  return _read(
    hf,
    'gemma2',
    tied_head=hf.get('tie_word_embeddings', True),
    post_norms=True,
    windows=_windows(hf, lambda l: l % 2 == 0),
    attention_scale=hf.get('query_pre_attn_scalar', 256) ** -0.5,
    attention_cap=hf.get('attn_logit_softcapping', 50.0),
    head_cap=hf.get('final_logit_softcapping', 30.0),
    **_GEMMA,
  )


def _gemma2_to_hf(c):
  gelu = 'gelu_pytorch_tanh'
  scalar = c.attention_scale**-2
  return _write(
    c,
    'Gemma2',
    hidden_act=gelu,
    hidden_activation=gelu,
    attention_bias=False,
    query_pre_attn_scalar=round(scalar),
    attn_logit_softcapping=c.attention_cap,
    final_logit_softcapping=c.head_cap,
    sliding_window=max(c.windows, default=None),
    layer_types=_layer_types(c),
  )


def _gpt2(hf):
  _refuse(
    hf,
    activation_function='gelu_new',
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
  )
  heads, width = hf['n_head'], hf['n_embd']
  return DecoderConfig(
    vocab_size=hf['vocab_size'],
    width=width,
    layers=hf['n_layer'],
    heads=heads,
    kv_heads=heads,
    head_dim=width // heads,
    ff_width=hf.get('n_inner') or 4 * width,
    tied_head=hf.get('tie_word_embeddings', True),
    rope_theta=0.0,
    norm_eps=hf.get('layer_norm_epsilon', 1e-5),
    max_length=hf['n_positions'],
    family='gpt2',
    qk_norm=False,
    qkv_bias=True,
    bias=True,
    gated=False,
    gelu=True,
    layer_norm=True,
    learned_positions=True,
  )


def _gpt2_to_hf(c):
  return {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': c.vocab_size,
    'n_embd': c.width,
    'n_layer': c.layers,
    'n_head': c.heads,
    'n_inner': c.ff_width,
    'n_positions': c.max_length,
    'n_ctx': c.max_length,
    'layer_norm_epsilon': c.norm_eps,
    'tie_word_embeddings': c.tied_head,
    'activation_function': 'gelu_new',
  }


FAMILIES = {
  'qwen3': Family(_qwen3, _qwen3_to_hf, tensor_names.QWEN3),
  'qwen2': Family(_qwen2, _qwen2_to_hf, tensor_names.QWEN2),
  'llama': Family(_llama, _llama_to_hf, tensor_names.LLAMA),
  'mistral': Family(_mistral, _mistral_to_hf, tensor_names.LLAMA),
  'gemma': Family(_gemma, _gemma_to_hf, tensor_names.LLAMA),
  'gemma2': Family(_gemma2, _gemma2_to_hf, tensor_names.GEMMA2),
  'gpt2': Family(
    _gpt2,
    _gpt2_to_hf,
    tensor_names.GPT2,
    prefix='transformer.',
    transposed=False,
  ),
}


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
