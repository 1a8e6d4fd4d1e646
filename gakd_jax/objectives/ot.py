"""Optimal transport between two short lists of points, in log space and fp32.

cost_BMN is what it costs to move a unit from m to n; a_BM and b_BN are the
masses that are there and wanted, each summing to 1, zeros where nothing is
(padding). Regularised by the entropy of the plan relative to the marginals,

  OT = min_P <P, C> + eps KL(P | a b'),

its dual potentials f, g each follow from the other by a c-transform, and
alternating these is Sinkhorn's algorithm (Cuturi, arXiv 1306.0895).
"""

import jax
import jax.numpy as jnp

from gakd_jax.objectives import divergences

_NOTHING = -1e30  # the logarithm of no mass: finite, so that no product is NaN


def uniform(mask_BN):
  """The same mass wherever the mask is; of an empty one, none."""
  mass_BN = mask_BN.astype(jnp.float32)
  return mass_BN / jnp.maximum(jnp.sum(mass_BN, axis=1, keepdims=True), 1)


def c_transform(f_BM, cost_BMN, a_BM, epsilon):
  """g_BN = -eps log sum_m a_m exp((f_m - C_mn) / eps): the best for f.

  The soft minimum over m of C - f. With these, columns of the plan
  a_m exp((f_m + g_n - C_mn) / eps) b_n sum to b.
  """
  score_BMN = (f_BM[:, :, None] - cost_BMN) / epsilon + _log(a_BM)[:, :, None]
  return -epsilon * jax.nn.logsumexp(score_BMN, axis=1)


def sinkhorn(cost_BMN, a_BM, b_BN, *, epsilon, iterations):
  """Potentials f_BM, g_BN after some alternations, g the last.

  Differentiable through all iterations, of which each is computed again.
  """
  cost_BNM = cost_BMN.swapaxes(1, 2)

  @jax.checkpoint
  def alternate(potentials, _):
    _, g_BN = potentials
    f_BM = c_transform(g_BN, cost_BNM, b_BN, epsilon)
    return (f_BM, c_transform(f_BM, cost_BMN, a_BM, epsilon)), None

  start = jnp.zeros_like(a_BM), jnp.zeros_like(b_BN)
  return jax.lax.scan(alternate, start, length=iterations)[0]


def plan(potentials, cost_BMN, a_BM, b_BN, epsilon):
  """P_BMN; 0 where there is no mass."""
  f_BM, g_BN = potentials
  log_f_BM, log_g_BN = f_BM / epsilon + _log(a_BM), g_BN / epsilon + _log(b_BN)
  return jnp.exp(log_f_BM[:, :, None] + log_g_BN[:, None] - cost_BMN / epsilon)


def semi_dual(f_BM, cost_BMN, a_BM, b_BN, epsilon):
  """<a, f> + <b, g>, g the c-transform of f; [B].

  At most OT, for every f. Its gradient in C is the plan of f and g, and in f
  what a has more than that plan's rows.
  """
  g_BN = c_transform(f_BM, cost_BMN, a_BM, epsilon)
  return jnp.sum(a_BM * f_BM, axis=1) + jnp.sum(b_BN * g_BN, axis=1)


def entropic(cost_BMN, a_BM, b_BN, *, epsilon, iterations):
  """OT, [B], whose gradient in the cost is the plan (the envelope theorem).

  Potentials are found without a gradient: at the optimum they have none. Also
  returns the plan.
  """
  fixed_BMN = jax.lax.stop_gradient(cost_BMN)
  potentials = sinkhorn(
    fixed_BMN, a_BM, b_BN, epsilon=epsilon, iterations=iterations
  )
  value_B = semi_dual(potentials[0], cost_BMN, a_BM, b_BN, epsilon)
  return value_B, plan(potentials, fixed_BMN, a_BM, b_BN, epsilon)


def unrolled(cost_BMN, a_BM, b_BN, *, epsilon, iterations):
  """<P, C>, [B], with the gradient through all iterations, and the plan P.

  Without the entropy, so that its gradient is not the plan.
  """
  potentials = sinkhorn(
    cost_BMN, a_BM, b_BN, epsilon=epsilon, iterations=iterations
  )
  plan_BMN = plan(potentials, cost_BMN, a_BM, b_BN, epsilon)
  return jnp.sum(plan_BMN * cost_BMN, axis=(1, 2)), plan_BMN


def l1(x_BMK, y_BNK):
  """|x_m - y_n|_1 of all pairs, [B, M, N], one coordinate at a time."""

  @jax.checkpoint
  def add(cost_BMN, xy):
    x_BM, y_BN = xy
    gap_BMN = x_BM[:, :, None] - y_BN[:, None]
    return cost_BMN + divergences.absolute(gap_BMN), None

  start_BMN = jnp.zeros((*x_BMK.shape[:2], y_BNK.shape[1]), x_BMK.dtype)
  xs = jnp.moveaxis(x_BMK, 2, 0), jnp.moveaxis(y_BNK, 2, 0)
  return jax.lax.scan(add, start_BMN, xs)[0]


def l2(x_BMK, y_BNK):
  """|x_m - y_n|_2 of all pairs, [B, M, N], of one product.

  The gradient of the root at 0 is 0.
  """
  x2_BM, y2_BN = (jnp.sum(x * x, axis=2) for x in (x_BMK, y_BNK))
  square_BMN = x2_BM[:, :, None] + y2_BN[:, None] - 2 * inner(x_BMK, y_BNK)
  is_apart_BMN = square_BMN > 1e-12
  return jnp.where(
    is_apart_BMN, jnp.sqrt(jnp.where(is_apart_BMN, square_BMN, 1)), 0
  )


def kl(p_BMK, q_BNK, floor):
  """sum_k p_m log(p_m / (q_n + floor)) of all pairs, [B, M, N]."""
  tiny = jnp.finfo(jnp.float32).tiny
  negentropy_BM = jnp.sum(p_BMK * jnp.log(jnp.maximum(p_BMK, tiny)), axis=2)
  return negentropy_BM[:, :, None] - inner(p_BMK, jnp.log(q_BNK + floor))


def onto_simplex(x_K, floor):
  """The nearest point with a sum of 1 and no coordinate below the floor."""
  left = 1 - floor * x_K.size
  y_K = x_K - floor
  sorted_K = -jnp.sort(-y_K)
  excess_K = (jnp.cumsum(sorted_K) - left) / jnp.arange(1, x_K.size + 1)
  # Of as many of the largest as stay above what is taken from each.
  n = jnp.sum(sorted_K > excess_K)
  return floor + jnp.maximum(y_K - excess_K[n - 1], 0)


def inner(x_BMK, y_BNK):
  """x_m y_n of all pairs, [B, M, N], in fp32."""
  return jnp.einsum('bmk,bnk->bmn', x_BMK, y_BNK, precision='highest')


def _log(mass_BM):
  has_BM = mass_BM > 0
  return jnp.where(has_BM, jnp.log(jnp.where(has_BM, mass_BM, 1)), _NOTHING)
