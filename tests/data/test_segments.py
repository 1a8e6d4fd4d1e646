"""Positions, sums and ends of segments, against loops."""

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax.data import segments

SEGMENTS_BT = np.array([[1, 1, 1, 2, 2, 0], [0, 0, 3, 3, 1, 1]])


def test_positions_count_from_the_start_of_each_segment():
  want_BT = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 0, 1]]
  np.testing.assert_array_equal(segments.positions(SEGMENTS_BT), want_BT)


def test_total_is_the_sum_of_each_segment_and_zero_outside():
  x_BT = np.random.default_rng(0).standard_normal(SEGMENTS_BT.shape)
  want_BT = np.zeros_like(x_BT)
  for b, t in np.ndindex(*x_BT.shape):
    if SEGMENTS_BT[b, t]:
      want_BT[b, t] = x_BT[b, SEGMENTS_BT[b] == SEGMENTS_BT[b, t]].sum()
  total_BT = jax.jit(segments.total)(jnp.asarray(x_BT, 'float32'), SEGMENTS_BT)
  np.testing.assert_allclose(total_BT, want_BT, rtol=1e-6, atol=1e-6)


def test_is_last_marks_the_end_of_every_segment():
  want_BT = [[0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
  np.testing.assert_array_equal(segments.is_last(SEGMENTS_BT), want_BT)
