"""MultiLevelOT against recorded values."""

import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models.transformer import Head, Outputs
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


def _transport(x_MK, y_NK):
  """The entropic value of 20 iterations, in float64."""
  cost_MN = np.abs(x_MK[:, None] - y_NK[None]).sum(axis=2)
  g_N = np.zeros(len(y_NK))
  for _ in range(20):
    f_M = -0.1 * np.log(np.exp((g_N[None] - cost_MN) / 0.1).mean(axis=1))
    g_N = -0.1 * np.log(np.exp((f_M[:, None] - cost_MN) / 0.1).mean(axis=0))
  return f_M.mean() + g_N.mean()


def test_by_default_terms_are_those_of_the_formulas():
  """Of two responses, 3 and 2 tokens of the student, 2 and 3 of the other."""
  rng = np.random.default_rng(0)
  sides, models, likely = [], [], []
  for vocab, counts in ((5, (3, 2)), (6, (2, 3))):
    at_BT = np.arange(7)[None] - 2
    mask_BT = (at_BT >= 0) & (at_BT < np.array(counts)[:, None])
    ids_BT = rng.integers(0, vocab, mask_BT.shape, np.int32)
    sides.append(Tokens(ids_BT, np.ones_like(ids_BT), mask_BT))
    z_BTV = rng.standard_normal((*mask_BT.shape, vocab)).astype(np.float32)
    models.append(Outputs(jnp.asarray(z_BTV), Head(jnp.eye(vocab))))
    rows = []
    for z_TV, n in zip(np.float64(z_BTV), counts, strict=True):
      z_NV = z_TV[1 : 1 + n]  # Where they are predicted.
      z_NV = z_NV / (z_NV.std(axis=1, ddof=1, keepdims=True) + 1e-4)
      p_NV = np.exp(z_NV) / np.exp(z_NV).sum(axis=1, keepdims=True)
      rows.append(p_NV[:, np.argsort(-p_NV.sum(axis=0))[:3]])
    likely.append(rows)
  want = dict.fromkeys(('l1', 'kl', 'transport'), 0.0)
  for q, p in zip(*likely, strict=True):
    both = [x[: min(len(q), len(p))] for x in (q, p)]
    want['l1'] += np.abs(both[1] - both[0]).sum() / 5
    q_rest, p_rest = (1 - x.sum(axis=1, keepdims=True) for x in both)
    q_all, p_all = (
      np.hstack(x) for x in ((both[0], q_rest), (both[1], p_rest))
    )
    want['kl'] += np.sum(p_all * np.log(p_all / q_all)) / 5
    own = _transport(p, p) + _transport(q, q)
    want['transport'] += (_transport(p, q) - own / 2) / 2
  objective = MultiLevelOT(top=3, weight=0.5, ot=0.3, head_chunk=3)
  (loss, metrics), _ = cross.run(objective, *models, Batch(*sides))
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  more = want['l1'] + 0.1 * want['kl'] + 0.3 * want['transport']
  np.testing.assert_allclose(loss, metrics['ce'] + 0.5 * more, rtol=1e-5)
