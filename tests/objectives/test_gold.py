"""GOLD against recorded values."""

import dataclasses

import jax
import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch
from gakd_jax.objectives import vocabularies
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.gold import GOLD
from tests.objectives import cross


def recorded(name):
  z, meta = cross.golden(name)
  batch = Batch(*(cross.unshifted(z, side) for side in cross.SIDES))
  align = {}
  for i, side in enumerate(cross.SIDES):
    tokens = getattr(batch, side)
    starts_B = np.argmax(tokens.mask_BT, axis=1)
    spans_BT = np.full_like(tokens.ids_BT, -1)
    for b, groups in enumerate(meta['groups']):
      for n, places in enumerate(groups[i]):
        spans_BT[b, starts_B[b] + np.array(places)] = n
    align[f'span_{side[0]}'] = spans_BT
  batch = batch.replace(align=align)
  objective = GOLD(
    temperature=meta['student_temperature'],
    hybrid=meta['hybrid'],
    merge=meta['strategy'],
    reference=True,
    head_chunk=2,
  )
  constants = {}
  if meta['hybrid']:
    t_ids, s_ids = z['in.matched_teacher_to_student'].T
    V, U = (z[f'in.{side}_logits'].shape[2] for side in cross.SIDES)
    constants = vocabularies.shared_of(s_ids, t_ids, V, U)
  models = cross.from_logits(z, batch)
  return z, objective, (*models, batch, Own(constants=constants))


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['gold_bayesian_b', 'gold_hybrid_bayesian_a', 'gold_observed_a']
)
def test_recorded_values(name):
  z, objective, inputs = recorded(name)
  (loss, metrics), gradient = cross.run(objective, *inputs)
  np.testing.assert_allclose(loss, z['out.loss'], rtol=1e-5)
  np.testing.assert_allclose(metrics['gold'], loss, rtol=1e-6)
  cross.assert_near(gradient, z['grad.loss'])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gold_bayesian_b', 'gold_hybrid_bayesian_a'])
def test_of_one_response_both_means_are_the_same(name):
  _, objective, (student, teacher, batch, own) = recorded(name)
  batch = jax.tree.map(lambda x: x[:1], batch)
  models = [x.replace(hidden_BTD=x.hidden_BTD[:1]) for x in (student, teacher)]
  got, want = (
    cross.run(
      dataclasses.replace(objective, reference=on), *models, batch, own
    )[0][0]
    for on in (False, True)
  )
  np.testing.assert_allclose(got, want, rtol=1e-6)
