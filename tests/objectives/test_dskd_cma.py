"""DSKD against recorded values, and what its default does otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.dskd_cma import DSKD
from tests.objectives import cross

pytestmark = pytest.mark.slow  # Its terms take long to compile.

DIVERGENCES = {
  'forward_kl': 'forward_kl',
  'skewed_forward_kl': 'skew_forward',
}


def recorded(name):
  z, meta = cross.golden(name)
  batch = Batch(*(cross.shifted(z, side) for side in cross.SIDES))
  own = Own(extra=cross.projectors(z, 't2s', 's2t', 'query'))
  objective = DSKD(
    divergence=DIVERGENCES[meta['kd_objective']],
    kd=meta['kd_rate'],
    temperature=meta['kd_temperature'],
    teacher_temperature=meta['teacher_temperature'],
    attention='query' in own.extra,
    reference=True,
    head_chunk=4,
  )
  return z, objective, (*cross.from_heads(z, batch), batch, own)


@pytest.mark.parametrize(
  'name', ['dskd_cma_a', 'dskd_cma_d_teacher_temp', 'dskd_same_vocab_a']
)
def test_recorded_values(name):
  z, objective, inputs = recorded(name)
  (loss, metrics), gradients = cross.run(objective, *inputs, wanted='all')
  n = z['out.denom']
  np.testing.assert_allclose(loss, z['out.loss_over_denom'], rtol=1e-5)
  for ours, theirs in {
    'ce': 'nll_loss',
    't2s_ce': 't2s_ce_loss',
    't2s': 't2s_kd_loss',
    's2t': 's2t_kd_loss',
    't2s_accuracy': 't2s_acc',
  }.items():
    want = z[f'out.{theirs}'] / n
    np.testing.assert_allclose(metrics[ours], want, rtol=2e-5, err_msg=ours)
  d_hidden, d_head, d_extra = gradients
  cross.assert_near(d_hidden[:, :-1], z['grad.student_hidden'])
  cross.assert_near(d_head, z['grad.student_head'])
  want = cross.projectors(z, *d_extra, prefix='grad')
  jax.tree.map(cross.assert_near, d_extra, want)


def test_by_default_padding_and_other_rows_do_not_matter():
  _, objective, (student, teacher, batch, own) = recorded('dskd_cma_a')
  objective = dataclasses.replace(objective, reference=False)

  def loss(pad, rows=slice(None), objective=objective):
    def padded(x, value=0):
      more = ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)
      return np.pad(np.asarray(x), more, constant_values=value)[rows]

    one = Batch(
      *(jax.tree.map(padded, t) for t in (batch.student, batch.teacher))
    )
    models = [
      o.replace(hidden_BTD=padded(o.hidden_BTD, 3.0))
      for o in (student, teacher)
    ]
    n = one.student.mask_BT.sum()
    return float(cross.run(objective, *models, one, own)[0][0]) * n

  want = loss(0)
  np.testing.assert_allclose(loss(5), want, rtol=1e-5)
  parts = [loss(0, slice(i, i + 1)) for i in range(2)]
  np.testing.assert_allclose(sum(parts), want, rtol=1e-5)
  reference = dataclasses.replace(objective, reference=True)
  assert (
    abs(loss(5, objective=reference) / loss(0, objective=reference) - 1) > 1e-3
  )


def test_identical_models_with_one_space_have_the_loss_of_sft():
  """Projected into itself, the teacher is the student, and CE is both CEs."""
  _, objective, (student, _, batch, _) = recorded('dskd_same_vocab_a')
  D = student.hidden_BTD.shape[2]
  same = {'kernel': jnp.eye(D), 'bias': jnp.zeros(D)}
  own = Own(extra={'t2s': same, 's2t': same})
  batch = batch.replace(teacher=batch.student)
  (loss, metrics), _ = cross.run(objective, student, student, batch, own)
  np.testing.assert_allclose(loss, metrics['ce'], rtol=1e-5)
  np.testing.assert_allclose(metrics['t2s'], 0, atol=1e-6)
  np.testing.assert_allclose(metrics['s2t'], 0, atol=1e-6)


def test_by_default_the_deviation_is_that_of_a_document():
  """Of all numbers of its response, with n - 1; elsewhere it is 1."""
  x_BRE = np.random.default_rng(0).standard_normal((1, 7, 4), np.float32)
  mask_BR = np.array([[0, 0, 1, 1, 0, 1, 1]], bool)
  tokens = Tokens(mask_BR * 1, np.array([[1, 1, 1, 1, 2, 2, 2]]), mask_BR)
  want_R = np.ones(7)
  for rows in (slice(1, 3), slice(4, 6)):  # Where these are predicted.
    want_R[rows] = np.std(x_BRE[0, rows], ddof=1)
  got_BR1 = DSKD()._deviation(jnp.asarray(x_BRE), tokens)
  np.testing.assert_allclose(got_BR1[0, :, 0], want_R, rtol=1e-5)
