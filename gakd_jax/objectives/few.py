"""A teacher that is known by a few numbers a token.

Instead of a distribution over V ids there are K of them, `ids` [N, K] with
their `log_probs` [N, K], and what these ids are:

  top_k    the most likely ones, beside the log-probability `rest` [N] of all
           others together. A divergence is then over K + 1 outcomes, and never
           more than the one over V (`adaptive` may be). Nothing is
           renormalised: how much mass the student has outside of the K ids
           counts, but not on which ids.
  sampled  n draws from the teacher; `share` [N, K] of them are each id. The sum
           of share (log p - log q) and its gradient are, on average over draws,
           those of the forward KL (arXiv 2503.16870). Draws are systematic, at
           (u + 0 ... n - 1) / n of the cumulated probabilities, u uniform: an
           id of probability p is drawn n p times, rounded up or down, which
           varies less than independent draws.

Probabilities are those at the temperature of the loss, over the ids that have a
token. On disk numbers are fp16: p is then known to 0.1 to 0.4 %.
"""

import jax
import jax.numpy as jnp

from gakd_jax.data import kept
from gakd_jax.objectives import head

KINDS = ('top_k', 'sampled')


def ask(kind, size, outputs, mask_BT, *, temperature, chunk, key_B=None):
  """What a teacher's outputs are known by; positions of the mask alone count.

  Args:
    kind: one of `KINDS`.
    size: K of top_k, n of sampled.
    outputs: `models.transformer.Outputs` of the teacher.
    mask_BT: where something is predicted.
    temperature: of the loss.
    chunk: see `head.token_map`.
    key_B: of each row's draws, for sampled.

  Returns:
    {'ids': int32 [B, T, size], 'log_probs': fp16 of them}; of top_k 'rest' fp16
    [B, T]. Of sampled an id is there as often as it was drawn, side by side.
  """
  if kind == 'top_k':
    rows = ()
  else:
    T = mask_BT.shape[1]
    rows = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(key_B)

  def found(z_NV, u_N, _):
    log_p_NV = jax.nn.log_softmax(z_NV / temperature)
    if kind == 'top_k':
      log_p_NK, ids_NK = jax.lax.top_k(log_p_NV, size)
      more = [_rest(log_p_NV, ids_NK)[:, None]]
    else:
      ids_NK = _systematic(jnp.exp(log_p_NV), u_N, size)
      log_p_NK, more = jnp.take_along_axis(log_p_NV, ids_NK, axis=1), []
    # As floats, ids below 2^24 are exact.
    return jnp.concatenate([ids_NK.astype(jnp.float32), log_p_NK, *more], 1)

  x_BTX = head.token_map(found, outputs, rows, (), mask_BT, chunk=chunk)
  given = {
    'ids': x_BTX[:, :, :size].astype(jnp.int32),
    'log_probs': x_BTX[:, :, size : 2 * size].astype(jnp.float16),
  }
  if kind == 'top_k':
    given['rest'] = x_BTX[:, :, -1].astype(jnp.float16)
  return given


def outcomes(z_NV, known):
  """log p and log q of top_k's K + 1 outcomes, [N, K + 1], from logits of q."""
  log_q_NV = jax.nn.log_softmax(z_NV)
  ids_NK = known['ids']
  log_q_NK = jnp.take_along_axis(log_q_NV, ids_NK, axis=1)
  rest_N1 = _rest(log_q_NV, ids_NK)[:, None]
  log_p = known['log_probs'], known['rest'][:, None]
  return (
    jnp.concatenate([x.astype(jnp.float32) for x in log_p], axis=1),
    jnp.concatenate([log_q_NK, rest_N1], axis=1),
  )


def forward_kl(z_NV, known):
  """The estimate of KL(p || q) from sampled ids, [N], from logits of q."""
  log_q_NV = jax.nn.log_softmax(z_NV)
  log_q_NK = jnp.take_along_axis(log_q_NV, known['ids'], axis=1)
  log_p_NK = known['log_probs'].astype(jnp.float32)
  return jnp.sum(known['share'] * (log_p_NK - log_q_NK), axis=1)


def _rest(log_p_NV, ids_NK):
  """The log-probability [N] of all other ids, summed without these.

  As 1 less the sum it would be noise where almost nothing is left.
  """
  rows_N1 = jnp.arange(len(ids_NK))[:, None]
  others_NV = log_p_NV.at[rows_N1, ids_NK].set(2 * kept.NOTHING)
  return jnp.maximum(jax.nn.logsumexp(others_NV, axis=1), kept.NOTHING)


def _systematic(p_NV, u_N, n):
  """n ids [N, n] of each row, ascending, drawn with one uniform number."""
  sums_NV = jnp.cumsum(p_NV, axis=1)
  at_Nn = (jnp.arange(n)[None] + u_N[:, None]) / n * sums_NV[:, -1:]
  ids_Nn = jax.vmap(lambda s, x: jnp.searchsorted(s, x, side='right'))(
    sums_NV, at_Nn
  )
  # What rounds up to all of it is of the last id that there is.
  last_N = p_NV.shape[1] - 1 - jnp.argmax(p_NV[:, ::-1] > 0, axis=1)
  return jnp.minimum(ids_Nn, last_N[:, None])
