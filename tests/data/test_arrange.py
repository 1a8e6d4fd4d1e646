import collections
import itertools

import numpy as np
import pytest

from gakd_jax.data import arrange

BUCKETS = (8, 16, 32)


def lengths(n=101, seed=0):
  return np.random.default_rng(seed).integers(2, 33, n).tolist()


def listed(lengths, **options):
  """[(T, [indices of each bin])] of a plan."""
  return [
    (length, [b.tolist() for b in bins])
    for length, bins in arrange.arrange(lengths, **options)
  ]


def plan(**options):
  options = {'batch_size': 4, 'buckets': BUCKETS, 'seed': 1} | options
  return listed(lengths(), **options)


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('seed', [None, 1])
def test_arrange_loses_and_repeats_nothing(packing, seed):
  batches = plan(packing=packing, seed=seed)
  assert all(len(bins) == 4 for _, bins in batches)
  indices = [i for _, bins in batches for bin_ in bins for i in bin_]
  assert sorted(indices) == list(range(101))
  for length, bins in batches:
    assert length in BUCKETS
    assert all(sum(lengths()[i] for i in bin_) <= length for bin_ in bins)
  empty = sum(not bin_ for _, bins in batches for bin_ in bins)
  assert empty < 4


def test_arrange_uses_the_shortest_bucket_that_fits():
  batches = plan()
  singles = [bin_ for _, bins in batches for bin_ in bins if bin_]
  assert all(len(bin_) == 1 for bin_ in singles)
  own = collections.Counter(
    next(b for b in BUCKETS if n <= b) for n in lengths()
  )
  used = collections.Counter()
  for length, bins in batches:
    used[length] += len(bins)
  # Only what fills no batch moves up: fewer than a batch from each bucket.
  assert own[8] - 4 < used[8] <= own[8]
  assert own[16] - 4 < used[16] <= own[16] + 3


def test_arrange_of_a_few_short_examples_stays_short():
  assert listed([3, 5], batch_size=4, buckets=BUCKETS) == [
    (8, [[0], [1], [], []])
  ]


def test_arrange_without_seed_keeps_the_order():
  batches = listed([9, 3, 30, 4, 12, 5], batch_size=2, buckets=BUCKETS)
  assert batches == [(8, [[1], [3]]), (16, [[5], [0]]), (32, [[4], [2]])]
  assert plan(seed=None) == plan(seed=None, epoch=3)


def test_arrange_is_a_function_of_seed_and_epoch():
  assert plan(epoch=3) == plan(epoch=3)
  plans = [plan(), plan(epoch=1), plan(seed=2)]
  assert all(a != b for a, b in itertools.combinations(plans, 2))


@pytest.mark.parametrize('packing', [False, True])
def test_arrange_has_the_same_length_in_every_epoch(packing):
  assert len({len(plan(packing=packing, epoch=e)) for e in range(20)}) == 1


def test_arrange_shuffles_the_order_of_buckets():
  order = [length for length, _ in plan()]
  assert order != sorted(order)


def test_packing_fills_bins():
  batches = plan(packing=True)
  bins = [bin_ for _, bins in batches for bin_ in bins if bin_]
  least = -(-sum(lengths()) // 32)
  assert len(bins) <= 1.05 * least + 1
  # The first epochs pack other examples together.
  assert {frozenset(b) for b in bins} != {
    frozenset(b) for _, bs in plan(packing=True, epoch=1) for b in bs if b
  }


def test_arrange_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match='33 tokens do not fit'):
    arrange.arrange([33], batch_size=1, buckets=BUCKETS)


@pytest.mark.parametrize('seed', [None, 5])
@pytest.mark.parametrize('n', [1, 7, 300])
def test_packing_is_best_fit_of_the_longest_first(n, seed):
  """Placed all of a length at once, as if each were placed by itself."""
  sizes = lengths(n, seed=n)
  order = np.arange(n)
  if seed is not None:
    np.random.default_rng((seed, 0)).shuffle(order)
  bins = []
  for i in sorted(order.tolist(), key=lambda i: -sizes[i]):
    fitting = [b for b in bins if sum(sizes[j] for j in b) + sizes[i] <= 32]
    if not fitting:
      bins.append([])
    fullest = max(
      fitting, key=lambda b: sum(sizes[j] for j in b), default=bins[-1]
    )
    fullest.append(i)
  found = listed(sizes, batch_size=4, buckets=(32,), packing=True, seed=seed)

  def full(bins):
    return sorted(sum(sizes[i] for i in b) for b in bins)

  assert full(b for _, some in found for b in some if b) == full(bins)


def test_texts_without_a_token_are_packed_too():
  ((_, bins),) = listed([0, 3, 0, 4], batch_size=1, buckets=(8,), packing=True)
  assert sorted(bins[0]) == [0, 1, 2, 3]


def test_a_set_is_seen_as_often_as_its_weight_says():
  """2.25 times, 1 and 0.5 of it: the part moves on from epoch to epoch."""
  times = np.repeat([2.25, 1.0, 0.5], [40, 10, 30])
  seen = np.zeros(80, int)
  for epoch in range(4):
    batches = listed(
      [4] * 80, batch_size=8, buckets=(8,), seed=1, epoch=epoch, times=times
    )
    order = [i for _, bins in batches for b in bins for i in b]
    assert len(order) == 90 + 10 + 15
    counts = np.bincount(order, minlength=80)
    assert set(counts[:40]) == {2, 3}
    assert set(counts[40:50]) == {1}
    assert set(counts[50:]) == {0, 1}
    seen += counts
  assert seen.tolist() == [9] * 40 + [4] * 10 + [2] * 30


@pytest.mark.parametrize('packing', [False, True])
def test_the_last_batch_is_dropped_by_choice(packing):
  options = {'batch_size': 4, 'buckets': BUCKETS, 'seed': 1, 'packing': packing}
  whole = arrange.arrange(lengths(), **options)
  assert 0 < whole.empty < 4
  kept = arrange.arrange(lengths(), drop_last=True, **options)
  assert len(kept) == len(whole) - 1
  assert kept.empty == 0
  assert kept.slots == kept.lengths_S.sum() * 4
  # What fills its batches has no last one to drop.
  assert len(arrange.arrange([20] * 8, drop_last=True, **options)) == 2


def test_packed_bins_share_a_batch_at_random():
  """They are made of the longest first: neighbours are alike."""
  made = arrange.arrange(
    lengths(), batch_size=4, buckets=BUCKETS, packing=True, seed=1
  )
  assert np.mean(np.diff(made.bins_SB) == 1) < 0.5
