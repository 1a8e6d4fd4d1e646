"""The vocabulary head, streamed: functions of logits that never exist whole.

A (B, T, 151936) array of logits is the memory and time problem of this field.
Here the head runs over chunks of the tokens that count: peak memory is one
chunk, whatever B and T are, and prompt and padding cost nothing. There is one
loop over chunks, and three things to do with one:

  weighted_sum  a loss of each token, summed. The gradient of a chunk is
                computed *in the forward pass*, while its logits are there.
  token_map     a few numbers of each token, kept and differentiable; logits
                are computed once more in the backward pass.
  log_probs     log q(target) of each token.

Any number of models may take part, and only heads and hidden states that are
differentiated get a gradient: a frozen head, or an evaluation, costs none.

Under a mesh the loop runs on each device's own rows (`jax.shard_map` over the
batch axes), the vocabulary split over `tensor` by the compiler. A head that was
not gathered over `fsdp` before (`Head.gathered`) is gathered once, and its
gradient summed once, both outside the loop.
"""

import functools

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

  def capped_loss(logits, targets):
    pairs = zip(outputs, logits, strict=True)
    return token_loss(tuple(o.head.capped(z) for o, z in pairs), targets)

  def run(hidden_on, head_on, hiddens, heads, targets, weights_BT):
    head_specs = [_spec(x) for x in heads]
    on = [(j, s) for j, s in enumerate(head_specs) if head_on[j]]
    return _by_rows(
      functools.partial(_sum_of_rows, capped_loss, chunk, hidden_on, head_on),
      (_ROWS, head_specs, _ROWS, _ROWS),
      (_WHOLE, (_ROWS, dict(on))),
    )(hiddens, heads, targets, weights_BT)

  @jax.custom_vjp
  def total(hiddens, heads, targets, weights_BT):
    none = [False] * len(hiddens)
    return run(none, none, hiddens, heads, targets, weights_BT)[0]

  def forward(*args):
    # Symbolic zeros tell which arguments are differentiated at all.
    wanted = [[x.perturbed for x in arrays] for arrays in args[:2]]
    return run(*wanted, *jax.tree.map(lambda x: x.value, args))

  def backward(gradients, cotangent):
    # None stands for "no gradient": nothing is computed for it.
    d_hiddens, d_heads = (
      [
        (cotangent[0] * d[j]).astype(x.dtype) if j in d else None
        for j, x in enumerate(arrays)
      ]
      for d, arrays in zip(gradients, (hiddens, heads), strict=True)
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
  cap = outputs.head.cap

  def of_logits(z_NV, rows, whole):
    return function(Head(None, cap).capped(z_NV), rows, whole)

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
    args, wanted = residuals
    specs = {'hidden': _ROWS, 'head': _spec(args[1]), 'whole': _WHOLE}
    d = _by_rows(
      functools.partial(_pull_of_rows, of_logits, chunk, wanted),
      (_ROWS, specs['head'], _ROWS, _WHOLE, _ROWS, _ROWS),
      {name: specs[name] for name in wanted},
    )(*args, d_out)
    return d.get('hidden'), d.get('head'), None, d.get('whole'), None

  mapped.defvjp(forward, backward, symbolic_zeros=True)
  head = _array(outputs.head)
  return mapped(outputs.hidden_BTD, head, rows, whole, mask_BT)


def log_probs(outputs, targets_BT, mask_BT, *, chunk):
  """log q(target) in fp32, [B, T]; 0 outside of the mask. See `token_map`."""

  def of_targets(z_NV, target_N, _):
    log_q_NV = jax.nn.log_softmax(z_NV)
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
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _take(tree, index_N):
  return jax.tree.map(lambda x: x.at[index_N].get(mode='clip'), tree)


def _sum_of_rows(
  token_loss,
  chunk,
  hidden_on,
  head_on,
  total,
  hiddens,
  heads,
  targets,
  weights_BT,
):
  """Loss, metrics and the wanted gradients, a chunk of tokens at a time."""
  gathered, heads = heads, [_own(head) for head in heads]
  rows, weights_N = _flat((hiddens, targets)), weights_BT.reshape(-1)

  def chunk_of(index_N):
    hiddens, targets = _take(rows, index_N)
    weight_N = weights_N.at[index_N].get(mode='fill', fill_value=0)

    def loss(*logits):
      loss_N, metrics = token_loss(logits, targets)
      return jnp.sum(weight_N * loss_N), {
        name: jnp.sum(weight_N.reshape(-1, *(1,) * (x.ndim - 1)) * x, axis=0)
        for name, x in metrics.items()
      }

    return hiddens, loss

  def body(index_N, carry):
    (loss, metrics), d_hiddens, d_heads = carry
    hiddens, chunk_loss = chunk_of(index_N)
    logits = map(_logits, hiddens, heads)
    # Gradients that nobody wants are dead code to the compiler.
    new_loss, pull, new_metrics = jax.vjp(
      jax.checkpoint(chunk_loss, policy=_is_of_tokens), *logits, has_aux=True
    )
    new = pull(jnp.ones_like(new_loss))
    # In the compute dtype for the matrix units; their sums are fp32.
    new = [d.astype(h.dtype) for d, h in zip(new, hiddens, strict=True)]
    d_hiddens = {
      j: d.at[index_N].set(_d_hidden(new[j], heads[j]), mode='drop')
      for j, d in d_hiddens.items()
    }
    d_heads = {j: d + _d_head(new[j], hiddens[j]) for j, d in d_heads.items()}
    totals = jax.tree.map(jnp.add, (loss, metrics), (new_loss, new_metrics))
    return totals, d_hiddens, d_heads

  def shape_of_totals():
    hiddens, chunk_loss = chunk_of(jnp.arange(min(chunk, weights_N.size)))
    return chunk_loss(*map(_logits, hiddens, heads))

  totals, d_hiddens, d_heads = _loop(
    weights_N != 0,
    chunk,
    body,
    (
      jax.tree.map(_zeros, jax.eval_shape(shape_of_totals)),
      {j: _zeros(rows[0][j]) for j, on in enumerate(hidden_on) if on},
      {j: _zeros(heads[j], 'f4') for j, on in enumerate(head_on) if on},
    ),
  )
  return total(totals), (
    {j: d.reshape(hiddens[j].shape) for j, d in d_hiddens.items()},
    {j: _as_given(d, gathered[j], total) for j, d in d_heads.items()},
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


def _pull_of_rows(
  function,
  chunk,
  wanted,
  total,
  hidden_BTD,
  head,
  rows,
  whole,
  mask_BT,
  d_out_BT,
):
  """The wanted gradients of `_map_of_rows`; sums over tokens are fp32."""
  head_VD = _own(head)
  hidden_ND, rows, mask_N, d_out_N = _flat(
    (hidden_BTD, rows, mask_BT, d_out_BT)
  )
  d_out_N = jnp.where(_align(mask_N, d_out_N), d_out_N, 0)

  def body(index_N, d):
    hidden_nD, rows_n = _take((hidden_ND, rows), index_N)
    d_out_n = d_out_N.at[index_N].get(mode='fill', fill_value=0)
    _, pull = jax.vjp(
      lambda z_NV, whole: function(z_NV, rows_n, whole),
      _logits(hidden_nD, head_VD),
      whole,
    )
    d_z_NV, d_whole = pull(d_out_n)
    d_z_NV = d_z_NV.astype(hidden_nD.dtype)
    new = dict(d)
    if 'hidden' in d:
      new['hidden'] = (
        d['hidden'].at[index_N].set(_d_hidden(d_z_NV, head_VD), mode='drop')
      )
    if 'head' in d:
      new['head'] += _d_head(d_z_NV, hidden_nD)
    if 'whole' in d:
      new['whole'] = jax.tree.map(jnp.add, d['whole'], d_whole)
    return new

  zeros = {
    'hidden': _zeros(hidden_ND),
    'head': _zeros(head_VD, 'f4'),
    'whole': jax.tree.map(_zeros, whole),
  }
  d = _loop(mask_N, chunk, body, {name: zeros[name] for name in wanted})
  if 'hidden' in d:
    d['hidden'] = d['hidden'].reshape(hidden_BTD.shape)
  if 'head' in d:
    d['head'] = _as_given(d['head'], head, total).astype(head.dtype)
  if 'whole' in d:
    d['whole'] = total(d['whole'])
  return d


def _own(head):
  """[V, D] of what a device was given."""
  return head[0] if head.ndim == 3 else head


def _as_given(d_head_VD, head, total):
  """The gradient of `_own`; that of a gathered head is summed by its giver."""
  return d_head_VD[None] if head.ndim == 3 else total(d_head_VD)


def _is_of_tokens(primitive, *_, **__):
  """What a chunk's gradient keeps of its loss: one number a token.

  Log-probabilities and the like are computed again from the logits, in the
  loop that uses them: that costs less than to write and read them.
  """
  return primitive.name.startswith(('reduce', 'arg', 'while'))


def _logits(hidden_ND, head_VD):
  return _split(Head(head_VD).linear(hidden_ND), P(None, 'tensor'))


def _d_hidden(d_logits_NV, head_VD):
  return jnp.einsum('nv,vd->nd', d_logits_NV, head_VD)


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
