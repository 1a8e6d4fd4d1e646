"""The vocabulary head, streamed: functions of logits that never exist whole.

A (B, T, 151936) array of logits is most of the memory and time of a loss.
Here the head runs over chunks of the tokens that count: peak memory is one
chunk, whatever B and T are, and prompt and padding cost nothing. There is one
loop over chunks, and some things to do with one:

  weighted_sum  a loss of each token, summed. The gradient of a chunk is
                computed *in the forward pass*, while its logits are there.
  sum_over_ids  the same of a loss that is a sum over the vocabulary, in less
                time and memory.
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

import jax
import jax.numpy as jnp

from gakd_jax.objectives import head_loop, head_tiles
from gakd_jax.objectives.head_loop import ROWS, WHOLE


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

  gradient_of = head_tiles.of_logits(capped_loss)
  return _weighted_sum(gradient_of, outputs, targets, weights_BT, chunk)


def sum_over_ids(id_loss, outputs, targets, weights_BT, *, chunk):
  """As `weighted_sum`, of a loss that is a sum over the vocabulary.

  It takes less time and memory: see `head_tiles`.

  Args:
    id_loss: (tuple of fp32 log-probabilities [N, v] of some ids that follow
      each other, one for each of `outputs`; targets; the first of these ids) ->
      what these ids add to (loss [N], {name: metric [N, ...]}).
    outputs: of the same vocabulary, see `shared`.
  """
  gradient_of = head_tiles.of_log_probs(
    lambda log_probs, *args: id_loss(tuple(log_probs), *args),
    [o.head.capped for o in outputs],
  )
  return _weighted_sum(gradient_of, outputs, targets, weights_BT, chunk)


def _weighted_sum(gradient_of, outputs, targets, weights_BT, chunk):
  def run(wanted, hiddens, heads, targets, weights_BT):
    return head_loop.sums(
      gradient_of, chunk, wanted, hiddens, heads, (), targets, weights_BT
    )

  @jax.custom_vjp
  def total(hiddens, heads, targets, weights_BT):
    return run(head_loop.Wanted(), hiddens, heads, targets, weights_BT)[0]

  def forward(*args):
    # Symbolic zeros tell which arguments are differentiated at all.
    on = [[j for j, x in enumerate(xs) if x.perturbed] for xs in args[:2]]
    return run(head_loop.Wanted(*on), *jax.tree.map(lambda x: x.value, args))

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
  heads = [head_loop.array(o.head) for o in outputs]
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
    return head_loop.by_rows(
      functools.partial(head_loop.map_of_rows, of_logits, chunk),
      (
        ROWS,
        head_loop.spec(head),
        ROWS,
        WHOLE,
        ROWS,
      ),
      ROWS,
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
    wanted = head_loop.Wanted(
      [0] * ('hidden' in on), [0] * ('head' in on), 'whole' in on
    )
    weights_BT = mask_BT.astype(jnp.float32)
    args = [hidden_BTD], [head], whole, (rows, d_out), weights_BT
    gradient_of = head_tiles.of_logits(inner_product)
    _, d = head_loop.sums(gradient_of, chunk, wanted, *args)
    d_head = d[1][0].astype(head.dtype) if d[1] else None
    return d[0].get(0), d_head, None, d[2], None

  mapped.defvjp(forward, backward, symbolic_zeros=True)
  head = head_loop.array(outputs.head)
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

  head = head_loop.array(outputs.head)
  return head_loop.by_rows(
    functools.partial(head_loop.sums_by_row, of_logits, chunk),
    (ROWS, head_loop.spec(head), ROWS),
    ROWS,
  )(*jax.lax.stop_gradient((outputs.hidden_BTD, head)), mask_BT)


def log_probs(outputs, targets_BT, mask_BT, *, chunk, temperature=1.0):
  """log q(target) in fp32, [B, T]; 0 outside of the mask. See `token_map`."""

  def of_targets(z_NV, target_N, _):
    log_q_NV = jax.nn.log_softmax(z_NV / temperature)
    return jnp.take_along_axis(log_q_NV, target_N[:, None], axis=1)[:, 0]

  return token_map(of_targets, outputs, targets_BT, (), mask_BT, chunk=chunk)
