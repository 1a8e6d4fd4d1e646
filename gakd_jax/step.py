"""The one jitted update.

A step is a pure function of (state, frozen parameters, batch): methods differ
only in the objective object that they hand it.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gakd_jax import sharding
from gakd_jax.models import transformer


@struct.dataclass
class TrainState:
  """Exactly what is saved."""

  step: jax.Array  # optimizer steps taken
  params: dict  # {'student': ..., 'extra': ...}: descend objective.loss
  opt_state: optax.OptState


def init_state(student_params, extra, optimizer):
  """A fresh state, fp32 master weights; jit it with `state_shardings`."""
  params = {'student': student_params, 'extra': extra}
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_loss(student, teacher, objective, dtype, remat=False):
  """loss(params, frozen, batch, rng, step) -> scalar, metrics.

  `student` and `teacher` are model definitions (`transformer.split`); `frozen`
  is {'teacher': parameters}. The teacher keeps no activations and gets no
  gradient.
  """

  def loss(params, frozen, batch, rng, step):
    t_outputs = None
    if objective.needs_teacher:
      t_outputs = jax.lax.stop_gradient(
        transformer.apply(teacher, frozen['teacher'], batch.teacher, dtype)
      )
    s_outputs = transformer.apply(
      student, params['student'], batch.student, dtype, remat
    )
    return objective.loss(
      s_outputs, t_outputs, batch, params['extra'], rng, step
    )

  return loss


def make_train_step(
  loss_fn, optimizer, schedule, *, seed, microbatches=1, out_shardings=None
):
  """The jitted update: (state, frozen, batch) -> state, metrics.

  The state is donated. With several microbatches, rows are dealt out in turn
  and gradients summed: the loss divides by the tokens of the whole batch, so
  their number changes nothing.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def accumulate(params, frozen, batch, rng, step):
    def one(i, rows):
      (loss, metrics), grads = grad_fn(
        params, frozen, rows, jax.random.fold_in(rng, i), step
      )
      return {'loss': loss, **metrics}, grads

    num_tokens, batch = batch.num_tokens, batch.replace(num_tokens=None)
    if microbatches == 1:
      return one(0, batch.replace(num_tokens=num_tokens))
    # Rows i, i + M, i + 2M ...: each device keeps its own rows.
    split = jax.tree.map(
      lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def body(total, inputs):
      i, rows = inputs
      new = one(i, rows.replace(num_tokens=num_tokens))
      return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda x: x[0], split).replace(num_tokens=num_tokens)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0, first)
    )
    return jax.lax.scan(body, zeros, (jnp.arange(microbatches), split))[0]

  def train_step(state, frozen, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    num_tokens = jnp.sum(batch.student.mask_BT)
    batch = batch.replace(num_tokens=jnp.maximum(num_tokens, 1))
    metrics, grads = accumulate(state.params, frozen, batch, rng, state.step)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
      'tokens': num_tokens,
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def state_shardings(state, mesh):
  """(state, metrics) shardings of a (abstract) state on a mesh."""
  return sharding.shardings(state, mesh), sharding.replicated(mesh)
