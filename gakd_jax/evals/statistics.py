"""Is one model better than another, or was it luck of the test set?"""

import math

import numpy as np

from gakd_jax import results


def over_seeds(values):
  """What results.json says of {seed: value}: 'mean', 'std', 'by_seed'.

  One seed has no deviation.
  """
  mean, std = results.spread([*values.values()])
  by_seed = {str(seed): value for seed, value in values.items()}
  known = {} if std is None else {'std': std}
  return {'mean': mean} | known | {'by_seed': by_seed}


def all_over_seeds(metrics):
  """The same for every metric of {seed: {metric: value}}."""
  first, *_ = metrics.values()
  return {
    key: over_seeds({seed: found[key] for seed, found in metrics.items()})
    for key in first
  }


def standard_error(values):
  """Of the mean over rows; NaN of a single row."""
  if len(values) < 2:
    return math.nan
  return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def pass_at(right, samples):
  """{k: pass@k} of a prompt, for 1 < k <= samples; k doubles up to `samples`.

  The chance that one of k samples is right, without bias: drawn from those
  that there are, without replacement (arXiv 2107.03374, eq. 1).

  Args:
    right: how many of the samples are.
    samples: how many there are.
  """
  doubled = (2**i for i in range(1, samples.bit_length()))
  return {
    k: 1 - math.comb(samples - right, k) / math.comb(samples, k)
    for k in sorted({*doubled, samples} - {1})
  }


def paired_bootstrap(a_N, b_N, *, samples=10_000, seed=0):
  """Paired bootstrap over test rows (Koehn 2004, "Statistical significance
  tests for machine translation evaluation").

  Args:
    a_N, b_N: scores of two models on the same rows; means over seeds, if there
      are several.
    samples: how many test sets to draw, with replacement, from the rows.
    seed: the same seed gives the same result.

  Returns:
    'difference' of the means, a - b; 'low' and 'high', its 95 % interval
    (percentiles); 'p', two-sided: how often a difference of means drawn around
    0 is as large as the one found. NaN if a score is no finite number.

  Raises:
    ValueError: if the models were not scored on the same rows.
  """
  a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
  if a_N.shape != b_N.shape or not a_N.size:
    raise ValueError(f'scores of {a_N.size} and {b_N.size} rows are no pairs')
  d_N = a_N - b_N
  if not np.isfinite(d_N).all():
    return dict.fromkeys(('difference', 'low', 'high', 'p'), math.nan)
  rng = np.random.default_rng(seed)
  n = len(d_N)
  means = np.concatenate(
    [
      d_N[rng.integers(n, size=(k, n))].mean(axis=1)
      for k in _split(samples, max(1, 10**7 // n))
    ]
  )
  difference = d_N.mean()
  low, high = np.percentile(means, [2.5, 97.5])
  extreme = np.abs(means - difference) >= abs(difference) - 1e-12
  # No sample can show a p of 0 (Davison and Hinkley 1997, eq. 4.11).
  p = (1 + extreme.sum()) / (1 + samples)
  if not d_N.std():
    # Nothing to draw from: the odds of so many rows with one sign.
    p = max(p, 2.0 ** (1 - len(d_N)))
  return {
    'difference': float(difference),
    'low': float(low),
    'high': float(high),
    'p': float(p),
  }


def _split(total, size):
  return [min(size, total - i) for i in range(0, total, size)]
