"""The paired bootstrap against closed forms and invented cases."""

import itertools
import math

import numpy as np
import pytest

from gakd_jax.evals import statistics


def test_the_interval_is_that_of_a_normal_mean():
  rng = np.random.default_rng(1)
  n = 400
  a_N = rng.normal(50, 20, n)
  b_N = a_N - rng.normal(1.5, 10, n)
  result = statistics.paired_bootstrap(a_N, b_N)
  d_N = a_N - b_N
  error = d_N.std() / math.sqrt(n)
  assert result['difference'] == pytest.approx(d_N.mean())
  assert result['low'] == pytest.approx(d_N.mean() - 1.96 * error, abs=0.05)
  assert result['high'] == pytest.approx(d_N.mean() + 1.96 * error, abs=0.05)
  z = d_N.mean() / error
  assert result['p'] == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)


def test_rows_are_paired():
  """A small but steady difference is seen through the spread of the rows."""
  rng = np.random.default_rng(2)
  a_N = rng.uniform(0, 100, 200)
  b_N = a_N - rng.uniform(0.1, 0.3, 200)
  assert statistics.paired_bootstrap(a_N, b_N)['p'] < 0.001
  assert statistics.paired_bootstrap(a_N, rng.permutation(b_N))['p'] > 0.1


def test_p_is_uniform_where_there_is_no_difference():
  rng = np.random.default_rng(3)
  p = [
    statistics.paired_bootstrap(
      *rng.normal(size=(2, 100)), samples=500, seed=i
    )['p']
    for i in range(300)
  ]
  assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.05)
  assert np.mean(p) == pytest.approx(0.5, abs=0.06)


def test_ends():
  same = statistics.paired_bootstrap([1, 2, 3], [1, 2, 3])
  assert same == {'difference': 0, 'low': 0, 'high': 0, 'p': 1}
  forward = statistics.paired_bootstrap([3, 2, 5], [1, 2, 3])
  back = statistics.paired_bootstrap([1, 2, 3], [3, 2, 5])
  assert forward['difference'] == -back['difference']
  assert forward['p'] == back['p']
  assert forward == statistics.paired_bootstrap([3, 2, 5], [1, 2, 3])
  never_zero = statistics.paired_bootstrap([9] * 50, [1] * 50, samples=100)
  assert never_zero['p'] == 1 / 101
  assert statistics.paired_bootstrap([100], [0])['p'] == 1
  assert statistics.paired_bootstrap([100] * 3, [0] * 3)['p'] == 0.25
  with pytest.raises(ValueError, match='3 and 2 rows'):
    statistics.paired_bootstrap([1, 2, 3], [1, 2])


def test_the_error_of_a_mean():
  # Of n rows of which a share p is right: sqrt(p (1 - p) / (n - 1)).
  error = statistics.standard_error([100.0] * 3 + [0.0] * 7)
  assert error == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 9))
  assert math.isnan(statistics.standard_error([1.0]))


@pytest.mark.parametrize('right', range(6))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right):
  samples = [1] * right + [0] * (5 - right)
  drawn = {
    k: np.mean([any(x) for x in itertools.combinations(samples, k)])
    for k in (2, 4, 5)
  }
  assert statistics.pass_at(right, 5) == pytest.approx(drawn)


def test_k_doubles_up_to_all_samples():
  assert [*statistics.pass_at(1, 2)] == [2]
  assert [*statistics.pass_at(1, 8)] == [2, 4, 8]
  assert [*statistics.pass_at(1, 10)] == [2, 4, 8, 10]


def test_many_rows_are_drawn_in_parts(monkeypatch):
  rng = np.random.default_rng(4)
  a_N, b_N = rng.normal(size=(2, 2 * 10**6))
  result = statistics.paired_bootstrap(a_N, b_N, samples=12)
  assert result['low'] <= result['difference'] <= result['high']
