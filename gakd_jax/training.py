"""What a run trains with: optimizers, the jitted step, the state at its start.

`run` is a `build.Run`.
"""

import dataclasses
from collections.abc import Callable

import jax

from gakd_jax import keys, optim, sharding, step


@dataclasses.dataclass(frozen=True)
class Training:
  """What a run trains with."""

  step: Callable  # (state, models, batch) -> state, metrics; jitted
  state: step.TrainState  # as shapes with their places: to restore into
  init: Callable  # () -> the state at step 0


def optimizer(config, total_steps, updates=1):
  """The optax chain of an optimizer's config, and its schedule.

  `updates` of it make one of the steps that the schedule counts.
  """
  settings = config.to_dict()
  rate = settings.pop('learning_rate')
  schedule = optim.make_schedule(
    rate,
    total_steps,
    schedule=settings.pop('schedule'),
    warmup_steps=settings.pop('warmup_steps'),
    end=settings.pop('end'),
  )
  by_update = schedule if updates == 1 else lambda n: schedule(n // updates)
  extra = settings.pop('extra_learning_rate', None)
  extra_rate = 1.0 if extra is None else extra / rate
  return optim.make(by_update, extra_rate=extra_rate, **settings), schedule


def make(run, steps_per_epoch, total):
  """The `Training` of a run of `total` steps; nothing is allocated."""
  c = run.config
  main, schedule = optimizer(c.optimizer, total)
  updates = run.objective.critic_steps
  if run.objective.critic_by_microbatch:
    updates *= microbatches(c)
  critic_optimizer, _ = optimizer(c.critic_optimizer, total, updates)

  spikes = c.train.skip_spikes

  def first_state(params, own):
    return step.init_state(
      params, own, main, critic_optimizer, find_spikes=spikes is not None
    )

  own = run.objective.shapes(*run.models.configs)
  state = jax.eval_shape(first_state, run.shapes, own)
  state = sharding.abstract(state, run.mesh)
  places = jax.tree.map(lambda x: x.sharding, state)

  def init():
    own = run.objective.init(
      keys.of(c.seed, 'method'), *run.models.configs, run.mesh
    )
    params = run.start()
    own = run.objective.begin(own, run.models, params)
    make = jax.jit(first_state, out_shardings=places, donate_argnums=(0, 1))
    return make(params, own)

  train_step = step.make_train_step(
    run.objective.for_run(steps_per_epoch, total),
    main,
    schedule,
    critic_optimizer=critic_optimizer,
    seed=c.seed,
    microbatches=microbatches(c),
    skip_spikes=spikes,
    out_shardings=(places, sharding.replicated(run.mesh)),
  )
  return Training(train_step, state, init)


def microbatches(config):
  """How many of them make an optimizer step."""
  c = config.train
  return c.batch_size // (c.microbatch_size or c.batch_size)
