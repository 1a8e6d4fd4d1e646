"""What holds for every objective; a new one is a line in `OBJECTIVES`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import objectives
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models import DecoderConfig, pair, transformer
from gakd_jax.objectives.kld import DIVERGENCES

B, T, D, V = 4, 12, 16, 50

CRITIC = {'width': 8, 'layers': 1, 'heads': 2, 'ff_width': 16}
GAKD = dict(name='gakd', kd=0.7, g=0.1, warmup_steps=0, critic=CRITIC)

# id: (arguments of `objectives.make`, the share of CE in the loss where student
# and teacher agree, what is left of the rest (None: that depends), divergences
# among metrics).
OBJECTIVES = {
  'sft': (dict(name='sft'), 1.0, 0.0, ()),
  **{
    d: (dict(name='kld', divergence=d, kd=0.7, temperature=1.5), 0.3, 0.0, (d,))
    for d in DIVERGENCES
  },
  'gakd': (GAKD, 0.3, 0.1 * np.log(2), ('reverse_kl',)),
  'gakd_g_0': (GAKD | {'g': 0.0}, 0.3, 0.0, ('reverse_kl',)),
  # Those for two tokenizers, with one.
  'uld': (dict(name='uld', top=20), 1.0, 0.0, ('uld',)),
  'overlap': (dict(name='overlap', kd=0.7), 0.3, 0.0, ('forward_kl',)),
  'dskd_cma': (dict(name='dskd_cma', kd=0.7), 0.3, None, ()),
  'gold': (dict(name='gold', kd=0.7), 0.3, 0.0, ('gold',)),
  'alm': (dict(name='alm', kd=0.7, difference='abs'), 0.3, 0.0, ('alm',)),
  'multilevel_ot': (
    dict(name='multilevel_ot', weight=1.5, top=20),
    1.0,
    0.0,
    ('l1', 'kl', 'transport'),
  ),
  'mcw': (dict(name='mcw', kd=0.7, top=9), 1.0, None, ()),
  'dskd_v2': (dict(name='dskd_v2', kd=0.7), 0.3, None, ()),
  'xtoken': (
    dict(name='xtoken', kd=0.7, temperature=1.5),
    0.3,
    0.0,
    ('xtoken',),
  ),
  'mined': (dict(name='mined', kd=0.7), 0.3, 0.0, ('mined',)),
}
# What is tested by default: one of a kind, that compiles quickly.
_SHORT = ('sft', 'reverse_kl', 'gakd', 'uld', 'overlap', 'mined')
ALL = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in _SHORT))
    for name in OBJECTIVES
  ],
)


class Toy(nnx.Module):
  """A model of one layer, quick to compile: tokens see their predecessors."""

  def __init__(self):
    rngs = np.random.default_rng(0)
    self.embedding, self.head_weight = (
      nnx.Param(jnp.asarray(rngs.standard_normal((V, D), np.float32)))
      for _ in range(2)
    )

  @property
  def head(self):
    return transformer.Head(self.head_weight[...])

  def __call__(self, ids_BT, segments_BT, **_):
    dtype = self.head_weight[...].dtype
    x_BTD = jnp.cumsum(self.embedding[...][ids_BT].astype(dtype), axis=1)
    x_BTD *= (segments_BT > 0)[:, :, None]
    return transformer.Outputs(jnp.tanh(x_BTD), self.head)


DEFINITION = transformer.split(Toy())[0]


def _params(seed):
  rng = np.random.default_rng(seed)
  return {
    'embedding': jnp.asarray(0.7 * rng.standard_normal((V, D), np.float32)),
    'head_weight': jnp.asarray(0.5 * rng.standard_normal((V, D), np.float32)),
  }


def _batch(ids_seed=0, rows=range(B)):
  """Responses of 9, 2, 0 and 5 tokens; other rows than these are empty."""
  at_BT = np.broadcast_to(np.arange(T), (B, T))
  start_B1, end_B1 = np.array([[3, 4, 6, 1], [12, 6, 6, 6]])[:, :, None]
  mask_BT = (at_BT >= start_B1) & (at_BT < end_B1)
  ids_BT = np.random.default_rng(0).integers(0, V, (B, T), np.int32)
  rubbish_BT = np.random.default_rng(ids_seed).integers(0, V, (B, T), np.int32)
  ids_BT = np.where(at_BT < end_B1, ids_BT, rubbish_BT)
  segments_BT = (at_BT < end_B1).astype(np.int32)
  kept_B1 = np.isin(np.arange(B), list(rows))[:, None]
  tokens = Tokens(ids_BT, segments_BT * kept_B1, mask_BT & kept_B1)
  return Batch(
    student=tokens,
    teacher=tokens,
    totals={'tokens': np.float32(mask_BT.sum())},
  )


def _prompts():
  """`_batch` without a response token."""
  batch = _batch()
  none_BT = np.zeros_like(batch.student.mask_BT)
  tokens = dataclasses.replace(batch.student, mask_BT=none_BT)
  return dataclasses.replace(batch, student=tokens, teacher=tokens)


def _with_opinion(x):
  """A fresh critic's parameter, or something where it starts at zero."""
  return jnp.where(x == 0, jnp.cos(jnp.arange(x.size)).reshape(x.shape), x)


def _parts(settings, dtype='float32', chunk=5, tokens=V):
  """The objective, its `Own`, and teacher -> `Models`."""
  objective = objectives.make(**settings, head_chunk=chunk)
  shape = DecoderConfig(V, D, 0, 0, 0, 0, 0, False, 0, 0, 0)
  own = objective.init(jax.random.key(0), shape, shape)
  own = own.replace(critic=jax.tree.map(_with_opinion, own.critic), step=0)

  def both(teacher):
    return pair.Models(
      DEFINITION,
      DEFINITION if objective.needs_teacher else None,
      shape,
      shape,
      {'teacher': teacher},
      jnp.dtype(dtype),
      vocabs=(tokens, tokens),
    )

  return objective, own, both


@functools.cache
def _loss(name, dtype='float32', chunk=5, tokens=V):
  """loss(student, teacher, batch) -> scalar, metrics; not compiled."""
  objective, own, both = _parts(OBJECTIVES[name][0], dtype, chunk, tokens)

  def run(student, teacher, batch):
    batch = batch.replace(totals=objective.count(_batch()))
    outputs = both(teacher).outputs(student, batch)
    total, metrics = 0, {}
    for term in objective.terms().values():
      loss, new = term(*outputs, batch, own, jax.random.key(0))
      total, metrics = total + loss, metrics | new
    return total, metrics

  return run


@functools.cache
def _compiled(name, **settings):
  """-> (loss, metrics), student's gradient."""
  return jax.jit(jax.value_and_grad(_loss(name, **settings), has_aux=True))


@functools.cache
def _usual(name):
  return _compiled(name)(_params(0), _params(1), _batch())


def _assert_close(got, want, rtol=1e-5, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    got,
    want,
  )


def _cross_entropy(params, batch):
  """Of the response in nats, in numpy."""
  tokens, total = batch.student, 0.0
  for ids_T, mask_T in zip(tokens.ids_BT, tokens.mask_BT, strict=True):
    hidden_TD = np.tanh(np.cumsum(params['embedding'][ids_T], axis=0))
    z_TV = np.asarray(hidden_TD @ params['head_weight'].T, np.float64)
    log_q_TV = z_TV - np.log(np.exp(z_TV).sum(axis=1, keepdims=True))
    for t in np.nonzero(mask_T)[0]:
      total -= log_q_TV[t - 1, ids_T[t]]
  return total / batch.totals['tokens']


@ALL
def test_a_student_like_its_teacher_has_the_known_loss(name):
  _, ce_share, rest, zeros = OBJECTIVES[name]
  params, batch = _params(0), _batch()
  (loss, metrics), _ = _compiled(name)(params, params, batch)
  ce = _cross_entropy(params, batch)
  np.testing.assert_allclose(metrics['ce'], ce, rtol=1e-5)
  if rest is not None:
    np.testing.assert_allclose(loss, ce_share * ce + rest, rtol=1e-5)
  assert set(metrics) >= {'ce', *zeros}
  for zero in zeros:
    np.testing.assert_allclose(metrics[zero], 0, atol=1e-6)
    assert _usual(name)[0][1][zero] > 0.01


@ALL
def test_padding_does_not_matter(name):
  got = _compiled(name)(_params(0), _params(1), _batch(ids_seed=1))
  _assert_close(got, _usual(name), atol=0)


@ALL
def test_rows_beyond_the_tokenizer_do_not_matter(name):
  """Nor are they ever likely; as if the head had no such rows."""
  n = V - 3
  f = _compiled(name, tokens=n)
  student, teacher, batch = _params(0), _params(1), _batch()
  below = dataclasses.replace(batch.student, ids_BT=batch.student.ids_BT % n)
  batch = dataclasses.replace(batch, student=below, teacher=below)
  got = f(student, teacher, batch)
  (_, metrics), gradient = got
  np.testing.assert_array_equal(gradient['head_weight'][n:], 0)
  cut = student | {'head_weight': student['head_weight'][:n]}
  np.testing.assert_allclose(
    metrics['ce'], _cross_entropy(cut, batch), rtol=1e-5
  )
  # So that what must not count would be seen.
  large = [
    x | {'head_weight': x['head_weight'].at[n:].multiply(16)}
    for x in (student, teacher)
  ]
  _assert_close(f(*large, batch), got, atol=0)


@ALL
def test_the_student_gets_a_gradient(name):
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(_usual(name)[1]))


@ALL
def test_without_jit_and_in_one_chunk_it_is_the_same(name):
  """Gradients of all sizes of chunk: see the tests of the head."""
  got = _loss(name, chunk=1000)(_params(0), _params(1), _batch())
  _assert_close(got, _usual(name)[0])


@ALL
def test_microbatches_sum_to_the_whole(name):
  """Rows 0 and 3, then 1 and 2: 14 and 2 response tokens of 16."""
  f = _compiled(name)
  parts = [
    f(_params(0), _params(1), _batch(rows=rows)) for rows in ((0, 3), (1, 2))
  ]
  assert parts[0][0][0] != parts[1][0][0]
  _assert_close(jax.tree.map(jnp.add, *parts), _usual(name))


@ALL
def test_rows_without_a_response_contribute_nothing(name):
  """As those of a microbatch may be, beside others of the same step."""
  for batch in (_batch(rows=()), _prompts()):
    (loss, metrics), gradient = _compiled(name)(_params(0), _params(1), batch)
    assert all(np.all(np.isfinite(x)) for x in (loss, *metrics.values()))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    if name != 'mcw':  # It compares prompts as well.
      assert loss == 0
      jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


@pytest.mark.parametrize(
  'settings',
  [
    GAKD,
    *(
      pytest.param(settings, marks=pytest.mark.slow)
      for settings in (
        GAKD | {'kind': 'gan'},
        GAKD | {'kind': 'wgan'},
        GAKD | {'input': 'probs'},
        GAKD | {'reference': True},
        dict(name='mcw', top=9, solver='semi_dual', potential=8),
      )
    ),
  ],
  ids=['rgan', 'gan', 'wgan', 'probs', 'reference', 'mcw'],
)
def test_rows_without_a_response_teach_a_critic_nothing(settings):
  objective, own, both = _parts(settings)

  @jax.jit
  def run(student, teacher, batch):
    batch = batch.replace(totals=objective.count(_batch()))
    outputs = both(teacher).outputs(student, batch)

    def loss(critic):
      return objective.critic_loss(
        *outputs, batch, own.replace(critic=critic), jax.random.key(0)
      )

    return jax.value_and_grad(loss, has_aux=True)(own.critic)

  for batch in (_batch(rows=()), _prompts()):
    (loss, metrics), gradient = run(_params(0), _params(1), batch)
    assert all(np.all(np.isfinite(x)) for x in (loss, *metrics.values()))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    if settings['name'] != 'mcw':
      assert loss == 0
      jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)
  _, gradient = run(_params(0), _params(1), _batch())
  assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-4


@ALL
def test_bf16_is_near_fp32(name):
  """8 bits in hidden states and heads: 0.4 % of logits of a few nats."""
  f = _compiled(name, dtype='bfloat16')
  (loss, metrics), gradients = f(_params(0), _params(1), _batch())
  (want_loss, want_metrics), want_gradients = _usual(name)
  assert loss.dtype == jnp.float32
  _assert_close(loss, want_loss, rtol=0.02)
  for term in ('ce', *OBJECTIVES[name][-1]):
    _assert_close(metrics[term], want_metrics[term], rtol=0.02)
  for g, w in zip(
    *map(jax.tree.leaves, (gradients, want_gradients)), strict=True
  ):
    assert g.dtype == jnp.float32
    off = np.linalg.norm(g - w) / np.linalg.norm(w)
    assert 0 < off < 0.03


@pytest.mark.parametrize(
  ('settings', 'like'),
  [
    (
      {'name': 'overlap', 'divergence': 'reverse_kl'},
      {'divergence': 'reverse_kl', 'scale_by_t2': False},
    ),
    ({'name': 'mined'}, {'divergence': 'forward_kl', 'scale_by_t2': False}),
    pytest.param(
      {'name': 'gold', 'beta': 0.3},
      {'divergence': 'jsd', 'beta': 0.3, 'scale_by_t2': False},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'name': 'xtoken'}, {'divergence': 'forward_kl'}, marks=pytest.mark.slow
    ),
  ],
  ids=lambda x: x.get('name', ''),
)
def test_with_one_tokenizer_it_is_kld(settings, like):
  """As their docstrings say, whatever the settings; gradients, too."""

  def run(**settings):
    settings = {'kd': 0.7, 'temperature': 1.5} | settings
    objective, own, both = _parts(settings)

    @jax.jit
    @jax.value_and_grad
    def loss(student):
      batch = _batch().replace(totals=objective.count(_batch()))
      outputs = both(_params(1)).outputs(student, batch)
      return objective.loss(*outputs, batch, own, None)[0]

    return loss(_params(0))

  _assert_close(run(**settings), run(name='kld', **like), rtol=1e-4)
