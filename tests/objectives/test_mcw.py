"""MCW-KD against recorded values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data.pipeline import Batch
from gakd_jax.models import DecoderConfig
from gakd_jax.objectives import dskd_cma, mcw
from gakd_jax.objectives.base import Own
from tests.objectives import cross

pytestmark = pytest.mark.slow  # Its terms take long to compile.

PROJECTORS = 't2s', 's2t', 'query', 'ot', 'salience'


def recorded(name, **settings):
  z, meta = cross.golden(name)
  batch = Batch(*(cross.shifted(z, side) for side in cross.SIDES))
  batch = batch.replace(
    align=paths(z, len(batch.student.ids_BT), 10**6 if settings else 1)
  )
  memory = {k: jnp.array(w) for k, w in mcw._WEIGHTS.items()}
  own = Own(
    extra=cross.projectors(z, *PROJECTORS),
    memory=memory,
    step=meta['current_step'],
  )
  objective = mcw.MCW(
    kd=meta['kd_rate'],
    temperature=meta['kd_temperature'],
    top=meta['top_k'],
    total_steps=meta['total_iters'],
    reference=True,
    head_chunk=5,
    **settings,
  )
  return z, meta, objective, (*cross.from_heads(z, batch), batch, own)


def embeddings_of(z):
  """What `dskd_cma._embedded` finds: recorded inputs are not recorded labels."""

  def embedded(outputs, tokens, dtype):
    side = next(
      side
      for side in cross.SIDES
      if z[f'in.{side}_embed'].shape == outputs.embedding_VD.shape
    )
    return [
      outputs.embedding_VD[
        np.pad(np.where(counts, z[f'in.{side}_{name}'], 0), ((0, 0), (0, 1)))
      ].astype(dtype)
      for name in ('ids', 'labels')
      for counts in [z[f'in.{side}_labels'] != -100]
    ]

  return embedded


def paths(z, B, scale):
  """Cells of the warping paths, with the edits of both directions."""
  cells = [np.nonzero(z[f'mid.hidden.{b}.cost1']) for b in range(B)]
  P = max(len(t) for t, _ in cells)
  align = {f'path_{x}': np.full((B, P), -1, np.int32) for x in 'tsd'}
  for b, (t_P, s_P) in enumerate(cells):
    # Of the semi-dual they are shares of the largest, whatever that was.
    d_P = 2 * scale * z[f'mid.hidden.{b}.cost1'][t_P, s_P]
    for x, values in zip('tsd', (t_P, s_P, np.round(d_P)), strict=True):
      align[f'path_{x}'][b, : len(t_P)] = values
  return align


def assert_as_recorded(z, objective, inputs, monkeypatch):
  monkeypatch.setattr(dskd_cma, '_embedded', embeddings_of(z))
  (loss, metrics), gradients = cross.run(objective, *inputs, wanted='all')
  np.testing.assert_allclose(loss, z['out.loss_over_denom'], rtol=1e-5)
  for name in ('ot_logits', 'ot_hidden'):
    np.testing.assert_allclose(metrics[name], z[f'out.{name}'], rtol=1e-5)
  d_hidden, d_head, d_extra = gradients
  cross.assert_near(d_hidden[:, :-1], z['grad.loss.student_hidden'])
  cross.assert_near(d_head, z['grad.loss.student_head'])
  for name in ('ot', 'salience'):
    for part, ours in (('w', 'kernel'), ('b', 'bias')):
      want = z[f'grad.loss.{name}_{part}'].T
      cross.assert_near(d_extra[name][ours], want)


@pytest.mark.parametrize('name', ['mcw_primal_a', 'mcw_primal_f_alpha10'])
def test_reference_with_sinkhorn(name, monkeypatch):
  z, meta, objective, inputs = recorded(name)
  monkeypatch.setattr(mcw, '_RELEASED_EPSILON', 1 / meta['sinkhorn_alpha'])
  assert_as_recorded(z, objective, inputs, monkeypatch)


@pytest.mark.parametrize('branch', ['logits', 'hidden'])
@pytest.mark.parametrize('name', ['mcw_primal_a', 'mcw_primal_f_alpha10'])
def test_reference_gradients_of_transport_alone(name, branch, monkeypatch):
  """Too small beside the others to be seen in their sum."""
  z, meta, objective, inputs = recorded(name)
  monkeypatch.setattr(mcw, '_RELEASED_EPSILON', 1 / meta['sinkhorn_alpha'])
  off = {'ce': 0.0, 'kd': 0.0, 'ot_logits': 0.0, 'ot_hidden': 0.0}
  weights = off | {f'ot_{branch}': float(z['out.denom'])}
  objective = dataclasses.replace(objective, **weights)
  (loss, _), gradients = cross.run(objective, *inputs, wanted='all')
  np.testing.assert_allclose(loss, z[f'out.ot_{branch}'], rtol=1e-5)
  d_hidden, d_head, d_extra = gradients
  found = {
    'student_hidden': d_hidden[:, :-1],
    'student_head': d_head,
    'ot_w': d_extra['ot']['kernel'].T,
    'ot_b': d_extra['ot']['bias'],
    'salience_w': d_extra['salience']['kernel'].T,
  }
  for name, got in found.items():
    if f'grad.ot_{branch}.{name}' in z:
      cross.assert_near(got, z[f'grad.ot_{branch}.{name}'])


@pytest.mark.parametrize('name', ['mcw_semidual_a', 'mcw_semidual_c_inner0'])
def test_reference_with_a_potential(name, monkeypatch):
  z, meta, objective, (*inputs, own) = recorded(
    name, solver='semi_dual', ce=0.5, ot_logits=10.0, ot_hidden=10.0
  )
  monkeypatch.setattr(mcw, '_ASCENTS', meta['inner_iters'])
  critic = {
    branch: {
      part: {
        'kernel': jnp.asarray(z[f'in.phi_{branch}.{part}_w'].T),
        'bias': jnp.asarray(z[f'in.phi_{branch}.{part}_b']),
      }
      for part in ('context', 'token', 'combine')
    }
    for branch in ('logits', 'hidden')
  }
  own = own.replace(critic=critic, memory={})
  assert_as_recorded(z, objective, (*inputs, own), monkeypatch)


def test_by_default_a_text_with_itself_costs_little_and_padding_nothing():
  """Entropy makes up for what the plan spreads, but for its own share."""
  _, _, objective, (student, _, batch, own) = recorded('mcw_primal_a')
  D = student.hidden_BTD.shape[2]
  same = {'kernel': jnp.eye(D), 'bias': jnp.zeros(D)}
  own = own.replace(
    extra={
      't2s': same,
      's2t': same,
      'ot': same,
      'salience': own.extra['salience'],
      'query': {'kernel': jnp.eye(2 * D), 'bias': jnp.zeros(2 * D)},
    }
  )
  objective = dataclasses.replace(objective, reference=False, iterations=300)
  batch = Batch(batch.student, batch.student)

  def run(pad):
    def padded(x, value=0):
      more = ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)
      return np.pad(np.asarray(x), more, constant_values=value)

    model = student.replace(hidden_BTD=padded(student.hidden_BTD, 3.0))
    wide = jax.tree.map(padded, batch)
    return cross.run(objective, model, model, wide, own)

  (loss, metrics), gradient = run(0)
  for name in ('ot_logits', 'ot_hidden'):
    # The plan of a text onto itself, each token staying, costs eps log N.
    assert 0 < metrics[name] < 0.1 * np.log(11)
  (padded_loss, _), padded_gradient = run(3)
  np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
  np.testing.assert_allclose(padded_gradient[:, :-3], gradient, atol=1e-6)


def test_weights_of_costs_move_when_they_are_due():
  objective = mcw.MCW(update_every=3)
  own = Own(memory={k: jnp.array(w) for k, w in mcw._WEIGHTS.items()})
  metrics = {
    f'cost_{name}_{i}': jnp.float32(c)
    for name in ('logits', 'hidden')
    for i, c in enumerate((6.0, 0.3, 0.2), start=1)
  }
  for step in (0, 1, 3):
    same = objective.remember(own.replace(step=step), metrics)
    np.testing.assert_array_equal(same['logits'], own.memory['logits'])
  moved = objective.remember(own.replace(step=2), metrics)
  want = [0.01, 0.4825, 0.5075]  # see the recorded updates
  np.testing.assert_allclose(moved['hidden'], want, atol=1e-4)


def test_the_critic_ascends_what_the_loss_has():
  _, _, objective, (student, teacher, batch, own) = recorded(
    'mcw_semidual_c_inner0', solver='semi_dual'
  )
  objective = dataclasses.replace(objective, reference=False, potential=8)
  critic = objective.init(
    jax.random.key(0),
    *(
      DecoderConfig(V, D, 0, 0, 0, 0, 0, False, 0, 0, 0)
      for V, D in (x.head.weight_VD.shape for x in (student, teacher))
    ),
  ).critic
  batch = batch.replace(totals=objective.count(batch))

  def descended(critic):
    now = own.replace(critic=critic, memory={})
    return objective.critic_loss(student, teacher, batch, now, None)[0]

  @jax.jit
  def metrics(critic):
    now = own.replace(critic=critic, memory={})
    return objective.loss(student, teacher, batch, now, None)[1]

  gradient = jax.jit(jax.grad(descended))(critic)
  better = jax.tree.map(lambda p, d: p - 0.02 * d, critic, gradient)
  before, after = metrics(critic), metrics(better)
  total = [x['ot_logits'] + x['ot_hidden'] for x in (before, after)]
  np.testing.assert_allclose(descended(critic), -total[0], rtol=1e-5)
  assert total[1] > total[0] + 1e-4


def test_what_the_reference_would_not_read_is_refused():
  with pytest.raises(UserError, match='has its own epsilon; leave out epsilon'):
    mcw.MCW(reference=True, epsilon=0.01)
  mcw.MCW(reference=True, epsilon=0.01, solver='semi_dual')
