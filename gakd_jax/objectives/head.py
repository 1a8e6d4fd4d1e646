"""The vocabulary head, streamed: losses over logits that never exist whole.

A (B, T, 151936) array of logits is the memory and time problem of this field.
Here the head runs over chunks of response tokens, and the gradient of each
chunk is computed *in the forward pass*, while its logits are there
(`jax.custom_vjp` around a loop): peak memory is one chunk, whatever B and T
are. Prompt and padding cost nothing: the response tokens are brought together
first, and the loop ends with the last of them.

An objective gives a function of one chunk's logits to one loss a token; any
number of heads may take part (student and teacher, usually), and only those
that are differentiated get a gradient: a frozen head, or an evaluation, costs
none.

Under a mesh the loop runs on each device's own rows (`jax.shard_map` over the
batch axes), the vocabulary split over `tensor` by the compiler. The head is
gathered over `fsdp` once, and its gradient summed once, both outside the loop.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding
from gakd_jax.models.transformer import Head


def token_mean(token_loss, outputs, tokens, num_tokens, *, chunk):
  """Mean over response tokens of a per-token loss on next-token logits.

  Args:
    token_loss: (tuple of fp32 logits [N, V], one for each of `outputs`;
      targets [N]) -> (loss [N], {name: metric [N], or [N, K]}).
    outputs: tuple of `models.transformer.Outputs`, all [B, T, .].
    tokens: `data.pipeline.Tokens`; the loss of token t stands at t - 1.
    num_tokens: scalar to divide by: the response tokens of the whole optimizer
      step, so that accumulation and sharding leave the value alone.
    chunk: tokens whose logits exist at a time, on each device.

  Returns:
    Loss and metrics, scalars (or [K]) in fp32. Only the loss has a gradient.
  """
  targets_BT = jnp.roll(tokens.ids_BT, -1, axis=1)
  # Comparable logits: the ids that all vocabularies have. Rows beyond them are
  # padding of the embedding, and get no probability.
  V = min(o.head.vocab_size for o in outputs)

  def capped_loss(logits, targets_N):
    pairs = zip(outputs, logits, strict=True)
    return token_loss(tuple(o.head.capped(z) for o, z in pairs), targets_N)

  return _weighted_sum(
    capped_loss,
    chunk,
    [o.hidden_BTD for o in outputs],
    [o.head.weight_VD[:V] for o in outputs],
    targets_BT,
    tokens.predicts_BT / num_tokens,
  )


def token_features(outputs, w_VC, mask_BT, *, function, chunk):
  """function(logits) W of each token, for a few features of all logits.

  Args:
    outputs: `models.transformer.Outputs`, [B, T, .].
    w_VC: fp32; rows of the head beyond V are padding, and not read.
    mask_BT: the tokens that are wanted; others are zero.
    function: fp32 logits [N, V] -> [N, V].
    chunk: tokens whose logits exist at a time, on each device, in the forward
      pass and, computed once more, in the backward pass.

  Returns:
    [B, T, C] in the dtype of the hidden states.
  """

  def local(h_BTD, head_VD, w_VC, mask_BT):
    h_ND, mask_N = h_BTD.reshape(-1, h_BTD.shape[-1]), mask_BT.reshape(-1)
    size = min(chunk, mask_N.size)
    order_N = _response_first(mask_N, size)

    # In fp32 outside of the loop, so that its gradient is summed in fp32.
    head_VD = head_VD.astype(w_VC.dtype)

    @jax.checkpoint
    def features(index_N):
      head = Head(head_VD.astype(h_ND.dtype), outputs.head.cap)
      z_NV = head(h_ND.at[index_N].get(mode='clip'))
      return (function(z_NV) @ w_VC).astype(h_ND.dtype)

    def if_wanted(index_N):
      wanted_N = mask_N.at[index_N].get(mode='fill', fill_value=False)
      x_NC = jax.lax.cond(
        jnp.any(wanted_N),
        features,
        lambda _: jnp.zeros((size, w_VC.shape[1]), h_ND.dtype),
        index_N,
      )
      return jnp.where(wanted_N[:, None], x_NC, 0)

    x_NC = jax.lax.map(if_wanted, order_N.reshape(-1, size))
    x_NC = x_NC.reshape(-1, w_VC.shape[1])
    out_NC = jnp.zeros((mask_N.size, w_VC.shape[1]), x_NC.dtype)
    return out_NC.at[order_N].set(x_NC, mode='drop').reshape(*mask_BT.shape, -1)

  head_VD = outputs.head.weight_VD[: w_VC.shape[0]]
  args = outputs.hidden_BTD, head_VD, w_VC, mask_BT
  return _by_rows(local, (True, False, False, True))(*args)


def token_log_probs(outputs, tokens, *, chunk):
  """log q(next token) in fp32, [B, T]; 0 where it is not of a response.

  Args:
    outputs: `models.transformer.Outputs`, [B, T, .].
    tokens: `data.pipeline.Tokens`.
    chunk: tokens whose logits exist at a time, on each device.
  """

  def local(h_BTD, head_VD, targets_BT, mask_BT):
    h_ND, mask_N = h_BTD.reshape(-1, h_BTD.shape[-1]), mask_BT.reshape(-1)
    targets_N = targets_BT.reshape(-1)
    size = min(chunk, mask_N.size)
    order_N = _response_first(mask_N, size)

    def body(i, out_N):
      index_N = jax.lax.dynamic_slice_in_dim(order_N, i * size, size)
      z_NV = Head(head_VD, outputs.head.cap)(h_ND.at[index_N].get(mode='clip'))
      target_N1 = targets_N.at[index_N].get(mode='clip')[:, None]
      log_q_NV = jax.nn.log_softmax(z_NV)
      log_q_N = jnp.take_along_axis(log_q_NV, target_N1, axis=1)[:, 0]
      return out_N.at[index_N].set(log_q_N, mode='drop')

    n_chunks = -(-jnp.sum(mask_N) // size)
    zeros_N = jnp.zeros(mask_N.size, jnp.float32)
    out_N = jax.lax.fori_loop(0, n_chunks, body, zeros_N)
    return jnp.where(mask_N, out_N, 0).reshape(mask_BT.shape)

  targets_BT = jnp.roll(tokens.ids_BT, -1, axis=1)
  args = outputs.hidden_BTD, outputs.head.weight_VD, targets_BT
  return _by_rows(local, (True, False, True, True))(*args, tokens.predicts_BT)


def _by_rows(local, by_row):
  """`local` on each device's own rows; without a mesh, on all of them.

  by_row: of each argument, whether it is split or whole.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return local
  rows = P(sharding.BATCH_AXES)
  return jax.shard_map(
    local,
    in_specs=tuple(rows if split else P() for split in by_row),
    out_specs=rows,
    axis_names=set(sharding.BATCH_AXES),
    check_vma=False,
  )


def _weighted_sum(token_loss, chunk, hiddens, heads, targets_BT, weights_BT):
  """sum weights * token_loss, a function that brings its own gradient."""
  run = functools.partial(_on_mesh, token_loss, chunk)

  @jax.custom_vjp
  def total(hiddens, heads, targets_BT, weights_BT):
    none = [False] * len(hiddens)
    return run(none, none, hiddens, heads, targets_BT, weights_BT)[0]

  def forward(hiddens, heads, targets_BT, weights_BT):
    # Symbolic zeros tell which arguments are differentiated at all.
    values, wanted = [], []
    for arrays in (hiddens, heads):
      values.append([x.value for x in arrays])
      wanted.append([x.perturbed for x in arrays])
    return run(*wanted, *values, targets_BT.value, weights_BT.value)

  def backward(gradients, cotangent):
    d_loss = cotangent[0]
    # None stands for "no gradient": nothing is computed for it.
    d_hiddens, d_heads = (
      [
        d_loss.astype(x.dtype) * d[j].astype(x.dtype) if j in d else None
        for j, x in enumerate(arrays)
      ]
      for d, arrays in zip(gradients, (hiddens, heads), strict=True)
    )
    return d_hiddens, d_heads, None, None

  total.defvjp(forward, backward, symbolic_zeros=True)
  return total(hiddens, heads, targets_BT, weights_BT)


def _on_mesh(
  token_loss, chunk, hidden_on, head_on, hiddens, heads, targets_BT, weights_BT
):
  """`_loop` on each device's rows, sums over all of them."""
  loop = functools.partial(_loop, token_loss, chunk, hidden_on, head_on)
  if jax.sharding.get_abstract_mesh().empty:
    return loop(hiddens, heads, targets_BT, weights_BT)

  def local(*args):
    (loss, metrics), (d_hiddens, d_heads) = loop(*args)
    loss, metrics, d_heads = jax.lax.psum(
      (loss, metrics, d_heads), sharding.BATCH_AXES
    )
    return (loss, metrics), (d_hiddens, d_heads)

  rows, whole = P(sharding.BATCH_AXES), P()
  return jax.shard_map(
    local,
    in_specs=(rows, whole, rows, rows),
    out_specs=((whole, whole), (rows, whole)),
    axis_names=set(sharding.BATCH_AXES),
    check_vma=False,
  )(hiddens, heads, targets_BT, weights_BT)


def _loop(
  token_loss, chunk, hidden_on, head_on, hiddens, heads, targets_BT, weights_BT
):
  """Loss, metrics and the wanted gradients, a chunk of tokens at a time."""
  flat = [h.reshape(-1, h.shape[-1]) for h in hiddens]
  targets_N, weights_N = targets_BT.reshape(-1), weights_BT.reshape(-1)
  n = targets_N.size
  chunk = min(chunk, n)
  order_N = _response_first(weights_N != 0, chunk)
  n_chunks = -(-jnp.sum(weights_N != 0) // chunk)

  def chunk_of(i):
    index_N = jax.lax.dynamic_slice_in_dim(order_N, i * chunk, chunk)
    hidden_ND = [h.at[index_N].get(mode='clip') for h in flat]
    target_N = targets_N.at[index_N].get(mode='clip')
    weight_N = weights_N.at[index_N].get(mode='fill', fill_value=0)

    def loss(*logits):
      loss_N, metrics = token_loss(logits, target_N)
      return jnp.sum(weight_N * loss_N), {
        name: jnp.sum(weight_N.reshape(-1, *(1,) * (x.ndim - 1)) * x, axis=0)
        for name, x in metrics.items()
      }

    return index_N, hidden_ND, loss

  def logits_of(hidden_ND, head_VD):
    return _split(Head(head_VD).linear(hidden_ND), P(None, 'tensor'))

  def body(i, carry):
    (loss, metrics), d_hiddens, d_heads = carry
    index_N, hidden_ND, chunk_loss = chunk_of(i)
    logits = map(logits_of, hidden_ND, heads)
    # Gradients that nobody wants are dead code to the compiler.
    new_loss, pull, new_metrics = jax.vjp(
      jax.checkpoint(chunk_loss, policy=_is_reduction), *logits, has_aux=True
    )
    new = pull(jnp.ones_like(new_loss))
    # In the compute dtype for the matrix units; their sums are fp32.
    new = [d.astype(h.dtype) for d, h in zip(new, hidden_ND, strict=True)]
    d_hiddens = {
      j: d.at[index_N].set(_d_hidden(new[j], heads[j]), mode='drop')
      for j, d in d_hiddens.items()
    }
    d_heads = {j: d + _d_head(new[j], hidden_ND[j]) for j, d in d_heads.items()}
    totals = jax.tree.map(jnp.add, (loss, metrics), (new_loss, new_metrics))
    return totals, d_hiddens, d_heads

  def shape_of_totals():
    _, hidden_ND, chunk_loss = chunk_of(0)
    return chunk_loss(*map(logits_of, hidden_ND, heads))

  totals, d_hiddens, d_heads = jax.lax.fori_loop(
    0,
    n_chunks,
    body,
    (
      _zeros(jax.eval_shape(shape_of_totals)),
      {j: jnp.zeros_like(flat[j]) for j, on in enumerate(hidden_on) if on},
      {
        j: jnp.zeros(heads[j].shape, jnp.float32)
        for j, on in enumerate(head_on)
        if on
      },
    ),
  )
  return totals, (
    {j: d.reshape(hiddens[j].shape) for j, d in d_hiddens.items()},
    d_heads,
  )


def _response_first(mask_N, chunk):
  """Indices of tokens, those of the mask first, up to a whole chunk.

  The last chunk is filled with an index that is out of bounds: it reads
  nothing ('fill'), and what is written there is dropped.
  """
  order_N = jnp.argsort(~mask_N, stable=True)
  n = mask_N.size
  return jnp.pad(order_N, (0, -n % chunk), constant_values=n)


def _is_reduction(primitive, *_, **__):
  """What a chunk's gradient keeps of its loss: one number a token.

  Log-probabilities and the like are computed again from the logits, in the
  loop that uses them: that costs less than to write and read them.
  """
  return primitive.name.startswith(('reduce', 'arg'))


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


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
