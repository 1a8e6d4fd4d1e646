"""config.json as a table: what is read of it, its type and its default.

Defaults are those of transformers, by family, for a key that is absent; `null`
is another thing. What transformers computes is read as it reads it, or refused
by name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from gakd_jax import UserError, json_file

_MUST_BE_THERE = object()


@dataclasses.dataclass(frozen=True)
class Field:
  """A key of config.json.

  expected: its values in words.
  fits: (a value, not null) -> whether it is one of them.
  default: where the key is absent.
  null: whether it may be null, which is read as None.
  computed: {value: what it is here}, where the decoder computes no other;
    None: any that fits.
  alias: another name, which wins where both are there.
  kept: whether it is of others, who read it in what is written of a model.
  """

  expected: str
  fits: Callable
  default: Any = _MUST_BE_THERE
  null: bool = False
  computed: dict | None = None
  alias: str | None = None
  kept: bool = False

  def read(self, hf, name, prefix=''):
    """Its value in a parsed file; `prefix` of its name in what is raised."""
    key = self.alias if self.alias in hf else name
    value = hf.get(key, self.default)
    if value is _MUST_BE_THERE:
      raise UserError(f'field {prefix + key!r} is missing')
    if value is None and self.null:
      return None
    if not self.fits(value):
      null = ' or null' if self.null else ''
      raise UserError(
        f'{prefix}{key}={json_file.shown(value)} must be {self.expected}{null}'
      )
    if self.computed is None:
      return value
    if value not in self.computed:
      known = ', '.join(map(repr, self.computed))
      raise UserError(
        f'{prefix}{key}={json_file.shown(value)} is not supported for '
        f'{hf.get("model_type")} (expected {known})'
      )
    return self.computed[value]


def _is_number(x):
  is_number = isinstance(x, int | float) and not isinstance(x, bool)
  return is_number and abs(x) < 1e38  # not NaN, nor beyond fp32


def _is_whole(x):
  return isinstance(x, int) and not isinstance(x, bool)


def _whole(low, high):
  return functools.partial(
    Field,
    f'a whole number from {low} to {high}',
    lambda x: _is_whole(x) and low <= x <= high,
  )


# Far above all that there is, and what tells of layers still fits in memory.
_size = _whole(1, 2**24)
_layers = _whole(1, 10_000)
_length = _whole(1, 2**31 - 1)
_count = functools.partial(
  Field, 'a whole number from 0 on', lambda x: _is_whole(x) and x >= 0
)
_positive = functools.partial(
  Field, 'a positive number', lambda x: _is_number(x) and x > 0
)
_epsilon = functools.partial(
  Field, 'a number from 0 to 1', lambda x: _is_number(x) and 0 <= x <= 1
)
_flag = functools.partial(Field, 'true or false', lambda x: isinstance(x, bool))
_text = functools.partial(Field, 'a text', lambda x: isinstance(x, str))
_texts = functools.partial(
  Field,
  'a list of texts',
  lambda x: isinstance(x, list) and all(isinstance(i, str) for i in x),
)
_object = functools.partial(Field, 'an object', lambda x: isinstance(x, dict))
# -1 is none, by custom.
_token = Field(
  'a token id',
  lambda x: _is_whole(x) and -1 <= x < 2**31,
  None,
  null=True,
  kept=True,
)
_tokens = dataclasses.replace(
  _token,
  expected='a token id, or a list of these',
  fits=lambda x: all(map(_token.fits, x if isinstance(x, list) else [x])),
)
_NEVER = {False: False}
_ALWAYS = {True: True}

# The names that transformers has for one function.
_SILU = dict.fromkeys(('silu', 'swish'), 'silu')
_GELU = dict.fromkeys(('gelu', 'gelu_python'), 'gelu')
_GELU_TANH = dict.fromkeys(
  (
    'gelu_pytorch_tanh',
    'gelu_new',
    'gelu_fast',
    'gelu_accurate',
    'gelu_python_tanh',
  ),
  'gelu_tanh',
)

_EVERY = {
  'is_causal': _flag(True, computed=_ALWAYS),
  # Layers that differ, and weights under another name.
  'per_layer_config': Field('empty', lambda x: x == {}, None, null=True),
  'transformers_weights': Field('absent', lambda x: False, None, null=True),
  'bos_token_id': _token,
  'eos_token_id': _tokens,
  'pad_token_id': _token,
}
_ROTARY = _EVERY | {
  'tie_word_embeddings': _flag(False),
  'rms_norm_eps': _epsilon(1e-6),
  # See `_rope`.
  'rope_parameters': _object(None, null=True),
  'rope_scaling': _object(None, null=True),
  'rope_theta': _positive(10000.0, null=True),
  'original_max_position_embeddings': _length(None, null=True),
  'partial_rotary_factor': _positive(None, null=True, computed={1.0: 1.0}),
}


def _rotary(vocab, width, ff_width, layers, heads):
  """Of a family with these sizes."""
  return _ROTARY | {
    'vocab_size': _size(vocab),
    'hidden_size': _size(width),
    'intermediate_size': _size(ff_width),
    'num_hidden_layers': _layers(layers),
    'num_attention_heads': _size(heads),
  }


_QWEN = _rotary(151936, 4096, 22016, 32, 32) | {
  'hidden_act': _text('silu', computed=_SILU),
  'num_key_value_heads': _size(32, null=True),
  'max_position_embeddings': _length(32768),
  'use_sliding_window': _flag(False),
  'sliding_window': _length(4096, null=True),
  'max_window_layers': _count(28),
  'layer_types': _texts(None, null=True),
}
_GEMMA = {
  'num_key_value_heads': _size(16),
  'head_dim': _size(256),
  'max_position_embeddings': _length(8192),
  'tie_word_embeddings': _flag(True),
  'attention_bias': _flag(False, computed=_NEVER),
  'use_bidirectional_attention': _flag(None, null=True, computed=_NEVER),
}
QWEN3 = _QWEN | {
  'head_dim': _size(128),
  'attention_bias': _flag(False, computed=_NEVER),
}
QWEN2 = _QWEN | {'head_dim': _size(None, null=True)}
LLAMA = _rotary(32000, 4096, 11008, 32, 32) | {
  'hidden_act': _text('silu', computed=_SILU),
  'num_key_value_heads': _size(None, null=True),
  'head_dim': _size(None, null=True),
  'max_position_embeddings': _length(2048),
  'attention_bias': _flag(False, computed=_NEVER),
  'mlp_bias': _flag(False, computed=_NEVER),
}
MISTRAL = _rotary(32000, 4096, 14336, 32, 32) | {
  'hidden_act': _text('silu', computed=_SILU),
  'num_key_value_heads': _size(8, null=True),
  'head_dim': _size(None, null=True),
  'max_position_embeddings': _length(131072),
  'sliding_window': _length(4096, null=True),
  'layer_types': _texts(None, null=True),
}
GEMMA = (
  _rotary(256000, 3072, 24576, 28, 16)
  | _GEMMA
  | {
    # The first files said 'gelu' and meant the other.
    'hidden_act': _text(
      'gelu_pytorch_tanh', computed=_GELU_TANH | _GELU | {'gelu': 'gelu_tanh'}
    ),
  }
)
GEMMA2 = (
  _rotary(256000, 2304, 9216, 26, 8)
  | _GEMMA
  | {
    'num_key_value_heads': _size(4),
    'hidden_activation': _text(
      'gelu_pytorch_tanh', computed=_GELU_TANH | _GELU
    ),
    'query_pre_attn_scalar': _size(256),
    'attn_logit_softcapping': _positive(50.0, null=True),
    'final_logit_softcapping': _positive(30.0, null=True),
    'sliding_window': _length(4096, null=True),
    'layer_types': _texts(None, null=True),
  }
)
GPT2 = _EVERY | {
  'vocab_size': _size(50257),
  'n_embd': _size(768, alias='hidden_size'),
  'n_layer': _layers(12, alias='num_hidden_layers'),
  'n_head': _size(12, alias='num_attention_heads'),
  'n_positions': _length(1024, alias='max_position_embeddings'),
  'n_inner': _size(None, null=True),
  'tie_word_embeddings': _flag(True),
  'layer_norm_epsilon': _epsilon(1e-5),
  'activation_function': _text('gelu_new', computed=_GELU_TANH | _GELU),
  'scale_attn_weights': _flag(True, computed=_ALWAYS),
  'scale_attn_by_inverse_layer_idx': _flag(False, computed=_NEVER),
  'add_cross_attention': _flag(False, computed=_NEVER),
}

# Of rope type 'llama3', in the order of `layers.rope_tables`.
LLAMA3 = {
  'factor': _positive(),
  'low_freq_factor': _positive(),
  'high_freq_factor': _positive(),
  'original_max_position_embeddings': _length(),
}


def read(hf, fields):
  """{name: value} of a parsed config.json; checked, and no size left open.

  Instead of its fields of rope, 'rope': (theta, those of `LLAMA3` or None).
  """
  values = {name: field.read(hf, name) for name, field in fields.items()}
  if fields is GPT2:
    _head_dim(values, 'n_embd', 'n_head')
    return values
  width, heads = 'hidden_size', 'num_attention_heads'
  if values['num_key_value_heads'] is None:
    values['num_key_value_heads'] = values[heads]
  if values[heads] % values['num_key_value_heads']:
    raise UserError(
      f'{heads}={values[heads]} is not a multiple of '
      f'num_key_value_heads={values["num_key_value_heads"]}'
    )
  if values['head_dim'] is None:
    values['head_dim'] = _head_dim(values, width, heads)
  if values['head_dim'] % 2:
    raise UserError(f'head_dim={values["head_dim"]} must be even, for rope')
  return values | {'rope': _rope(values)}


def _head_dim(values, width, heads):
  size, rest = divmod(values[width], values[heads])
  if rest:
    raise UserError(
      f'{width}={values[width]} is not a multiple of {heads}={values[heads]}'
    )
  return size


def _rope(values):
  """Of both spellings; the older one wins, and then all of it counts."""
  which = 'rope_scaling' if values['rope_scaling'] else 'rope_parameters'
  rope = values[which] or {}
  by_layer = [k for k in rope if k.endswith('_attention')]
  by_layer += [k for k, v in rope.items() if isinstance(v, dict)]
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if by_layer or kind not in ('default', 'llama3'):
    what = 'a table for' if by_layer else 'rope type'
    raise UserError(
      f'{which}: {what} {json_file.shown((by_layer or [kind])[0])} is not '
      'supported; remove it or use a checkpoint without it'
    )
  at_top = ('rope_theta', 'partial_rotary_factor')
  rope = {name: values[name] for name in at_top} | rope
  _ROTARY['partial_rotary_factor'].read(rope, 'partial_rotary_factor')
  theta = float(_positive().read(rope, 'rope_theta'))
  if kind == 'default':
    return theta, None
  # Where it is beside rope's own fields, transformers takes that one.
  name = 'original_max_position_embeddings'
  outer = {name: values[name]} if values[name] else {}
  rope = {name: values['max_position_embeddings']} | rope | outer
  scaling = {k: f.read(rope, k, f'{which}.') for k, f in LLAMA3.items()}
  if scaling['high_freq_factor'] <= scaling['low_freq_factor']:
    raise UserError(f'{which}: high_freq_factor must be above low_freq_factor')
  return theta, tuple(scaling.values())


def windows(values, size, default):
  """The window of each layer, 0 for none; () if no layer has one.

  size: of all windows; None: there are none.
  default: whether layer l has one if `layer_types` does not say.
  """
  layers = values['num_hidden_layers']
  names = {False: 'full_attention', True: 'sliding_attention'}
  kinds = values.get('layer_types')
  if kinds is None:
    kinds = [names[default(l)] for l in range(layers)]
  if len(kinds) != layers or set(kinds) - set(names.values()):
    raise UserError(
      f'layer_types={json_file.shown(kinds)} must be '
      f'{" or ".join(names.values())} for each of {layers} layers'
    )
  found = tuple(size if k == names[True] else 0 for k in kinds)
  return found if size and any(found) else ()
