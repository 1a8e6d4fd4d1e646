"""The vocabulary in tiles: losses and gradients are those of it as a whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import divergences, head, head_tiles

B, T, V = 3, 5, 50
WIDTHS = 8, 12
CAPS = (None, None), (3.0, 5.0)


def _arrays():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  hiddens = [normal(B, T, d) for d in WIDTHS]
  return hiddens, [normal(V, d) for d in WIDTHS]


def _targets():
  rng = np.random.default_rng(1)
  weights_BT = rng.random((B, T), np.float32)
  return rng.integers(0, 41, (B, T)), jnp.asarray(
    weights_BT * (weights_BT > 0.3)
  )


def _id_loss(log_probs, target_N, first=0):
  log_q_NV, log_p_NV = log_probs
  ce_N = divergences.cross_entropy(log_q_NV, target_N - first)
  jsd_N = divergences.jsd(log_p_NV, log_q_NV, 0.3)
  kl_N = divergences.reverse_kl(log_p_NV, log_q_NV)
  return ce_N + 2 * kl_N + jsd_N, {'ce': ce_N, 'jsd': jsd_N}


def _token_loss(logits, target_N):
  return _id_loss([*map(jax.nn.log_softmax, logits)], target_N)


def _run(kind, caps, valid):
  """((loss, metrics), gradients of all arrays), tokens in chunks of 4."""

  def loss(hiddens, heads):
    outputs = tuple(
      Outputs(h, Head(w, cap, valid))
      for h, w, cap in zip(hiddens, heads, caps, strict=True)
    )
    if kind == 'ids':
      return head.sum_over_ids(_id_loss, outputs, *_targets(), chunk=4)
    return head.weighted_sum(_token_loss, outputs, *_targets(), chunk=4)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
    *_arrays()
  )


@functools.cache
def _whole(caps, valid):
  """By autodiff, of all logits at once."""
  targets_BT, weights_BT = _targets()

  def loss(hiddens, heads):
    logits = [
      Head(w, cap, valid)(h.reshape(-1, h.shape[-1]))
      for h, w, cap in zip(hiddens, heads, caps, strict=True)
    ]
    sums = _token_loss(logits, targets_BT.reshape(-1))
    return jax.tree.map(lambda x: jnp.vdot(weights_BT.reshape(-1), x), sums)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*_arrays())


# Tiles that divide 50 ids, that leave a rest, and one of all.
@pytest.mark.parametrize(
  'size', [10, pytest.param(16, marks=pytest.mark.slow), 50]
)
@pytest.mark.parametrize(
  ('kind', 'caps', 'valid'),
  [
    ('ids', CAPS[0], None),
    ('ids', CAPS[1], 41),
    ('logits', CAPS[0], None),
    ('logits', CAPS[1], 41),
  ],
)
def test_tiles_change_neither_loss_nor_gradients(
  monkeypatch, kind, caps, valid, size
):
  monkeypatch.setattr(head_tiles, '_CPU_TILE', size)
  got, want = _run(kind, caps, valid), _whole(caps, valid)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
    got,
    want,
  )
  assert all(np.abs(g).max() > 1e-2 for g in jax.tree.leaves(want[1]))


@pytest.mark.parametrize('V', [6, 7])
def test_models_of_unlike_vocabularies_have_tiles_of_their_own(monkeypatch, V):
  """A loss of logits may read them: here 7 ids, and 6 or 7, in tiles of 4."""
  hiddens, heads = _arrays()
  heads = [heads[0][:7], heads[1][:V]]
  targets_BT, weights_BT = _targets()

  def token_loss(logits, _):
    return sum(jnp.sum(jnp.sin(z), axis=1) for z in logits), {}

  def loss(hiddens, heads):
    outputs = tuple(map(Outputs, hiddens, map(Head, heads)))
    return head.weighted_sum(
      token_loss, outputs, targets_BT, weights_BT, chunk=4
    )[0]

  def direct(hiddens, heads):
    logits = [h @ w.T for h, w in zip(hiddens, heads, strict=True)]
    return jnp.vdot(weights_BT, sum(jnp.sin(z).sum(-1) for z in logits))

  monkeypatch.setattr(head_tiles, '_CPU_TILE', 4)
  got, want = (
    jax.grad(f, argnums=(0, 1))(hiddens, heads) for f in (loss, direct)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    got,
    want,
  )


def _sizes(monkeypatch, size, kind):
  """Elements of a step's temporary memory."""
  monkeypatch.setattr(head_tiles, '_CPU_TILE', size)
  shape, D, V, n = jax.ShapeDtypeStruct, 8, 16384, 64
  targets_BT = jnp.zeros((1, n), int)

  def loss(hidden, head_VD, t_hidden):
    outputs = tuple(
      Outputs(h, Head(w)) for h, w in ((hidden, head_VD), (t_hidden, head_VD))
    )
    args = outputs, targets_BT, jnp.ones((1, n))
    if kind == 'ids':
      return head.sum_over_ids(_id_loss, *args, chunk=n)[0]
    return head.weighted_sum(_token_loss, *args, chunk=n)[0]

  f = jax.jit(jax.grad(loss, argnums=(0, 1)))
  hidden = shape((1, n, D), 'float32')
  compiled = f.lower(hidden, shape((V, D), 'float32'), hidden).compile()
  return compiled.memory_analysis().temp_size_in_bytes / (4 * n * V)


def test_beside_the_logits_nothing_of_a_chunk_is_whole(monkeypatch):
  """In units of a chunk's logits: those of both models, and the head's sum."""
  assert _sizes(monkeypatch, 256, 'ids') < 2.6
  assert _sizes(monkeypatch, 256, 'logits') > 5
