"""Model families: how a Hugging Face config reads here, and is written.

A family is a value: the fields that are read of its `config.json`
(`hf_config.py`), a function from these to `DecoderConfig`, one back, and a
table of its tensor names (`tensor_names.py`).
"""

import dataclasses
from collections.abc import Callable

from gakd_jax import UserError, json_file
from gakd_jax.models import hf_config, tensor_names
from gakd_jax.models.transformer import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
  fields: dict[str, hf_config.Field]
  to_config: Callable[[dict], DecoderConfig]  # of `hf_config.read`
  to_hf: Callable[[DecoderConfig], dict]
  names: dict[str, str | tensor_names.Part]
  prefix: str = 'model.'  # of all tensors but the head; some files leave it out
  transposed: bool = True  # linear layers are [out, in]


def _rope_to_hf(c):
  """Both spellings: transformers 5 reads the last, everyone else the others."""
  rope = {'rope_type': 'default'}
  if c.rope_scaling:
    fields = zip(hf_config.LLAMA3, c.rope_scaling, strict=True)
    rope = {'rope_type': 'llama3'} | dict(fields)
  return {
    'rope_theta': c.rope_theta,
    'rope_scaling': rope if c.rope_scaling else None,
    'rope_parameters': rope | {'rope_theta': c.rope_theta},
  }


def _layer_types(c):
  kinds = ('full_attention', 'sliding_attention')
  return [kinds[w > 0] for w in c.windows or (0,) * c.layers]


def _read(hf, family, **switches):
  """What all families but GPT-2 spell alike."""
  theta, scaling = hf['rope']
  return DecoderConfig(
    **{
      'vocab_size': hf['vocab_size'],
      'width': hf['hidden_size'],
      'layers': hf['num_hidden_layers'],
      'heads': hf['num_attention_heads'],
      'kv_heads': hf['num_key_value_heads'],
      'head_dim': hf['head_dim'],
      'ff_width': hf['intermediate_size'],
      'tied_head': hf['tie_word_embeddings'],
      'norm_eps': hf['rms_norm_eps'],
      'max_length': hf['max_position_embeddings'],
      'family': family,
      'qk_norm': False,
      'rope_theta': theta,
      'rope_scaling': scaling,
    }
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
  size = hf['sliding_window'] if hf['use_sliding_window'] else None
  return hf_config.windows(hf, size, lambda l: l >= hf['max_window_layers'])


def _qwen_windows_to_hf(c):
  return {
    'use_sliding_window': bool(c.windows),
    'sliding_window': max(c.windows, default=None),
    'max_window_layers': c.layers,
    'layer_types': _layer_types(c),
  }


def _qwen3(hf):
  return _read(hf, 'qwen3', qk_norm=True, windows=_qwen_windows(hf))


def _qwen3_to_hf(c):
  return _write(c, 'Qwen3', attention_bias=False, **_qwen_windows_to_hf(c))


def _qwen2(hf):
  return _read(hf, 'qwen2', qkv_bias=True, windows=_qwen_windows(hf))


def _qwen2_to_hf(c):
  hf = _write(c, 'Qwen2', **_qwen_windows_to_hf(c))
  if c.head_dim * c.heads == c.width:
    del hf['head_dim']  # A field that it does not have by itself.
  return hf


def _llama(hf):
  return _read(hf, 'llama')


def _llama_to_hf(c):
  return _write(c, 'Llama', attention_bias=False, mlp_bias=False)


def _mistral(hf):
  windows = hf_config.windows(hf, hf['sliding_window'], lambda l: True)
  return _read(hf, 'mistral', windows=windows)


def _mistral_to_hf(c):
  hf = _write(c, 'Mistral', sliding_window=max(c.windows, default=None))
  if len(set(c.windows)) > 1:  # Which transformers calls Ministral.
    hf['layer_types'] = _layer_types(c)
  return hf


def _gelu(activation):
  return {'gelu': True, 'gelu_exact': activation == 'gelu'}


_GEMMA = {'norm_from_one': True, 'scaled_embedding': True}


def _gemma(hf):
  return _read(hf, 'gemma', **_gelu(hf['hidden_act']), **_GEMMA)


def _gemma_to_hf(c):
  # Of its files, 'gelu' is the approximation.
  gelu = 'gelu_python' if c.gelu_exact else 'gelu_pytorch_tanh'
  return _write(
    c, 'Gemma', hidden_act=gelu, hidden_activation=gelu, attention_bias=False
  )


def _gemma2(hf):
  size = hf['sliding_window']
  return _read(
    hf,
    'gemma2',
    post_norms=True,
    windows=hf_config.windows(hf, size, lambda l: l % 2 == 0),
    attention_scale=hf['query_pre_attn_scalar'] ** -0.5,
    attention_cap=hf['attn_logit_softcapping'],
    head_cap=hf['final_logit_softcapping'],
    **_gelu(hf['hidden_activation']),
    **_GEMMA,
  )


def _gemma2_to_hf(c):
  gelu = 'gelu' if c.gelu_exact else 'gelu_pytorch_tanh'
  scalar = (c.attention_scale or c.head_dim**-0.5) ** -2
  return _write(
    c,
    'Gemma2',
    hidden_act=gelu,
    hidden_activation=gelu,
    attention_bias=False,
    query_pre_attn_scalar=round(scalar),
    attn_logit_softcapping=c.attention_cap,
    final_logit_softcapping=c.head_cap,
    # transformers asks for a size even where no layer has a window.
    sliding_window=max(c.windows, default=4096),
    layer_types=_layer_types(c),
  )


def _gpt2(hf):
  heads, width = hf['n_head'], hf['n_embd']
  return DecoderConfig(
    vocab_size=hf['vocab_size'],
    width=width,
    layers=hf['n_layer'],
    heads=heads,
    kv_heads=heads,
    head_dim=width // heads,
    ff_width=hf['n_inner'] or 4 * width,
    tied_head=hf['tie_word_embeddings'],
    rope_theta=0.0,
    norm_eps=hf['layer_norm_epsilon'],
    max_length=hf['n_positions'],
    family='gpt2',
    qk_norm=False,
    qkv_bias=True,
    bias=True,
    gated=False,
    layer_norm=True,
    learned_positions=True,
    **_gelu(hf['activation_function']),
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
    'activation_function': 'gelu' if c.gelu_exact else 'gelu_new',
  }


FAMILIES = {
  'qwen3': Family(hf_config.QWEN3, _qwen3, _qwen3_to_hf, tensor_names.QWEN3),
  'qwen2': Family(hf_config.QWEN2, _qwen2, _qwen2_to_hf, tensor_names.QWEN2),
  'llama': Family(hf_config.LLAMA, _llama, _llama_to_hf, tensor_names.LLAMA),
  'mistral': Family(
    hf_config.MISTRAL, _mistral, _mistral_to_hf, tensor_names.LLAMA
  ),
  'gemma': Family(hf_config.GEMMA, _gemma, _gemma_to_hf, tensor_names.LLAMA),
  'gemma2': Family(
    hf_config.GEMMA2, _gemma2, _gemma2_to_hf, tensor_names.GEMMA2
  ),
  'gpt2': Family(
    hf_config.GPT2,
    _gpt2,
    _gpt2_to_hf,
    tensor_names.GPT2,
    prefix='transformer.',
    transposed=False,
  ),
}
# What is not carried on from a model's source: `pretraining_tp` is of no
# effect, and the others speak of its weights, its layers and its own code.
_LEFT_BEHIND = (
  *('pretraining_tp', 'quantization_config', 'layer_types', 'auto_map'),
)


def config_from_hf(hf, where):
  """`DecoderConfig` of config.json, a dict.

  Raises:
    UserError: for a field that cannot be, or is not computed here; one line,
      which begins with `where`.
  """
  kind = hf.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(
      f'{where}: model_type {json_file.shown(kind)} is not supported; '
      f'supported are {", ".join(sorted(FAMILIES))}'
    )
  family = FAMILIES[kind]
  try:
    return family.to_config(hf_config.read(hf, family.fields))
  except UserError as e:
    raise UserError(f'{where}: {e}') from None


def check(config, where):
  """Refuses a `DecoderConfig` that no config.json of its family can say.

  Nor one that transformers refuses: it asks of two families a width that is a
  multiple of the heads, whatever a head's own width.
  """
  if config.family in ('llama', 'gemma2') and config.width % config.heads:
    raise UserError(
      f'{where}: {config.heads} heads: transformers reads no {config.family} '
      f'model whose width, {config.width}, is no multiple of them; keep '
      'another number'
    )
  written = config_from_hf(config_to_hf(config, {}), where)
  ours, theirs = dataclasses.asdict(config), dataclasses.asdict(written)
  lost = [f'{k}={x!r}' for k, x in ours.items() if theirs[k] != x]
  if lost:
    raise UserError(
      f'{where}: no {config.family} model has {", ".join(lost)}; leave that out'
    )


def config_to_hf(config, source):
  """config.json of a `DecoderConfig`.

  `source`: a parsed one, of which fields stay that say nothing of shape or
  weights, such as token ids.
  """
  family = FAMILIES[config.family]
  ours = {name: f for name, f in family.fields.items() if not f.kept}
  ours |= {f.alias: f for f in ours.values()}
  kept = {
    k: v for k, v in source.items() if k not in ours and k not in _LEFT_BEHIND
  }
  return kept | family.to_hf(config)
