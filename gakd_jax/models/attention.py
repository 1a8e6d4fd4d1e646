"""Attention: what a token may see, and who computes it.

A token sees earlier tokens of its own segment, itself included, and only the
nearest of them where its layer has a window. `Context` says this in so many
words; each backend takes it in another form:

  chunked  plain JAX, a block of queries at a time (`scores`): for every model,
           on every platform, with any derivative. Memory grows with T.
  xla      all scores at once, [B, N, T, T] in fp32, with a mask.
  cudnn    flash attention on CUDA (arXiv 2205.14135). For rows of one document
           a length each, and a window that is known when it is compiled.
           Else, `jax.nn` offering no segments, a mask in the compute dtype,
           [B, 1, T, T], up to the length where it is as large as the scores
           that chunked holds (of 16 heads); longer rows are chunked.
  splash   flash attention on TPUs (`splash`), with segments. Where windows
           differ between layers, chunked.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import UserError
from gakd_jax.models import layers, scores

BACKENDS = ('auto', 'chunked', 'xla', 'cudnn', 'splash')
# Of a mask for cuDNN: 8 MiB a row, once, of bf16.
LONGEST_MASK = 2048


class Context(NamedTuple):
  """What the tokens of one forward pass share, in every layer."""

  rope: Any  # of `layers.rope_tables`; None where positions are learned
  segments_BT: Any = None  # of queries and keys alike; with a cache, None
  slots_BT: Any = None  # with a cache: where tokens go, which is their position
  window: Any = None  # how many positions a token sees, its own included
  key: Any = None  # of dropout; None: there is none
  backend: str = 'chunked'  # of `choose_backend`
  groups: int = scores.GROUPS  # of blocks of queries, see `scores.chunked`
  packed: bool = True  # False: each row is one document, then padding


def choose_backend(backend, config, dtype, platform=None):
  """One of `BACKENDS`, but 'auto'.

  Args:
    backend: 'auto' is cudnn or splash where these can be had, else chunked.
    config: the model's `DecoderConfig`.
    dtype: of the computation.
    platform: None is `jax.default_backend()`; of GPUs, those since Ampere.

  Raises:
    UserError: if the backend is unknown, or one that is asked for by name
      cannot compute this model.
  """
  platform = platform or jax.default_backend()
  if backend not in BACKENDS:
    raise UserError(
      f'config.attention={backend!r} is not known; known are '
      f'{", ".join(BACKENDS)}'
    )
  if backend == 'auto':
    backend = {'gpu': 'cudnn', 'tpu': 'splash'}.get(platform, 'chunked')
    return 'chunked' if _obstacle(backend, config, dtype, platform) else backend
  if reason := _obstacle(backend, config, dtype, platform):
    raise UserError(
      f"config.attention={backend!r}: {reason}; take 'chunked' or 'auto'"
    )
  return backend


def _obstacle(backend, config, dtype, platform):
  """Why a backend cannot compute a model; None: it can."""
  dtype = jnp.dtype(dtype)
  if backend == 'splash' and platform != 'tpu':
    return f'it needs a TPU, and this is {platform!r}'
  if backend != 'cudnn':
    return None
  if platform != 'gpu':
    return f'it needs CUDA, and this is {platform!r}'
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f'it computes in bfloat16 or float16, not {dtype.name}'
  if config.head_dim % 8 or config.head_dim > 128:
    return f'head_dim={config.head_dim} is not a multiple of 8 up to 128'
  if config.attention_cap:
    return f'{config.family} caps its scores'
  return None


def _cudnn(q_BTNH, k_BTKH, v_BTKH, context, scale):
  """Through `jax.nn`, with lengths where they say it all, else with a mask."""
  if context.packed or not _is_static(context.window):
    at_T = jnp.arange(q_BTNH.shape[1])
    segments = (context.segments_BT,) * 2
    mask_BTT = scores.sees(at_T[None], at_T, context.window, segments)
    told = {'mask': mask_BTT[:, None]}
  else:
    # Of a row without any token, cuDNN would make a softmax of nothing.
    length_B = jnp.maximum(jnp.sum(context.segments_BT > 0, axis=1), 1)
    length_B = length_B.astype(jnp.int32)
    told = {
      'is_causal': True,
      'query_seq_lengths': length_B,
      'key_value_seq_lengths': length_B,
      'local_window_size': context.window and (context.window - 1, 0),
    }
  return jax.nn.dot_product_attention(
    q_BTNH, k_BTKH, v_BTKH, scale=scale, implementation='cudnn', **told
  )


def _is_static(window):
  return window is None or isinstance(window, int)


def _form(context, T):
  """The backend that computes rows of T tokens."""
  backend, is_static = context.backend, _is_static(context.window)
  if backend == 'splash' and not is_static:
    return 'chunked'
  if backend == 'cudnn' and (context.packed or not is_static):
    # It takes masks of an even length only.
    return 'chunked' if T % 2 or T > LONGEST_MASK else 'cudnn'
  return backend


def attention(q_BTNH, k_BTKH, v_BTKH, context, scale, cap=None):
  """Softmax attention over whole sequences; [B, T, N, H].

  Scores are times `scale`, then `layers.soft_cap`ped by `cap`. What comes out
  on padding means nothing.
  """
  T = q_BTNH.shape[1]
  q_k_v = q_BTNH, k_BTKH, v_BTKH
  form = _form(context, T)
  if form == 'cudnn':
    return _cudnn(*q_k_v, context, scale)
  seen = context.segments_BT, context.window
  if form == 'splash':
    from gakd_jax.models import splash  # Slow to import, and for TPUs alone.

    return splash.attention(*q_k_v, *seen, scale, cap)
  if form == 'chunked':
    return scores.chunked(*q_k_v, *seen, scale, cap, context.groups)
  return scores.whole(*q_k_v, *seen, scale, cap)


class Attention(nnx.Module):
  """Grouped-query attention."""

  def __init__(self, config, rngs):
    c = self.config = config
    bias = c.qkv_bias or c.bias
    n_q, n_kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    self.query = layers.Linear(c.width, n_q, rngs, bias)
    self.key = layers.Linear(c.width, n_kv, rngs, bias)
    self.value = layers.Linear(c.width, n_kv, rngs, bias)
    self.out = layers.Linear(n_q, c.width, rngs, c.bias)
    if c.qk_norm:
      self.query_norm = layers.RMSNorm(c.head_dim, c.norm_eps)
      self.key_norm = layers.RMSNorm(c.head_dim, c.norm_eps)

  def __call__(self, x_BTD, context, cache=None):
    """With a cache, keys and values go to its slots and all are read.

    A head's slots lie together, since every token reads all of them, and keys
    lie transposed; `dot_product_attention` would transpose both first.
    """
    c = self.config
    B, T, _ = x_BTD.shape
    q_BTNH, k_BTKH, v_BTKH = (
      linear(x_BTD, context.key).reshape(B, T, -1, c.head_dim)
      for linear in (self.query, self.key, self.value)
    )
    if c.qk_norm:
      q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
    if context.rope is not None:
      q_BTNH, k_BTKH = (
        layers.apply_rope(x, context.rope) for x in (q_BTNH, k_BTKH)
      )
    scale = c.attention_scale or c.head_dim**-0.5
    cap = c.attention_cap
    if cache is None:
      y_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, context, scale, cap)
    else:
      slots_BT = context.slots_BT
      cache = cache.write(slots_BT, k_BTKH, v_BTKH)
      k_BKHS, v_BKSH, *scales = cache
      slot_S = jnp.arange(v_BKSH.shape[2])
      mask_BTS = scores.sees(slots_BT, slot_S, context.window)
      y_BTNH = scores.attend(
        q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, cap, scales
      )
    return self.out(y_BTNH.reshape(B, T, -1), context.key), cache
