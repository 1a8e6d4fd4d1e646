"""DSKDv2 against recorded values."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.data.pipeline import Batch
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.dskd_v2 import DSKDv2
from tests.objectives import cross

pytestmark = pytest.mark.slow  # Its terms take long to compile.


def recorded(name):
  z, meta = cross.golden(name)
  batch = Batch(*(cross.shifted(z, side) for side in cross.SIDES))
  models = cross.from_heads(z, batch)
  objective = DSKDv2(
    divergence=meta['kd_objective'].replace('adaptive_kl', 'adaptive'),
    kd=meta['kd_rate'],
    temperature=meta['kd_temperature'],
    pinv=meta['pinv_init'],
    agreement=meta['t2s_agreement'] > 0,
    reference=True,
    head_chunk=4,
  )
  constants = {}
  if meta['exact_token_alignment']:
    batch = batch.replace(align=exact_pairs(z, batch))
    constants = {'teacher_id_V': same_strings(z), 'student_id_U': by_name(z)}
  if meta['pinv_init']:
    own = objective.begin(Own(), trained(*models, constants), {})
  else:
    own = Own(
      extra={
        name: {'kernel': jnp.asarray(z[f'in.{name}_w'].T)}
        for name in ('t2s', 's2t')
      }
    )
  return z, objective, (*models, batch, own.replace(constants=constants))


def trained(student, teacher, constants):
  """What `begin` asks of a pair of models."""
  return types.SimpleNamespace(
    student=lambda _: student,
    teacher=lambda: teacher,
    frozen={'constants': constants},
  )


def exact_pairs(z, batch):
  starts = [
    np.argmax(tokens.mask_BT, axis=1)
    for tokens in (batch.student, batch.teacher)
  ]
  found = [z[f'mid.align.{b}'] for b in range(len(starts[0]))]
  pairs_BT = np.full(batch.student.ids_BT.shape, -1, np.int32)
  for b, cells in enumerate(found):
    pairs_BT[b, starts[0][b] + cells[:, 1]] = starts[1][b] + cells[:, 0]
  return {'pairs_t': pairs_BT}


def same_strings(z):
  """Maps by normalised strings."""
  t_ids = {t.replace('Ġ', '▁'): i for i, t in enumerate(z['in.teacher_tokens'])}
  return np.array(
    [t_ids.get(s.replace('Ġ', '▁'), -1) for s in z['in.student_tokens']],
    np.int32,
  )


def by_name(z):
  """The student's id of the teacher's token of one name, or end of turn."""
  s_ids = {s: i for i, s in enumerate(z['in.student_tokens'])}
  s_id_U = [s_ids.get(t, -1) for t in z['in.teacher_tokens']]
  return jnp.array([0, *s_id_U[1:]])


@pytest.mark.parametrize(
  'name',
  [
    'eta_a',
    'eta_b_agree0',
    'eta_e_same_marker',
    'same_vocab_a',
    'same_vocab_c_random_proj',
  ],
)
def test_recorded_values(name):
  z, objective, inputs = recorded(f'dskdv2_{name}')
  (loss, metrics), gradients = cross.run(objective, *inputs, wanted='all')
  for ours, theirs in {
    'ce': 'nll_loss',
    't2s_ce': 't2s_ce_loss',
    't2s': 't2s_kd_loss',
    's2t': 's2t_kd_loss',
  }.items():
    np.testing.assert_allclose(
      metrics[ours], z[f'out.{theirs}'], rtol=1e-4, err_msg=ours
    )
  np.testing.assert_allclose(loss, z['out.loss'], rtol=1e-5)
  d_hidden, d_head, d_extra = gradients
  cross.assert_near(d_hidden[:, :-1], z['grad.student_hidden'])
  cross.assert_near(d_head, z['grad.student_head'])
  for name, d in d_extra.items():
    cross.assert_near(d['kernel'].T, z[f'grad.{name}_w'])


class _OneOfTwo(DSKDv2):
  """A microbatch, of two with as many tokens."""

  def count(self, batch):
    return {name: 2 * n for name, n in super().count(batch).items()}


def test_a_reference_of_microbatches_weighs_as_much():
  _, objective, inputs = recorded('dskdv2_eta_a')
  (want, terms), _ = cross.run(objective, *inputs)
  half = _OneOfTwo(**vars(objective))
  (got, halves), _ = cross.run(half, *inputs)
  np.testing.assert_allclose(2 * got, want, rtol=1e-6)
  for name in ('ce', 't2s_ce', 't2s', 's2t'):
    np.testing.assert_allclose(2 * halves[name], terms[name], rtol=1e-6)


def test_identical_models_are_projected_into_themselves():
  _, objective, (student, _, batch, _) = recorded('dskdv2_same_vocab_a')
  own = objective.begin(Own(), trained(student, student, {}), {})
  D = student.hidden_BTD.shape[2]
  kernel_DD = own.extra['t2s']['kernel']
  np.testing.assert_allclose(kernel_DD, np.eye(D), atol=1e-4)
  objective = dataclasses.replace(objective, reference=False)
  batch = batch.replace(teacher=batch.student)
  (_, metrics), _ = cross.run(objective, student, student, batch, own)
  np.testing.assert_allclose(metrics['t2s_accuracy'], 1, rtol=1e-6)
  for name in ('t2s', 's2t'):
    np.testing.assert_allclose(metrics[name], 0, atol=1e-5)
  q_BTV = jax.nn.softmax(student.hidden_BTD @ student.head.weight_VD.T)
  want_BT = -np.log(q_BTV.max(2))
  want = want_BT[batch.student.predicts_BT].mean()
  np.testing.assert_allclose(metrics['t2s_ce'], want, rtol=1e-4)
