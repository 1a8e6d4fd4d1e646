"""Is one model better than another, or was it luck of the test set?"""

import numpy as np


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
    0 is as large as the one found.

  Raises:
    ValueError: if the models were not scored on the same rows.
  """
  a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
  if a_N.shape != b_N.shape or not a_N.size:
    raise ValueError(f'scores of {a_N.size} and {b_N.size} rows are no pairs')
  d_N = a_N - b_N
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
