import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gakd_jax import sampler


def softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def top_k_reference(logits, k):
  lowest = np.sort(logits)[::-1][: min(k, len(logits))][-1]
  return np.where(logits >= lowest, logits, -np.inf)


def top_p_reference(logits, p):
  p_sorted = np.sort(softmax(logits.astype(np.float64)))[::-1]
  n = 1 + np.searchsorted(np.cumsum(p_sorted), p)
  return top_k_reference(logits, n)


def random_logits():
  """From nearly uniform to one-hot."""
  scale = np.array([[0.01], [1.0], [3.0], [1e4]])
  x = np.random.default_rng(0).normal(size=(4, 500)) * scale
  return x.astype(np.float32)


@pytest.mark.parametrize('k', [1, 2, 25, 499, 500, 1000])
def test_top_k_keeps_what_a_sort_keeps(k):
  x = random_logits()
  np.testing.assert_array_equal(
    sampler.top_k_filter(x, k), [top_k_reference(row, k) for row in x]
  )


@pytest.mark.parametrize('p', [0.0, 1e-6, 0.1, 0.5, 0.95, 0.999])
def test_top_p_keeps_what_a_sort_keeps(p):
  x = random_logits()
  np.testing.assert_array_equal(
    sampler.top_p_filter(x, p), [top_p_reference(row, p) for row in x]
  )


@pytest.mark.parametrize(
  ('filtered', 'row', 'kept'),
  [
    (lambda x: sampler.top_k_filter(x, 2), [1, 3, 1, 0], [0, 1, 2]),
    (lambda x: sampler.top_k_filter(x, 3), [-1, -3, -2, -4], [0, 1, 2]),
    (lambda x: sampler.top_k_filter(x, 3), [0, -np.inf, 1, 2], [0, 2, 3]),
    (lambda x: sampler.top_p_filter(x, 0.0), [1, 3, 2, 0], [1]),
    (lambda x: sampler.top_p_filter(x, 0.0), [3, 3, 2, 0], [0, 1]),
    (lambda x: sampler.top_p_filter(x, 0.4), [2, 2, 2, 2], [0, 1, 2, 3]),
    (lambda x: sampler.top_p_filter(x, 0.25), [0, -9, 0, 0], [0, 2, 3]),
    (lambda x: sampler.top_p_filter(x, 0.9), [9, -np.inf, 9, 0], [0, 2]),
    # exp(-200) is 0 in fp32: order does not come from probabilities.
    (lambda x: sampler.top_k_filter(x, 2), [0, -300, -200, -400], [0, 2]),
  ],
)
def test_filters_at_ties_and_edges(filtered, row, kept):
  x = np.array([row], np.float32)
  expected = np.where(np.isin(np.arange(4), kept), x, -np.inf)
  np.testing.assert_array_equal(filtered(x), expected)


def filter_logits(x, **settings):
  ids = np.zeros((len(x), 1), np.int32)
  x = sampler.Sampler(**settings).filter(x, ids, np.zeros(len(x), np.int32))
  return np.asarray(x)


def test_temperature_then_top_k_then_top_p():
  x = random_logits()
  expected = [top_p_reference(top_k_reference(r / 4.0, 20), 0.7) for r in x]
  result = filter_logits(x, temperature=4.0, top_k=20, top_p=0.7)
  np.testing.assert_array_equal(result, expected)
  swapped = [top_k_reference(top_p_reference(r / 4.0, 0.7), 20) for r in x]
  assert not np.array_equal(expected, swapped), 'the order must matter here'


def test_what_is_not_asked_for_is_off():
  x = random_logits()
  np.testing.assert_array_equal(filter_logits(x), x)
  assert filter_logits(jnp.array(x, jnp.bfloat16)).dtype == np.float32


@pytest.mark.parametrize('n', [1, 2, 3, 4, 12])
def test_repeated_ngrams_are_blocked_as_by_brute_force(n):
  rng = np.random.default_rng(n)
  B, S, V = 40, 11, 5
  ids = rng.integers(0, V, (B, S)).astype(np.int32)
  length = rng.integers(0, S + 1, B).astype(np.int32)
  x = rng.normal(size=(B, V)).astype(np.float32)
  expected = x.copy()
  for b in range(B):
    tokens = ids[b, : length[b]].tolist()
    seen = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
    for v in range(V):
      if tuple([*tokens, v][-n:]) in seen:
        expected[b, v] = -np.inf
  if n < 4:
    assert np.isinf(expected).any()
  np.testing.assert_array_equal(
    sampler.block_repeated_ngrams(jnp.array(x), ids, length, n), expected
  )


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'temperature': 0.5, 'top_k': 6},
    {'top_p': 0.8, 'valid_vocab': 9},
  ],
)
def test_draws_follow_the_filtered_distribution(settings):
  n = 20000
  x = np.random.default_rng(1).normal(0, 1, (1, 12)).astype(np.float32)
  filtered = filter_logits(x, **settings)
  keys = jax.random.split(jax.random.key(3), n)
  tokens = sampler.Sampler(**settings).draw(
    jnp.broadcast_to(filtered, (n, 12)), keys
  )
  counts = np.bincount(tokens, minlength=12)
  # The distribution, written again without the code under test.
  x = x[0].astype(np.float64) / settings.get('temperature', 1.0)
  x[settings.get('valid_vocab', 12) :] = -np.inf
  if 'top_k' in settings:
    x = top_k_reference(x, settings['top_k'])
  if 'top_p' in settings:
    x = top_p_reference(x, settings['top_p'])
  p = softmax(x)
  assert counts[p == 0].sum() == 0
  assert scipy.stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 0.01


@pytest.mark.parametrize('V', [1, 5, 128, 300, 1024])
def test_argmax_is_the_first_of_the_highest(V):
  x = np.random.default_rng(V).integers(0, 4, (50, V)).astype(np.float32)
  x[0], x[1] = -np.inf, np.nan
  np.testing.assert_array_equal(sampler.argmax(x), np.argmax(x, axis=1))


LAST = np.float32(1 - 2**-24)  # the highest number below 1


@pytest.mark.parametrize('V', [1, 5, 128, 300, 1000])
def test_a_number_falls_into_the_share_of_its_token(V):
  """Among the cumulative probabilities in id order, in float64."""
  n = 2000
  rng = np.random.default_rng(V)
  x = rng.normal(0, 3, V).astype(np.float32)
  x[rng.random(V) < 0.3] = -np.inf
  x[rng.integers(V)] = 1.0
  u = np.append(rng.random(n - 2, np.float32), [0, LAST]).astype(np.float32)
  tokens = sampler.inverse_cdf(np.broadcast_to(x, (n, V)), u)
  assert tokens.dtype == np.int32
  cdf = np.cumsum(softmax(x.astype(np.float64)))
  below = np.append(0, cdf)[np.asarray(tokens)]
  assert np.all(below - 1e-6 <= u)
  assert np.all(u <= cdf[np.asarray(tokens)] + 1e-6)
  drawn = np.nonzero(np.isfinite(x))[0]
  assert set(np.asarray(tokens).tolist()) <= set(drawn.tolist())
  assert tokens[-2] == drawn[0]
  np.testing.assert_allclose(cdf[tokens[-1]], 1, atol=1e-6)


@pytest.mark.parametrize('only', [0, 127, 128, 299])
def test_what_alone_is_likely_is_drawn_whatever_the_number(only):
  x = np.full((4, 300), -np.inf, np.float32)
  x[:, only] = -1e4
  u = np.array([0, 1e-30, 0.5, LAST], np.float32)
  assert np.all(sampler.inverse_cdf(x, u) == only)


def test_what_cannot_be_is_never_drawn_however_sums_are_rounded(monkeypatch):
  """A sum in a tree may grow from one id to the next without its weight."""
  tree = functools.partial(jax.lax.associative_scan, jnp.add)
  monkeypatch.setattr(jnp, 'cumsum', tree)
  B, V = 1000, 300
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, V)).astype(np.float32)
  x[rng.random((B, V)) < 0.9] = -np.inf
  x[:, 0] = 0
  cdf = np.cumsum(softmax(x.astype(np.float64)), axis=1)
  draw = jax.jit(sampler.inverse_cdf)
  for _ in range(20):  # Numbers where the sums of two ids meet.
    u = (
      cdf[np.arange(B), rng.integers(0, V, B)] + rng.integers(-2, 3, B) / 2**23
    )
    tokens = draw(x, np.clip(u, 0, LAST).astype(np.float32))
    assert np.all(np.isfinite(x[np.arange(B), tokens]))


@pytest.mark.parametrize('name', ['skd_blocks_a', 'skd_blocks_c_gamma1'])
def test_draws_are_the_golden_ones(name, shared_dir):
  z = np.load(shared_dir / 'goldens' / f'{name}.npz')
  meta = json.loads(str(z['meta']))
  tempered = {
    'temperature': meta['teacher_temperature'],
    'top_p': meta['teacher_top_p'],
  }
  x = z['in.teacher_logits'].reshape(-1, meta['V'])
  u = z['in.u_teacher'].ravel().astype(np.float32)
  for key, settings in (('plain', {}), ('tempered', tempered)):
    tokens = sampler.inverse_cdf(filter_logits(x, **settings), u)
    want = z[f'mid.teacher_sample_{key}'].ravel()
    if name == 'skd_blocks_a' and key == 'tempered':
      # Five ids tie: there three of them have the mass 0.5, here all stay.
      tokens, want = tokens[1:], want[1:]
    np.testing.assert_array_equal(tokens, want)
