"""What a decoder block is made of, for all families.

Modules take their sizes and switches from a `transformer.DecoderConfig`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax.models import quantized


class Linear(nnx.Module):
  """x W + b, with W of [in, out]; `quantize` makes W one of `quantized`.

  It computes in the dtype of x, as all modules here do.
  """

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
      # Of rows and tokens as one: their gradient is then one product, and no
      # activation is transposed for it.
      y = x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(x.dtype)
      y = y.reshape(*x.shape[:-1], -1)
    if hasattr(self, 'bias'):
      y += _align(self.bias[...], x.ndim)
    if self.lora is not None:
      y += self.lora(x, key)
    return y.astype(x.dtype)

  @property
  def dtype(self):
    """Of W, or of what it was before it was quantized."""
    return (self.kernel_scale if self.is_quantized else self.kernel)[...].dtype

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
    return (normed.astype(x.dtype) * scale).astype(x.dtype)


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
    scale, bias = (_align(p[...], x.ndim) for p in (self.scale, self.bias))
    return (normed * scale + bias).astype(x.dtype)


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


def einsum32(spec, a, b):
  """`jnp.einsum` of two arrays of one dtype, in fp32 or better.

  Its gradients are products in the dtype of the arrays: jax alone would widen
  what the fp32 cotangent meets, such as a whole vocabulary head.
  """
  if jnp.finfo(a.dtype).bits >= 32:
    return jnp.einsum(spec, a, b)
  return _einsum32(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum32(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _pull_einsum32(spec, operands, cotangent):
  _, pull = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
  return pull(cotangent.astype(operands[0].dtype))


_einsum32.defvjp(
  lambda spec, a, b: (_einsum32(spec, a, b), (a, b)), _pull_einsum32
)


def rope_frequencies(head_dim, theta, scaling=None):
  """Of the rotary embedding, in radians a token, fp32 [H/2].

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
  return frequency_h


def rope_tables(positions_BT, head_dim, theta, scaling=None):
  """Cosines and sines of the rotary embedding, fp32, each [B, T, 1, H/2]."""
  frequency_h = rope_frequencies(head_dim, theta, scaling)
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
    y_BTF = self.up(x_BTD, key)
    if self.config.gated:
      return self.down(self._act(self.gate(x_BTD, key)) * y_BTF, key)
    return self.down(self._act(y_BTF), key)

  def _act(self, x):
    if self.config.gelu:
      return jax.nn.gelu(x, approximate=not self.config.gelu_exact)
    return jax.nn.silu(x)
