"""Attention in plain JAX: all scores at once, or a block of queries at a time.

A block has all its scores, so there is no softmax to piece together. What is
kept for gradients are queries, keys and values: a block's scores are computed
again when they are needed, as in flash attention (arXiv 2205.14135), and for
gradients of gradients once more. There is no forward mode (`jax.jvp`).
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from gakd_jax.models import layers

# Measured on a CPU, forward and backward, four rows of 8 heads: 64 queries at
# a time took 0.3 of the time of all at once at T = 2048 (0.5 at 512, no more at
# 128), and blocks of 32, 128 and 256 more than 64.
BLOCK = 64
# Blocks see keys up to the end of their group: of 8, they read 12 % of the
# keys in vain.
GROUPS = 8


def sees(at_BT, at_S, window=None, segments=None):
  """Which keys each query sees; bool [B or 1, T, S].

  Args:
    at_BT: positions of queries; one row if they are those of all rows.
    at_S: positions of keys.
    window: how many positions a query sees, its own included; None: all.
    segments: of queries [B, T] and of keys [B, S]; None: all are of one.
  """
  distance_BTS = at_BT[:, :, None] - at_S[None, None, :]
  mask_BTS = distance_BTS >= 0
  if window is not None:
    mask_BTS &= distance_BTS < window
  if segments is not None:
    of_queries_BT, of_keys_BS = segments
    mask_BTS &= of_queries_BT[:, :, None] == of_keys_BS[:, None, :]
  return mask_BTS


def attend(
  q_BTNH, k_BKHS, v_BKSH, mask_BTS, scale, cap=None, scales=(None, None)
):
  """Softmax attention over keys and values whose heads lie together.

  Scores are fp32, times `scale`, then `layers.soft_cap`ped. scales: of integer
  keys and values, [B, K, S] each, see `caches`.
  """
  B, T, N, H = q_BTNH.shape
  K, S = v_BKSH.shape[1:3]
  q_BKGTH = q_BTNH.reshape(B, T, K, -1, H).transpose(0, 2, 3, 1, 4)
  # Products of matrices as they lie: of an einsum in another order, XLA makes
  # one that takes several times as long on a CPU.
  score_BKMS = scale * layers.einsum32(
    'bkmh,bkhs->bkms',
    q_BKGTH.reshape(B, K, -1, H),
    k_BKHS.astype(q_BTNH.dtype),
  )
  k_scale_BKS, v_scale_BKS = scales
  if k_scale_BKS is not None:
    score_BKMS *= k_scale_BKS[:, :, None]
  score_BKGTS = score_BKMS.reshape(B, K, -1, T, S)
  if cap:
    score_BKGTS = layers.soft_cap(score_BKGTS, cap)
  score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS, -jnp.inf)
  weight_BKMS = jax.nn.softmax(score_BKGTS).reshape(B, K, -1, S)
  if v_scale_BKS is not None:
    weight_BKMS *= v_scale_BKS[:, :, None]
  dtype = q_BTNH.dtype
  y_BKMH = jnp.matmul(weight_BKMS.astype(dtype), v_BKSH.astype(dtype))
  y_BTKGH = y_BKMH.reshape(B, K, -1, T, H).transpose(0, 3, 1, 2, 4)
  return y_BTKGH.reshape(B, T, N, H)


def whole(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, scale, cap=None):
  """`chunked` with all scores at once."""
  at_T = jnp.arange(q_BTNH.shape[1])
  return attend(
    q_BTNH,
    k_BTKH.transpose(0, 2, 3, 1),
    v_BTKH.swapaxes(1, 2),
    sees(at_T[None], at_T, window, (segments_BT, segments_BT)),
    scale,
    cap,
  )


def _groups(T, most):
  """(size of a block, [(first block, last block + 1)] of each group)."""
  # Blocks of one size, in multiples of 8: what is padded is little.
  n = -(-T // BLOCK)
  size = -(-T // (8 * n)) * 8
  n = -(-T // size)
  # Two blocks or more: XLA makes no loop of one, and would then keep what is
  # to be computed again.
  groups = min(most, n // 2)
  ends = [n * i // groups for i in range(groups + 1)]
  return size, list(itertools.pairwise(ends))


def chunked(
  q_BTNH,
  k_BTKH,
  v_BTKH,
  segments_BT,
  window,
  scale,
  cap=None,
  groups=GROUPS,
):
  """Causal attention over whole sequences, [B, T, N, H], without (T, T) scores.

  Memory is that of BLOCK x T scores a row and head. Keys after a group of
  blocks, and those that its first query does not see through a `window` that is
  an int, are not read. Arguments as in `attention.attention`; `groups` are how
  many there are at most, each a loop to compile.
  """
  B, T, N, H = q_BTNH.shape
  if T <= BLOCK:
    return whole(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, scale, cap)
  dtype = q_BTNH.dtype
  size, groups = _groups(T, groups)
  n = groups[-1][1]

  def padded(x_BT):
    """With tokens of segment 0 that only they see."""
    rest = ((0, 0),) * (x_BT.ndim - 2)
    return jnp.pad(x_BT, ((0, 0), (0, n * size - T), *rest))

  def split(x_BT):
    return x_BT.reshape(B, n, size, *x_BT.shape[2:]).swapaxes(0, 1)

  segments_BT = padded(segments_BT)
  q_nBMNH, segments_nBM = split(padded(q_BTNH)), split(segments_BT)
  # Wide, so that gradients of all blocks are summed in fp32.
  wide = jnp.promote_types(dtype, jnp.float32)
  k_BKHT = padded(k_BTKH).transpose(0, 2, 3, 1).astype(wide)
  v_BKTH = padded(v_BTKH).swapaxes(1, 2).astype(wide)

  def group(first, last):
    start = 0
    if isinstance(window, int):
      start = max(0, first * size - window + 1)
    keys = slice(start, last * size)
    return _blocks(
      (scale, cap, first, start),
      q_nBMNH[first:last],
      k_BKHT[..., keys],
      v_BKTH[:, :, keys],
      segments_nBM[first:last],
      segments_BT[:, keys],
      window,
    )

  y_nBMNH = jnp.concatenate([group(*ends) for ends in groups])
  return y_nBMNH.swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]


def _block(settings, q_BMNH, k_BKHS, v_BKSH, queries, of_keys_BS, window):
  """`attend` of block i; queries: (i, their segments)."""
  scale, cap, first, start = settings
  i, of_queries_BM = queries
  size = q_BMNH.shape[1]
  at_1M = ((first + i) * size + jnp.arange(size))[None]
  at_S = start + jnp.arange(v_BKSH.shape[2])
  mask_BMS = sees(at_1M, at_S, window, (of_queries_BM, of_keys_BS))
  k_BKHS, v_BKSH = (x.astype(q_BMNH.dtype) for x in (k_BKHS, v_BKSH))
  return attend(q_BMNH, k_BKHS, v_BKSH, mask_BMS, scale, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(settings, q_nBMNH, k_BKHS, v_BKSH, segments_nBM, *keys):
  """`attend` of each block of queries, with the same keys.

  settings: scale, cap, the number of the first block, the position of the first
    key. keys: their segments [B, S], and the window.
  """
  return jax.lax.map(
    lambda xs: _block(settings, xs[0], k_BKHS, v_BKSH, xs[1:], *keys),
    (q_nBMNH, jnp.arange(len(q_nBMNH)), segments_nBM),
  )


def _keep(settings, *operands):
  # Of arguments that are kept as they are, jax 0.10.2 may take one for another
  # in a second derivative through layers that are recomputed.
  kept = jax.lax.optimization_barrier(operands)
  return _blocks(settings, *operands), kept


def _pull(settings, operands, d_nBMNH):
  q_nBMNH, k_BKHS, v_BKSH, segments_nBM, *keys = operands

  # For derivatives of this, which recompute in their turn.
  @jax.checkpoint
  def gradients(q_BMNH, d_BMNH, queries):
    def block(q_BMNH, k_BKHS, v_BKSH):
      return _block(settings, q_BMNH, k_BKHS, v_BKSH, queries, *keys)

    return jax.vjp(block, q_BMNH, k_BKHS, v_BKSH)[1](d_BMNH)

  def step(sums, xs):
    d_q, *d_keys = gradients(*xs)
    return jax.tree.map(jnp.add, sums, d_keys), d_q

  zeros = [jnp.zeros_like(x) for x in (k_BKHS, v_BKSH)]
  queries = jnp.arange(len(q_nBMNH)), segments_nBM
  d_keys, d_q = jax.lax.scan(step, zeros, (q_nBMNH, d_nBMNH, queries))
  return d_q, *d_keys, None, None, None


_blocks.defvjp(_keep, _pull)
