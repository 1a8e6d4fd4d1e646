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
