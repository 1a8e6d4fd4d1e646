"""Who draws at random in a run: one key for each, all from `config.seed`."""

import jax

CONSUMERS = ('student', 'adapters', 'method', 'step', 'writer')


def of(seed, consumer):
  """The key of one of `CONSUMERS`; no two of them draw the same numbers."""
  return jax.random.fold_in(jax.random.key(seed), CONSUMERS.index(consumer))
