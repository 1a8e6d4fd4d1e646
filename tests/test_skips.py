"""Steps that are skipped: nothing moves, whatever was not finite of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gakd_jax import skips, step
from gakd_jax.data import pipeline
from gakd_jax.models import transformer
from gakd_jax.objectives.base import Objective, Own

B, T = 8, 2

# Ids of a first token by which a row makes something go wrong.
FAULTS = {
  name: 1000 + i
  for i, name in enumerate(
    (
      'loss nan',
      'loss inf',
      'term gradient',
      'extra gradient',
      'critic loss',
      'critic gradient',
      'second critic loss',
      'large critic',
      'large second critic',
      'large student',
      'memory',
    )
  )
}


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['frozen'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Numbers:
  """Models of one number each: all of their hidden states."""

  frozen: dict
  head_name = 'none'

  def heads(self, params):
    return None, None

  def student_hidden(self, params, batch, key):
    return params['w'] * jnp.ones((*batch.student.ids_BT.shape, 1))

  def teacher_hidden(self, batch):
    return jnp.ones((*batch.student.ids_BT.shape, 1))

  def pair(self, params, heads, hiddens):
    return tuple(transformer.Outputs(x, None) for x in hiddens)


def _fault(batch, name, value, usually=0.0):
  """`value` if a row of the microbatch has the fault."""
  has = jnp.any(batch.student.ids_BT == FAULTS[name])
  return jnp.where(has, value, usually)


def _steep(x):
  """0 of 0, and an infinite gradient there."""
  return jnp.sqrt(x - jax.lax.stop_gradient(x))


class Faulty(Objective):
  """Terms 'first' and 'second', a critic, all of it faulty at the asking."""

  critic_steps = 2

  def __init__(self, by_microbatch=False):
    object.__setattr__(self, 'by_microbatch', by_microbatch)

  @property
  def critic_by_microbatch(self):
    return self.by_microbatch

  def terms(self):
    return {'first': self.first, 'second': self.second}

  def first(self, student, teacher, batch, own, key):
    x = jnp.mean(student.hidden_BTD) + jnp.mean(own.extra['e'])
    # Where it is not asked, nothing of it is differentiated.
    has = _fault(batch, 'extra gradient', 1.0) > 0
    x += jax.lax.cond(has, _steep, lambda x: 0 * x, own.extra['e'])
    return x * _fault(batch, 'large student', 1e15, 1.0), {'value': x}

  def second(self, student, teacher, batch, own, key):
    x = jnp.mean(student.hidden_BTD)
    has = _fault(batch, 'term gradient', 1.0) > 0
    x += jax.lax.cond(has, _steep, lambda x: 0 * x, x)
    x = x * own.critic['c'] + _fault(batch, 'loss nan', jnp.nan)
    memory = _fault(batch, 'memory', jnp.inf)
    return x + _fault(batch, 'loss inf', jnp.inf), {'memory': memory}

  def critic_loss(self, student, teacher, batch, own, key):
    c = own.critic['c']
    bad = _fault(batch, 'critic loss', jnp.nan)
    is_second = c < 5.0  # Of a run, the first update has moved it by then.
    bad += jnp.where(is_second, _fault(batch, 'second critic loss', jnp.nan), 0)
    has = _fault(batch, 'critic gradient', 1.0) > 0
    bad += jax.lax.cond(has, _steep, lambda x: 0 * x, c)
    size = _fault(batch, 'large critic', 1e15, 1.0)
    size = jnp.where(
      is_second, _fault(batch, 'large second critic', 1e15, size), size
    )
    return c * size + bad, {}

  def remember(self, own, metrics):
    return {'m': own.memory['m'] + 1 + metrics['memory']}


RATE = 0.01


def _optimizer():
  """Momentum, and steps beyond all numbers where gradients are large."""

  def update(updates, state, params=None):
    return jax.tree.map(
      lambda x: jnp.where(jnp.abs(x) > 1e9, x * 1e30, x), updates
    ), state

  huge = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
  return optax.chain(optax.sgd(RATE, momentum=0.9), huge)


def _schedule(count):
  return 1.0 - 0.1 * count


def _batch(*faults, tokens=1):
  """Rows of two tokens; the last of each is the response."""
  ids_BT = np.ones((B, T), np.int32)
  for i, name in enumerate(faults):
    ids_BT[5 + i, 0] = FAULTS[name]
  mask_BT = np.zeros((B, T), bool)
  mask_BT[:tokens, 1] = True
  tokens = pipeline.Tokens(ids_BT, np.ones_like(ids_BT), mask_BT)
  return pipeline.Batch(tokens, tokens)


@functools.cache
def _faulty_step(microbatches, by_microbatch):
  return step.make_train_step(
    Faulty(by_microbatch),
    _optimizer(),
    _schedule,
    critic_optimizer=_optimizer(),
    seed=0,
    microbatches=microbatches,
  )


def _run(microbatches, by_microbatch, *batches):
  """The state after some batches, and metrics of the last."""
  own = Own({'e': jnp.float32(2.0)}, {'c': jnp.float32(5.0)})
  own = own.replace(memory={'m': jnp.float32(0.0)})
  state = step.init_state(
    {'w': jnp.float32(3.0)}, own, _optimizer(), _optimizer()
  )
  metrics = {}
  for batch in batches:
    train_step = _faulty_step(microbatches, by_microbatch)
    state, metrics = train_step(state, Numbers({}), batch)
  return jax.device_get((state, metrics))


def _causes(metrics):
  found = {k for k, x in metrics.items() if k.startswith('skipped/') and x}
  return {k.partition('/')[2] for k in found} - {'in_a_row'}


def _assert_same(got, want, but=()):
  """Bit for bit, and what is in `but` other."""
  for field in dataclasses.fields(got):
    a, b = (jax.tree.leaves(getattr(x, field.name)) for x in (got, want))
    if field.name not in (*but, 'skips', 'step'):
      assert a, field.name
      np.testing.assert_array_equal(a, b, err_msg=field.name)


MANY = pytest.mark.parametrize(
  ('microbatches', 'by_microbatch'),
  [
    (1, False),
    pytest.param(4, False, marks=pytest.mark.slow),
    pytest.param(4, True, marks=pytest.mark.slow),
  ],
)


@MANY
@pytest.mark.parametrize(
  ('faults', 'causes'),
  [
    (['loss nan'], {'second'}),
    (['loss inf'], {'second'}),
    (['term gradient'], {'second'}),
    (['extra gradient'], {'gradient'}),
    (['large student'], {'update'}),
    (['memory'], {'update'}),
    (['critic loss'], {'critic'}),
    (['critic gradient'], {'critic', 'second'}),
    (['second critic loss'], {'critic'}),
    (['large critic'], {'critic', 'second'}),
    (['large second critic'], {'critic', 'second'}),
    (['loss nan', 'critic loss'], {'critic', 'second'}),
  ],
  ids=lambda x: '+'.join(sorted(x)).replace(' ', '_'),
)
def test_what_is_not_finite_moves_nothing(
  microbatches, by_microbatch, faults, causes
):
  """One row of one microbatch, one of the critic's two updates, is enough."""
  run = functools.partial(_run, microbatches, by_microbatch)
  for steps in ([], [_batch()]):
    before, _ = run(*steps)
    after, metrics = run(*steps, _batch(*faults))
    _assert_same(after, before)
    assert after.step == before.step + 1
    assert _causes(metrics) == causes
    assert metrics['skipped'] == metrics['skipped/in_a_row'] == 1
    assert after.skips.total == after.skips.in_a_row == 1


@MANY
def test_after_a_skipped_step_all_goes_on_as_without_it(
  microbatches, by_microbatch
):
  run = functools.partial(_run, microbatches, by_microbatch)
  bad = _batch('loss nan')
  after, metrics = run(bad, _batch(), bad, bad, _batch())
  want, want_metrics = run(_batch(), _batch())
  _assert_same(after, want)
  assert (after.step, after.skips.total, after.skips.in_a_row) == (5, 3, 0)
  # The optimizer counts its own updates, and so does what is said of it.
  assert metrics['learning_rate'] == want_metrics['learning_rate']
  assert metrics['skipped'] == 0
  assert not _causes(metrics)
  _, metrics = run(bad, bad)
  assert metrics['skipped/in_a_row'] == 2


def test_a_batch_without_a_response_moves_nothing():
  before, _ = _run(1, False, _batch())
  after, metrics = _run(1, False, _batch(), _batch(tokens=0))
  _assert_same(after, before)
  assert _causes(metrics) == {'no_text'}


class Given(Objective):
  """Its loss is what the first token says, in hundredths, times w."""

  needs_teacher = False

  def loss(self, student, teacher, batch, own, key):
    return jnp.mean(student.hidden_BTD) * batch.student.ids_BT[0, 0] / 100, {}


@dataclasses.dataclass(frozen=True)
class Alone(Numbers):
  def alone(self):
    return self

  def teacher_hidden(self, batch):
    return None

  def pair(self, params, heads, hiddens):
    return transformer.Outputs(hiddens[0], None), None


jax.tree_util.register_dataclass(Alone, ['frozen'], [])


@functools.cache
def _given_step(most):
  frozen = optax.sgd(0.0)
  return step.make_train_step(
    Given(), frozen, lambda _: 0.0, seed=0, skip_spikes=most
  )


def _given_losses(monkeypatch, losses, most=6.0):
  """Which steps of these losses are skipped, and the last state.

  A step of None has no text.
  """
  monkeypatch.setattr(skips, 'WINDOW', 8)
  state = step.init_state(
    {'w': jnp.float32(1.0)},
    Own(),
    optax.sgd(0.0),
    None,
    find_spikes=most is not None,
  )
  found = []
  for i, loss in enumerate(losses):
    batch = _batch(tokens=0 if loss is None else 1)
    batch.student.ids_BT[0, 0] = 5000 if loss is None else round(100 * loss)
    state, metrics = _given_step(most)(state, Alone({}), batch)
    if metrics['skipped']:
      found.append(i)
      assert _causes(metrics) == {'no_text' if loss is None else 'spike'}
  return found, jax.device_get(state)


STEADY = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1.0]


def test_a_spike_is_skipped_once_there_is_something_to_tell_it_from(
  monkeypatch,
):
  """Median 1, median deviation 0.035: six deviations are 0.31."""
  run = functools.partial(_given_losses, monkeypatch)
  assert run([*STEADY, 1.3])[0] == []
  assert run([*STEADY, 1.35])[0] == [8]
  assert run([*STEADY, 0.1])[0] == []  # what is low is no spike
  # Of one of them, the median and its deviation hardly speak.
  assert run([50.0, *STEADY[1:], 1.5])[0] == [8]
  assert run([*STEADY[:7], 50.0])[0] == []  # the window is not full
  assert run([*STEADY, 50.0], most=None)[0] == []


def test_what_lasts_is_no_spike(monkeypatch):
  """It is the median when half of the window has it."""
  found, _ = _given_losses(monkeypatch, [*STEADY, *(5.0 + 0.01 * np.arange(8))])
  assert found == [8, 9, 10, 11]


def test_the_window_is_kept_where_spikes_are_looked_for(monkeypatch):
  _, state = _given_losses(monkeypatch, STEADY[:3])
  np.testing.assert_allclose(
    state.skips.recent['loss'], [*[np.nan] * 5, *STEADY[:3]], rtol=1e-6
  )
  assert state.skips.recent.keys() == {'loss', 'grad_norm'}
  _, without = _given_losses(monkeypatch, STEADY[:3], most=None)
  assert not without.skips.recent
  # What another reason skips does not count.
  found, with_bad = _given_losses(monkeypatch, [*STEADY[:2], None, STEADY[2]])
  assert found == [2]
  for name, x in state.skips.recent.items():
    np.testing.assert_array_equal(with_bad.skips.recent[name], x)
