"""Settings of the objectives, and errors that say what to change."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax import UserError, objectives
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives.base import Own
from gakd_jax.objectives.kld import KLD
from gakd_jax.objectives.sft import SFT

T, D, V = 6, 8, 20
IDS_1T = np.array([[3, 7, 1, 19, 0, 4]], np.int32)
MASK_1T = np.array([[False, False, True, True, True, True]])


def _inputs():
  rng = np.random.default_rng(0)
  return [
    (
      jnp.asarray(rng.standard_normal((1, T, D), np.float32)),
      jnp.asarray(rng.standard_normal((V, D), np.float32)),
    )
    for _ in range(2)
  ]


def _run(**settings):
  """The student's loss, metrics, and gradient in its hidden states."""
  tokens = Tokens(IDS_1T, np.ones_like(IDS_1T), MASK_1T)
  batch = Batch(tokens, tokens, totals={'tokens': MASK_1T.sum()})
  (s_hidden, s_head), teacher = _inputs()
  objective = objectives.make(**settings)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(s_hidden):
    student = Outputs(s_hidden, Head(s_head))
    t_outputs = Outputs(teacher[0], Head(teacher[1]))
    return objective.loss(student, t_outputs, batch, Own(), None)

  (value, metrics), gradient = loss(s_hidden)
  return float(value), jax.tree.map(float, metrics), gradient


def _by_hand(temperature=1.0):
  """ce, forward KL and reverse KL of the response, means in float64."""

  def log_softmax(hidden, head, temperature):
    z = np.float64(hidden[0]) @ np.float64(head).T / temperature
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

  student, teacher = _inputs()
  at = np.nonzero(MASK_1T[0])[0]
  log_q1 = log_softmax(*student, 1.0)[at - 1]
  log_q = log_softmax(*student, temperature)[at - 1]
  log_p = log_softmax(*teacher, temperature)[at - 1]
  p, q = np.exp(log_p), np.exp(log_q)
  return (
    -log_q1[np.arange(at.size), IDS_1T[0, at]].mean(),
    (p * (log_p - log_q)).sum(axis=1).mean(),
    (q * (log_q - log_p)).sum(axis=1).mean(),
  )


def test_the_default_is_half_reverse_kl():
  loss, metrics, _ = _run(name='kld')
  ce, _, reverse = _by_hand()
  assert metrics == pytest.approx({'ce': ce, 'reverse_kl': reverse}, rel=1e-5)
  assert loss == pytest.approx(0.5 * ce + 0.5 * reverse, rel=1e-5)


def test_sft_is_cross_entropy_and_needs_no_teacher():
  loss, metrics, _ = _run(name='sft')
  assert metrics == {'ce': loss}
  assert loss == pytest.approx(_by_hand()[0], rel=1e-5)
  assert not SFT.needs_teacher
  assert KLD.needs_teacher


@pytest.mark.parametrize('divergence', ['forward_kl', 'reverse_kl', 'jsd'])
def test_losses_of_speculative_distillation_are_the_golden_ones(
  divergence, shared_dir
):
  """Those of the paper, with its shift, and their gradients."""
  z = np.load(shared_dir / 'goldens' / 'skd_losses_a.npz')
  meta = json.loads(str(z['meta']))
  T, V = meta['sequence_length'], meta['V']
  mask_1T = (np.arange(T) >= meta['prompt_length'])[None]
  ids_1T = np.zeros((1, T), np.int32)
  tokens = Tokens(ids_1T, np.ones_like(ids_1T), mask_1T)
  batch = Batch(tokens, tokens)
  objective = objectives.make('kld', divergence=divergence, kd=1.0)
  batch = batch.replace(totals=objective.count(batch))

  @jax.jit
  @jax.value_and_grad
  def loss(s_logits):  # Hidden states that are logits.
    student, teacher = (
      Outputs(x, Head(jnp.eye(V))) for x in (s_logits, z['in.teacher_logits'])
    )
    return objective.loss(student, teacher, batch, Own(), None)[0]

  value, gradient = loss(z['in.student_logits'])
  name = {'forward_kl': 'kl'}.get(divergence, divergence)
  assert value == pytest.approx(z[f'out.paper.{name}'], rel=1e-5)
  want = z[f'grad.paper.{name}']
  np.testing.assert_allclose(gradient, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('scale_by_t2', [True, False])
def test_temperature_divides_both_logits_and_scales_if_asked(scale_by_t2):
  """CE stays that of the untempered student."""
  loss, metrics, _ = _run(
    name='kld',
    divergence='forward_kl',
    temperature=2.0,
    kd=0.8,
    scale_by_t2=scale_by_t2,
  )
  ce, forward, _ = _by_hand(temperature=2.0)
  forward *= 4 if scale_by_t2 else 1
  assert metrics == pytest.approx({'ce': ce, 'forward_kl': forward}, rel=1e-5)
  assert loss == pytest.approx(0.2 * ce + 0.8 * forward, rel=1e-5)


@pytest.mark.parametrize(('kd', 'of'), [(0.0, 'ce'), (1.0, 'forward_kl')])
def test_kd_at_its_ends_is_one_of_the_two(kd, of):
  loss, metrics, gradient = _run(name='kld', divergence='forward_kl', kd=kd)
  assert loss == pytest.approx(metrics[of], rel=1e-6)
  if of == 'ce':
    np.testing.assert_allclose(gradient, _run(name='sft')[2], rtol=1e-5)


def test_settings_of_a_divergence_reach_it():
  forward, reverse = _by_hand()[1:]

  def value(divergence, **settings):
    return _run(name='kld', divergence=divergence, **settings)[1][divergence]

  assert value('jsd', beta=0) == pytest.approx(forward, rel=1e-5)
  assert value('jsd', beta=1) == pytest.approx(reverse, rel=1e-5)
  assert value('skew_forward', alpha=0) == pytest.approx(forward, rel=1e-5)
  assert value('skew_reverse', alpha=0) == pytest.approx(reverse, rel=1e-5)
  assert value('skew_forward', alpha=1) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'name': 'kdl'}, ["name='kdl'", "did you mean 'kld'?", 'sft']),
    (
      {'name': 'kld', 'divergence': 'reverse_k'},
      ["divergence='reverse_k'", "did you mean 'reverse_kl'?", 'tvd'],
    ),
    ({'name': 'kld', 'divergence': ''}, ["divergence=''"]),
    (
      {'name': 'kld', 'temprature': 2},
      ["no setting 'temprature'", "did you mean 'temperature'?", 'alpha'],
    ),
    ({'name': 'sft', 'kd': 0.5}, ["sft has no setting 'kd'", 'known are none']),
    ({'name': 'kld', 'kd': 1.1}, ['kd=1.1', '0 to 1']),
    ({'name': 'kld', 'kd': -0.1}, ['kd=-0.1', '0 to 1']),
    ({'name': 'kld', 'beta': 2}, ['beta=2', '0 to 1']),
    ({'name': 'kld', 'alpha': -1}, ['alpha=-1', '0 to 1']),
    ({'name': 'kld', 'kd': float('nan')}, ['kd=nan']),
    ({'name': 'kld', 'temperature': 0}, ['temperature=0', 'more than 0']),
    ({'name': 'kld', 'temperature': -2.0}, ['temperature=-2.0', 'more than 0']),
  ],
  ids=str,
)
def test_errors_say_in_one_line_what_to_change(settings, words):
  with pytest.raises(UserError) as error:
    objectives.make(**settings)
  message = str(error.value)
  assert message.startswith('config.objective')
  assert '\n' not in message
  for word in words:
    assert word in message
