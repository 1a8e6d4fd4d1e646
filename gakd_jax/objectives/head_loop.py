"""The loop over chunks of tokens that `head` is made of, on a device's rows."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding
from gakd_jax.models.transformer import Head
from gakd_jax.objectives import head_tiles

ROWS, WHOLE = P(sharding.BATCH_AXES), P()


def array(head):
  """The head's weights as the loop reads them."""
  return head.weight_VD if head.gathered_RVD is None else head.gathered_RVD


def spec(head):
  """Each device reads a copy of its own of a gathered head, [1, V, D]."""
  return ROWS if head.ndim == 3 else WHOLE


def by_rows(local, in_specs, out_specs):
  """`local(total, ...)` on each device's own rows; `total` sums over devices.

  Without a mesh, or with one that does not split rows, on all of them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or sharding.batch_ways(mesh) == 1:
    return functools.partial(local, lambda x: x)
  return jax.shard_map(
    functools.partial(local, lambda x: jax.lax.psum(x, sharding.BATCH_AXES)),
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(sharding.BATCH_AXES),
    check_vma=False,
  )


def _loop(mask_N, chunk, body, carry):
  """body(index_N, carry) -> carry, over chunks of the tokens of a mask.

  The last chunk is filled up with tokens outside of the mask, then with an
  index out of bounds: it reads the last token, and what is written there is
  dropped.
  """
  n = mask_N.size
  chunk = min(chunk, n)
  order_N = jnp.argsort(~mask_N, stable=True)
  order_N = jnp.pad(order_N, (0, -n % chunk), constant_values=n)

  def step(i, carry):
    return body(jax.lax.dynamic_slice_in_dim(order_N, i * chunk, chunk), carry)

  return jax.lax.fori_loop(0, -(-jnp.sum(mask_N) // chunk), step, carry)


def _flat(tree):
  """[B, T, ...] -> [B T, ...]."""
  return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), tree)


def _take(tree, index_N):
  return jax.tree.map(lambda x: x.at[index_N].get(mode='clip'), tree)


class Wanted(NamedTuple):
  """What a gradient is wanted of: of which models, and of what they share."""

  hiddens: Sequence = ()
  heads: Sequence = ()
  whole: bool = False


def sums(
  gradient_of, chunk, wanted, hiddens, heads, whole, targets, weights_BT
):
  """((loss, metrics), gradients) of all rows; see `_sum_of_rows`."""
  head_specs = [spec(x) for x in heads]
  return by_rows(
    functools.partial(_sum_of_rows, gradient_of, chunk, wanted),
    (ROWS, head_specs, WHOLE, ROWS, ROWS),
    (WHOLE, (ROWS, {j: head_specs[j] for j in wanted.heads}, WHOLE)),
  )(hiddens, heads, whole, targets, weights_BT)


def _sum_of_rows(
  gradient_of, chunk, wanted, total, hiddens, heads, whole, targets, weights_BT
):
  """Loss, metrics and the wanted gradients, a chunk of tokens at a time.

  gradient_of: of a kind of loss, from `head_tiles`.
  Gradients are dicts by model of hidden states and of heads, and one like
  `whole`, or None; but for those of hidden states they are fp32.
  """
  given, heads = heads, [_own(head) for head in heads]
  *rows, weights_N = _flat((hiddens, targets, weights_BT))
  V = max(map(len, heads))

  def gradient(size, index_N):
    hiddens, targets = _take(rows, index_N)
    weight_N = weights_N.at[index_N].get(mode='fill', fill_value=0)
    logits = [*map(_logits, hiddens, heads)]
    return hiddens, gradient_of(weight_N, logits, targets, whole, size)

  def body(size, index_N, carry):
    totals, (d_hiddens, d_heads, d_whole) = carry
    hiddens, (new, d_logits, new_whole) = gradient(size, index_N)
    d_hiddens, d_heads = dict(d_hiddens), dict(d_heads)
    for j in sorted({*d_hiddens, *d_heads}):

      def products(tile, carry, j=j):
        d_chunk, d_head = carry
        # In the compute dtype for the matrix units; their sums are fp32.
        d_z = d_logits(j, tile).astype(hiddens[j].dtype)
        if d_chunk is not None:
          d_chunk += _d_hidden(d_z, tile.of(heads[j], 0))
        if d_head is not None:
          d_head = tile.add(d_head, _d_head(d_z, hiddens[j]))
        return d_chunk, d_head

      d_chunk = None
      if j in d_hiddens:
        d_chunk = _no_d_hidden(hiddens[j].astype(jnp.float32), heads[j])
      d_chunk, d_head = head_tiles.over(
        len(heads[j]), size, products, (d_chunk, d_heads.get(j))
      )
      if j in d_hiddens:
        d_hiddens[j] = _put(d_hiddens[j], index_N, d_chunk)
      if j in d_heads:
        d_heads[j] = d_head
    if wanted.whole:
      d_whole = jax.tree.map(jnp.add, d_whole, new_whole)
    totals = jax.tree.map(jnp.add, totals, new)
    return totals, (d_hiddens, d_heads, d_whole)

  def shape_of_totals():
    index_N = jnp.arange(min(chunk, weights_N.size))
    return gradient(V, index_N)[1][0]

  if _parts(heads[0]) > 1:
    step = functools.partial(body, V)  # Each device has its tile already.
  else:
    step = functools.partial(head_tiles.sized, body, V)
  totals, (d_hiddens, d_heads, d_whole) = _loop(
    weights_N != 0,
    chunk,
    step,
    (
      jax.tree.map(_zeros, jax.eval_shape(shape_of_totals)),
      (
        {j: _no_d_hidden(rows[0][j], heads[j]) for j in wanted.hiddens},
        {j: _zeros(heads[j], 'f4') for j in wanted.heads},
        jax.tree.map(_zeros, whole) if wanted.whole else None,
      ),
    ),
  )
  return total(totals), (
    {
      j: jax.lax.reduce_sum(d, axes=(0,)).reshape(hiddens[j].shape)
      for j, d in d_hiddens.items()
    },
    # Those of a gathered head are summed by who gathered it.
    {
      j: d[None] if given[j].ndim == 3 else total(d) for j, d in d_heads.items()
    },
    total(d_whole) if wanted.whole else None,
  )


def map_of_rows(function, chunk, total, hidden_BTD, head, rows, whole, mask_BT):
  del total
  head_VD = _own(head)
  hidden_ND, rows, mask_N = _flat((hidden_BTD, rows, mask_BT))

  def values(index_N):
    hidden_nD, rows_n = _take((hidden_ND, rows), index_N)
    return function(_logits(hidden_nD, head_VD), rows_n, whole)

  shape = jax.eval_shape(values, jnp.arange(1))
  out_N = jnp.zeros((mask_N.size, *shape.shape[1:]), shape.dtype)
  out_N = _loop(
    mask_N,
    chunk,
    lambda index_N, out_N: out_N.at[index_N].set(values(index_N), mode='drop'),
    out_N,
  )
  out_N = jnp.where(head_tiles.align(mask_N, out_N), out_N, 0)
  return out_N.reshape(*mask_BT.shape, *out_N.shape[1:])


def sums_by_row(function, chunk, total, hidden_BTD, head, mask_BT):
  del total
  head_VD = _own(head)
  hidden_ND, mask_N = _flat((hidden_BTD, mask_BT))
  B, T = mask_BT.shape

  def values(index_N):
    return function(_logits(_take(hidden_ND, index_N), head_VD))

  def body(index_N, sums_B):
    is_in_N = mask_N.at[index_N].get(mode='fill', fill_value=False)
    row_BN = (index_N[None] // T == jnp.arange(B)[:, None]) & is_in_N[None]
    return sums_B + jnp.einsum(
      'bn,n...->b...',
      row_BN.astype(jnp.float32),
      values(index_N),
      precision='highest',
    )

  shape = jax.eval_shape(values, jnp.arange(1))
  return _loop(mask_N, chunk, body, jnp.zeros((B, *shape.shape[1:])))


def _own(head):
  """[V, D] of what a device was given."""
  return head[0] if head.ndim == 3 else head


def _logits(hidden_ND, head_VD):
  return _split(Head(head_VD).linear(hidden_ND), P(None, 'tensor'))


def _parts(head_VD):
  """How many devices split a vocabulary: P."""
  ways = sharding.ways('tensor')
  return ways if head_VD.shape[0] % ways == 0 else 1


def _no_d_hidden(hidden_ND, head_VD):
  """Zeros for what `_d_hidden` gives of all tokens: [P, N, D]."""
  d_PND = jnp.zeros((_parts(head_VD), *hidden_ND.shape), hidden_ND.dtype)
  return _split(d_PND, P('tensor'))


def _d_hidden(d_logits_NV, head_VD):
  """The gradient of hidden states, of each part of the vocabulary: [P, N, D].

  The devices that split it sum them once, after the loop over chunks.
  """
  N, parts = len(d_logits_NV), _parts(head_VD)
  if parts == 1:
    return jnp.einsum(
      'nv,vd->nd', d_logits_NV, head_VD, preferred_element_type=jnp.float32
    )[None]
  d_PND = jnp.einsum(
    'npv,pvd->pnd',
    _split(d_logits_NV.reshape(N, parts, -1), P(None, 'tensor')),
    _split(head_VD.reshape(parts, -1, head_VD.shape[1]), P('tensor')),
    preferred_element_type=jnp.float32,
  )
  return _split(d_PND, P('tensor'))


def _put(d_PND, index_N, new_PND):
  return jax.vmap(lambda d, new: d.at[index_N].set(new, mode='drop'))(
    d_PND, new_PND.astype(d_PND.dtype)
  )


def _d_head(d_logits_NV, hidden_ND):
  d_head_VD = jnp.einsum(
    'nv,nd->vd', d_logits_NV, hidden_ND, preferred_element_type=jnp.float32
  )
  return _split(d_head_VD, P('tensor', None))


def _split(x, spec):
  """Splits the vocabulary over `tensor`; nothing without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def _zeros(x, dtype=None):
  return jnp.zeros(x.shape, dtype or x.dtype)
