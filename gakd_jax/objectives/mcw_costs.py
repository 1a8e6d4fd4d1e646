"""The costs of MCW-KD: how far each token of a teacher is from a student's.

All are [B, M, N], teacher's tokens by student's. `Sides` says which of them
are there: a row's tokens that have a next one, prompt and response. What cells
hold beyond those is of no meaning, but finite.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gakd_jax.objectives import ot

_TAU = 2.0  # temperature of the ranked logits
_WINDOW = 4  # positions on each side that make a context
_SMALL = 1e-7


class Sides(NamedTuple):
  t_BM: Any  # bool
  s_BN: Any

  @property
  def cells_BMN(self):
    return self.t_BM[:, :, None] & self.s_BN[:, None]


def of_logits(t_BMK, s_BNK, t_scores_BM, s_scores_BN, share, sides, bounded):
  """Of the largest logits, ranked: three costs, and the teacher's features.

  t_BMK, s_BNK: logits in descending order; the teacher's are mixed with the
    student's at the same position, where there is one, of which it keeps
    `share`.
  t_scores_BM, s_scores_BN: salience of tokens, 0 to 1.
  bounded: as the semi-dual has them, at most 1.
  """
  M = t_BMK.shape[1]
  mixed_BMK = jnp.pad(s_BNK, ((0, 0), (0, max(0, M - s_BNK.shape[1])), (0, 0)))
  mixed_BMK = (1 - share) * mixed_BMK[:, :M] + share * t_BMK
  t_BMK, s_BNK = (jax.nn.softmax(x / _TAU) for x in (mixed_BMK, s_BNK))
  if bounded:
    t_BMK, s_BNK = (jnp.clip(x, _SMALL, 1) for x in (t_BMK, s_BNK))
  costs = [
    ot.l2(t_BMK, s_BNK),
    ot.kl(t_BMK, s_BNK, 0.0 if bounded else _SMALL),
    jnp.abs(t_scores_BM[:, :, None] - s_scores_BN[:, None]),
  ]
  if bounded:
    costs[1] = jnp.clip(costs[1], 0, 100)
    costs = [_over_largest(x, sides) for x in costs]
  return costs, t_BMK


def of_hiddens(t_BMD, s_BND, edits_BMN, sides, bounded):
  """Of edits, and of contexts of hidden states: three, and features.

  t_BMD are in the student's space. edits_BMN: see `edits`.
  """
  if bounded:
    t_BMD, s_BND = (x / _norm(x) for x in (t_BMD, s_BND))
    edits_BMN = _over_largest(edits_BMN, sides)
  t_context, s_context = (
    _contexts(t_BMD, sides.t_BM),
    _contexts(s_BND, sides.s_BN),
  )
  far_BMN = ot.l2(t_context, s_context)
  t_norm_BM1, s_norm_BN1 = (
    jnp.maximum(_norm(x), _SMALL) if bounded else _norm(x) + _SMALL
    for x in (t_context, s_context)
  )
  cosine_BMN = ot.inner(t_context / t_norm_BM1, s_context / s_norm_BN1)
  turned_BMN = 1 - cosine_BMN
  if bounded:
    turned_BMN = jnp.clip(turned_BMN, 0, 2)
  return [edits_BMN, _over_largest(far_BMN, sides), turned_BMN], t_BMD


def edits(align, shape_BMN):
  """Edit distances on the cells of the warping paths, 0 elsewhere.

  The mean of the path from the teacher to the student and of that back.
  """
  if 'path_d' not in align:
    return jnp.zeros(shape_BMN)

  def row(t_P, s_P, d_P):
    # Negative indices would count from the end.
    t_P = jnp.where(t_P < 0, shape_BMN[1], t_P)
    cost_MN = jnp.zeros(shape_BMN[1:])
    return cost_MN.at[t_P, s_P].add(0.5 * d_P, mode='drop')

  return jax.vmap(row)(*(align[f'path_{name}'] for name in ('t', 's', 'd')))


def _contexts(x_BND, mask_BN):
  """Means over a token's neighbours, those that are there."""
  x_BND = jnp.where(mask_BN[:, :, None], x_BND, 0)
  values = jnp.concatenate(
    [x_BND, mask_BN[:, :, None].astype(x_BND.dtype)], axis=2
  )
  N = values.shape[1]
  padded = jnp.pad(values, ((0, 0), (_WINDOW, _WINDOW), (0, 0)))
  total = sum(padded[:, i : i + N] for i in range(2 * _WINDOW + 1))
  return total[:, :, :-1] / jnp.maximum(total[:, :, -1:], 1)


def _norm(x_BND):
  """[B, N, 1]; without a gradient where it is 0."""
  square_BN1 = jnp.sum(x_BND * x_BND, axis=2, keepdims=True)
  is_BN1 = square_BN1 > 0
  return jnp.where(is_BN1, jnp.sqrt(jnp.where(is_BN1, square_BN1, 1)), 0)


def _over_largest(cost_BMN, sides):
  largest_B = jnp.max(
    jnp.where(sides.cells_BMN, cost_BMN, 0), axis=(1, 2), keepdims=True
  )
  return cost_BMN / (largest_B + _SMALL)
