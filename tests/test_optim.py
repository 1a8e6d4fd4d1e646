"""Schedules, decay by path, clipping, and names that do not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from gakd_jax import UserError, optim, training


def _rates(steps, *args, **kwargs):
  schedule = optim.make_schedule(*args, **kwargs)
  return [float(schedule(step)) for step in steps]


def test_a_critic_of_several_updates_a_step_has_the_rate_of_the_step():
  c = base.get_config().critic_optimizer
  c.schedule, c.weight_decay, c.learning_rate = 'cosine', 0.0, 1.0
  made, schedule = training.optimizer(c, 10, updates=3)
  params = {'kernel': jnp.zeros(())}
  state, rates = made.init(params), []
  for _ in range(9):  # Adam's update of a gradient that stays is the rate.
    update, state = made.update({'kernel': jnp.ones(())}, state, params)
    rates.append(-float(update['kernel']))
  want = [float(schedule(n // 3)) for n in range(9)]
  assert len(set(want)) == 3
  np.testing.assert_allclose(rates, want, rtol=1e-3)


def test_a_constant_rate():
  assert _rates([0, 5, 10, 99], 0.5, 10) == [0.5] * 4


@pytest.mark.parametrize(
  ('schedule', 'quarter'), [('linear', 1.6), ('cosine', 0.4 + 1.6 * 0.853553)]
)
def test_decay_ends_with_the_last_step(schedule, quarter):
  """From 2 to 0.4 over steps 0 to 100, and 0.4 from then on."""
  got = _rates([0, 25, 50, 100, 1000], 2.0, 100, schedule=schedule, end=0.4)
  np.testing.assert_allclose(got, [2.0, quarter, 1.2, 0.4, 0.4], rtol=1e-5)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
def test_warm_up_moves_at_once_and_decay_takes_the_rest(schedule):
  got = _rates(
    [0, 1, 2, 3, 4, 54, 104], 1.0, 104, schedule=schedule, warmup_steps=4
  )
  middle, end = (1, 1) if schedule == 'constant' else (0.5, 0)
  want = [0.2, 0.4, 0.6, 0.8, 1.0, middle, end]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_warm_up_as_long_as_the_run_is_still_a_schedule():
  got = _rates([0, 9, 10], 1.0, 10, schedule='cosine', warmup_steps=10)
  np.testing.assert_allclose(got, [1 / 11, 10 / 11, 1.0], rtol=1e-5)


def test_a_schedule_is_traced_like_any_function_of_the_step():
  schedule = optim.make_schedule(1.0, 9, schedule='linear', warmup_steps=2)
  got = jax.jit(jax.vmap(schedule))(jnp.arange(10))
  want = [schedule(step) for step in range(10)]
  np.testing.assert_allclose(got, want, rtol=1e-6)


PARAMS = {
  'student': {
    'embedding': jnp.full((2, 3), 2.0),
    'blocks': {
      'attention_norm': {'scale': jnp.full(3, 2.0)},
      'mlp': {
        'up': {'kernel': jnp.full((3, 2), 2.0), 'bias': jnp.full(2, 2.0)},
      },
      'scaled': {'kernel': jnp.full((3, 3), 2.0)},
    },
  },
}


def _step(grads, params=PARAMS, schedule=lambda _: 0.1, **kwargs):
  optimizer = optim.make(schedule, **kwargs)

  @jax.jit
  def step(grads, params):
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), updates, state

  return step(grads, params)


@pytest.mark.parametrize(
  ('no_decay', 'kept'),
  [
    (None, {'scale', 'bias'}),
    (r'kernel$', {'kernel'}),
    (r'^student/blocks/mlp', {'up/kernel', 'bias'}),
    (r'nothing', set()),
  ],
)
def test_weight_decay_spares_paths(no_decay, kept):
  """Decoupled: a zero gradient leaves w - rate * decay * w."""
  kwargs = {} if no_decay is None else {'no_decay': no_decay}
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  params, *_ = _step(zeros, weight_decay=0.5, **kwargs)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    want = 2.0 if any(name.endswith(k) for k in kept) else 2.0 * (1 - 0.05)
    np.testing.assert_allclose(x, want, rtol=1e-6, err_msg=name)


def test_rmsprop_spares_the_same_paths():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  params, *_ = _step(zeros, name='rmsprop', weight_decay=0.5)
  block = params['student']['blocks']
  assert np.all(block['attention_norm']['scale'] == 2)
  assert np.all(block['mlp']['up']['bias'] == 2)
  assert np.all(block['mlp']['up']['kernel'] < 2)


def test_no_decay_is_the_default():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  jax.tree.map(np.testing.assert_array_equal, _step(zeros)[0], PARAMS)


def test_adam_with_the_given_constants():
  """The first two moments by hand, for one number."""
  grads, b1, b2, eps = (3.0, -1.0), 0.8, 0.9, 0.5
  optimizer = optim.make(lambda _: 0.1, b1=b1, b2=b2, eps=eps)
  w, mu, nu = 1.0, 0.0, 0.0
  params = {'w': jnp.array(w)}
  state = optimizer.init(params)
  for i, g in enumerate(grads, start=1):
    updates, state = optimizer.update({'w': jnp.array(g)}, state, params)
    params = optax.apply_updates(params, updates)
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
    w -= 0.1 * (mu / (1 - b1**i)) / ((nu / (1 - b2**i)) ** 0.5 + eps)
    np.testing.assert_allclose(params['w'], w, rtol=1e-6)


def test_a_first_moment_in_bf16_is_half_as_large_and_moves_alike():
  grads = jax.tree.map(
    lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) + 1.5,
    PARAMS,
  )
  moved, moments = {}, {}
  for mu_dtype in ('float32', 'bfloat16'):
    optimizer = optim.make(lambda _: 0.1, mu_dtype=mu_dtype)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(5):
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    moved[mu_dtype] = jax.tree.map(jnp.subtract, params, PARAMS)
    moments[mu_dtype] = optax.tree.get(state, 'mu'), optax.tree.get(state, 'nu')
  mu, nu = moments['bfloat16']
  assert {x.dtype for x in jax.tree.leaves(mu)} == {jnp.dtype('bfloat16')}
  assert {x.dtype for x in jax.tree.leaves(nu)} == {jnp.dtype('float32')}
  for got, want in zip(*map(jax.tree.leaves, moved.values()), strict=True):
    # bf16 has 8 bits.
    np.testing.assert_allclose(got, want, rtol=2**-7)
  assert any(
    np.any(got != want)
    for got, want in zip(*map(jax.tree.leaves, moved.values()), strict=True)
  )


def test_rmsprop_has_no_smaller_momentum():
  with pytest.raises(UserError, match='rmsprop keeps its momentum in float32'):
    optim.make(lambda _: 0.1, name='rmsprop', mu_dtype='bfloat16')


def test_rmsprop_is_that_of_pytorch():
  """By hand: decay joins the gradient, then squares, then momentum."""
  optimizer = optim.make(
    lambda _: 0.1, name='rmsprop', b1=0.9, b2=0.8, eps=0.01, weight_decay=0.5
  )
  w, square, momentum = 1.0, 0.0, 0.0
  params = {'w': jnp.array(w)}
  state = optimizer.init(params)
  for grad in (3.0, -1.0, 2.0):
    updates, state = optimizer.update({'w': jnp.array(grad)}, state, params)
    params = optax.apply_updates(params, updates)
    g = grad + 0.5 * w
    square = 0.8 * square + 0.2 * g**2
    momentum = 0.9 * momentum + g / (square**0.5 + 0.01)
    w -= 0.1 * momentum
    np.testing.assert_allclose(params['w'], w, rtol=1e-6)


@pytest.mark.parametrize('norm', [0.5, 8.0])
def test_gradients_are_clipped_by_their_global_norm(norm):
  """Seen in Adam's first moment, (1 - b1) times what it was given."""
  params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  grads = {'a': jnp.array([norm, 0.0]) * 0.6, 'b': jnp.array([0.0, norm]) * 0.8}
  *_, state = _step(grads, params, clip_norm=2.0)
  mu = optax.tree_utils.tree_get(state, 'mu')
  share = min(1, 2.0 / norm)
  np.testing.assert_allclose(mu['a'], [0.06 * norm * share, 0], rtol=1e-5)
  np.testing.assert_allclose(mu['b'], [0, 0.08 * norm * share], rtol=1e-5)
  mu = optax.tree_utils.tree_get(_step(grads, params)[-1], 'mu')
  np.testing.assert_allclose(mu['a'], [0.06 * norm, 0], rtol=1e-5)


def test_the_rate_is_that_of_the_optimizers_own_step():
  schedule = optim.make_schedule(1.0, 4, schedule='linear')
  optimizer = optim.make(schedule, eps=0.0)
  params = {'w': jnp.array(1.0)}
  state, steps = optimizer.init(params), []
  for _ in range(4):
    updates, state = optimizer.update({'w': jnp.array(5.0)}, state, params)
    steps.append(-float(updates['w']))
  np.testing.assert_allclose(steps, [1.0, 0.75, 0.5, 0.25], rtol=1e-4)


def test_a_methods_own_parameters_have_a_rate_of_their_own():
  params = {'student': {'w': jnp.ones(3)}, 'extra': {'w': jnp.ones(3)}}
  optimizer = optim.make(lambda _: 0.1, weight_decay=0.5, extra_rate=20.0)
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  np.testing.assert_allclose(updates['student']['w'], -0.15, rtol=1e-5)
  np.testing.assert_allclose(updates['extra']['w'], -3.0, rtol=1e-5)


def test_a_methods_own_rate_is_the_one_that_is_asked_for():
  c = base.get_config().optimizer
  c.learning_rate, c.extra_learning_rate, c.weight_decay = 0.5, 0.1, 0.0
  c.schedule, c.warmup_steps = 'constant', 0
  made, _ = training.optimizer(c, 10)
  params = {'student': jnp.zeros(()), 'extra': {'x': jnp.zeros(())}}
  ones = jax.tree.map(jnp.ones_like, params)
  # Adam's first update is the rate.
  moved, _ = made.update(ones, made.init(params), params)
  np.testing.assert_allclose(moved['student'], -0.5, rtol=1e-5)
  np.testing.assert_allclose(moved['extra']['x'], -0.1, rtol=1e-5)
