"""Steps that are not taken, so that what goes wrong never gets into a state.

A step is skipped, which leaves all but its number as it was, for what is not
finite of it:

  <term>    a term of the objective, or its gradient of the hidden states
  critic    a loss or gradient of the critic in any of its updates, or what they
            make of it
  gradient  that of all that is trained, where no term or critic is to blame
  update    what the step would make of parameters, where the gradient is finite

and besides

  no_text   where no token of the batch is of a response: there is nothing to
            learn, and weight decay alone would move
  spike     where the loss, or the gradient's norm, is far above the last ones:
            by choice, `config.train.skip_spikes`

All is decided within the step, which the host reads of in its metrics. Steps go
on being counted, and with them the data; a schedule of the optimizer, which
counts its own updates, waits.
"""

import jax
import jax.numpy as jnp
from flax import struct

WINDOW = 64  # steps that a spike is told from
# Median deviations of a normal distribution in its standard deviation.
_SIGMA = 1.4826


@struct.dataclass
class Skips:
  """What a `TrainState` knows of the steps that were skipped."""

  total: jax.Array
  in_a_row: jax.Array  # up to the last step
  # {'loss', 'grad_norm': [WINDOW] of the last steps that were finite, NaN for
  # those before the first}; {} if spikes are taken.
  recent: dict


def none(find_spikes=False):
  """Those of a run at its start."""
  names = ('loss', 'grad_norm') if find_spikes else ()
  return Skips(
    total=jnp.zeros((), jnp.int32),
    in_a_row=jnp.zeros((), jnp.int32),
    recent={name: jnp.full(WINDOW, jnp.nan) for name in names},
  )


def are_finite(tree):
  """Whether all floating point numbers of a tree are."""
  found = [
    jnp.all(jnp.isfinite(x))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.all(jnp.array(found, bool))


def take_or_leave(before, taken, move, metrics, bad, most=None):
  """The `TrainState` after a step, and its metrics.

  Args:
    before: the state before the step.
    taken: the state that the step makes of it, but for what `move` does.
    move: the optimizer: (params, opt_state) -> (params, opt_state).
    metrics: of the step; among them 'loss', 'grad_norm' and 'tokens'.
    bad: {term or 'critic': whether it is not finite}.
    most: so many robust standard deviations above the median of the last
      `WINDOW` steps make a spike; None: nothing does.

  Returns:
    What `taken` is, or `before`, of the next number; the metrics, with
    'skipped', 'skipped/<cause>' and 'skipped/in_a_row'.
  """
  moved, _ = move(before.params, before.opt_state)
  causes = _causes(moved, taken, metrics, bad)
  skips, recent = before.skips, before.skips.recent
  if most is not None:
    now = {name: metrics[name] for name in recent}
    is_good = ~_any(causes)
    causes['spike'] = is_good & _is_spike(recent, now, most)
    # A spike as well: what lasts is none.
    recent = {
      name: jnp.where(is_good, jnp.append(x[1:], now[name]), x)
      for name, x in recent.items()
    }
  skipped = _any(causes)
  skips = Skips(
    total=skips.total + skipped,
    in_a_row=jnp.where(skipped, skips.in_a_row + 1, 0),
    recent=recent,
  )
  # Computed once more, in place: otherwise there would be parameters and
  # moments twice until it is known which to keep. (In the other order of
  # branches XLA copies what it keeps.)
  params, opt_state = jax.lax.cond(
    ~skipped, move, lambda *x: x, before.params, before.opt_state
  )
  state = jax.tree.map(
    lambda x, y: jnp.where(skipped, x, y), before, taken
  ).replace(params=params, opt_state=opt_state)
  flags = {'skipped': skipped} | {f'skipped/{k}': x for k, x in causes.items()}
  metrics = metrics | {k: x.astype(jnp.float32) for k, x in flags.items()}
  metrics |= {'skipped/in_a_row': skips.in_a_row}
  return state.replace(step=before.step + 1, skips=skips), metrics


def _causes(moved, taken, metrics, bad):
  """{cause: whether it is one}, but for spikes."""
  bad = dict(bad)
  if 'critic' in bad:
    bad['critic'] |= ~are_finite(taken.critic)
  gradient = ~jnp.isfinite(metrics['grad_norm'])
  update = ~are_finite((moved, taken.memory))
  return bad | {
    'gradient': gradient & ~_any(bad),
    'update': update & ~gradient & ~_any(bad),
    'no_text': metrics['tokens'] == 0,
  }


def _any(causes):
  return jnp.any(jnp.array([*causes.values()]))


def _is_spike(recent, now, most):
  """Never before the window is full: the median of any NaN is NaN."""
  found = []
  for name, x in recent.items():
    median = jnp.median(x)
    deviation = _SIGMA * jnp.median(jnp.abs(x - median))
    found.append(now[name] - median > most * deviation)
  return jnp.any(jnp.array(found))
