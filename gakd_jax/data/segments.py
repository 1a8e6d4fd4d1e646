"""Documents that share a row: segments are 1, 2, ... and 0 on what is nobody's.

A segment lies in one piece. Sums and positions of all rows at once, without an
array of [B, T, T].
"""

import jax
import jax.numpy as jnp


def positions(segments_BT):
  """The position of each token within its segment, counted from 0; [B, T]."""
  t_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
  starts_BT = jnp.concatenate(
    [
      jnp.ones_like(segments_BT[:, :1], bool),
      segments_BT[:, 1:] != segments_BT[:, :-1],
    ],
    axis=1,
  )
  return t_BT - jax.lax.cummax(jnp.where(starts_BT, t_BT, 0), axis=1)


def total(x_BT, segments_BT):
  """At every position, the sum over its segment; 0 outside segments."""

  def row(x_T, segments_T):
    sums = jnp.zeros(x_T.size + 1, x_T.dtype).at[segments_T].add(x_T)
    return sums.at[0].set(0)[segments_T]

  return jax.vmap(row)(x_BT, segments_BT)


def is_last(segments_BT):
  """True at the last position of every segment, [B, T]."""
  next_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
  return (segments_BT > 0) & (segments_BT != next_BT)
