"""A chunk's loss and gradient, a tile of the vocabulary at a time.

The logits of a chunk of tokens are one product, [n, V] for each model. All that
is done with them after that goes tile by tile, which stays in a CPU's cache; on
an accelerator a tile is all of the vocabulary.

A loss is one of two kinds. `of_logits` is any function of logits: its gradient
exists whole, and what is tiled are the products with it. `of_log_probs` is a
sum over the vocabulary of a function of log-probabilities, as cross-entropy and
most divergences are: beside the logits themselves, nothing exists whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_CPU_TILE = 4096  # ids: with 256 tokens, 4 MB of fp32


class Tile(NamedTuple):
  """Ids that follow each other."""

  first: Any
  size: int

  def of(self, x, axis=1):
    if x.shape[axis] == self.size:
      return x
    return jax.lax.dynamic_slice_in_dim(x, self.first, self.size, axis)

  def add(self, x_VD, new_vD):
    """x with more in these rows."""
    new_vD = self.of(x_VD, 0) + new_vD
    if x_VD.shape[0] == self.size:
      return new_vD
    return jax.lax.dynamic_update_slice_in_dim(x_VD, new_vD, self.first, 0)


def sized(function, V, *args):
  """function(ids in a tile, *args), with what the platform likes."""
  if V <= _CPU_TILE:
    return function(V, *args)
  return jax.lax.platform_dependent(
    *args,
    cpu=lambda *args: function(_CPU_TILE, *args),
    default=lambda *args: function(V, *args),
  )


def over(V, size, body, carry):
  """body(tile, carry) -> carry, over tiles of V ids."""
  if size >= V:
    return body(Tile(0, V), carry)
  rest = V % size
  carry = jax.lax.fori_loop(
    0, V // size, lambda i, c: body(Tile(i * size, size), c), carry
  )
  return body(Tile(V - rest, rest), carry) if rest else carry


def of_logits(token_loss):
  """For `head_loop.sums`, a loss that reads logits.

  token_loss: (fp32 logits [n, V] of each model, targets, whole) -> (loss [n],
    {name: metric [n, ...]}).

  Returns:
    (weight [n], logits, targets, whole, ids in a tile) -> (weighted sums of
    loss and metrics; the gradient of logits, a function of the model's number
    and the tile; that of `whole`).
  """

  def gradient(weight_N, logits, targets, whole, size):
    del size

    def loss(logits, whole):
      return _weighted(weight_N, *token_loss(logits, targets, whole))

    # Gradients that nobody wants are dead code to the compiler.
    value, pull, metrics = jax.vjp(
      jax.checkpoint(loss, policy=_is_of_tokens), logits, whole, has_aux=True
    )
    d_logits, d_whole = pull(jnp.ones_like(value))
    return (value, metrics), lambda j, tile: tile.of(d_logits[j]), d_whole

  return gradient


def of_log_probs(id_loss, cappeds):
  """For `head_loop.sums`, a loss that is a sum over the vocabulary.

  id_loss: (log-probabilities [n, v] of each model, of ids that follow each
    other; targets; the first of these ids) -> what they add to (loss [n],
    {name: metric [n, ...]}).
  cappeds: of each model, (logits before `Head.capped`, first id) -> logits.
  """

  def gradient(weight_N, logits, targets, whole, size):
    V = logits[0].shape[1]

    def at(tile, zs):
      """Logits of a tile, after caps."""
      return [
        capped(z, tile.first) for capped, z in zip(cappeds, zs, strict=True)
      ]

    def more(tile, log_sums):
      zs = at(tile, map(tile.of, logits))
      return [
        jnp.logaddexp(log_sum, jax.nn.logsumexp(z, axis=1))
        for log_sum, z in zip(log_sums, zs, strict=True)
      ]

    def log_probs(tile, zs, log_sums):
      pairs = zip(at(tile, zs), log_sums, strict=True)
      return [z - log_sum[:, None] for z, log_sum in pairs]

    def value_of(tile, log_ps):
      return _weighted(weight_N, *id_loss(log_ps, targets, tile.first))

    def measured(tile):
      """((value, metrics) of a tile, the gradient of the `log_sums`)."""

      def value(log_sums):
        log_ps = log_probs(tile, map(tile.of, logits), log_sums)
        return value_of(tile, log_ps)

      return jax.value_and_grad(value, has_aux=True)(log_sums)

    def d_logits(j, tile):
      def value(zs):
        log_ps = log_probs(tile, zs, log_sums)
        # A log_sum moves by the probabilities: exp(log_p) has this gradient.
        through_sums = sum(
          jnp.sum(d_N[:, None] * jnp.exp(log_p))
          for d_N, log_p in zip(d_log_sums, log_ps, strict=True)
        )
        return value_of(tile, log_ps)[0] + through_sums

      return jax.grad(value)([*map(tile.of, logits)])[j]

    nothing_N = jnp.full_like(weight_N, -jnp.inf)
    log_sums = over(V, size, more, [nothing_N] * len(logits))
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(lambda: measured(Tile(0, min(size, V)))),
    )
    totals, d_log_sums = over(
      V,
      size,
      lambda tile, carry: jax.tree.map(jnp.add, carry, measured(tile)),
      zeros,
    )
    return totals, d_logits, jax.tree.map(jnp.zeros_like, whole)

  return gradient


def _weighted(weight_N, loss_N, metrics):
  return jnp.sum(weight_N * loss_N), {
    name: jnp.sum(align(weight_N, x) * x, axis=0) for name, x in metrics.items()
  }


def align(mask_N, x_N):
  return mask_N.reshape(-1, *(1,) * (x_N.ndim - 1))


def _is_of_tokens(primitive, *_, **__):
  """What a chunk's gradient keeps of its loss: a few numbers a token.

  Log-probabilities and the like are computed again from the logits, in the
  loop that uses them: that costs less than to write and read them.
  """
  return primitive.name.startswith(('reduce', 'arg', 'while', 'top_k'))
