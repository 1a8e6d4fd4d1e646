"""What a decoder block is made of, for all families.

Modules take their sizes and switches from a `transformer.DecoderConfig`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax.models import quantized


class Context(NamedTuple):
  """What the tokens of one forward pass share, in every layer."""

  rope: Any  # of `rope_tables`; None where positions are learned
  mask_BTS: jax.Array  # which keys a token sees
  distance_BTS: jax.Array  # how many positions before the token they are
  window: Any = None  # only keys nearer than this; None: all
  key: Any = None  # of dropout; None: there is none


class Linear(nnx.Module):
  """x W + b, with W of [in, out]; `quantize` makes W one of `quantized`."""

  lora = None  # an adapter that `lora.attach` put here

  def __init__(self, n_in, n_out, rngs, bias=False):
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (n_in, n_out)))
    if bias:
      self.bias = nnx.Param(jnp.zeros(n_out))

  def __call__(self, x, key=None):
    if self.is_quantized:
      y = quantized.matmul(x, self.kernel[...], self.kernel_scale[...])
    else:
      y = x @ self.kernel[...]
    if hasattr(self, 'bias'):
      y += _align(self.bias[...], x.ndim)
    return y if self.lora is None else y + self.lora(x, key)

  @property
  def is_quantized(self):
    return hasattr(self, 'kernel_scale')

  def quantize(self, kind):
    """Of stacked layers, in place."""
    kernel, scale = quantized.quantize(self.kernel[...], kind)
    self.kernel, self.kernel_scale = nnx.Param(kernel), nnx.Param(scale)


class RMSNorm(nnx.Module):
  """Root-mean-square norm, computed in fp32 (arXiv 1910.07467).

  `from_one`: the scale is stored as its distance from 1 (Gemma).
  """

  def __init__(self, size, eps, from_one=False):
    self.eps = eps
    self.from_one = from_one
    self.scale = nnx.Param(jnp.zeros(size) if from_one else jnp.ones(size))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
    scale = _align(self.scale[...], x.ndim)
    if self.from_one:  # Gemma rounds after the product, the others before.
      return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * scale


class LayerNorm(nnx.Module):
  """Mean and variance norm with a bias, computed in fp32 (arXiv 1607.06450)."""

  def __init__(self, size, eps):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(size))
    self.bias = nnx.Param(jnp.zeros(size))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
    return normed * _align(self.scale[...], x.ndim) + _align(
      self.bias[...], x.ndim
    )


def _align(x_D, ndim):
  return x_D.reshape((1,) * (ndim - 1) + (-1,))


def make_norm(config):
  """The norm of a residual stream of `config.width`."""
  if config.layer_norm:
    return LayerNorm(config.width, config.norm_eps)
  return RMSNorm(config.width, config.norm_eps, config.norm_from_one)


def soft_cap(x, cap):
  """cap tanh(x / cap): x where it is small, never beyond the cap (Gemma 2)."""
  return cap * jnp.tanh(x / cap)


def rope_tables(positions_BT, head_dim, theta, scaling=None):
  """Cosines and sines of the rotary embedding, fp32, each [B, T, 1, H/2].

  scaling: None, or Llama 3's (factor, low, high, length): wavelengths above
  length / low are stretched by the factor, those below length / high are kept,
  and between them the two are mixed (arXiv 2407.21783; the formula is that of
  the released code).
  """
  frequency_h = theta ** -(
    jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  )
  if scaling:
    factor, low, high, length = scaling
    turns_h = frequency_h * length / (2 * jnp.pi)
    kept_h = jnp.clip((turns_h - low) / (high - low), 0, 1)
    frequency_h *= kept_h + (1 - kept_h) / factor
  angle_BT1h = (
    positions_BT[:, :, None, None].astype(jnp.float32)
    * frequency_h[None, None, None, :]
  )
  return jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)


def apply_rope(x_BTNH, tables):
  """Rotates halves, as Hugging Face's checkpoints expect (arXiv 2104.09864)."""
  cos, sin = tables
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def attend(q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, cap=None):
  """Softmax attention over keys and values whose heads lie together.

  Scores are fp32, times `scale`, then `soft_cap`ped.
  """
  B, T, N, H = q_BTNH.shape
  K, S = v_BKSH.shape[1:3]
  q_BKGTH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
  # Products of matrices as they lie: of an einsum in another order, XLA makes
  # one that takes several times as long on a CPU.
  score_BKGTS = scale * jnp.matmul(
    q_BKGTH.reshape(B, K, -1, H),
    k_BKHS,
    preferred_element_type=jnp.float32,
  ).reshape(B, K, -1, T, S)
  if cap:
    score_BKGTS = soft_cap(score_BKGTS, cap)
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
    self.query = Linear(c.width, c.heads * c.head_dim, rngs, bias)
    self.key = Linear(c.width, c.kv_heads * c.head_dim, rngs, bias)
    self.value = Linear(c.width, c.kv_heads * c.head_dim, rngs, bias)
    self.out = Linear(c.heads * c.head_dim, c.width, rngs, c.bias)
    if c.qk_norm:
      self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
      self.key_norm = RMSNorm(c.head_dim, c.norm_eps)

  def __call__(self, x_BTD, context, cache=None, slots_BT=None):
    """With a cache, keys and values go to `slots_BT` and all are read.

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
      q_BTNH, k_BTKH = (apply_rope(x, context.rope) for x in (q_BTNH, k_BTKH))
    scale = c.attention_scale or c.head_dim**-0.5
    mask_BTS = context.mask_BTS
    if context.window is not None:
      mask_BTS &= context.distance_BTS < context.window
    if cache is None and c.attention_cap is None:
      y_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None], scale=scale
      )
    else:
      keys_values = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
      if cache is not None:
        k_BKHS, v_BKSH = cache
        rows_B1 = jnp.arange(B)[:, None]
        keys_values = cache = (
          k_BKHS.at[rows_B1, :, :, slots_BT].set(k_BTKH, mode='drop'),
          v_BKSH.at[rows_B1, :, slots_BT].set(v_BTKH, mode='drop'),
        )
      y_BTNH = attend(q_BTNH, *keys_values, mask_BTS, scale, c.attention_cap)
    return self.out(y_BTNH.reshape(B, T, -1), context.key), cache


class MLP(nnx.Module):
  """Feed-forward: act(x W_u) W_d, or gated (arXiv 2002.05202) as
  (act(x W_g) * (x W_u)) W_d.
  """

  def __init__(self, config, rngs):
    c = self.config = config
    if c.gated:
      self.gate = Linear(c.width, c.ff_width, rngs, c.bias)
    self.up = Linear(c.width, c.ff_width, rngs, c.bias)
    self.down = Linear(c.ff_width, c.width, rngs, c.bias)

  def __call__(self, x_BTD, key=None):
    # Of the GELUs, all families take the tanh approximation.
    act = jax.nn.gelu if self.config.gelu else jax.nn.silu
    y_BTF = self.up(x_BTD, key)
    if self.config.gated:
      return self.down(act(self.gate(x_BTD, key)) * y_BTF, key)
    return self.down(act(y_BTF), key)


class Block(nnx.Module):
  """Attention, then feed-forward, each on a normed copy of the residual."""

  def __init__(self, config, rngs):
    self.config = config
    self.attention_norm = make_norm(config)
    self.attention = Attention(config, rngs)
    self.mlp_norm = make_norm(config)
    self.mlp = MLP(config, rngs)
    if config.post_norms:
      self.attention_post_norm = make_norm(config)
      self.mlp_post_norm = make_norm(config)

  def __call__(self, x_BTD, context, cache=None, slots_BT=None):
    y_BTD, cache = self.attention(
      self.attention_norm(x_BTD), context, cache, slots_BT
    )
    if self.config.post_norms:
      y_BTD = self.attention_post_norm(y_BTD)
    x_BTD = x_BTD + y_BTD
    y_BTD = self.mlp(self.mlp_norm(x_BTD), context.key)
    if self.config.post_norms:
      y_BTD = self.mlp_post_norm(y_BTD)
    return x_BTD + y_BTD, cache
