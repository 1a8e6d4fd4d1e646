"""A teacher that is paid for once: its hidden states, kept on disk.

In every epoch a teacher reads the same text again: of a run from 8B to 0.6B
that is most of the work. What methods for one tokenizer ask it about a response
are its last hidden states where that is predicted; logits are a projection of
these away, so that nothing is lost, for a critic neither. They are kept
in the dtype that they were computed in: 8 KB a token of a teacher of width 4096
in bf16.

They lie in `data.store`, in shards of some texts. A shard's key is all that it
was made of: another teacher, dtype, text or order of texts has others. A run
makes the shards that are missing before its first step; interrupted, it goes on
with the next.
"""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax import UserError, log, models, sharding
from gakd_jax.data import pipeline, store
from gakd_jax.data import tokenizer as tokenizer_lib

_SHARD = 256  # Texts, whose hidden states are held at once.
_VERSION = 1  # Of what is in a shard.


@dataclasses.dataclass(frozen=True)
class Cache:
  """Hidden states [positions, E] of each text, from its `first` position on.

  shards: of each `size` texts, [positions of all, E]; in files.
  starts, lengths: [N], of each text, where it begins there, and its positions.
  """

  shards: list
  starts: np.ndarray
  lengths: np.ndarray
  size: int

  def __getitem__(self, i):
    start = self.starts[i]
    return self.shards[i // self.size][start : start + self.lengths[i]]

  def put(self, batch, bins, lengths):
    """The batch with 'teacher_hidden', 0 where nothing is predicted.

    bins: which texts are in each row of the batch. lengths: of all texts.
    """
    shape = *batch.teacher.ids_BT.shape, self.shards[0].shape[1]
    hidden_BTE = np.zeros(shape, self.shards[0].dtype)
    for b, documents in enumerate(bins):
      end = 0
      for i in documents:
        end += lengths[i]
        hidden_BTE[b, end - self.lengths[i] : end] = self[i]
    return batch.replace(cached={'teacher_hidden': hidden_BTE})


def check(config, objective, writer):
  """Refuses a cache that could not stand in for the teacher."""
  if not config.teacher.cache:
    return
  if not objective.needs_teacher:
    raise UserError(
      f'config.teacher.cache: the objective {config.objective.name!r} asks '
      'nothing of a teacher; set it to False'
    )
  if not objective.one_tokenizer:
    raise UserError(
      f'config.teacher.cache: the objective {config.objective.name!r}, for two '
      'tokenizers, may ask for more than what is kept; set it to False'
    )
  if writer.room:
    raise UserError(
      f'config.teacher.cache: with the writer {config.rollout.writer!r} the '
      'teacher reads text that is new in every step; set it to False'
    )
  if jax.process_count() > 1:
    raise UserError(
      'config.teacher.cache: it is read and made by one process; set it to '
      'False on several hosts'
    )


def _first(texts):
  """[N], the first position of each text that predicts a response's token."""
  return np.maximum(texts.prompts, 1) - 1


def _keys(config, texts):
  """Yields the key of each shard."""
  teacher = {
    'version': _VERSION,
    'teacher': models.identity(config.teacher.path),
    'quantize': config.teacher.quantize,
    'dtype': config.teacher.dtype,
    'precision': config.train.precision,
  }
  for start in range(0, len(texts), _SHARD):
    some = texts.take(slice(start, start + _SHARD))
    ids = [x for text in map(some.__getitem__, range(len(some))) for x in text]
    content = np.concatenate([some.prompts, some.lengths, *ids], dtype=np.int32)
    yield teacher | {'texts': hashlib.sha256(content).hexdigest()}


def is_whole(config, texts):
  """Whether there is nothing to make, and no block of a teacher is needed."""
  root = _root(config)
  return all(store.has(root, key) for key in _keys(config, texts))


def load(config, both, texts, mesh):
  """The `Cache` of some texts; makes what is missing.

  Args:
    config: of the run, see configs/base.py.
    both: its `pair.Models`; of the teacher, the weights are needed.
    texts: `texts.Texts`.
    mesh: where the teacher reads them.

  Raises:
    UserError: if a part is damaged and the teacher's blocks are not there.
  """
  c = config
  teacher = dataclasses.replace(
    both, frozen={'teacher': both.frozen['teacher']}
  )
  hidden = jax.jit(lambda teacher, batch: teacher.teacher_hidden(batch))
  lengths = texts.lengths - _first(texts)
  starts = np.zeros(len(texts), np.int64)
  keys = [*_keys(c, texts)]
  shards = []
  dtype = jnp.dtype(c.train.precision)
  with log.Progress(len(keys), description='teacher') as progress:
    for n, key in enumerate(keys):
      these = slice(n * _SHARD, (n + 1) * _SHARD)
      starts[these] = np.cumsum(lengths[these]) - lengths[these]

      def make(add, these=these):
        if not both.teacher_config.layers:
          raise UserError(
            'config.teacher.cache: a part of what was kept is damaged; start '
            'again'
          )
        read = functools.partial(hidden, teacher)
        states = _hidden(c, read, texts.take(these), teacher.tokenizer, mesh)
        # numpy has no name for bfloat16.
        add(hidden=states.view(f'u{dtype.itemsize}'))
        return {'width': states.shape[1]}

      arrays, facts = store.load(_root(c), key, make)
      shards.append(arrays['hidden'].view(dtype).reshape(-1, facts['width']))
      progress.advance(1)
  return Cache(shards, starts, lengths, _SHARD)


def _root(config):
  return config.data.cache or store.default_root()


def _hidden(config, read, texts, tokenizer, mesh):
  """[positions of all texts, E], a text after the other."""
  c = config
  order = np.argsort(texts.lengths, kind='stable')
  size = c.train.microbatch_size or c.train.batch_size
  buckets = np.array(pipeline.default_buckets(c.data.max_length))
  pad_id = tokenizer_lib.pad_id(tokenizer)
  found = [None] * len(texts)
  first = _first(texts)
  for start in range(0, len(order), size):
    some = order[start : start + size]
    length = buckets[np.searchsorted(buckets, texts.lengths[some].max())]
    bins = [[texts[i]] for i in some] + [[]] * (size - len(some))
    tokens = pipeline.collate(bins, length, pad_id)
    batch = sharding.put_batch(pipeline.Batch(tokens, tokens), mesh)
    hidden_BTE = np.asarray(read(batch))
    for i, hidden_TE in zip(some, hidden_BTE, strict=False):
      found[i] = hidden_TE[first[i] : texts.lengths[i]]
  return np.concatenate(found)
