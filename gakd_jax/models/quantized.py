"""Frozen projections in 8 or 4 bits: the base of QLoRA (arXiv 2305.14314).

'int8' has a scale for each output of a projection. 'nf4' has, for each 64
inputs of an output, a scale and 16 levels that lie like a normal distribution;
scales stay in the dtype of the weights, and are not quantized once more.
Embeddings, head, norms and biases stay as they are.

A `layers.Linear` then holds integers as its `kernel`, of the same shape (two of
'nf4' share a byte), and scales as its `kernel_scale`, [1 or blocks, out]. The
number formats are those of qwix.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gakd_jax import UserError

KINDS = ('int8', 'nf4')
_BLOCK = 64


def check(kind, setting):
  """Refuses what is not None or one of `KINDS`, in one line."""
  if kind is not None and kind not in KINDS:
    raise UserError(
      f'{setting}={kind!r} is not known; it is None or one of '
      f'{", ".join(KINDS)}'
    )


@functools.partial(jax.jit, static_argnames='kind')
def quantize(kernel_LIO, kind):
  """(integers, scales) of stacked kernels, layer by layer.

  Blocks are smaller where 64 does not divide the inputs.
  """
  import qwix  # Only where something is quantized.

  n_in = kernel_LIO.shape[1]
  tiles = {0: math.gcd(n_in, _BLOCK)} if kind == 'nf4' else {}

  def column(x_I):
    x = qwix.quantize(
      x_I.astype(jnp.float32), kind, tiled_axes=tiles, scale_dtype=x_I.dtype
    )
    return x.qvalue, x.scale

  return jax.lax.map(_by_column(column), kernel_LIO)


# The backward pass computes W again: kept for it, a W of each layer would be
# the whole model in the compute dtype.
@functools.partial(jax.checkpoint, prevent_cse=False)
def matmul(x, kernel_IO, scale_BO):
  """x W, with W in the dtype of its scales."""
  import qwix

  is_nf4 = kernel_IO.dtype == jnp.uint4
  qtype = 'nf4' if is_nf4 else kernel_IO.dtype

  def column(kernel_I, scale_B):
    return qwix.dequantize(qwix.QArray(kernel_I, scale_B, qtype=qtype))

  return x @ _by_column(column)(kernel_IO, scale_BO)


def _by_column(function):
  """Of whole kernels qwix makes vectors, which no mesh could split."""
  return jax.vmap(function, in_axes=1, out_axes=1)
