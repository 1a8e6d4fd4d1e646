"""Attention: what a token may see, and who computes it.

A token sees earlier tokens of its own segment, itself included, and only the
nearest of them where its layer has a window. `Context` says this in so many
words; each backend takes it in another form:

  xla    a mask. The scores, [B, N, T, T] in fp32, exist in every layer.
  cudnn  flash attention on CUDA (arXiv 2205.14135), without the scores. For
         rows of one document a length each, and a window that is known when it
         is compiled; else a mask in the compute dtype, [B, 1, T, T].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import UserError
from gakd_jax.models import layers

BACKENDS = ('auto', 'xla', 'cudnn')


class Context(NamedTuple):
  """What the tokens of one forward pass share, in every layer."""

  rope: Any  # of `layers.rope_tables`; None where positions are learned
  segments_BT: Any = None  # of queries and keys alike; with a cache, None
  slots_BT: Any = None  # with a cache: where tokens go, which is their position
  window: Any = None  # how many positions a token sees, its own included
  key: Any = None  # of dropout; None: there is none
  backend: str = 'xla'  # or 'cudnn'
  packed: bool = True  # False: each row is one document, then padding


def choose_backend(backend, config, dtype, platform=None):
  """'xla' or 'cudnn', of one of `BACKENDS`.

  Args:
    backend: 'auto' is cudnn where that can be had.
    config: the model's `DecoderConfig`.
    dtype: of the computation.
    platform: None is `jax.default_backend()`; of GPUs, those since Ampere.

  Raises:
    UserError: if the backend is unknown, or cudnn asked for by name cannot
      compute this model.
  """
  platform = platform or jax.default_backend()
  if backend not in BACKENDS:
    raise UserError(
      f'config.attention={backend!r} is not known; known are '
      f'{", ".join(BACKENDS)}'
    )
  for obstacle, reason in (
    (platform != 'gpu', f'it needs CUDA, and this is {platform!r}'),
    (
      jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16),
      f'it computes in bfloat16 or float16, not {jnp.dtype(dtype).name}',
    ),
    (
      config.head_dim % 8 or config.head_dim > 128,
      f'head_dim={config.head_dim} is not a multiple of 8 up to 128',
    ),
    (config.attention_cap, f'{config.family} caps its scores'),
  ):
    if obstacle and backend == 'cudnn':
      raise UserError(
        f"config.attention='cudnn': {reason}; take 'xla' or 'auto'"
      )
    if obstacle:
      return 'xla'
  return 'xla' if backend == 'xla' else 'cudnn'


def sees(context, keys):
  """Which of so many keys each token sees; bool [B, T, S]."""
  s_S = jnp.arange(keys)
  if context.slots_BT is None:
    distance_BTS = s_S[None, :, None] - s_S[None, None, :]
  else:
    distance_BTS = context.slots_BT[:, :, None] - s_S[None, None, :]
  mask_BTS = distance_BTS >= 0
  if context.window is not None:
    mask_BTS &= distance_BTS < context.window
  if context.segments_BT is not None:
    segments_BT = context.segments_BT
    mask_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return mask_BTS


def _arguments(context, length):
  """Of `jax.nn.dot_product_attention`, by its implementation."""
  knows_window = context.window is None or isinstance(context.window, int)
  if context.backend == 'cudnn' and not context.packed and knows_window:
    # Of a row without any token, cuDNN would make a softmax of nothing.
    length_B = jnp.maximum(jnp.sum(context.segments_BT > 0, axis=1), 1)
    length_B = length_B.astype(jnp.int32)
    return {
      'is_causal': True,
      'query_seq_lengths': length_B,
      'key_value_seq_lengths': length_B,
      'local_window_size': context.window and (context.window - 1, 0),
      'implementation': 'cudnn',
    }
  # cuDNN takes masks of an even length only.
  backend = 'xla' if length % 2 else context.backend
  mask_BTS = sees(context, length)
  return {'mask': mask_BTS[:, None], 'implementation': backend}


def attention(q_BTNH, k_BTKH, v_BTKH, context, scale, cap=None):
  """Softmax attention over whole sequences; [B, T, N, H].

  Scores are times `scale`, then `layers.soft_cap`ped by `cap`. What comes out
  on padding means nothing.
  """
  T = q_BTNH.shape[1]
  # On a CPU, what jax asks of XLA for fp16 is not there.
  is_fp16 = q_BTNH.dtype == jnp.float16 and context.backend == 'xla'
  if cap is not None or is_fp16:
    return attend(
      q_BTNH,
      k_BTKH.transpose(0, 2, 3, 1),
      v_BTKH.swapaxes(1, 2),
      sees(context, T),
      scale,
      cap,
    )
  return jax.nn.dot_product_attention(
    q_BTNH, k_BTKH, v_BTKH, scale=scale, **_arguments(context, T)
  )


def attend(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, cap=None):
  """Softmax attention over keys and values whose heads lie together.

  Scores are fp32, times `scale`, then `layers.soft_cap`ped.
  """
  B, T, N, H = q_BTNH.shape
  K, S = v_BKSH.shape[1:3]
  q_BKGTH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
  # Products of matrices as they lie: of an einsum in another order, XLA makes
  # one that takes several times as long on a CPU.
  score_BKMS = scale * layers.einsum32(
    'bkmh,bkhs->bkms', q_BKGTH.reshape(B, K, -1, H), k_BKHS
  )
  score_BKGTS = score_BKMS.reshape(B, K, -1, T, S)
  if cap:
    score_BKGTS = layers.soft_cap(score_BKGTS, cap)
  score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS, -jnp.inf)
  weight_BKGTS = jax.nn.softmax(score_BKGTS).astype(v_BKSH.dtype)
  y_BKMH = jnp.matmul(weight_BKGTS.reshape(B, K, -1, S), v_BKSH)
  y_BTKGH = y_BKMH.reshape(B, K, -1, T, H).transpose(0, 3, 1, 2, 4)
  return y_BTKGH.reshape(B, T, N, H)


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
      k_BKHS, v_BKSH = cache
      rows_B1, slots_BT = jnp.arange(B)[:, None], context.slots_BT
      cache = (
        k_BKHS.at[rows_B1, :, :, slots_BT].set(k_BTKH, mode='drop'),
        v_BKSH.at[rows_B1, :, slots_BT].set(v_BTKH, mode='drop'),
      )
      mask_BTS = sees(context, v_BKSH.shape[2])
      y_BTNH = attend(q_BTNH, *cache, mask_BTS, scale, cap)
    return self.out(y_BTNH.reshape(B, T, -1), context.key), cache
