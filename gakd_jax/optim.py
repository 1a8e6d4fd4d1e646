"""Learning-rate schedules and optimizers from explicit arguments."""

import re

import jax
import optax

from gakd_jax import UserError, sharding

SCHEDULES = {
  'constant': lambda rate, end, steps: optax.constant_schedule(rate),
  'cosine': lambda rate, end, steps: optax.cosine_decay_schedule(
    rate, steps, alpha=end / rate
  ),
  'linear': optax.linear_schedule,
}


def _adamw(schedule, b1, b2, eps, weight_decay, mask, mu_dtype):
  return optax.adamw(
    *(schedule, b1, b2, eps),
    weight_decay=weight_decay,
    mask=mask,
    mu_dtype=mu_dtype,
  )


def _rmsprop(schedule, b1, b2, eps, weight_decay, mask, mu_dtype):
  if mu_dtype != 'float32':
    raise UserError(
      f'mu_dtype={mu_dtype!r}: rmsprop keeps its momentum in float32; leave it '
      'at that, or take adamw'
    )
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.rmsprop(schedule, b2, eps, eps_in_sqrt=False, momentum=b1),
  )


OPTIMIZERS = {'adamw': _adamw, 'rmsprop': _rmsprop}


def make_schedule(
  learning_rate, total_steps, *, schedule='constant', warmup_steps=0, end=0.0
):
  """Linear warm-up, then constant, or cosine or linear down to `end`.

  The decay ends at `total_steps`; step 0 without warm-up has the full rate.
  """
  steps = max(total_steps - warmup_steps, 1)
  main = SCHEDULES[schedule](learning_rate, end, steps)
  if not warmup_steps:
    return main
  # The first step already moves: a rate of 0 would waste it.
  warmup = optax.linear_schedule(
    learning_rate / (warmup_steps + 1), learning_rate, warmup_steps
  )
  return optax.join_schedules([warmup, main], [warmup_steps])


def make(
  schedule,
  *,
  name='adamw',
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  no_decay=r'(scale|bias)$',
  clip_norm=None,
  mu_dtype='float32',
  extra_rate=1.0,
):
  """An optax chain: clip by global norm, then the optimizer.

  'adamw', or 'rmsprop' as in PyTorch: weight decay is added to the gradient,
  `b1` is the momentum and `b2` the decay of the squares. `no_decay` is a regex
  of parameter paths that weight decay leaves alone. `mu_dtype` is that of
  Adam's first moment; the second, which moves by less than bf16 can say, is
  fp32, as is all arithmetic. `extra_rate` multiplies the learning rate of a
  method's own parameters, those under 'extra/'.
  """

  def is_extra(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: sharding.path_name(path).startswith('extra/'), params
    )

  def decays(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: not re.search(no_decay, sharding.path_name(path)), params
    )

  optimizer = OPTIMIZERS[name](
    schedule, b1, b2, eps, weight_decay, decays, mu_dtype
  )
  if extra_rate != 1:
    own_rate = optax.masked(optax.scale(extra_rate), is_extra)
    optimizer = optax.chain(optimizer, own_rate)
  if clip_norm is None:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
