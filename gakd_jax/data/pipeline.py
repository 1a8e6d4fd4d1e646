"""From texts to batches, as a pure function of (texts, seed, step).

`arrange` decides which texts share a batch of an epoch; a batch is then looked
up by its step alone. So the whole state of the iterator is one integer, and a
run resumes with any number of hosts. A batch is some slices of ids in memory,
or in a file: workers that would make it ahead of time were slower than none.
"""

import functools
import math

import flax.struct
import jax.numpy as jnp
import numpy as np

from gakd_jax import UserError
from gakd_jax.data import aligned
from gakd_jax.data.arrange import arrange


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
  align: what relates the tokens of differing ones, int32, see `aligned`:
    `pairs_t`, `dtw_t` and `span_s` [B, T], `span_t` [B, U], `path_s`, `path_t`
    and `path_d` [B, cells]; -1 for none. Here positions are those of the whole
    row, as are numbers of pieces.
  cached: of a teacher that need not run, 'teacher_hidden' [B, R, E].
  known: of one that is known by few numbers, these; see `objectives.few`.
  totals: of the whole optimizer step, see `objectives.base.Objective.count`.
  rows_B: int32, each row's (first) place in the data; -1 for none.
  written_B: bool, the rows that a model wrote in the run, and not the data;
    None where nobody writes.
  old_log_BT: log-probabilities that the writer gave to what it wrote, of the
    token after each; None where the method does not ask.
  group: how many rows that follow each other have one prompt.
  """

  student: Tokens
  teacher: Tokens
  align: dict = flax.struct.field(default_factory=dict)
  cached: dict = flax.struct.field(default_factory=dict)
  known: dict = flax.struct.field(default_factory=dict)
  totals: dict = flax.struct.field(default_factory=dict)
  rows_B: np.ndarray | None = None
  written_B: np.ndarray | None = None
  old_log_BT: np.ndarray | None = None
  group: int = flax.struct.field(pytree_node=False, default=1)


def default_buckets(max_length):
  """A quarter, a half and all of max_length: each is one more compilation."""
  lengths = {-(-max_length // part) for part in (4, 2)}
  short = sorted(8 * -(-n // 8) for n in lengths if n >= 32)
  return (*(n for n in short if n < max_length), max_length)


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


def collate_aligned(bins, length, pad_ids, names):
  """A Batch of bins of rows of `aligned.Aligned`.

  pad_ids: of both models. names: of the rows' parts.
  """
  student, teacher = (
    collate([[row[side] for row in b] for b in bins], length, pad_ids[side])
    for side in (0, 1)
  )
  found = {}
  for name in names:
    # Two paths, each at most as long as both texts.
    size = 4 * length if name.startswith('path') else length
    found[name] = np.full((len(bins), size), -1, np.int32)
  for b, rows in enumerate(bins):
    start = [0, 0]
    pieces = 0
    for s, t, parts in rows:
      begin = [start[0] + len(s[0]), start[1] + len(t[0])]
      for name, part in parts.items():
        if name.startswith('path'):  # Of a row that is not packed.
          found[name][b, : len(part)] = part
          continue
        first = begin[name == 'span_t']
        shift = pieces if name.startswith('span') else begin[1]
        if name == 'dtw_t':  # Of tokens that are read: those before.
          first, shift = first - 1, shift - 1
        there = np.where(part >= 0, part + shift, -1)
        found[name][b, first : first + len(part)] = there
      if 'span_s' in parts:
        pieces += 1 + parts['span_s'].max(initial=-1)
      start = [begin[0] + len(s[1]), begin[1] + len(t[1])]
  return Batch(student=student, teacher=teacher, align=found)


def coverage(batch):
  """{'coverage/<part of align>': share of response tokens that it relates}."""
  found = {}
  for name, x_BT in batch.align.items():
    if not name.startswith('path'):  # All of both texts, always.
      side = batch.teacher if name == 'span_t' else batch.student
      n = max(1, np.sum(side.mask_BT))
      found[f'coverage/{name}'] = np.sum(x_BT >= 0) / n
  return found


class Batches:
  """Endless iterator over Batch, or over those of some epochs.

  Its state is the step. steps_per_epoch: of the first. padding: the share of
  all its positions that no text fills. empty: its rows without a text.
  """

  def __init__(self, texts, plan, epochs, pad_id, rows, room, cached):
    self._texts = texts
    self._plan = plan  # epoch -> arrange.Plan
    self._pad_id = pad_id
    self._rows = rows  # Those of a global batch that are this process's.
    self._room = room
    self._cached = cached
    self._epochs = epochs
    self._starts = [0]  # First step of each epoch, as far as is known.
    self.set_state({'step': 0})
    first = plan(0)
    self.steps_per_epoch = len(first)
    self.empty = first.empty
    slots = first.slots + room * first.bins_SB.size
    self.padding = 1 - first.tokens(texts.lengths) / slots

  def __iter__(self):
    return self

  def __next__(self):
    while self._epoch != self._epochs and (
      self._step >= self._first_step(self._epoch + 1)
    ):
      self._epoch += 1
    if self._epoch == self._epochs:
      raise StopIteration
    i = self._step - self._first_step(self._epoch)
    length, bins = self._plan(self._epoch)[i]
    bins = [bins[row] for row in self._rows]
    texts = [[self._texts[i] for i in b] for b in bins]
    length += self._room
    self._step += 1
    rows_B = np.array([b[0] if len(b) else -1 for b in bins], np.int32)
    if isinstance(self._texts, aligned.Aligned):
      names = sorted(self._texts.parts)
      batch = collate_aligned(texts, length, self._pad_id, names)
      lengths = self._texts.teacher.lengths
    else:
      tokens = collate(texts, length, self._pad_id)
      batch = Batch(student=tokens, teacher=tokens)
      lengths = self._texts.lengths
    if self._cached is not None:
      batch = self._cached.put(batch, bins, lengths)
    return batch.replace(rows_B=rows_B)

  def _first_step(self, epoch):
    """Epochs differ in length where weights choose what is packed."""
    while len(self._starts) <= epoch:
      n = len(self._plan(len(self._starts) - 1))
      self._starts.append(self._starts[-1] + n)
    return self._starts[epoch]

  def steps(self, epochs):
    """How many steps some epochs are; there may be a part of one."""
    whole = int(epochs)
    first, end = self._first_step(whole), self._first_step(whole + 1)
    return first + math.ceil((epochs - whole) * (end - first))

  def get_state(self):
    return {'step': self._step}

  def set_state(self, state):
    self._step, self._epoch = int(state['step']), 0


def batches(
  texts,
  *,
  batch_size,
  max_length,
  pad_id,
  buckets=None,
  packing=False,
  room=0,
  seed=None,
  epochs=None,
  weights=None,
  drop_last=False,
  rows=None,
  cached=None,
):
  """Returns the Batches of some epochs (None: endless) as numpy arrays.

  texts: `texts.Texts`, of which none is longer than max_length and room, or
    `aligned.Aligned`, whose two texts of a row stand in buckets of one length.
  pad_id: of the student; of both models if there are two tokenizers.
  batch_size: rows of the global batch.
  rows: indices of those that are made, `sharding.own_rows`; None: all.
  buckets: batch lengths, ascending to max_length (None: default_buckets).
  room: tokens that every batch has beyond its bucket, for responses that are
    still to be written: rows are then bucketed by their prompts, or by as much
    of a response as does not fit there.
  packing, seed, drop_last: see `arrange`.
  weights: how often an epoch has each text of each set; None: once.
  cached: a `kept.Kept` of the texts, of which a batch then has its part; None:
    the teacher reads them.
  Raises UserError if these do not fit together.
  """
  buckets = tuple(buckets or default_buckets(max_length))
  if sorted({*buckets, max_length}) != list(buckets):
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
  if batch_size < 1:
    raise UserError(f'batch_size is {batch_size}: it must be at least 1')
  if not len(texts):
    raise UserError('there are no texts to make batches of')
  lengths = np.maximum(texts.prompts, texts.lengths - room)

  @functools.lru_cache(maxsize=1)
  def plan(epoch):
    return arrange(
      lengths,
      batch_size=batch_size,
      buckets=buckets,
      packing=packing,
      seed=seed,
      epoch=epoch,
      times=None if weights is None else np.asarray(weights)[texts.sets],
      drop_last=drop_last,
    )

  if not len(plan(0)):
    raise UserError(
      f'batch_size is {batch_size}, and an epoch has {len(lengths)} texts: '
      'nothing is left of it without its last batch; set config.data.drop_last '
      'to False'
    )
  if rows is None:
    rows = range(batch_size)
  return Batches(texts, plan, epochs, pad_id, rows, room, cached)
