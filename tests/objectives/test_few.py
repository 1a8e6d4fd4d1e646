"""A teacher that is known by a few numbers a token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import divergences, few, kld

B, T, D, V = 2, 5, 8, 40
VALID = 37


@pytest.fixture(scope='module')
def teacher():
  rng = np.random.default_rng(0)
  hidden_BTD = rng.standard_normal((B, T, D), np.float32)
  head_VD = rng.standard_normal((V, D), np.float32)
  return Outputs(
    jnp.asarray(hidden_BTD), Head(jnp.asarray(head_VD), valid=VALID)
  )


def _logits(outputs, temperature=1.0):
  return outputs.head(outputs.hidden_BTD.reshape(-1, D)) / temperature


def _student(seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((B * T, V), np.float32))


def _asked(teacher, kind, size, temperature=1.0, seed=0):
  ask = functools.partial(few.ask, kind, size, temperature=temperature, chunk=3)
  keys = jax.random.split(jax.random.key(seed), B)
  known = ask(teacher, jnp.ones((B, T), bool), key_B=keys)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), known)


@pytest.mark.parametrize('temperature', [1.0, 2.0])
@pytest.mark.parametrize('k', [1, 5, VALID - 1])
def test_top_k_is_the_largest_and_the_mass_of_the_rest(teacher, k, temperature):
  known = _asked(teacher, 'top_k', k, temperature)
  z_NV = np.float64(_logits(teacher, temperature))
  p_NV = np.exp(z_NV - np.max(z_NV, axis=1, keepdims=True))
  p_NV /= p_NV.sum(axis=1, keepdims=True)
  np.testing.assert_array_equal(
    known['ids'], np.argsort(-p_NV, axis=1, kind='stable')[:, :k]
  )
  want_NK = np.take_along_axis(p_NV, np.array(known['ids']), axis=1)
  # fp16 has 11 bits of a logarithm of up to 16 here.
  got_NK = np.exp(np.float64(known['log_probs']))
  np.testing.assert_allclose(got_NK, want_NK, rtol=0.004)
  rest_N = np.exp(np.float64(known['rest']))
  np.testing.assert_allclose(rest_N, 1 - want_NK.sum(axis=1), rtol=0.004)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name != 'reverse_kl'))
    for name in kld.DIVERGENCES
  ],
)
def test_a_divergence_of_fewer_outcomes_is_smaller_and_ends_exact(
  teacher, name
):
  divergence = kld.divergence_of(name)
  z_NV = _student().at[:, VALID:].set(-1e9)
  exact_N = divergence(
    jax.nn.log_softmax(_logits(teacher)), jax.nn.log_softmax(z_NV)
  )
  found = [
    divergence(*few.outcomes(z_NV, _asked(teacher, 'top_k', k)))
    for k in (1, 4, 16, VALID - 1)
  ]
  np.testing.assert_allclose(found[-1], exact_N, rtol=0.01, atol=1e-4)
  if name not in ('adaptive', 'entropy_gated'):  # No f-divergences.
    # Merging outcomes never raises one (data processing inequality).
    for less_N, more_N in itertools.pairwise(found):
      assert np.all(less_N <= more_N * 1.01 + 1e-4)
    assert np.all(found[0] < 0.9 * exact_N)


def test_the_rest_is_summed_and_not_what_is_left_of_one(teacher):
  """Of a student that is sure, 1 - sum would be noise."""
  known = _asked(teacher, 'top_k', 2)
  z_NV = jnp.zeros((B * T, V)).at[jnp.arange(B * T), known['ids'][:, 0]].set(40)

  def rest(z_NV):
    return few.outcomes(z_NV, known)[1][:, -1]

  want = np.log(V - 2) - np.logaddexp(40, np.log(V - 1))
  np.testing.assert_allclose(rest(z_NV), want, rtol=1e-5)
  d_NV = jax.grad(lambda z: rest(z).sum())(z_NV)
  others = np.setdiff1d(np.arange(V), known['ids'][0])
  np.testing.assert_allclose(d_NV[0, others], 1 / (V - 2), rtol=1e-4)


def test_draws_are_ids_as_often_as_they_are_likely(teacher):
  n = 50
  known = _asked(teacher, 'sampled', n)
  p_NV = np.array(jax.nn.softmax(_logits(teacher)))
  for ids_n, log_p_n, p_V in zip(
    np.array(known['ids']), np.array(known['log_probs']), p_NV, strict=True
  ):
    counts_V = np.bincount(ids_n, minlength=V)
    # Rounded up or down.
    assert np.all(np.abs(counts_V - n * p_V) < 1 + 1e-3)
    assert np.all(np.diff(ids_n) >= 0)
    np.testing.assert_allclose(
      np.exp(np.float64(log_p_n)), p_V[ids_n], rtol=4e-3
    )


def test_what_rounds_up_to_all_is_of_the_last_id_that_is_likely():
  p_NV = jax.nn.softmax(
    jnp.where(jnp.arange(64)[None] < 50, jnp.ones((9, 64)), -jnp.inf), axis=1
  )
  u_N = jnp.float32(1) - 2.0 ** -jnp.arange(16, 25)
  for n in (8, 50, 64):
    ids_Nn = few._systematic(p_NV, u_N.astype(jnp.float32), n)
    assert ids_Nn.max() == 49


def _with_share(known, n):
  return known | {'share': jnp.full(known['ids'].shape, 1 / n)}


def test_over_many_draws_the_gradient_is_that_of_forward_kl(teacher):
  n, draws = 4, 400
  z_NV = _student().at[:, VALID:].set(-1e9)

  def exact(z_NV):
    log_p_NV = jax.nn.log_softmax(_logits(teacher))
    return divergences.forward_kl(log_p_NV, jax.nn.log_softmax(z_NV)).sum()

  @jax.jit
  def drawn(z_NV, seed):
    known = _with_share(_asked(teacher, 'sampled', n, seed=seed), n)
    return few.forward_kl(z_NV, known).sum()

  want, d_want = jax.value_and_grad(exact)(z_NV)
  got, d_got = jax.lax.map(
    lambda seed: jax.value_and_grad(drawn)(z_NV, seed), jnp.arange(draws)
  )
  # Four standard errors of these draws.
  error = got.std() / draws**0.5
  assert abs(got.mean() - want) < 4 * error
  # Without bias in any id: a share of n draws has at most 1/4n variance.
  bound = 4.5 * 0.5 / (n * draws) ** 0.5
  assert np.max(np.abs(d_got.mean(axis=0) - d_want)) < bound
  assert got.std() > 0
