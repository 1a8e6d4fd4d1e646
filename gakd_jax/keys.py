"""Who draws at random in a run: one key for each, all from `config.seed`.

Not so what is kept of a teacher as draws: runs of all seeds read the same.
"""

import jax

# Whom a row's key is folded for beside the tokens of its response, from 0 on:
# the teacher that draws instead, what accepts a draft, who writes the row, and
# how often the same step has had the row before, from there on.
TEACHER, ACCEPTANCE, SHARE, AGAIN = ((1 << 31) + i for i in range(4))
CONSUMERS = ('student', 'adapters', 'method', 'step', 'writer')


def of(seed, consumer):
  """The key of one of `CONSUMERS`; no two of them draw the same numbers."""
  return jax.random.fold_in(jax.random.key(seed), CONSUMERS.index(consumer))
