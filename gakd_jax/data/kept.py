"""What is kept of a teacher, from files into batches; see `teacher_cache`."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from gakd_jax.data import store

# log of a mass that is none: finite in fp16, and exp of it is 0.
NOTHING = -1e4


@dataclasses.dataclass(frozen=True)
class Kept:
  """Arrays {name: [positions, ...]} of each text, its last positions.

  shards: of each `size` texts, {name: [positions of all, ...]}.
  lengths: [N], positions of each text.
  starts: [N], where each text begins in its shard; None: where the one before
    it ends.
  draws: None; or of ids that were sampled, how many. A shard has an entry for
    each id that was drawn at a position, and its `ends` [positions]; a text,
    `share` of them, and as many ids as draws, of which the last have no share.
  """

  shards: list
  lengths: np.ndarray
  size: int
  draws: int | None = None
  starts: np.ndarray | None = None

  def __getitem__(self, i):
    shard = self.shards[i // self.size]
    first = i // self.size * self.size
    if self.starts is None:
      start = int(self.lengths[first:i].sum())
    else:
      start = int(self.starts[i])
    these = slice(start, start + self.lengths[i])
    if self.draws:
      return _dense(shard, these, self.draws)
    return {name: x[these] for name, x in shard.items()}

  def put(self, batch, bins, lengths):
    """The batch with what is kept of it, 0 where nothing is predicted.

    bins: which texts are in each row of the batch. lengths: of all texts,
      as the teacher reads them.
    """
    B, T = batch.teacher.ids_BT.shape
    found = {
      name: np.zeros((B, T, *x.shape[1:]), x.dtype)
      for name, x in self[0].items()
    }
    for b, documents in enumerate(bins):
      end = 0
      for i in documents:
        end += lengths[i]
        for name, x in self[i].items():
          found[name][b, end - self.lengths[i] : end] = x
    if 'hidden' in found:
      return batch.replace(cached={'teacher_hidden': found['hidden']})
    return batch.replace(known=found)


def load(root, key, make):
  """A shard {name: [positions of all, ...]}, of files; see `store.load`.

  make: () -> such arrays, of any dtype.
  """

  def write(add):
    arrays = make()
    # numpy has no name for bfloat16.
    add(**{k: x.view(f'u{x.dtype.itemsize}') for k, x in arrays.items()})
    return {
      'dtypes': {k: x.dtype.name for k, x in arrays.items()},
      'shapes': {k: x.shape[1:] for k, x in arrays.items()},
    }

  arrays, facts = store.load(root, key, write)
  return {
    k: x.view(jnp.dtype(facts['dtypes'][k])).reshape(-1, *facts['shapes'][k])
    for k, x in arrays.items()
  }


def ragged(ids, log_probs):
  """A shard, of [positions, n] draws, those of one id side by side."""
  ids_Pn, log_probs_Pn = ids, log_probs
  is_first_Pn = np.ones(ids_Pn.shape, bool)
  is_first_Pn[:, 1:] = ids_Pn[:, 1:] != ids_Pn[:, :-1]
  at = np.flatnonzero(is_first_Pn)
  return {
    'ids': ids_Pn[is_first_Pn],
    'log_probs': log_probs_Pn[is_first_Pn],
    'drawn': np.diff(at, append=is_first_Pn.size).astype(np.uint16),
    'ends': np.cumsum(is_first_Pn.sum(axis=1)),
  }


def _dense(shard, these, draws):
  """{name: [positions, draws]} of some positions of a `ragged` shard."""
  start = shard['ends'][these.start - 1] if these.start else 0
  ends = shard['ends'][these]
  numbers = np.diff(ends, prepend=start)
  is_there = np.arange(draws) < numbers[:, None]
  entries = slice(int(start), int(start) + int(numbers.sum()))
  found = {}
  for name in ('ids', 'log_probs'):
    found[name] = np.zeros(is_there.shape, shard[name].dtype)
    found[name][is_there] = shard[name][entries]
  found['share'] = np.zeros(is_there.shape, np.float32)
  found['share'][is_there] = shard['drawn'][entries] / np.float32(draws)
  return found
