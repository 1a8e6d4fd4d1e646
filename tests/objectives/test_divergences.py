"""Divergences against float64 numpy, their gradients against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.objectives import divergences
from gakd_jax.objectives.kld import DIVERGENCES

N, V = 6, 40


def _logits(seed, scale=(0.3, 1, 3, 10, 100, 100)):
  """One row of each scale; in the last, most probabilities underflow."""
  z_NV = np.random.default_rng(seed).standard_normal((N, V))
  return (z_NV * np.array(scale)[:, None]).astype(np.float32)


Z_P, Z_Q = _logits(0), _logits(1)
ROUNDING = 5e-5  # log-probabilities of -500 have an error of 3e-5 in fp32


def _log_softmax(z_NV):
  z_NV = z_NV.astype(np.float64)
  z_NV = z_NV - z_NV.max(axis=1, keepdims=True)
  return z_NV - np.log(np.exp(z_NV).sum(axis=1, keepdims=True))


def _kl(log_a, log_b):
  return np.sum(np.exp(log_a) * (log_a - log_b), axis=1)


def _mix(log_a, log_b, weight):
  if weight in (0, 1):
    return log_a if weight else log_b
  return np.logaddexp(log_a + np.log(weight), log_b + np.log(1 - weight))


def _jsd(p, q, beta):
  m = _mix(p, q, beta)
  return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _tail_share(p, q):
  """By sorting: the tail is the longest run of the least probable tokens
  with less than half the mass."""
  shares = []
  for log_p, log_q in zip(p, q, strict=True):
    order = np.argsort(log_p, kind='stable')
    tail = order[np.cumsum(np.exp(log_p[order])) < 0.5]
    gap = np.abs(np.exp(log_p) - np.exp(log_q))
    shares.append(gap[tail].sum() / gap.sum())
  return np.array(shares)


def _adaptive(p, q):
  share = _tail_share(p, q)
  return (1 - share) * _kl(p, q) + share * _kl(q, p)


def _entropy_gated(p, q):
  entropy = -np.sum(np.exp(p) * p, axis=1)
  assert 0 < np.sum(entropy > 0.8) < N, 'both sides of the gate'
  return _kl(q, p) + np.where(entropy > 0.8, _kl(p, q), 0)


def _jsd_at(beta):
  return (
    functools.partial(divergences.jsd, beta=beta),
    functools.partial(_jsd, beta=beta),
  )


CASES = {
  'forward_kl': (divergences.forward_kl, _kl),
  'reverse_kl': (divergences.reverse_kl, lambda p, q: _kl(q, p)),
  'entropy_gated': (divergences.entropy_gated, _entropy_gated),
  'jsd 0.1': _jsd_at(0.1),
  'jsd 0.5': _jsd_at(0.5),
  'jsd 0.9': _jsd_at(0.9),
  'skew_forward': (
    divergences.skew_forward,
    lambda p, q: _kl(p, _mix(p, q, 0.1)),
  ),
  'skew_reverse': (
    functools.partial(divergences.skew_reverse, alpha=0.3),
    lambda p, q: _kl(q, _mix(p, q, 0.7)),
  ),
  'total_variation': (
    divergences.total_variation,
    lambda p, q: 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(axis=1),
  ),
  'adaptive_kl': (divergences.adaptive_kl, _adaptive),
}


@functools.cache
def _compiled(case):
  """(z_p, z_q) -> values [N], and the gradients of their sum; one compile."""
  function = CASES[case][0]

  @jax.jit
  def run(z_p_NV, z_q_NV):
    def total(z_p_NV, z_q_NV):
      value_N = function(*map(jax.nn.log_softmax, (z_p_NV, z_q_NV)))
      return value_N.sum(), value_N

    grad = jax.grad(total, argnums=(0, 1), has_aux=True)
    gradients, value_N = grad(z_p_NV, z_q_NV)
    return value_N, *gradients

  return run


def _numeric_gradient(function, z_p, z_q):
  """Of the values' sum in z_q, by central differences in float64."""
  p, z_q = _log_softmax(z_p), z_q.astype(np.float64)
  gradient_NV, h = np.zeros_like(z_q), 1e-5
  for v in range(V):
    up, down = z_q.copy(), z_q.copy()
    up[:, v] += h
    down[:, v] -= h
    change = function(p, _log_softmax(up)) - function(p, _log_softmax(down))
    gradient_NV[:, v] = change / (2 * h)
  return gradient_NV


@pytest.mark.parametrize('case', CASES)
def test_values_are_those_of_numpy(case):
  got = _compiled(case)(Z_P, Z_Q)[0]
  want = CASES[case][1](_log_softmax(Z_P), _log_softmax(Z_Q))
  assert got.shape == (N,)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_are_zero_at_equality(case):
  value, *gradients = _compiled(case)(Z_P, Z_P)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  for gradient in gradients:
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize('case', [c for c in CASES if c != 'adaptive_kl'])
def test_gradients_are_those_of_differences(case):
  got = _compiled(case)(Z_P, Z_Q)[2]
  want = _numeric_gradient(CASES[case][1], Z_P, Z_Q)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=ROUNDING)


def test_no_gradient_flows_through_the_weights_of_adaptive_kl():
  share_N1 = _tail_share(_log_softmax(Z_P), _log_softmax(Z_Q))[:, None]
  assert np.ptp(share_N1) > 0.2
  forward, reverse = (
    _compiled(case)(Z_P, Z_Q)[2] for case in ('forward_kl', 'reverse_kl')
  )
  want = (1 - share_N1) * forward + share_N1 * reverse
  got = _compiled('adaptive_kl')(Z_P, Z_Q)[2]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_adaptive_kl_takes_the_tail_by_mass():
  """0.15 + 0.15 are less than half the mass, with 0.3 more they are not."""
  p = np.array([[0.3, 0.15, 0.4, 0.15]])
  q = np.array([[0.3, 0.25, 0.2, 0.25]])
  want = 0.5 * np.sum(p * np.log(p / q)) + 0.5 * np.sum(q * np.log(q / p))
  log_p, log_q = jnp.log(p), jnp.log(q)
  got = jax.jit(divergences.adaptive_kl)(log_p, log_q)
  np.testing.assert_allclose(got, [want], rtol=1e-5)
  # With a larger tail the 0.3 joins, whose gap is 0: nothing changes; with
  # all of the mass there is no head.
  function = functools.partial(divergences.adaptive_kl, tail_mass=1.1)
  got = jax.jit(function)(log_p, log_q)
  np.testing.assert_allclose(got, np.sum(q * np.log(q / p)), rtol=1e-5)


def test_gradients_are_the_closed_forms():
  log_p, log_q = _log_softmax(Z_P), _log_softmax(Z_Q)
  p, q, gap = np.exp(log_p), np.exp(log_q), log_q - log_p
  want = {
    'forward_kl': q - p,
    'reverse_kl': q * (gap - np.sum(q * gap, axis=1, keepdims=True)),
  }
  for case, gradient in want.items():
    got = _compiled(case)(Z_P, Z_Q)[2]
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=ROUNDING)


def test_cross_entropy_and_its_gradient():
  targets_N = np.array([0, 39, 7, 7, 20, 1])
  onehot_NV = np.eye(V)[targets_N]

  @jax.jit
  def run(z_NV):
    def total(z_NV):
      ce_N = divergences.cross_entropy(jax.nn.log_softmax(z_NV), targets_N)
      return ce_N.sum(), ce_N

    return jax.grad(total, has_aux=True)(z_NV)

  gradient, ce_N = run(Z_Q)
  log_q = _log_softmax(Z_Q)
  want = -log_q[np.arange(N), targets_N]
  assert want.max() > 100  # exp would underflow
  np.testing.assert_allclose(ce_N, want, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(gradient, np.exp(log_q) - onehot_NV, atol=1e-6)


def test_the_weights_of_jsd_are_on_the_right_side():
  """p = (1, 0), q = (1/2, 1/2): KL(p || M), KL(q || M) with M by hand.

  A small beta is mostly forward KL's direction of GKD: M near the student.
  """
  log_p = jnp.array([[0.0, -1e4]])
  log_q = jnp.log(jnp.array([[0.5, 0.5]]))
  m = np.array([0.1 + 0.45, 0.45])  # beta 0.1
  want = 0.1 * -np.log(m[0]) + 0.9 * np.sum(0.5 * np.log(0.5 / m))
  got = divergences.jsd(log_p, log_q, beta=0.1)
  np.testing.assert_allclose(got, [want], rtol=1e-6)
  swapped = divergences.jsd(log_q, log_p, beta=0.9)
  np.testing.assert_allclose(swapped, [want], rtol=1e-6)
  assert abs(divergences.jsd(log_p, log_q, beta=0.9)[0] - want) > 0.01


def test_the_ends_of_jsd_are_defined_as_its_limits():
  """jsd / beta -> forward KL at 0 and jsd / (1 - beta) -> reverse KL at 1."""
  log_p, log_q = (
    jnp.asarray(_log_softmax(z[:2]), jnp.float32) for z in (Z_P, Z_Q)
  )
  forward = divergences.forward_kl(log_p, log_q)
  reverse = divergences.reverse_kl(log_p, log_q)
  assert np.all(np.abs(forward - reverse) > 0.001)
  at = functools.partial(divergences.jsd, log_p, log_q)
  np.testing.assert_array_equal(at(beta=0), forward)
  np.testing.assert_array_equal(at(beta=1), reverse)
  np.testing.assert_allclose(at(beta=1e-3) / 1e-3, forward, rtol=0.01)
  np.testing.assert_allclose(at(beta=1 - 1e-3) / 1e-3, reverse, rtol=0.01)


def test_the_limits_of_skew():
  log_p, log_q = (jnp.asarray(_log_softmax(z), jnp.float32) for z in (Z_P, Z_Q))
  forward, reverse = divergences.skew_forward, divergences.skew_reverse
  np.testing.assert_allclose(
    forward(log_p, log_q, alpha=0),
    divergences.forward_kl(log_p, log_q),
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    reverse(log_p, log_q, alpha=0),
    divergences.reverse_kl(log_p, log_q),
    rtol=1e-6,
  )
  for function in (forward, reverse):
    np.testing.assert_allclose(function(log_p, log_q, alpha=1), 0, atol=1e-6)
    # The mixture has at least alpha of the first: bounded, unlike KL.
    assert np.all(function(log_p, log_q) <= -np.log(0.1) + 1e-5)


def test_total_variation_is_between_zero_and_one():
  value = _compiled('total_variation')(Z_P, Z_Q)[0]
  assert np.all((value >= 0) & (value <= 1 + 1e-6))
  apart = np.array([[50.0, 0.0, 0.0]]), np.array([[0.0, 50.0, 0.0]])
  value = divergences.total_variation(*map(jax.nn.log_softmax, apart))
  np.testing.assert_allclose(value, 1, rtol=1e-6)


@pytest.mark.parametrize('case', CASES)
def test_extreme_logits_have_finite_values_and_gradients(case):
  """All mass on one token, and on another: log-probabilities of -2e4."""
  z_p = 1e4 * np.where(np.arange(V) == 3, 1, -1) * np.ones((N, 1), np.float32)
  z_q = 1e4 * np.where(np.arange(V) == 7, 1, -1) * np.ones((N, 1), np.float32)
  z_q[0] = z_p[0]
  z_q[1] = 0
  for a, b in ((z_p, z_q), (z_q, z_p)):
    value, *gradients = _compiled(case)(
      a.astype(np.float32), b.astype(np.float32)
    )
    assert np.all(np.isfinite(value))
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert value[2] > 0.1


def test_a_small_divergence_survives_logits_that_come_in_bf16():
  """0.005 nats between logits of bf16: the loss itself is fp32."""
  z_p = jnp.asarray(Z_P[1:2], jnp.bfloat16)
  z_q = (z_p + 0.1 * jnp.asarray(Z_Q[1:2])).astype(jnp.bfloat16)
  want = _kl(*(_log_softmax(np.asarray(z, np.float32)) for z in (z_q, z_p)))
  assert 0.001 < want[0] < 0.01
  log_p, log_q = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (z_p, z_q))
  got = divergences.reverse_kl(log_p, log_q)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_every_divergence_of_the_configs_is_tested_here():
  tested = {getattr(f, 'func', f) for f, _ in CASES.values()}
  assert {function for function, _ in DIVERGENCES.values()} == tested
