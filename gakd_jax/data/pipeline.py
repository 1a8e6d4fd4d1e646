"""From rows to batches, as a pure function of (rows, seed, epoch, step).

`arrange` decides which rows share a batch; a batch is then looked up by its
step alone. So the order cannot depend on workers, and the whole state of the
iterator is one integer: a run resumes with any number of workers or hosts.
"""

import collections
import dataclasses
import functools

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gakd_jax import UserError
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow, Row

_CHUNK = 4096  # Rows tokenised at once: bounds memory, keeps all cores busy.


@flax.struct.dataclass
class Tokens:
  """Rows of token ids; each holds one document, or several if packed.

  ids_BT: int32. segments_BT: int32, 0 on padding, else 1, 2, ... by document.
  mask_BT: bool, True where ids_BT is itself a response token (EOS included),
  so that its loss is at the position before; never on a document's first token.
  """

  ids_BT: np.ndarray
  segments_BT: np.ndarray
  mask_BT: np.ndarray

  @property
  def predicts_BT(self):
    """True where the *next* token is of a response: there its loss stands."""
    return jnp.roll(self.mask_BT, -1, axis=1).at[:, -1].set(False)

  @property
  def response_segments_BT(self):
    """The document of each position that `predicts_BT`, elsewhere 0."""
    return jnp.where(self.predicts_BT, self.segments_BT, 0)


@flax.struct.dataclass
class Batch:
  """One text as both models read it.

  student, teacher: the same arrays where the tokenizers agree.
  align: what relates differing ones, by row.
  cached: of a teacher that need not run, 'teacher_hidden' [B, R, E].
  totals: of the whole optimizer step, see `objectives.base.Objective.count`.
  rows_B: int32, each row's (first) place in the data; -1 for none.
  written_B: bool, the rows that a model wrote in the run, and not the data;
    None where nobody writes.
  """

  student: Tokens
  teacher: Tokens
  align: dict = flax.struct.field(default_factory=dict)
  cached: dict = flax.struct.field(default_factory=dict)
  totals: dict = flax.struct.field(default_factory=dict)
  rows_B: np.ndarray | None = None
  written_B: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Example:
  """A row as int32 ids; `truncated`: the response lost its end and its EOS."""

  prompt_ids: np.ndarray
  response_ids: np.ndarray
  row: Row
  truncated: bool = False

  @property
  def length(self):
    return len(self.prompt_ids) + len(self.response_ids)


def encode_rows(
  rows,
  tokenizer,
  *,
  template,
  max_length,
  max_prompt_length,
  on_bad_row='skip',
  thinking='refuse',
):
  """Returns (examples of at most max_length tokens, Counter of bad rows).

  A row with a longer prompt than max_prompt_length is bad; a response that does
  not fit in what the prompt leaves is cut. Raises UserError if no row is left,
  and at the first bad row if on_bad_row is 'fail'.
  """
  if not 0 < max_prompt_length < max_length:
    raise UserError(
      f'max_prompt_length is {max_prompt_length} and max_length {max_length}: '
      'the prompt must leave room for a response'
    )
  examples, bad = [], collections.Counter()

  def refuse(error):
    if on_bad_row == 'fail':
      raise error
    bad[error.reason] += 1

  for start in range(0, len(rows), _CHUNK):
    some = rows[start : start + _CHUNK]
    encoded = tokenizer_lib.encode_batch(tokenizer, some, template, thinking)
    for row, found in zip(some, encoded, strict=True):
      if isinstance(found, BadRow):
        refuse(found)
        continue
      prompt, response = found
      if len(prompt) > max_prompt_length:
        refuse(BadRow(row.where, 'prompt too long'))
        continue
      room = max_length - len(prompt)
      examples.append(
        Example(
          np.array(prompt, np.int32),
          np.array(response[:room], np.int32),
          row,
          truncated=len(response) > room,
        )
      )
  if not examples:
    reasons = ', '.join(f'{n} {reason}' for reason, n in bad.most_common())
    raise UserError(
      f'none of {len(rows)} rows is left ({reasons}); max_prompt_length is '
      f'{max_prompt_length} and the template {template!r}'
    )
  return examples, bad


def default_buckets(max_length):
  """A quarter, a half and all of max_length: each is one more compilation."""
  lengths = {-(-max_length // part) for part in (4, 2)}
  short = sorted(8 * -(-n // 8) for n in lengths if n >= 32)
  return (*(n for n in short if n < max_length), max_length)


def arrange(lengths, *, batch_size, buckets, packing=False, seed=None, epoch=0):
  """Which examples share a batch, for one epoch; every example is in one bin.

  lengths: tokens of each example. buckets: batch lengths T, ascending.
  packing: fill bins of the last bucket, instead of one example a bin.
  seed: shuffles rows and batches anew each epoch; None keeps their order.
  Returns a list of (T, batch_size bins), a bin being a list of indices; the
  last bins may be empty. Its length is the same in every epoch.
  """
  if max(lengths) > buckets[-1]:
    raise ValueError(f'{max(lengths)} tokens do not fit buckets {buckets}')
  order = np.arange(len(lengths))
  rng = None if seed is None else np.random.default_rng((seed, epoch))
  if rng is not None:
    rng.shuffle(order)
  if packing:
    bins = _pack(lengths, order, buckets[-1])
    if rng is not None:
      rng.shuffle(bins)
    batches = [(buckets[-1], group) for group in _split(bins, batch_size)]
  else:
    batches = _bucket(lengths, order, buckets, batch_size)
  if rng is not None:
    rng.shuffle(batches)
  return [
    (length, bins + [[] for _ in range(batch_size - len(bins))])
    for length, bins in batches
  ]


def _bucket(lengths, order, buckets, batch_size):
  """Full batches of the shortest bucket that fits; the rest moves one up."""
  by_bucket = np.searchsorted(buckets, np.asarray(lengths)[order])
  batches, left = [], []
  for b, length in enumerate(buckets):
    left += [[i] for i in order[by_bucket == b].tolist()]
    full = len(left) - len(left) % batch_size
    batches += [(length, bins) for bins in _split(left[:full], batch_size)]
    left = left[full:]
  if left:
    longest = max(lengths[i] for (i,) in left)
    batches.append((buckets[np.searchsorted(buckets, longest)], left))
  return batches


def _pack(lengths, order, size):
  """Best fit, longest first: bins of indices with at most `size` tokens.

  The number of bins follows from the lengths alone, hence is the same in every
  epoch; the order decides which of equally long examples go where.
  """
  bins_by_room = [[] for _ in range(size + 1)]
  bins = []
  roomy = 0  # Bit r is set while there are bins with room r.
  for i in sorted(order.tolist(), key=lambda i: -lengths[i]):
    fitting = roomy >> lengths[i] << lengths[i]
    if fitting:
      room = (fitting & -fitting).bit_length() - 1  # The lowest bit.
      chosen = bins_by_room[room].pop()
      if not bins_by_room[room]:
        roomy ^= 1 << room
    else:
      room, chosen = size, []
      bins.append(chosen)
    chosen.append(i)
    bins_by_room[room - lengths[i]].append(chosen)
    roomy |= 1 << (room - lengths[i])
  return bins


def _split(items, size):
  return [items[i : i + size] for i in range(0, len(items), size)]


def collate(bins, length, pad_id):
  """Tokens [len(bins), length] of bins of (prompt ids, response ids)."""
  shape = (len(bins), length)
  ids_BT = np.full(shape, pad_id, np.int32)
  segments_BT = np.zeros(shape, np.int32)
  mask_BT = np.zeros(shape, bool)
  for b, documents in enumerate(bins):
    start = 0
    for segment, (prompt, response) in enumerate(documents, start=1):
      middle, end = start + len(prompt), start + len(prompt) + len(response)
      ids_BT[b, start:middle] = prompt
      ids_BT[b, middle:end] = response
      segments_BT[b, start:end] = segment
      # Nothing stands before a document's first token to predict it from.
      mask_BT[b, max(middle, start + 1) : end] = True
      start = end
  return Tokens(ids_BT=ids_BT, segments_BT=segments_BT, mask_BT=mask_BT)


class Source:
  """Batches by step: what Grain's workers read from. Holds ids, not text."""

  def __init__(self, examples, arrange_epoch, epochs, pad_id, rows, room=0):
    self._documents = [(e.prompt_ids, e.response_ids) for e in examples]
    self._arrange_epoch = arrange_epoch
    self._epochs = epochs
    self._pad_id = pad_id
    self._room = room
    self._rows = rows  # The part of a global batch that is this process's.
    self._arranged = 0, arrange_epoch(epoch=0)
    self.steps_per_epoch = len(self._arranged[1])
    slots = sum((n + room) * len(bins) for n, bins in self._arranged[1])
    self.padding = 1 - sum(e.length for e in examples) / slots

  def __len__(self):
    # Endless: longer than any run, and still an index to Grain.
    epochs = 2**32 if self._epochs is None else self._epochs
    return epochs * self.steps_per_epoch

  def __getitem__(self, step):
    epoch, i = divmod(int(step), self.steps_per_epoch)
    arranged = self._arranged
    if arranged[0] != epoch:
      self._arranged = arranged = epoch, self._arrange_epoch(epoch=epoch)
    length, bins = arranged[1][i]
    bins = bins[self._rows]
    documents = [[self._documents[j] for j in b] for b in bins]
    tokens = collate(documents, length + self._room, self._pad_id)
    return tokens, np.array([b[0] if b else -1 for b in bins], np.int32)


class Batches(grain.DatasetIterator):
  """Iterator over Batch; its state is the step, whatever made the batches.

  steps_per_epoch: batches until every example was seen. padding: the share of
  all positions that no example fills.

  Grain's own state differs with the number of workers and cannot be restored
  under another, so the workers are started anew at the step instead.
  """

  def __init__(self, source, workers):
    super().__init__()
    self.steps_per_epoch = source.steps_per_epoch
    self.padding = source.padding
    self._source = source
    self._workers = workers
    self._step = 0
    self._running = None

  def __next__(self):
    if self._running is None:
      self._running = self._start()
    # Copied: workers send views of shared memory, which is theirs to free.
    tokens, rows_B = jax.tree.map(np.array, next(self._running))
    self._step += 1
    return Batch(student=tokens, teacher=tokens, rows_B=rows_B)

  def get_state(self):
    return {'step': self._step}

  def set_state(self, state):
    self._stop()
    self._step = int(state['step'])

  def close(self):
    """Ends the workers; safe to call twice."""
    self._stop()
    super().close()

  def _start(self):
    steps = grain.MapDataset.source(self._source)[self._step :]
    steps = steps.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if self._workers:
      # Grain reads absl flags for its workers, also where no binary has any.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      steps = steps.mp_prefetch(
        grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
      )
    return iter(steps)

  def _stop(self):
    if self._running is not None:
      self._running.close()
      self._running = None


def batches(
  examples,
  *,
  batch_size,
  max_length,
  pad_id,
  buckets=None,
  packing=False,
  room=0,
  seed=None,
  epochs=None,
  workers=0,
  process_index=0,
  process_count=1,
):
  """Returns the Batches of some epochs (None: endless) as numpy arrays.

  batch_size: rows of the global batch, of which this process gets its slice.
  buckets: batch lengths, ascending to max_length (None: default_buckets).
  room: tokens that every batch has beyond its bucket, for responses that are
    still to be written: rows are then bucketed by their prompts, or by as much
    of a response as does not fit there.
  packing, seed: see `arrange`.
  workers: processes that build batches; 0 for none.
  Raises UserError if these do not fit together.
  """
  buckets = tuple(buckets or default_buckets(max_length))
  if buckets[-1] != max_length or list(buckets) != sorted(set(buckets)):
    less = f' less the {room} tokens that a model writes' if room else ''
    raise UserError(
      f'buckets are {buckets}: they must ascend to max_length{less}, '
      f'{max_length}'
    )
  if packing and room:
    raise UserError(
      'packed rows have no room for responses that are still to be written; '
      'set config.data.packing to False'
    )
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'batch_size is {batch_size}: it must be a multiple of the '
      f'{process_count} processes'
    )
  if not examples:
    raise UserError('there are no examples to make batches of')
  arrange_epoch = functools.partial(
    arrange,
    [max(len(e.prompt_ids), e.length - room) for e in examples],
    batch_size=batch_size,
    buckets=buckets,
    packing=packing,
    seed=seed,
  )
  share = batch_size // process_count
  rows = slice(process_index * share, (process_index + 1) * share)
  source = Source(examples, arrange_epoch, epochs, pad_id, rows, room)
  return Batches(source, workers)


def stats(examples):
  """What a report says of the data, beside the padding of its Batches."""
  return {
    'examples': len(examples),
    'truncated': sum(e.truncated for e in examples),
    'prompt_tokens': sum(len(e.prompt_ids) for e in examples),
    'response_tokens': sum(len(e.response_ids) for e in examples),
  }
