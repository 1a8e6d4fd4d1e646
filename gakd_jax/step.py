"""The one jitted update.

A step is a pure function of (state, frozen parameters, batch): methods differ
only in the objective object that they hand it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gakd_jax import sharding
from gakd_jax.data import segments
from gakd_jax.models import lora, transformer


@struct.dataclass
class TrainState:
  """Exactly what is saved."""

  step: jax.Array  # optimizer steps taken
  params: dict  # {'student': ..., 'extra': ...}: descend objective.loss
  opt_state: optax.OptState
  critic: dict  # descends objective.critic_loss; {} if there is none
  critic_opt_state: optax.OptState


def init_state(
  student_params, optimizer, *, extra=None, critic=None, critic_optimizer=None
):
  """A fresh state, fp32 master weights; jit it with `state_shardings`."""
  params = {'student': student_params, 'extra': extra or {}}
  params, critic = jax.tree.map(
    lambda x: x.astype(jnp.float32), (params, critic or {})
  )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    critic=critic,
    critic_opt_state=critic_optimizer.init(critic) if critic else (),
  )


@dataclasses.dataclass(frozen=True)
class Models:
  """Student and teacher as functions of parameters and a batch.

  `student` and `teacher` are model definitions (`transformer.split`); `frozen`
  has the 'teacher's parameters, and those of the 'student' that are not
  trained, if any. The teacher is None for methods that need none. It keeps no
  activations and gets no gradient. `key` draws dropout.
  """

  student: Any
  teacher: Any
  dtype: Any  # of the computation
  remat: bool = False  # of the student's blocks

  def student_outputs(self, params, frozen, batch, key):
    params = lora.combine(params, frozen.get('student'))
    return transformer.apply(
      self.student, params, batch.student, self.dtype, self.remat, key
    )

  def teacher_outputs(self, frozen, batch):
    if self.teacher is None:
      return None
    outputs = transformer.apply(
      self.teacher, frozen['teacher'], batch.teacher, self.dtype
    )
    return jax.lax.stop_gradient(outputs)


def make_train_step(
  models,
  objective,
  optimizer,
  schedule,
  *,
  critic_optimizer=None,
  seed,
  microbatches=1,
  out_shardings=None,
):
  """The jitted update: (state, frozen, batch) -> state, metrics.

  The state is donated. With several microbatches, rows are dealt out in turn
  and gradients summed: losses divide by the numbers of the whole batch, so the
  split changes nothing but what is drawn at random.

  A critic is updated before the student's loss is computed. In one microbatch
  it sees the outputs that this loss then uses: student and teacher run once.
  Of several it needs all, so their hidden states are collected first, for one
  more forward pass of the student (`objective.critic_by_microbatch` does
  without).
  """
  critic_update = _make_critic_update(objective, critic_optimizer)
  update_first = microbatches > 1 and not objective.critic_by_microbatch

  def student_loss(
    params, critic_state, frozen, teacher, rows, numbers, rngs, step
  ):
    student = models.student_outputs(params['student'], frozen, rows, rngs[2])
    critic_metrics = {}
    if critic_state[0] and not update_first:
      pair = jax.lax.stop_gradient((student, teacher))
      critic_state, critic_metrics = critic_update(
        critic_state,
        [x.head for x in pair],
        [x.hidden_BTD[None] for x in pair],
        jax.tree.map(lambda x: x[None], rows),
        numbers,
        rngs[1],
      )
    loss, metrics = objective.loss(
      student,
      teacher,
      rows.replace(**numbers),
      params['extra'],
      critic_state[0],
      rngs[0],
      step,
    )
    return loss, (critic_state, {'loss': loss} | metrics | critic_metrics)

  grad_fn = jax.grad(student_loss, has_aux=True)

  def train_step(state, frozen, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    # Of what is random: the objective, the critic's update, dropout.
    rngs = rng, *(jax.random.fold_in(rng, microbatches + i) for i in range(2))
    numbers = _count(batch.student)
    rows = jax.tree.map(lambda x: _deal(x, microbatches), batch)
    critic_state = state.critic, state.critic_opt_state
    t_hidden, critic_metrics = None, {}
    if state.critic and update_first:
      first = jax.tree.map(lambda x: x[0], rows)

      def outputs(i, rows):
        key = jax.random.fold_in(rngs[2], i)
        return (
          models.student_outputs(state.params['student'], frozen, rows, key),
          models.teacher_outputs(frozen, rows),
        )

      hiddens = jax.lax.map(
        lambda args: [x.hidden_BTD for x in outputs(*args)],
        (jnp.arange(microbatches), rows),
      )
      # Only the heads of these are used, so that nothing else is computed.
      heads = [x.head for x in outputs(0, first)]
      critic_state, critic_metrics = critic_update(
        critic_state, heads, hiddens, rows, numbers, rngs[1]
      )
      t_hidden = hiddens[1]

    def one(critic_state, i, rows, t_hidden):
      if t_hidden is None:
        teacher = models.teacher_outputs(frozen, rows)
      else:
        teacher = transformer.Outputs(t_hidden, heads[1])
      grads, (critic_state, metrics) = grad_fn(
        state.params,
        critic_state,
        frozen,
        teacher,
        rows,
        numbers,
        [jax.random.fold_in(r, i) for r in rngs],
        state.step,
      )
      return critic_state, (grads, metrics)

    critic_state, (grads, metrics) = _accumulate(
      one, critic_state, rows, t_hidden
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = objective.summarize(metrics | critic_metrics) | {
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
      'tokens': jnp.sum(batch.student.mask_BT),
    }
    state = TrainState(
      state.step + 1,
      optax.apply_updates(state.params, updates),
      opt_state,
      *critic_state,
    )
    return state, metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _make_critic_update(objective, optimizer):
  """(critic state, heads, hiddens, rows, ...) -> critic state, metrics.

  Takes `objective.critic_steps` steps, each on all of the microbatches that
  `hiddens` and `rows` have along a leading M; metrics are those before the
  first.
  """
  grad_fn = jax.value_and_grad(objective.critic_loss, has_aux=True)

  def critic_update(critic_state, heads, hiddens, rows, numbers, rng):
    def step(critic_state, rng):
      critic, opt_state = critic_state

      def one(_, i, hiddens, rows):
        outputs = map(transformer.Outputs, hiddens, heads)
        (_, metrics), grads = grad_fn(
          critic, *outputs, rows.replace(**numbers), jax.random.fold_in(rng, i)
        )
        return None, (grads, metrics)

      _, (grads, metrics) = _accumulate(one, None, hiddens, rows)
      metrics |= {'grad_norm': optax.tree.norm(grads)}
      updates, opt_state = optimizer.update(grads, opt_state, critic)
      return (optax.apply_updates(critic, updates), opt_state), metrics

    critic_state, metrics = jax.lax.scan(
      step, critic_state, jax.random.split(rng, objective.critic_steps)
    )
    return critic_state, {f'critic/{k}': x[0] for k, x in metrics.items()}

  return critic_update


def _count(tokens):
  """What the losses of an optimizer step divide by."""
  numbers = {
    'num_tokens': jnp.sum(tokens.mask_BT),
    'num_sequences': jnp.sum(segments.is_last(tokens.response_segments_BT)),
  }
  return {name: jnp.maximum(n, 1) for name, n in numbers.items()}


def _deal(x, hands):
  """Rows i, i + M, i + 2M ... to hand i: each device keeps its own rows."""
  return x.reshape(-1, hands, *x.shape[1:]).swapaxes(0, 1)


def _accumulate(fn, carry, *stacked):
  """Sums what `fn` puts out over the leading axis, threading a carry.

  fn(carry, i, *slices) -> carry, tree.
  """
  leading = len(jax.tree.leaves(stacked)[0])
  first = jax.tree.map(lambda x: x[0], stacked)
  if leading == 1:
    return fn(carry, 0, *first)

  def body(state, inputs):
    carry, total = state
    carry, new = fn(carry, *inputs)
    return (carry, jax.tree.map(jnp.add, total, new)), None

  _, shapes = jax.eval_shape(fn, carry, 0, *first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  inputs = (jnp.arange(leading), *stacked)
  return jax.lax.scan(body, (carry, zeros), inputs)[0]


def state_shardings(state, mesh):
  """(state, metrics) shardings of a (abstract) state on a mesh."""
  return sharding.shardings(state, mesh), sharding.replicated(mesh)
