"""The one jitted update.

A step is a pure function of (state, models, batch): methods differ only in the
objective object that they hand it. It reads in the order in which it happens:
what student and teacher put out, the critic's update on that, the loss against
the updated critic and its gradient with respect to the student's outputs, that
gradient pulled back into the student's parameters, and whether all of this is
taken, see `skips`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gakd_jax import keys, sharding, skips
from gakd_jax.objectives.base import Own


@struct.dataclass
class TrainState:
  """Exactly what is saved."""

  step: jax.Array  # optimizer steps taken
  params: dict  # {'student': ..., 'extra': ...}: descend the objective's terms
  opt_state: optax.OptState
  critic: dict  # descends objective.critic_loss; {} if there is none
  critic_opt_state: optax.OptState
  memory: dict  # of the objective, moved by its `remember`; {} if none
  skips: skips.Skips  # what is known of steps that were not taken


def init_state(
  student_params, own, optimizer, critic_optimizer, find_spikes=False
):
  """A fresh state, fp32 master weights."""
  params = {'student': student_params, 'extra': own.extra}
  params, critic = jax.tree.map(
    lambda x: x.astype(jnp.float32), (params, own.critic)
  )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    critic=critic,
    critic_opt_state=critic_optimizer.init(critic) if critic else (),
    memory=own.memory,
    skips=skips.none(find_spikes),
  )


def make_train_step(
  objective,
  optimizer,
  schedule,
  *,
  critic_optimizer=None,
  seed,
  microbatches=1,
  skip_spikes=None,
  out_shardings=None,
):
  """The jitted update: (state, models, batch) -> state, metrics.

  The state is donated; of a step that is skipped (see `skips`, whose `most` is
  `skip_spikes`) all but its number comes back. With several microbatches, rows
  are dealt out in turn and gradients summed: losses divide by the totals of the
  whole batch, so the split changes nothing but what is drawn at random.

  A critic is updated before the student's loss is computed. In one microbatch
  it sees the outputs that this loss then uses: student and teacher run once.
  Of several it needs all, so their hidden states are collected first, for one
  more forward pass of the student (`objective.critic_by_microbatch` does
  without).
  """
  critic_first = objective.updates_critic_first(microbatches)

  def train_step(state, models, batch):
    if batch.known or not objective.needs_teacher:
      models = models.alone()
    key = jax.random.fold_in(keys.of(seed, 'step'), state.step)
    step = _Step(
      objective=objective,
      critic_optimizer=critic_optimizer,
      models=models,
      params=state.params['student'],
      heads=models.heads(state.params['student']),
      own=Own(
        extra=state.params['extra'],
        critic=state.critic,
        memory=state.memory,
        constants=models.frozen.get('constants', {}),
        step=state.step,
      ),
      totals=objective.count(batch),
      keys=jax.random.split(key, 3),
    )
    dealt = jax.tree.map(lambda x: _deal(x, microbatches, batch.group), batch)
    critic_state = state.critic, state.critic_opt_state
    t_hidden, critic_metrics = None, {}
    if state.critic and critic_first:
      hiddens = step.collect(dealt)
      critic_state, critic_metrics = step.update_critic(
        critic_state, hiddens, dealt, step.keys[1]
      )
      t_hidden = hiddens[1]
    microbatch = functools.partial(
      step.microbatch, updates_critic=state.critic and not critic_first
    )
    critic_state, (d, metrics, terms) = _accumulate(
      microbatch, critic_state, dealt, t_hidden
    )
    metrics |= critic_metrics
    names = list(objective.terms())
    bad = {'critic': metrics.pop('critic/not_finite')} if state.critic else {}
    bad |= _not_finite(terms, names)
    grads = step.parameter_gradients(d)

    def move(params, opt_state):
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    metrics |= _compared(terms['gram'], names) | {
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(
        schedule(state.step - state.skips.total), jnp.float32
      ),
      'tokens': jnp.sum(batch.student.mask_BT),
    }
    taken = state.replace(
      critic=critic_state[0],
      critic_opt_state=critic_state[1],
      memory=objective.remember(step.own, metrics),
    )
    return skips.take_or_leave(state, taken, move, metrics, bad, skip_spikes)

  return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


@dataclasses.dataclass(frozen=True)
class _Step:
  """One step: what its microbatches share, and what happens to each."""

  objective: Any
  critic_optimizer: Any
  models: Any  # `models.pair.Models`
  params: dict  # of the student, those that are trained
  heads: tuple  # of student and teacher, gathered
  own: Own
  totals: dict
  keys: jax.Array  # of what is random: the objective, the critic, dropout

  @property
  def trains_head(self):
    return self.models.head_name in self.params

  @property
  def backbone(self):
    """The student but for a head of its own, whose gradient comes first."""
    return {k: p for k, p in self.params.items() if k != 'head_weight'}

  def student_hidden(self, backbone, i, rows):
    key = jax.random.fold_in(self.keys[2], i)
    return self.models.student_hidden(self.params | backbone, rows, key)

  def outputs(self, hiddens):
    return self.models.pair(self.params, self.heads, hiddens)

  def collect(self, dealt):
    """Hidden states of both models in all microbatches, [M, B, T, .]."""

    def hiddens(i, rows):
      student = self.student_hidden(self.backbone, i, rows)
      return student, self.models.teacher_hidden(rows)

    n = len(dealt.student.ids_BT)
    return jax.lax.map(lambda x: hiddens(*x), (jnp.arange(n), dealt))

  def microbatch(self, critic_state, i, rows, t_hidden, updates_critic):
    """critic state, (gradients, metrics, `terms` of `_gradients`)."""
    s_hidden, pull_back = jax.vjp(
      lambda backbone: self.student_hidden(backbone, i, rows), self.backbone
    )
    if t_hidden is None:
      t_hidden = self.models.teacher_hidden(rows)
    hiddens, critic_metrics = (s_hidden, t_hidden), {}
    if updates_critic:
      critic_state, critic_metrics = self.update_critic(
        critic_state,
        *jax.tree.map(lambda x: x[None], (hiddens, rows)),
        jax.random.fold_in(self.keys[1], i),
      )
    d, metrics, terms = _gradients(
      self.objective,
      *self.outputs(hiddens),
      rows.replace(totals=self.totals),
      self.own.replace(critic=critic_state[0]),
      jax.random.fold_in(self.keys[0], i),
      self.trains_head,
    )
    (student,) = pull_back(d.pop('hidden'))
    if self.trains_head:
      name = self.models.head_name
      student |= {name: student.get(name, 0) + d['head'].weight_VD}
      d['head'] = d['head'].gathered_RVD
    d['student'] = student
    return critic_state, (d, metrics | critic_metrics, terms)

  def parameter_gradients(self, d):
    """Those of `TrainState.params`, of the sum over `microbatch`es."""
    if d['head'] is not None:
      name, summed = self.models.head_name, _sum_copies(d['head'])
      d['student'] |= {name: d['student'][name] + summed}
    return {name: d[name] for name in ('student', 'extra')}

  def update_critic(self, critic_state, hiddens, rows, key):
    """`objective.critic_steps` steps of the critic; -> its state, metrics.

    Each is on all of the microbatches that `hiddens` and `rows` have along a
    leading M; metrics are those before the first, and 'critic/not_finite' is of
    all. Nothing but the critic is differentiated.
    """

    def step(critic_state, key):
      critic, opt_state = critic_state

      def microbatch(_, i, hiddens, rows):
        def loss(critic):
          return self.objective.critic_loss(
            *self.outputs(hiddens),
            rows.replace(totals=self.totals),
            self.own.replace(critic=critic),
            jax.random.fold_in(key, i),
          )

        return None, jax.value_and_grad(loss, has_aux=True)(critic)

      _, ((loss, metrics), grads) = _accumulate(microbatch, None, hiddens, rows)
      metrics |= {'grad_norm': optax.tree.norm(grads)}
      bad = ~skips.are_finite((loss, metrics['grad_norm']))
      updates, opt_state = self.critic_optimizer.update(
        grads, opt_state, critic
      )
      return (optax.apply_updates(critic, updates), opt_state), (metrics, bad)

    step_keys = jax.random.split(key, self.objective.critic_steps)
    critic_state, (metrics, bad) = jax.lax.scan(step, critic_state, step_keys)
    metrics = {f'critic/{k}': x[0] for k, x in metrics.items()}
    return critic_state, metrics | {'critic/not_finite': jnp.any(bad)}


def _gradients(objective, student, teacher, batch, own, key, trains_head):
  """Of the sum of the objective's terms, at the outputs of the student.

  Returns:
    Gradients of its 'hidden' states, its 'head' (None if that is frozen) in
    fp32 and the method's 'extra'; metrics; and of the terms, the 'loss' [terms]
    and the inner products of their gradients of the hidden states, the 'gram'
    [terms, terms].
  """
  outputs = {
    'hidden': student.hidden_BTD,
    'head': student.head if trains_head else None,
    'extra': own.extra,
  }

  def value(outputs, term):
    changed = student.replace(
      hidden_BTD=outputs['hidden'],
      head=outputs['head'] if trains_head else student.head,
    )
    extra = own.replace(extra=outputs['extra'])
    return term(changed, teacher, batch, extra, key)

  losses, metrics, gradients = [], {}, []
  for term in objective.terms().values():
    (loss, new), d = jax.value_and_grad(value, has_aux=True)(outputs, term)
    losses.append(loss)
    assert not metrics.keys() & new.keys(), (
      'two terms have a metric of one name'
    )
    metrics |= new
    # Sums over terms are fp32, as over microbatches.
    d['head'] = jax.tree.map(lambda x: x.astype(jnp.float32), d['head'])
    gradients.append(d)
  hiddens = [d['hidden'].astype(jnp.float32) for d in gradients]
  gram = jnp.array([[jnp.vdot(a, b) for a in hiddens] for b in hiddens])
  d = jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *gradients)
  terms = {'loss': jnp.stack(losses), 'gram': gram}
  return d, {'loss': sum(losses)} | metrics, terms


def _sum_copies(d_RVD):
  """The gradient of a head, of that of its copies on each device; in fp32."""
  shape = jax.ShapeDtypeStruct(d_RVD.shape[1:], d_RVD.dtype)
  return jax.linear_transpose(sharding.copies, shape)(d_RVD)[0]


def _not_finite(terms, names):
  """{name: whether its loss, or gradient of the hidden states, is not finite}.

  Of a single term, `skips` looks at the gradient as a whole.
  """
  are = jnp.isfinite(terms['loss'])
  if len(names) > 1:
    are &= jnp.isfinite(jnp.diag(terms['gram']))
  return {name: ~are[i] for i, name in enumerate(names)}


def _compared(gram, names):
  """Norms of the terms' gradients of the hidden states, from `_gradients`.

  And the cosine of the first with the sum of the others, where there are any.
  """
  if len(names) == 1:
    return {}
  norms = jnp.sqrt(jnp.diag(gram))
  others = jnp.sqrt(jnp.maximum(jnp.sum(gram[1:, 1:]), 0))
  dot = jnp.sum(gram[0, 1:])
  return {f'hidden_grad_{k}': norms[i] for i, k in enumerate(names)} | {
    'hidden_grad_cosine': dot / jnp.maximum(norms[0] * others, 1e-30)
  }


def _deal(x, microbatches, group):
  """Rows i, i + M, i + 2M ... to microbatch i: devices keep their own rows.

  Groups of rows stay whole.
  """
  x = x.reshape(-1, microbatches, group, *x.shape[1:]).swapaxes(0, 1)
  return x.reshape(microbatches, -1, *x.shape[3:])


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
