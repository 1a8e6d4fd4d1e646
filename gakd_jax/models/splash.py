"""Attention on TPUs: the splash kernel that comes with jax.

Flash attention in Pallas, with segments, windows and soft caps; blocks of keys
that no query of a block sees are skipped. It knows no second derivatives.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding

LANES = 128  # of a TPU's vector unit: blocks are multiples
# Of queries and of keys; not tuned on hardware.
BLOCK = 512


def _kernel(heads, T, window, cap, interpret):
  """Of [N, T, H] queries and [K, T, H] keys and values of one row."""
  block = max(b for b in range(LANES, BLOCK + 1, LANES) if T % b == 0)
  sizes = ('block_q', 'block_kv', 'block_kv_compute')
  sizes += ('block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute')
  sizes += ('block_q_dq', 'block_kv_dq')
  mask = splash_attention.CausalMask((T, T))
  if window is not None:
    mask = splash_attention.LocalMask((T, T), (window - 1, 0), offset=0)
  return splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=splash_attention.BlockSizes(**dict.fromkeys(sizes, block)),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )


def _by_device(function, mesh, B, K):
  """A function of [B, T, heads, H]s and [B, T] on each device's own part.

  A kernel is nothing that the compiler could split; what does not divide over
  an axis, all devices along it compute.
  """
  places = []
  for size, axes in ((B, sharding.BATCH_AXES), (K, ('tensor',))):
    axes = tuple(axis for axis in axes if axis in mesh.auto_axes)
    ways = math.prod(mesh.shape[axis] for axis in axes)
    places.append(None if size % ways else axes)
  rows, heads = places
  arrays = P(rows, None, heads)
  return jax.shard_map(
    function,
    in_specs=(arrays, arrays, arrays, P(rows)),
    out_specs=arrays,
    axis_names=set(mesh.auto_axes),
    check_vma=False,
  )


def attention(
  q_BTNH,
  k_BTKH,
  v_BTKH,
  segments_BT,
  window,
  scale,
  cap=None,
  interpret=False,
):
  """Causal attention over whole sequences; [B, T, N, H].

  Arguments as in `scores.chunked`; `window` is None or an int. `interpret`
  runs on any platform, slowly.
  """
  T = q_BTNH.shape[1]
  rest = -T % LANES

  def row(q_TNH, k_TKH, v_TKH, segments_T):
    q, k, v = (
      jnp.pad(x, ((0, rest), (0, 0), (0, 0))).swapaxes(0, 1)
      for x in (q_TNH, k_TKH, v_TKH)
    )
    kernel = _kernel(len(q), T + rest, window, cap, interpret)
    segments_T = jnp.pad(segments_T, (0, rest))
    ids = splash_attention.SegmentIds(segments_T, segments_T)
    return kernel(q, k, v, segment_ids=ids).swapaxes(0, 1)[:T]

  run = jax.vmap(row)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.auto_axes:
    run = _by_device(run, mesh, len(q_BTNH), k_BTKH.shape[2])
  scaled_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype)
  return run(scaled_BTNH, k_BTKH, v_BTKH, segments_BT)
