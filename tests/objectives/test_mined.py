"""MinED against recorded values."""

import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch
from gakd_jax.objectives import vocabularies
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.mined import MinED
from tests.objectives import cross


def single_partners(z, batch):
  """'dtw_t' of the recorded paths, which count from the first that is read."""
  dtw_t_BT = np.full_like(batch.student.ids_BT, -1)
  starts = [
    np.argmax(tokens.mask_BT, axis=1) - 1
    for tokens in (batch.student, batch.teacher)
  ]
  for b in range(len(dtw_t_BT)):
    t_P, s_P = z[f'mid.dtw.{b}.pairs'].T
    alone_P = np.bincount(s_P)[s_P] == 1
    dtw_t_BT[b, starts[0][b] + s_P[alone_P]] = starts[1][b] + t_P[alone_P]
  return dtw_t_BT


@pytest.mark.parametrize('name', ['a', 'b_swapped', 'e_one_to_many'])
def test_recorded_values(name):
  z, meta = cross.golden(f'mined_loss_{name}')
  batch = Batch(*(cross.shifted(z, side) for side in cross.SIDES))
  batch = batch.replace(align={'dtw_t': single_partners(z, batch)})
  models = cross.from_logits(z, batch)
  s_id_U = z['in.teacher_to_student']
  V = z['in.student_logits'].shape[2]
  constants = vocabularies.nearest_of(s_id_U, V)
  objective = MinED(
    kd=meta['kd_rate'], temperature=meta['kd_temperature'], head_chunk=4
  )
  (loss, metrics), gradient = cross.run(
    objective, *models, batch, Own(constants=constants)
  )
  n = z['out.denom']
  np.testing.assert_allclose(loss, z['out.loss_over_denom'], rtol=1e-5)
  np.testing.assert_allclose(metrics['ce'], z['out.nll_sum'] / n, rtol=1e-5)
  np.testing.assert_allclose(metrics['mined'], z['out.kd_sum'] / n, rtol=1e-5)
  cross.assert_near(gradient[:, :-1], z['grad.loss_over_denom'])
  assert 0.1 < metrics['paired'] < 0.9
