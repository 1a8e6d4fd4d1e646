"""Attention in blocks and by kernels: what the plain formula gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.models import scores, splash

B, N, K, H, SCALE = 2, 4, 2, 8, 0.5
FORMS = {
  'whole': scores.whole,
  'chunked': scores.chunked,
  'splash': lambda *args: splash.attention(*args, interpret=True),
}


def _arrays(T, dtype='float32'):
  """Queries, keys, values, and segments: three and padding; padding alone."""
  rng = np.random.default_rng(0)
  q_k_v = [
    jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K)
  ]
  segments_BT = np.zeros((B, T), np.int32)
  for i, end in enumerate((0.95, 0.8, 0.3)):
    segments_BT[0, : round(end * T)] = 3 - i
  segments_BT[1, : T // 2] = 1
  return q_k_v, segments_BT


def _formula(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, scale, cap):
  """Token by token in double precision."""
  y_BTNH = np.zeros(q_BTNH.shape)
  for b, t, n in np.ndindex(q_BTNH.shape[:3]):
    seen = [
      s
      for s in range(t + 1)
      if segments_BT[b, s] == segments_BT[b, t]
      and (window is None or t - s < window)
    ]
    k_SH, v_SH = (
      np.asarray(x, np.float64)[b, seen, n // (N // K)]
      for x in (k_BTKH, v_BTKH)
    )
    score_S = scale * (k_SH @ np.asarray(q_BTNH, np.float64)[b, t, n])
    score_S = score_S if cap is None else cap * np.tanh(score_S / cap)
    weight_S = np.exp(score_S - score_S.max())
    y_BTNH[b, t, n] = weight_S @ v_SH / weight_S.sum()
  return y_BTNH


def _derivatives(form, q_k_v, segments_BT, window, cap, order=2):
  """The value of a scalar of what is no padding, its gradient, that of this."""
  mask_BT11 = jnp.asarray(segments_BT > 0)[:, :, None, None]
  segments_BT = jnp.asarray(segments_BT)

  def value(q_k_v):
    y = form(*q_k_v, segments_BT, window, SCALE, cap).astype(jnp.float32)
    return jnp.sum(jnp.where(mask_BT11, jnp.sin(y), 0))

  def penalty(q_k_v):
    gradient = jax.grad(value)(q_k_v)
    return sum(jnp.sum(jnp.square(d.astype(jnp.float32))) for d in gradient)

  functions = [value, jax.grad(value), jax.grad(penalty)][: order + 1]
  return jax.jit(lambda q_k_v: [f(q_k_v) for f in functions])(q_k_v)


def _assert_close(got, want, share):
  """Up to a share of the largest entry of each array."""
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())


# Lengths: of one block; of blocks that are not full; of several groups.
@pytest.mark.parametrize(
  ('form', 'T'),
  [('whole', 40), ('chunked', 40), ('chunked', 150), ('splash', 40)],
)
@pytest.mark.parametrize(('window', 'cap'), [(None, None), (9, 2.0)])
def test_every_form_is_the_formula(form, T, window, cap):
  q_k_v, segments_BT = _arrays(T)
  got = FORMS[form](*q_k_v, jnp.asarray(segments_BT), window, SCALE, cap)
  want = _formula(*q_k_v, segments_BT, window, SCALE, cap)
  is_token_BT = segments_BT > 0
  _assert_close(got[is_token_BT], want[is_token_BT], 2e-6)


@pytest.mark.parametrize(
  ('form', 'order'),
  [
    ('whole', 2),
    ('chunked', 2),
    pytest.param('splash', 1, marks=pytest.mark.slow),
  ],
)
def test_packed_documents_do_not_see_each_other(form, order):
  """Nor feel it in gradients: other documents may change, a row moves."""
  q_k_v, segments_BT = _arrays(200)
  is_two_BT11 = (segments_BT == 2)[:, :, None, None]
  others = [jnp.where(is_two_BT11, x, x[:, ::-1] + 1) for x in q_k_v]
  got, want = (
    _derivatives(
      lambda *args: jnp.where(is_two_BT11, FORMS[form](*args), 0),
      x,
      segments_BT,
      None,
      None,
      order,
    )
    for x in (q_k_v, others)
  )
  assert float(jnp.abs(want[0])) > 0.1
  _assert_close(got[0], want[0], 1e-6)
  for a in jax.tree.leaves(got[1:]):
    assert not np.any(np.asarray(a)[segments_BT != 2])
  _assert_close(got[1:], want[1:], 1e-6)


@pytest.mark.parametrize(
  ('window', 'cap'),
  [
    pytest.param(None, None, marks=pytest.mark.slow),
    (50, 2.0),
    pytest.param('traced', None, marks=pytest.mark.slow),
  ],
)
def test_chunked_derivatives_are_those_of_all_scores(window, cap):
  """T = 300: five blocks in two groups, and what is padded."""
  window = jnp.int32(50) if window == 'traced' else window
  got, want = (
    _derivatives(form, *_arrays(300), window, cap)
    for form in (scores.chunked, scores.whole)
  )
  # Rounding: gradients of keys are sums over queries in another order.
  _assert_close(got, want, 5e-6)


def test_chunked_bfloat16_is_as_good_as_all_scores_in_it():
  """Against fp32; gradients of 8 blocks are not summed in 8 bits."""
  exact, whole, chunked = (
    _derivatives(form, *_arrays(512, dtype), None, None, order=1)[1]
    for form, dtype in (
      (scores.whole, 'float32'),
      (scores.whole, 'bfloat16'),
      (scores.chunked, 'bfloat16'),
    )
  )

  def error(got):
    return [
      float(jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32) - b))))
      for a, b in zip(got, exact, strict=True)
    ]

  for a, b in zip(error(chunked), error(whole), strict=True):
    # Of keys, the part of each block is rounded before it is added.
    assert a < 1.2 * b


@pytest.mark.parametrize(('window', 'cap'), [(None, None), (50, 2.0)])
def test_splash_gradients_are_those_of_all_scores(window, cap):
  got, want = (
    _derivatives(FORMS[form], *_arrays(200), window, cap, order=1)
    for form in ('splash', 'whole')
  )
  _assert_close(got, want, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize('order', [1, 2])
def test_chunked_memory_grows_with_the_length(order):
  """By the compiler's count: four times the tokens, not 16 times it."""

  def temporary(form, T):
    shapes = [jax.ShapeDtypeStruct((1, T, n, H), 'float32') for n in (N, K, K)]
    segments_BT = np.ones((1, T), np.int32)

    def last(*q_k_v):
      return _derivatives(form, q_k_v, segments_BT, None, None, order)[-1]

    compiled = jax.jit(last).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(scores.chunked, 4096) < 4.1 * temporary(scores.chunked, 1024)
  assert temporary(scores.whole, 1024) > 3.5 * temporary(scores.whole, 512)


@pytest.mark.parametrize('rows', [2, 3])
def test_second_derivatives_through_recomputed_layers(rows):
  """As a critic's penalty has them; as many rows as a group has blocks, or more."""
  rng = np.random.default_rng(0)
  T = 2 * scores.BLOCK
  q_k_v = [
    jnp.asarray(rng.standard_normal((rows, T, n, H)), 'float32')
    for n in (N, K, K)
  ]
  segments_BT = jnp.asarray(rng.integers(1, 3, (rows, T)).cumsum(1) // 40 + 1)

  def gradient(form):
    def layers(q_k_v):
      @jax.checkpoint
      def layer(x, _):
        q, k, v = q_k_v
        return x + form(q + x, k, v, segments_BT, None, SCALE), None

      x, _ = jax.lax.scan(layer, jnp.zeros_like(q_k_v[0]), length=2)
      return jnp.sum(jnp.sin(x))

    def penalty(q_k_v):
      return sum(jnp.sum(d * d) for d in jax.grad(layers)(q_k_v))

    return jax.jit(jax.grad(penalty))(q_k_v)

  for a, b in zip(
    gradient(scores.chunked), gradient(scores.whole), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
