"""How far one next-token distribution is from another, token by token.

`log_p` is the teacher's and `log_q` the student's log-probabilities, [N, V] in
fp32; every function returns [N], in nats where it is a KL divergence, unreduced
and zero where the two agree. Gradients flow to whatever is differentiated;
stop them at the teacher outside.
"""

import math

import jax
import jax.numpy as jnp


def cross_entropy(log_q_NV, targets_N):
  """-log q(y): what SFT descends."""
  # A comparison instead of a gather: it fuses with the pass over the logits,
  # forward and backward, and needs no communication when V is sharded.
  vocab_1V = jnp.arange(log_q_NV.shape[-1])[None, :]
  hit_NV = vocab_1V == targets_N[:, None]
  return -jnp.sum(jnp.where(hit_NV, log_q_NV, 0.0), axis=-1)


def entropy(log_q_NV):
  """-sum q log q of the student; in nats."""
  return -jnp.sum(jnp.exp(log_q_NV) * log_q_NV, axis=-1)


def forward_kl(log_p_NV, log_q_NV):
  """KL(teacher || student) = sum p (log p - log q)."""
  return jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_q_NV), axis=-1)


def reverse_kl(log_p_NV, log_q_NV):
  """KL(student || teacher) = sum q (log q - log p)."""
  return forward_kl(log_q_NV, log_p_NV)


def jsd(log_p_NV, log_q_NV, beta=0.5):
  """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1).

  beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q. It tends
  to zero at both ends; beta 0 is therefore *defined* as forward KL and beta 1
  as reverse KL, the limits of its direction, as the authors do.
  """
  if beta == 0:
    return forward_kl(log_p_NV, log_q_NV)
  if beta == 1:
    return reverse_kl(log_p_NV, log_q_NV)
  log_m_NV = _log_mixture(log_p_NV, log_q_NV, beta)
  return beta * forward_kl(log_p_NV, log_m_NV) + (1 - beta) * forward_kl(
    log_q_NV, log_m_NV
  )


def skew_forward(log_p_NV, log_q_NV, alpha=0.1):
  """KL(p || a p + (1 - a) q), DistiLLM (arXiv 2402.03898)."""
  return forward_kl(log_p_NV, _log_mixture(log_p_NV, log_q_NV, alpha))


def skew_reverse(log_p_NV, log_q_NV, alpha=0.1):
  """KL(q || (1 - a) p + a q), DistiLLM (arXiv 2402.03898)."""
  return forward_kl(log_q_NV, _log_mixture(log_q_NV, log_p_NV, alpha))


def entropy_gated(log_p_NV, log_q_NV, threshold=0.8):
  """KL(q || p), and KL(p || q) beside it where the teacher is uncertain.

  Entropy-aware on-policy distillation (arXiv 2603.07079): reverse KL, plus
  forward KL at tokens where the teacher's entropy is above `threshold` nats.
  """
  is_open_N = entropy(jax.lax.stop_gradient(log_p_NV)) > threshold
  return reverse_kl(log_p_NV, log_q_NV) + is_open_N * forward_kl(
    log_p_NV, log_q_NV
  )


def total_variation(log_p_NV, log_q_NV):
  """0.5 sum |p - q|, between 0 and 1."""
  return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p_NV) - jnp.exp(log_q_NV)), axis=-1)


def ranked_distance(p_NU, q_NV, top):
  """sum |p_(r) - q_(r)|, r the rank by probability: no id meets its like.

  Of ULD (arXiv 2402.12030), the smaller vocabulary filled up with zeros; p and
  q need not sum to 1. A vocabulary is not sorted, which would cost far more
  than all else: the `top` largest of each are compared one by one, what is left
  as one sum. That is exact where one tail lies above the other, and else too
  small by less than the tails; and exact if there are no more than `top`.
  """
  top = min(top, max(p_NU.shape[-1], q_NV.shape[-1]))
  (p_NK, p_rest_N), (q_NK, q_rest_N) = (
    _largest(x_NV, top) for x_NV in (p_NU, q_NV)
  )
  distance_N = jnp.sum(absolute(p_NK - q_NK), axis=-1)
  return distance_N + absolute(p_rest_N - q_rest_N)


def absolute(x):
  """|x|, without a gradient at 0: that of `jnp.abs` is 1 there."""
  return jnp.sign(x) * x


def adaptive_kl(log_p_NV, log_q_NV, tail_mass=0.5):
  """Forward and reverse KL mixed by where the student is wrong.

  AKL (arXiv 2404.02657, eq. 11): the least probable tokens of the teacher,
  `tail_mass` of its mass, are the tail, the others the head; each KL has the
  share of sum |p - q| on its side, forward the head's and reverse the tail's.
  The shares are weights: no gradient flows through them.
  """
  p_NV, q_NV = jnp.exp(log_p_NV), jnp.exp(log_q_NV)
  gap_NV = jnp.abs(p_NV - q_NV)
  tail_NV = p_NV <= _tail_threshold(p_NV, tail_mass)
  tail_N = jnp.sum(jnp.where(tail_NV, gap_NV, 0.0), axis=-1)
  all_N = jnp.sum(gap_NV, axis=-1)
  tail_share_N = jax.lax.stop_gradient(
    tail_N / jnp.maximum(all_N, jnp.finfo(jnp.float32).tiny)
  )
  return (1 - tail_share_N) * forward_kl(
    log_p_NV, log_q_NV
  ) + tail_share_N * reverse_kl(log_p_NV, log_q_NV)


def _largest(x_NV, k):
  """The k largest in descending order, zeros after them; the sum of others."""
  short = k - x_NV.shape[-1]
  if short >= 0:
    x_NK = jax.lax.top_k(x_NV, x_NV.shape[-1])[0]
    return jnp.pad(x_NK, ((0, 0), (0, short))), jnp.zeros_like(x_NV[:, 0])
  x_NK = jax.lax.top_k(x_NV, k)[0]
  return x_NK, jnp.sum(x_NV, axis=-1) - jnp.sum(x_NK, axis=-1)


def _log_mixture(log_a_NV, log_b_NV, weight):
  """log(weight a + (1 - weight) b), in log space."""
  return jnp.logaddexp(
    log_a_NV + jnp.log(weight), log_b_NV + jnp.log1p(-weight)
  )


def _tail_threshold(p_NV, tail_mass):
  """The largest p such that all tokens up to it hold less than the mass.

  By bisection of its logarithm, since sorting the vocabulary would cost more
  than the loss itself, to 1e-7 of it, as fine as fp32.
  """
  p_NV = jax.lax.stop_gradient(p_NV)
  # All tokens below this share of the mass have less than it together.
  lowest = math.log(tail_mass / p_NV.shape[-1]) - 0.01
  steps = math.ceil(math.log2(-lowest * 1e7))

  def halve(state):
    step, low_N1, high_N1 = state
    middle_N1 = (low_N1 + high_N1) / 2
    in_tail_NV = p_NV <= jnp.exp(middle_N1)
    mass_N1 = jnp.sum(jnp.where(in_tail_NV, p_NV, 0), axis=-1, keepdims=True)
    small_N1 = mass_N1 < tail_mass
    return (
      step + 1,
      jnp.where(small_N1, middle_N1, low_N1),
      jnp.where(small_N1, high_N1, middle_N1),
    )

  zero_N1 = jnp.zeros_like(p_NV[:, :1])
  # A `while` of its own: a gradient need not keep what it passes through.
  _, low_N1, _ = jax.lax.while_loop(
    lambda state: state[0] < steps, halve, (0, zero_N1 + lowest, zero_N1)
  )
  return jnp.exp(low_N1)
