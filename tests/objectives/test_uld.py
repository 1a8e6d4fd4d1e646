"""ULD against recorded values, and what its distance of ranks is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch
from gakd_jax.objectives import divergences
from gakd_jax.objectives.uld import ULD
from tests.objectives import cross


@pytest.mark.parametrize('name', ['uld_a', 'uld_b_teacher_vocab_larger'])
def test_reference_is_the_mean_of_the_means_of_responses(name):
  z, _ = cross.golden(name)
  batch = Batch(*(cross.unshifted(z, side) for side in cross.SIDES))
  models = cross.from_logits(z, batch)
  (loss, metrics), _ = cross.run(ULD(reference=True), *models, batch)
  np.testing.assert_allclose(loss, z['out.total'], rtol=1e-5)
  np.testing.assert_allclose(metrics['ce'], z['out.ce'], rtol=1e-5)
  np.testing.assert_allclose(1.5 * metrics['uld'], z['out.distill'], rtol=1e-5)
  objective = ULD(reference=True, ce=0.0, head_chunk=3)
  _, gradient = cross.run(objective, *models, batch)
  cross.assert_near(gradient, z['grad.distill'])


@pytest.mark.parametrize(
  ('name', 'settings'),
  [
    ('uld_dskd_a', {'ce': 0.5, 'weight': 0.5}),
    ('uld_mcw_a', {'ce': 1.0, 'weight': 1.0}),
  ],
)
def test_the_mean_over_tokens_is_that_of_the_ports(name, settings):
  z, _ = cross.golden(name)
  batch = Batch(*(cross.shifted(z, side) for side in cross.SIDES))
  objective = ULD(**settings, head_chunk=4)
  (loss, metrics), gradient = cross.run(
    objective, *cross.from_logits(z, batch), batch
  )
  np.testing.assert_allclose(loss, z['out.loss_over_denom'], rtol=1e-5)
  want = z['out.uld_sum'] / z['out.denom']
  np.testing.assert_allclose(metrics['uld'], want, rtol=1e-5)
  cross.assert_near(gradient[:, :-1], z['grad.loss_over_denom'])


def test_a_mean_without_ends_of_turns_at_one_position_each():
  """TRL's ULD, of probabilities where tokens are predicted from."""
  z, _ = cross.golden('gold_positional_bayesian')
  batch = Batch(
    *(cross.without_last(cross.unshifted(z, side)) for side in cross.SIDES)
  )
  objective = ULD(reference=True, ce=0.0, weight=1.0)
  (loss, _), gradient = cross.run(
    objective, *cross.from_logits(z, batch), batch
  )
  np.testing.assert_allclose(loss, z['out.loss'], rtol=1e-5)
  cross.assert_near(gradient, z['grad.loss'])


def test_the_tails_are_one_sum_each():
  rng = np.random.default_rng(0)
  p_NU, q_NV = (
    rng.dirichlet(np.full(n, 0.3), 5).astype(np.float32) for n in (40, 60)
  )

  def whole(p_NU, q_NV):
    p_NV = np.pad(p_NU, ((0, 0), (0, 20)))
    return -np.sort(-p_NV), -np.sort(-q_NV)

  p_NR, q_NR = whole(p_NU, q_NV)
  for top in (1, 7, 45, 60, 1000):
    want_N = np.abs(p_NR - q_NR)[:, :top].sum(1)
    want_N += np.abs(p_NR[:, top:].sum(1) - q_NR[:, top:].sum(1))
    for a, b in ((p_NU, q_NV), (q_NV, p_NU)):
      got_N = divergences.ranked_distance(a, b, top)
      np.testing.assert_allclose(got_N, want_N, atol=1e-6)
  # Every probability has a gradient, its sign that of what it is compared in.
  d_NV = jax.grad(lambda q: divergences.ranked_distance(p_NU, q, 7).sum())(
    jnp.asarray(q_NV)
  )
  np.testing.assert_array_equal(np.abs(d_NV), 1)


def test_temperature_divides_the_logits_of_both():
  z, _ = cross.golden('uld_a')
  batch = Batch(*(cross.unshifted(z, side) for side in cross.SIDES))
  models = cross.from_logits(z, batch)
  halves = [x.replace(hidden_BTD=x.hidden_BTD / 2) for x in models]
  (got, _), _ = cross.run(ULD(ce=0.0, temperature=2.0), *models, batch)
  (want, _), _ = cross.run(ULD(ce=0.0), *halves, batch)
  np.testing.assert_allclose(got, want, rtol=1e-6)
