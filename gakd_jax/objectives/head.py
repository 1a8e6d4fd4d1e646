"""The vocabulary head, streamed: functions of logits that never exist whole.

A (B, T, 151936) array of logits is the memory and time problem of this field.
Here the head runs over chunks of the tokens that count: peak memory is one
chunk, whatever B and T are, and prompt and padding cost nothing. There is one
loop over chunks, and some things to do with one:

  weighted_sum  a loss of each token, summed. The gradient of a chunk is
                computed *in the forward pass*, while its logits are there.
  token_map     a few numbers of each token, kept and differentiable; logits
                are computed once more in the backward pass.
  log_probs     log q(target) of each token.
  largest       the largest logits of each token.
  row_sums      sums over the tokens of each row.

Any number of models may take part, and only heads and hidden states that are
differentiated get a gradient: a frozen head, or an evaluation, costs none.

Under a mesh the loop runs on each device's own rows (`jax.shard_map` over the
batch axes), the vocabulary split over `tensor` by the compiler. A head that was
not gathered over `fsdp` before (`Head.gathered`) is gathered once, and its
gradient summed once, both outside the loop.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding
from gakd_jax.models.transformer import Head

_ROWS, _WHOLE = P(sharding.BATCH_AXES), P()


def next_token(tokens):
  """What each position of a text predicts: ids [B, T], and which of them count.

  tokens: `data.pipeline.Tokens`; what token t is stands at t - 1.
  """
  return jnp.roll(tokens.ids_BT, -1, axis=1), tokens.predicts_BT


def shared(outputs):
  """Outputs over the ids that all models have, with comparable logits.

  Rows beyond them are padding of an embedding, and get no probability.
  """
  V = min(o.head.vocab_size for o in outputs)
  return tuple(o.replace(head=o.head.first(V)) for o in outputs)


def at(outputs, index_BM):
  """Outputs at other positions: hidden state m is that of `index_BM[b, m]`."""
  hidden_BMD = jnp.take_along_axis(
    outputs.hidden_BTD, index_BM[:, :, None], axis=1
  )
  return outputs.replace(hidden_BTD=hidden_BMD)


def weighted_sum(token_loss, outputs, targets, weights_BT, *, chunk):
  """sum weights_BT * token_loss, and the same of its metrics.

  Args:
    token_loss: (tuple of fp32 logits [N, V], one for each of `outputs`; the
      targets of these tokens [N, ...]) -> (loss [N], {name: metric [N, ...]}).
    outputs: tuple of `models.transformer.Outputs`, hidden states [B, T, .].
    targets: tree of [B, T, ...], what `token_loss` needs to know of a token.
    weights_BT: fp32; 0 where a token does not count. Those of a mean are
      1 / the number of tokens of the whole optimizer step, so that accumulation
      and sharding leave the value alone.
    chunk: tokens whose logits exist at a time, on each device.

  Returns:
    Loss and metrics, scalars (or [...]) in fp32. Only the loss has a gradient,
    with respect to `outputs`.
  """

  def capped_loss(logits, targets, _):
    pairs = zip(outputs, logits, strict=True)
    return token_loss(tuple(o.head.capped(z) for o, z in pairs), targets)

  def run(wanted, hiddens, heads, targets, weights_BT):
    return _sums(
      capped_loss, chunk, wanted, hiddens, heads, (), targets, weights_BT
    )

  @jax.custom_vjp
  def total(hiddens, heads, targets, weights_BT):
    return run(_Wanted(), hiddens, heads, targets, weights_BT)[0]

  def forward(*args):
    # Symbolic zeros tell which arguments are differentiated at all.
    on = [[j for j, x in enumerate(xs) if x.perturbed] for xs in args[:2]]
    return run(_Wanted(*on), *jax.tree.map(lambda x: x.value, args))

  def backward(gradients, cotangent):
    # None stands for "no gradient": nothing is computed for it.
    d_hiddens, d_heads = (
      [
        (cotangent[0] * d[j]).astype(x.dtype) if j in d else None
        for j, x in enumerate(arrays)
      ]
      for d, arrays in zip(gradients[:2], (hiddens, heads), strict=True)
    )
    return d_hiddens, d_heads, None, None

  total.defvjp(forward, backward, symbolic_zeros=True)
  hiddens = [o.hidden_BTD for o in outputs]
  heads = [_array(o.head) for o in outputs]
  return total(hiddens, heads, targets, weights_BT)


def token_map(function, outputs, rows, whole, mask_BT, *, chunk):
  """function(logits, ...) of each token of a mask; 0 elsewhere.

  Args:
    function: (fp32 logits [N, V], rows [N, ...], whole) -> [N, ...], a few
      numbers a token.
    outputs: `models.transformer.Outputs`, hidden states [B, T, D].
    rows: tree of [B, T, ...]; not differentiated.
    whole: tree of floating point arrays that all tokens share; they get a
      gradient, as hidden states and head do.
    mask_BT: the tokens that are wanted.
    chunk: tokens whose logits exist at a time, on each device.

  Returns:
    [B, T, ...] in the dtype that `function` gives.
  """

  def of_logits(z_NV, rows, whole):
    return function(outputs.head.capped(z_NV), rows, whole)

  def inner_product(logits, rows_and_d, whole):
    """Of `function` and its cotangent: what has the gradient that is asked."""
    rows, d_N = rows_and_d
    product_N = of_logits(logits[0], rows, whole) * d_N.astype(jnp.float32)
    return jnp.sum(product_N, axis=tuple(range(1, d_N.ndim))), {}

  @jax.custom_vjp
  def mapped(hidden_BTD, head, rows, whole, mask_BT):
    return _by_rows(
      functools.partial(_map_of_rows, of_logits, chunk),
      (_ROWS, _spec(head), _ROWS, _WHOLE, _ROWS),
      _ROWS,
    )(hidden_BTD, head, rows, whole, mask_BT)

  def forward(*args):
    hidden, head, _, whole, _ = args
    on = {
      'hidden': hidden.perturbed,
      'head': head.perturbed,
      'whole': any(x.perturbed for x in jax.tree.leaves(whole)),
    }
    args = jax.tree.map(lambda x: x.value, args)
    # A dict's keys are static, as what is wanted must be.
    return mapped(*args), (args, {name: None for name in on if on[name]})

  def backward(residuals, d_out):
    (hidden_BTD, head, rows, whole, mask_BT), on = residuals
    wanted = _Wanted(
      [0] * ('hidden' in on), [0] * ('head' in on), 'whole' in on
    )
    weights_BT = mask_BT.astype(jnp.float32)
    args = [hidden_BTD], [head], whole, (rows, d_out), weights_BT
    _, d = _sums(inner_product, chunk, wanted, *args)
    d_head = d[1][0].astype(head.dtype) if d[1] else None
    return d[0].get(0), d_head, None, d[2], None

  mapped.defvjp(forward, backward, symbolic_zeros=True)
  head = _array(outputs.head)
  return mapped(outputs.hidden_BTD, head, rows, whole, mask_BT)


def largest(outputs, k, mask_BT, *, chunk):
  """The k largest logits of each token, descending: [B, T, k], fp32.

  The backward pass needs which they are, and no logits.
  """

  def top(z_NV, *_):
    values_NK, ids_NK = jax.lax.top_k(z_NV, k)
    # As floats, ids below 2^24 are exact.
    return jnp.stack([values_NK, ids_NK.astype(jnp.float32)], axis=1)

  def at_ids(z_NV, ids_NK, _):
    return jnp.take_along_axis(z_NV, ids_NK, axis=1)

  @jax.custom_vjp
  def found(outputs, mask_BT):
    return forward(outputs, mask_BT)[0]

  def forward(outputs, mask_BT):
    x_BT2K = token_map(top, outputs, (), (), mask_BT, chunk=chunk)
    ids_BTK = x_BT2K[:, :, 1].astype(jnp.int32)
    return x_BT2K[:, :, 0], (outputs, ids_BTK, mask_BT)

  def backward(kept, d_BTK):
    outputs, ids_BTK, mask_BT = kept

    def values(outputs):
      return token_map(at_ids, outputs, ids_BTK, (), mask_BT, chunk=chunk)

    return *jax.vjp(values, outputs)[1](d_BTK), None

  found.defvjp(forward, backward)
  return found(outputs, mask_BT)


def row_sums(function, outputs, mask_BT, *, chunk):
  """sum of function(fp32 logits [N, V]) over the tokens of each row, [B, ...].

  It has no gradient.
  """

  def of_logits(z_NV):
    return function(outputs.head.capped(z_NV))

  head = _array(outputs.head)
  return _by_rows(
    functools.partial(_sums_by_row, of_logits, chunk),
    (_ROWS, _spec(head), _ROWS),
    _ROWS,
  )(*jax.lax.stop_gradient((outputs.hidden_BTD, head)), mask_BT)


def log_probs(outputs, targets_BT, mask_BT, *, chunk, temperature=1.0):
  """log q(target) in fp32, [B, T]; 0 outside of the mask. See `token_map`."""

  def of_targets(z_NV, target_N, _):
    log_q_NV = jax.nn.log_softmax(z_NV / temperature)
    return jnp.take_along_axis(log_q_NV, target_N[:, None], axis=1)[:, 0]

  return token_map(of_targets, outputs, targets_BT, (), mask_BT, chunk=chunk)


def _array(head):
  """The head's weights as the loop reads them."""
  return head.weight_VD if head.gathered_RVD is None else head.gathered_RVD


def _spec(head):
  """Each device reads a copy of its own of a gathered head, [1, V, D]."""
  return _ROWS if head.ndim == 3 else _WHOLE


def _by_rows(local, in_specs, out_specs):
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


class _Wanted(NamedTuple):
  """What a gradient is wanted of: of which models, and of what they share."""

  hiddens: Sequence = ()
  heads: Sequence = ()
  whole: bool = False


def _sums(
  token_loss, chunk, wanted, hiddens, heads, whole, targets, weights_BT
):
  """((loss, metrics), gradients) of all rows; see `_sum_of_rows`."""
  head_specs = [_spec(x) for x in heads]
  return _by_rows(
    functools.partial(_sum_of_rows, token_loss, chunk, wanted),
    (_ROWS, head_specs, _WHOLE, _ROWS, _ROWS),
    (_WHOLE, (_ROWS, {j: head_specs[j] for j in wanted.heads}, _WHOLE)),
  )(hiddens, heads, whole, targets, weights_BT)


def _sum_of_rows(
  token_loss, chunk, wanted, total, hiddens, heads, whole, targets, weights_BT
):
  """Loss, metrics and the wanted gradients, a chunk of tokens at a time.

  Gradients are dicts by model of hidden states and of heads, and one like
  `whole`, or None; but for those of hidden states they are fp32.
  """
  given, heads = heads, [_own(head) for head in heads]
  *rows, weights_N = _flat((hiddens, targets, weights_BT))

  def chunk_of(index_N):
    hiddens, targets = _take(rows, index_N)
    weight_N = weights_N.at[index_N].get(mode='fill', fill_value=0)

    def loss(logits, whole):
      loss_N, metrics = token_loss(logits, targets, whole)
      return jnp.sum(weight_N * loss_N), {
        name: jnp.sum(_align(weight_N, x) * x, axis=0)
        for name, x in metrics.items()
      }

    return hiddens, [*map(_logits, hiddens, heads)], loss

  def body(index_N, carry):
    totals, (d_hiddens, d_heads, d_whole) = carry
    hiddens, logits, loss = chunk_of(index_N)
    # Gradients that nobody wants are dead code to the compiler.
    value, pull, metrics = jax.vjp(
      jax.checkpoint(loss, policy=_is_of_tokens), logits, whole, has_aux=True
    )
    d_logits, new_whole = pull(jnp.ones_like(value))
    # In the compute dtype for the matrix units; their sums are fp32.
    d_logits = [
      d.astype(h.dtype) for d, h in zip(d_logits, hiddens, strict=True)
    ]
    d_hiddens = {
      j: _put(d, index_N, _d_hidden(d_logits[j], heads[j]))
      for j, d in d_hiddens.items()
    }
    d_heads = {
      j: d + _d_head(d_logits[j], hiddens[j]) for j, d in d_heads.items()
    }
    if wanted.whole:
      d_whole = jax.tree.map(jnp.add, d_whole, new_whole)
    totals = jax.tree.map(jnp.add, totals, (value, metrics))
    return totals, (d_hiddens, d_heads, d_whole)

  def shape_of_totals():
    _, logits, loss = chunk_of(jnp.arange(min(chunk, weights_N.size)))
    return loss(logits, whole)

  totals, (d_hiddens, d_heads, d_whole) = _loop(
    weights_N != 0,
    chunk,
    body,
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


def _map_of_rows(
  function, chunk, total, hidden_BTD, head, rows, whole, mask_BT
):
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
  out_N = jnp.where(_align(mask_N, out_N), out_N, 0)
  return out_N.reshape(*mask_BT.shape, *out_N.shape[1:])


def _sums_by_row(function, chunk, total, hidden_BTD, head, mask_BT):
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


def _is_of_tokens(primitive, *_, **__):
  """What a chunk's gradient keeps of its loss: a few numbers a token.

  Log-probabilities and the like are computed again from the logits, in the
  loop that uses them: that costs less than to write and read them.
  """
  return primitive.name.startswith(('reduce', 'arg', 'while', 'top_k'))


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
    return jnp.einsum('nv,vd->nd', d_logits_NV, head_VD)[None]
  d_PND = jnp.einsum(
    'npv,pvd->pnd',
    _split(d_logits_NV.reshape(N, parts, -1), P(None, 'tensor')),
    _split(head_VD.reshape(parts, -1, head_VD.shape[1]), P('tensor')),
  )
  return _split(d_PND, P('tensor'))


def _put(d_PND, index_N, new_PND):
  return jax.vmap(lambda d, new: d.at[index_N].set(new, mode='drop'))(
    d_PND, new_PND
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


def _align(mask_N, x_N):
  return mask_N.reshape(-1, *(1,) * (x_N.ndim - 1))


def _zeros(x, dtype=None):
  return jnp.zeros(x.shape, dtype or x.dtype)
