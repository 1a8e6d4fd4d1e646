"""No two who draw get the same numbers, and the seed decides them."""

import jax
import numpy as np

from gakd_jax import keys


def test_everybody_draws_something_else():
  drawn = {
    int(jax.random.bits(keys.of(seed, name)))
    for seed in (0, 1)
    for name in keys.CONSUMERS
  }
  # Nor what the first steps draw, whose keys are folded once more.
  drawn |= {
    int(jax.random.bits(jax.random.fold_in(keys.of(0, 'step'), step)))
    for step in range(8)
  }
  assert len(drawn) == 2 * len(keys.CONSUMERS) + 8
  a, b = (jax.random.bits(keys.of(3, 'method')) for _ in range(2))
  np.testing.assert_array_equal(a, b)
