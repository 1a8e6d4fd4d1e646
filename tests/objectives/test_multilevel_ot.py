"""MultiLevelOT against recorded values."""

import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.objectives.multilevel_ot import MultiLevelOT
from tests.objectives import cross

pytestmark = pytest.mark.slow  # Its terms take long to compile.


@pytest.mark.parametrize('name', ['multilevelot_a', 'multilevelot_d_length1'])
def test_reference_is_what_was_released(name):
  z, meta = cross.golden(name)
  batch = Batch(*(cross.unshifted(z, side) for side in cross.SIDES))
  models = cross.from_logits(z, batch)
  objective = MultiLevelOT(
    reference=True, weight=meta['distillation_weight'], head_chunk=3
  )
  (loss, metrics), gradient = cross.run(objective, *models, batch)
  np.testing.assert_allclose(loss, z['out.total'], rtol=1e-5)
  np.testing.assert_allclose(metrics['ce'], z['out.ce'], rtol=1e-5)
  np.testing.assert_allclose(
    metrics['l1'], z['out.had_per_row'].mean(), rtol=1e-5
  )
  np.testing.assert_allclose(metrics['kl'], z['out.log_term'], rtol=1e-5)
  np.testing.assert_allclose(
    metrics['transport'], z['out.sinkhorn_sum'], rtol=1e-3
  )
  _, ce_gradient = cross.run(MultiLevelOT(weight=0.0), *models, batch)
  cross.assert_near(gradient - ce_gradient, z['grad.distill'])


def test_terms_of_the_port_within_mcw_kd():
  """Of all positions, rotated to begin with the response; sides exchanged."""
  z, _ = cross.golden('multilevelot_mcw_a')
  logits = {}
  for side, other in zip(cross.SIDES, reversed(cross.SIDES), strict=True):
    starts_B = np.argmax(z[f'in.{other}_labels'] != -100, axis=1)
    logits[f'in.{side}_logits'] = np.stack(
      [
        np.roll(x_LV, -n, axis=0)
        for x_LV, n in zip(z[f'in.{other}_logits'], starts_B, strict=True)
      ]
    )
  B, L, _ = z['in.student_logits'].shape
  ids_BT = np.zeros((B, L + 1), np.int32)
  counts_BT = np.broadcast_to(np.arange(L + 1) > 0, ids_BT.shape)
  tokens = Tokens(ids_BT, np.ones_like(ids_BT), counts_BT)
  batch = Batch(tokens, tokens)
  objective = MultiLevelOT(reference=True, temperature=2.0, head_chunk=5)
  (_, metrics), _ = cross.run(
    objective, *cross.from_logits(logits, batch), batch
  )
  np.testing.assert_allclose(metrics['l1'], z['out.l1_mean'], rtol=1e-5)
  np.testing.assert_allclose(metrics['kl'], z['out.log_term'], rtol=1e-5)
  np.testing.assert_allclose(metrics['transport'], z['out.sinkhorn'], rtol=1e-3)


def test_by_default_identical_models_cost_nothing_and_others_something():
  z, _ = cross.golden('multilevelot_a')
  batch = Batch(*(cross.unshifted(z, side) for side in cross.SIDES))
  student, teacher = cross.from_logits(z, batch)
  objective = MultiLevelOT(top=20)
  (loss, metrics), _ = cross.run(objective, student, teacher, batch)
  assert min(metrics[name] for name in ('l1', 'kl', 'transport')) > 0.01
  same = batch.replace(teacher=batch.student)
  (loss, metrics), gradient = cross.run(objective, student, student, same)
  np.testing.assert_allclose(loss, metrics['ce'], rtol=1e-6)
  _, of_ce = cross.run(MultiLevelOT(weight=0.0), student, student, same)
  np.testing.assert_allclose(gradient, of_ce, atol=1e-6)
