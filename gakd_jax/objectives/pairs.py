"""Which position of the teacher a position of the student is compared with.

Positions are those of *logits*: what token n is predicted from stands at n - 1.
Every function returns, for each of the student's, the teacher's, and whether
there is one, [B, T]; the loss is then one of the student's tokens, with
`head.at` of the teacher's. What alignments are made of, see
`data.pipeline.Batch`; where there are none, both models read the same tokens.
"""

import jax
import jax.numpy as jnp

from gakd_jax.data import segments


def by_rank(student, teacher):
  """The n-th token of a response with the n-th of the other.

  student, teacher: `data.pipeline.Tokens`.
  """
  s_BT, t_BR = student.response_segments_BT, teacher.response_segments_BT
  rank_BT, rank_BR = segments.positions(s_BT), segments.positions(t_BR)

  def row(s_T, rank_T, t_R, rank_R):
    n = max(s_T.size, t_R.size) + 1
    # Of each document there: where it begins, and how long it is.
    begins_R = jnp.where((t_R > 0) & (rank_R == 0), t_R, n)
    first_S = _blank(n, 0).at[begins_R].set(jnp.arange(t_R.size), mode='drop')
    size_S = _blank(n, 0).at[t_R].add(1)
    return first_S[s_T] + rank_T, (s_T > 0) & (rank_T < size_S[s_T])

  return _pairs(*jax.vmap(row)(s_BT, rank_BT, t_BR, rank_BR))


def exact(batch):
  """Tokens that cover the same bytes after the same text: 'pairs'."""
  predicts_BT = batch.student.predicts_BT
  if 'pairs_t' not in batch.align:
    return _same(predicts_BT)
  # Where the teacher's token is predicted, of what is predicted here.
  index_BT = jnp.roll(batch.align['pairs_t'], -1, axis=1) - 1
  return _pairs(index_BT, predicts_BT & (index_BT >= 0))


def warped(batch):
  """Tokens that time warping pairs with one of the teacher's alone: 'dtw'.

  Here it is what the logits have *read* that is paired.
  """
  predicts_BT = batch.student.predicts_BT
  if 'dtw_t' not in batch.align:
    return _same(predicts_BT)
  index_BT = batch.align['dtw_t']
  return _pairs(index_BT, predicts_BT & (index_BT >= 0))


def spans(batch):
  """The 'span' of text of every token, as segments: [B, T] and [B, R].

  Both sides end at the same byte. They stand where their tokens are predicted.
  """
  s_BT, t_BR = (
    x.response_segments_BT > 0 for x in (batch.student, batch.teacher)
  )
  if 'span_s' not in batch.align:
    return [jnp.cumsum(x, axis=1) * x for x in (s_BT, t_BR)]
  return [
    x * (jnp.roll(batch.align[name], -1, axis=1) + 1)
    for x, name in ((s_BT, 'span_s'), (t_BR, 'span_t'))
  ]


def span_means(outputs, spans_BT):
  """`Outputs` whose hidden state is the mean of its span's; 0 outside.

  Logits are then the means of logits: the geometric mean of distributions,
  but for what a soft cap bends.
  """

  def row(x_TD, spans_T):
    n = spans_T.size + 1
    sums_SD = jnp.zeros((n, x_TD.shape[1])).at[spans_T].add(x_TD)
    sizes_S = jnp.zeros(n).at[spans_T].add(1)
    means_SD = sums_SD / jnp.maximum(sizes_S, 1)[:, None]
    return means_SD.at[0].set(0)[spans_T].astype(x_TD.dtype)

  return outputs.replace(hidden_BTD=jax.vmap(row)(outputs.hidden_BTD, spans_BT))


def ends(s_BT, t_BR):
  """The last tokens of `spans`."""

  def row(s_T, t_R):
    at_S = _blank(max(s_T.size, t_R.size) + 1, -1)
    return at_S.at[t_R].max(jnp.arange(t_R.size)).at[0].set(-1)[s_T]

  index_BT = jax.vmap(row)(s_BT, t_BR)
  return _pairs(index_BT, segments.is_last(s_BT) & (index_BT >= 0))


def begins(s_BT, t_BR):
  """The first tokens of `spans`."""
  R = t_BR.shape[1]
  index_BT, mask_BT = ends(s_BT[:, ::-1], t_BR[:, ::-1])
  return _pairs(R - 1 - index_BT[:, ::-1], mask_BT[:, ::-1])


def _same(mask_BT):
  at_BT = jnp.broadcast_to(jnp.arange(mask_BT.shape[1]), mask_BT.shape)
  return at_BT, mask_BT


def _pairs(index_BT, mask_BT):
  return jnp.where(mask_BT, index_BT, 0), mask_BT


def _blank(n, value):
  return jnp.full(n, value, jnp.int32)
