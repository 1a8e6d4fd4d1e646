"""Which documents share a batch: a pure function of (lengths, seed, epoch).

So the order cannot depend on processes or restarts, and is not stored. Plans
are arrays: of a million documents, some megabytes and a tenth of a second.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
  """Batches of one epoch; the i-th is (T, bins), a bin being indices.

  lengths_S: T of each batch. bins_SB: numbers of bins, -1 for none.
  starts: of bin n, documents[starts[n] : starts[n + 1]] are the indices.
  """

  lengths_S: np.ndarray
  bins_SB: np.ndarray
  starts: np.ndarray
  documents: np.ndarray

  def __len__(self):
    return len(self.lengths_S)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    bins = [
      self.documents[self.starts[n] : self.starts[n + 1]] if n >= 0 else ()
      for n in self.bins_SB[i]
    ]
    return int(self.lengths_S[i]), [np.asarray(b, np.int64) for b in bins]

  @property
  def slots(self):
    """Tokens that all batches could hold."""
    return int(self.lengths_S.sum()) * self.bins_SB.shape[1]

  def tokens(self, lengths):
    """Those of all batches; `lengths` of all documents."""
    until = np.concatenate([[0], np.cumsum(lengths[self.documents])])
    of_bin = np.diff(until[self.starts])
    return int(of_bin[self.bins_SB[self.bins_SB >= 0]].sum())

  @property
  def empty(self):
    """Bins without a document."""
    return int(np.sum(self.bins_SB < 0))


def arrange(
  lengths,
  *,
  batch_size,
  buckets,
  packing=False,
  seed=None,
  epoch=0,
  times=None,
  drop_last=False,
):
  """The Plan of one epoch; every document is in one bin.

  Args:
    lengths: tokens of each document.
    batch_size: bins of a batch; those of the last one may be empty.
    buckets: batch lengths T, ascending.
    packing: fill bins of the last bucket, instead of one document a bin.
    seed: shuffles documents and batches anew each epoch; None keeps the order.
    epoch: counted from 0.
    times: how often an epoch has each document, see `repeat`; None: once.
    drop_last: leave out what does not fill a batch.
  """
  lengths = np.asarray(lengths)
  if lengths.max() > buckets[-1]:
    raise ValueError(f'{lengths.max()} tokens do not fit buckets {buckets}')
  order = np.arange(len(lengths))
  if times is not None:
    order = repeat(times, seed, epoch)
  rng = None if seed is None else np.random.default_rng((seed, epoch))
  if rng is not None:
    rng.shuffle(order)
  if packing:
    starts, documents = _pack(lengths, order, buckets[-1])
    bins = np.arange(len(starts) - 1)
    if rng is not None:
      rng.shuffle(bins)
    bins_SB = _rows(bins, batch_size)
    lengths_S = np.full(len(bins_SB), buckets[-1])
  else:
    starts, documents = np.arange(len(order) + 1), order
    lengths_S, bins_SB = _bucket(lengths[order], buckets, batch_size)
  if drop_last and len(bins_SB) and bins_SB[-1, -1] < 0:
    lengths_S, bins_SB = lengths_S[:-1], bins_SB[:-1]
  if rng is not None:
    shuffled = np.arange(len(bins_SB))
    rng.shuffle(shuffled)
    lengths_S, bins_SB = lengths_S[shuffled], bins_SB[shuffled]
  return Plan(lengths_S, bins_SB, starts, documents)


def repeat(times, seed, epoch):
  """Indices of one epoch: 2.25 is twice, and every fourth time once more.

  times: float of each document, the same for all of a set. Of those that an
  epoch has a part of, the next takes the following part.
  """
  order = [np.repeat(np.arange(len(times)), np.floor(times).astype(int))]
  for value in np.unique(times):
    members = np.flatnonzero(times == value)
    n = round((value % 1) * len(members))
    if n:
      np.random.default_rng((seed or 0, int(members[0]))).shuffle(members)
      order.append(np.roll(members, -n * epoch)[:n])
  return np.sort(np.concatenate(order))


def _bucket(lengths, buckets, batch_size):
  """Full batches of the shortest bucket that fits; the rest moves one up."""
  by_bucket = np.searchsorted(buckets, lengths)
  lengths_S, bins_SB, left = [], [], np.empty(0, int)
  for b, length in enumerate(buckets):
    left = np.concatenate([left, np.flatnonzero(by_bucket == b)])
    n = len(left) // batch_size
    lengths_S += [length] * n
    bins_SB.append(left[: n * batch_size].reshape(n, batch_size))
    left = left[n * batch_size :]
  if len(left):
    lengths_S.append(buckets[by_bucket[left].max()])
    bins_SB.append(_rows(left, batch_size))
  return np.array(lengths_S), np.concatenate(bins_SB)


def _pack(lengths, order, size):
  """Best fit, longest first: (starts, documents) of bins of `size` tokens.

  The number of bins follows from the lengths alone; the order decides which of
  equally long documents go where. Documents of one length are placed at once:
  the tightest bin takes them for as long as it has room, then the next.
  """
  order = order[np.argsort(-lengths[order], kind='stable')]
  by_length, firsts, counts = np.unique(
    -lengths[order], return_index=True, return_counts=True
  )
  bin_of = np.empty(len(order), int)
  bins_by_room = [[] for _ in range(size + 1)]
  roomy = 0  # Bit r is set while there are bins with room r.
  bins = 0
  for length, first, count in zip(
    (-by_length).tolist(), firsts.tolist(), counts.tolist(), strict=True
  ):
    while count:
      fitting = roomy >> length << length
      room = (fitting & -fitting).bit_length() - 1 if fitting else size
      # A document of no token is in the first bin that there is.
      each = room // length if length else count
      needed = -(-count // each)
      if fitting:
        chosen = bins_by_room[room][-needed:][::-1]
        del bins_by_room[room][-needed:]
        if not bins_by_room[room]:
          roomy ^= 1 << room
      else:
        chosen = [*range(bins, bins + needed)]
        bins += needed
      placed = min(count, each * len(chosen))
      bin_of[first : first + placed] = np.repeat(chosen, each)[:placed]
      rest = placed - each * (len(chosen) - 1)  # In the last of them.
      for some, n in ((chosen[:-1], each), (chosen[-1:], rest)):
        bins_by_room[room - n * length] += some
        if some:
          roomy |= 1 << (room - n * length)
      first, count = first + placed, count - placed
  documents = order[np.argsort(bin_of, kind='stable')]
  starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])
  return starts, documents


def _rows(items, size):
  """[n, size] of items, the last row filled up with -1."""
  rows = np.full(-(-len(items) // size) * size, -1)
  rows[: len(items)] = items
  return rows.reshape(-1, size)
