"""Transport against linear programs, closed forms and recorded values."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from gakd_jax.objectives import ot
from tests.objectives import cross


def _problem(seed=0, M=5, N=7, padding=2):
  """Two: one fills its arrays, the other has padding of rubbish."""
  rng = np.random.default_rng(seed)
  cost_BMN = rng.random((2, M, N)).astype(np.float32)
  masks = np.ones((2, M), bool), np.ones((2, N), bool)
  for mask in masks:
    mask[1, -padding:] = False
  cost_BMN[1, -padding:] = 1e3
  cost_BMN[1, :, -padding:] = -1e3
  return cost_BMN, *(np.asarray(ot.uniform(jnp.asarray(m))) for m in masks)


def _exact(cost_MN, a_M, b_N):
  """The cost of the best plan, by scipy's linear program."""
  M, N = cost_MN.shape
  sums = np.concatenate(
    [np.kron(np.eye(M), np.ones(N)), np.kron(np.ones(M), np.eye(N))]
  )
  result = scipy.optimize.linprog(
    cost_MN.ravel(), A_eq=sums, b_eq=np.concatenate([a_M, b_N])
  )
  return result.fun


def test_with_little_entropy_it_is_the_linear_program():
  cost_BMN, a_BM, b_BN = _problem()
  got_B, _ = ot.entropic(cost_BMN, a_BM, b_BN, epsilon=3e-3, iterations=3000)
  for b in range(2):
    m, n = a_BM[b] > 0, b_BN[b] > 0
    want = _exact(cost_BMN[b][m][:, n], a_BM[b][m], b_BN[b][n])
    # Above it by less than eps times the entropy of the marginals.
    assert want - 1e-4 < got_B[b] < want + 3e-3 * np.log(m.sum() * n.sum())


def test_plans_have_their_marginals_and_the_gradient_is_the_plan():
  cost_BMN, a_BM, b_BN = _problem()
  settings = {'epsilon': 0.1, 'iterations': 200}

  @jax.jit
  def both(cost_BMN):
    def total(cost_BMN):
      value_B, plan_BMN = ot.entropic(cost_BMN, a_BM, b_BN, **settings)
      return value_B.sum(), (value_B, plan_BMN)

    gradient_BMN, found = jax.grad(total, has_aux=True)(cost_BMN)
    return *found, gradient_BMN

  value_B, plan_BMN, gradient_BMN = both(cost_BMN)
  np.testing.assert_allclose(plan_BMN.sum(2), a_BM, atol=1e-6)
  np.testing.assert_allclose(plan_BMN.sum(1), b_BN, atol=1e-6)
  np.testing.assert_allclose(gradient_BMN, plan_BMN, atol=1e-6)
  # The value is <P, C> and the entropy, and no other plan of theirs has less.
  p, c = (np.float64(x[0]) for x in (plan_BMN, cost_BMN))
  entropy = np.sum(p * np.log(p / np.outer(a_BM[0], b_BN[0])))
  np.testing.assert_allclose(
    value_B[0], np.sum(p * c) + 0.1 * entropy, rtol=1e-5
  )


def test_every_potential_is_a_lower_bound():
  cost_BMN, a_BM, b_BN = _problem()
  best_B, _ = ot.entropic(cost_BMN, a_BM, b_BN, epsilon=0.1, iterations=200)
  rng = np.random.default_rng(1)
  for scale in (0, 0.01, 1):
    f_BM = scale * rng.standard_normal(a_BM.shape).astype(np.float32)
    assert (ot.semi_dual(f_BM, cost_BMN, a_BM, b_BN, 0.1) < best_B).all()
  f_BM, _ = ot.sinkhorn(cost_BMN, a_BM, b_BN, epsilon=0.1, iterations=200)
  d_BM = jax.grad(lambda f: ot.semi_dual(f, cost_BMN, a_BM, b_BN, 0.1).sum())(
    f_BM
  )
  np.testing.assert_allclose(d_BM, 0, atol=1e-6)


def test_recorded_plans_and_gradients_through_the_iterations():
  """Of a solver that divides rows and columns by their sums in turn."""
  z, _ = cross.golden('multilevelot_a')
  for b in range(2):
    cost_1MN = jnp.asarray(z[f'mid.plain.{b}.cost'][None], jnp.float32)
    a_1M, b_1N = (ot.uniform(jnp.ones((1, n))) for n in cost_1MN.shape[1:])
    got, plan_1MN = ot.unrolled(
      cost_1MN, a_1M, b_1N, epsilon=0.1, iterations=20
    )
    N = cost_1MN.shape[2]  # Its columns sum to 1.
    np.testing.assert_allclose(
      N * got[0], z[f'out.plain_sinkhorn20.{b}'], rtol=1e-5
    )
    cross.assert_near(N * plan_1MN[0], z[f'mid.plain.{b}.plan20'])


@pytest.mark.parametrize(
  ('file', 'alpha'), [('mcw_primal_a', 0.1), ('mcw_primal_f_alpha10', 10.0)]
)
def test_recorded_plans_of_little_and_much_entropy(file, alpha):
  z, _ = cross.golden(file)
  for name in ('logits.0', 'logits.1', 'hidden.0', 'hidden.1'):
    cost_1MN = jnp.asarray(z[f'mid.{name}.cost'][None], jnp.float32)
    a_1M, b_1N = (ot.uniform(jnp.ones((1, n))) for n in cost_1MN.shape[1:])
    got, plan_1MN = ot.unrolled(
      cost_1MN, a_1M, b_1N, epsilon=1 / alpha, iterations=100
    )
    np.testing.assert_allclose(got[0], z[f'mid.{name}.loss'], rtol=1e-5)
    cross.assert_near(plan_1MN[0], z[f'mid.{name}.plan'])


def test_costs_of_all_pairs():
  rng = np.random.default_rng(0)
  x_BMK, y_BNK = (
    rng.dirichlet(np.ones(6), (2, n)).astype(np.float32) for n in (4, 5)
  )
  y_BNK[0, 0] = x_BMK[0, 0]
  gap = x_BMK[:, :, None] - y_BNK[:, None]
  np.testing.assert_allclose(
    ot.l1(x_BMK, y_BNK), np.abs(gap).sum(3), rtol=1e-5, atol=1e-6
  )
  # A difference of squares has the root of fp32's last digit at 0.
  np.testing.assert_allclose(
    ot.l2(x_BMK, y_BNK), np.sqrt((gap**2).sum(3)), rtol=1e-4, atol=1e-3
  )
  ratio = np.log(x_BMK[:, :, None] / (y_BNK[:, None] + 1e-7))
  np.testing.assert_allclose(
    ot.kl(x_BMK, y_BNK, 1e-7),
    (x_BMK[:, :, None] * ratio).sum(3),
    rtol=1e-4,
    atol=1e-5,
  )
  gradient = jax.grad(lambda x: ot.l2(x, jnp.asarray(y_BNK)).sum())(x_BMK)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  'cost', [ot.l1, ot.l2, functools.partial(ot.kl, floor=1e-7)]
)
def test_no_array_of_all_pairs_and_coordinates(cost):
  shapes = [jax.ShapeDtypeStruct((2, n, 31), 'float32') for n in (17, 19)]
  text = str(jax.make_jaxpr(jax.grad(lambda *a: cost(*a).sum()))(*shapes))
  assert '2,17,19]' in text
  assert '17,19,31' not in text
  assert '31,2,17,19' not in text


@pytest.mark.torch
def test_values_and_plans_are_those_of_python_optimal_transport():
  library = pytest.importorskip('ot')  # POT
  cost_BMN, a_BM, b_BN = _problem()
  for epsilon in (0.05, 0.1, 10.0):
    potentials = ot.sinkhorn(
      cost_BMN, a_BM, b_BN, epsilon=epsilon, iterations=2000
    )
    plan_BMN = ot.plan(potentials, cost_BMN, a_BM, b_BN, epsilon)
    value_B, _ = ot.entropic(
      cost_BMN, a_BM, b_BN, epsilon=epsilon, iterations=2000
    )
    for b in range(2):
      m, n = a_BM[b] > 0, b_BN[b] > 0
      one = a_BM[b][m], b_BN[b][n], cost_BMN[b][m][:, n]
      a_M, b_N, cost_MN = (np.float64(x) for x in one)
      a_M, b_N = a_M / a_M.sum(), b_N / b_N.sum()
      want_MN = library.sinkhorn(
        a_M,
        b_N,
        cost_MN,
        epsilon,
        method='sinkhorn_log',
        numItermax=5000,
        stopThr=1e-12,
      )
      np.testing.assert_allclose(plan_BMN[b][m][:, n], want_MN, atol=1e-5)
      entropy = np.sum(want_MN * np.log(want_MN / np.outer(a_M, b_N)))
      want = np.sum(want_MN * cost_MN) + epsilon * entropy
      np.testing.assert_allclose(value_B[b], want, rtol=1e-4)


def test_recorded_weights_of_costs(shared_dir):
  path = shared_dir / 'goldens/mcw_weight_update.json'
  cases = json.loads(path.read_text())
  for case in cases['cases']:
    c_K = jnp.asarray(case['mean_costs'])
    target_K = 1 / c_K.size - c_K / (2 * case['sigma'])
    got_K = ot.onto_simplex(target_K, case['floor'])
    np.testing.assert_allclose(got_K, case['weights_solver'], atol=1e-4)
