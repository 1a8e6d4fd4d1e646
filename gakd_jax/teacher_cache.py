"""A teacher that is paid for once: what it says of the data, kept on disk.

In every epoch a teacher reads the same text again: of a run from 8B to 0.6B
that is most of the work. `config.teacher.cache` names what is kept of each
position that predicts a response's token:

  hidden   its last hidden state, in the dtype that it was computed in: 8 KB for
           a width of 4096 in bf16. All that methods ask are logits, a
           projection of it: nothing is lost, for a critic neither, nor where
           the teacher's tokens are others.
  top_k    its `config.teacher.cache_size` most likely ids: 6 bytes each, and 2
           for the mass of all others. See `objectives.few`.
  sampled  as many draws: 8 bytes for each id among them. Of 64 that are some
           10 to 20 ids. See `objectives.few`.

  data     what the rows of `config.data.train` have as `logprobs`, of a teacher
           that is nowhere else: see `data.logprobs`. Nothing is made.

Of the last three the run never needs the teacher's weights, not even its head.

The others lie in `data.store`, in shards of some texts. A shard's key is all
that it was made of: another teacher, dtype, text or order of texts has others.
A run makes the shards that are missing before its first step; interrupted, it
goes on with the next. Of several processes each keeps its own, or all the same
where `data.cache` is of a file system that they share.
"""

import dataclasses
import functools
import hashlib

import jax
import numpy as np

from gakd_jax import UserError, hosts, log, models, sharding
from gakd_jax.data import aligned, kept, pipeline, store
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import transformer
from gakd_jax.objectives import few

# Of which the teacher's weights are not needed.
NUMBERS = (*few.KINDS, 'data')
KINDS = ('none', 'hidden', *NUMBERS)
_SHARD = 256  # Texts, of which all is held at once.
_VERSION = 3  # Of what is in a shard.


def check(config, objective, writer):
  """Refuses a cache that could not stand in for the teacher."""
  kind = config.teacher.cache
  if kind == 'none':
    return
  where = f'config.teacher.cache={kind!r}'
  if not objective.needs_teacher:
    raise UserError(
      f'{where}: the objective {config.objective.name!r} asks nothing of a '
      "teacher; set it to 'none'"
    )
  if objective.reads_prompts:
    raise UserError(
      f'{where}: the objective {config.objective.name!r} reads the prompts as '
      'well, and only what is of responses is kept; set it to '
      "'none'"
    )
  if writer.room and not (writer.beside and objective.asks_of_data):
    raise UserError(
      f'{where}: with the writer {config.rollout.writer!r} the teacher reads '
      "text that is new in every step; set it to 'none'"
    )
  if kind != 'hidden' and _form(kind) not in objective.takes:
    can = ' or '.join(map(repr, ('hidden', *objective.takes)))
    raise UserError(
      f'{where}: config.objective asks more of a teacher than that; take {can}'
    )
  if kind == 'data' and writer.makes_rows:
    raise UserError(
      f'{where}: what the writer {config.rollout.writer!r} answers has no '
      'log-probabilities; write the rows with python -m gakd_jax.generate '
      f'--logprobs={config.teacher.cache_size}, or take another kind'
    )
  if kind == 'data' and objective.temperature != 1:
    raise UserError(
      f'{where}: log-probabilities of a file are those at temperature 1, and '
      f'config.objective.temperature is {objective.temperature}; set it to 1'
    )


def _form(kind):
  """Which of `few.KINDS` a kind is read as."""
  return 'top_k' if kind == 'data' else kind


def check_size(config, tokenizers):
  """Refuses more ids than there are, of the student and the teacher."""
  c = config.teacher
  if c.cache == 'top_k' and c.cache_size >= tokenizer_lib.size(tokenizers[1]):
    raise UserError(
      f'config.teacher.cache_size={c.cache_size}: the teacher has only '
      f'{tokenizer_lib.size(tokenizers[1])} ids, and one at least is not kept; '
      'lower it'
    )


def is_whole(config, objective, texts):
  """Whether there is nothing to make, and no block of a teacher is needed."""
  if config.teacher.cache == 'data':
    return True
  keys = _keys(config, objective, _read_by_teacher(texts))
  root = _root(config)
  return hosts.all_of(all(store.has(root, key) for key in keys))


def load(config, objective, both, texts, mesh):
  """The `kept.Kept` of some texts; makes what is missing.

  Args:
    config: of the run, see configs/base.py.
    objective: of the run.
    both: its `pair.Models`; of the teacher, the weights are needed.
    texts: `texts.Texts`, or `aligned.Aligned`.
    mesh: where the teacher reads them.

  Raises:
    UserError: if a part is damaged and the teacher's blocks are not there.
  """
  c = config.teacher
  texts = _read_by_teacher(texts)
  shard_keys = [*_keys(config, objective, texts)]
  ask = _asking(config, objective, both, mesh)
  shards = []
  with log.Progress(len(shard_keys), description='teacher') as progress:
    for n, key in enumerate(shard_keys):
      some = range(len(texts))[n * _SHARD : (n + 1) * _SHARD]

      def make(some=some):
        if both.teacher_config is None or not both.teacher_config.layers:
          raise UserError(
            'config.teacher.cache: a part of what was kept is damaged; start '
            'again'
          )
        said = _said(config, ask, texts, some, both.tokenizers[-1], mesh)
        return kept.ragged(**said) if c.cache == 'sampled' else said

      shards.append(_load(_root(config), key, make))
      progress.advance(1)
  draws = c.cache_size if c.cache == 'sampled' else None
  return kept.Kept(shards, texts.lengths - _first(texts), _SHARD, draws)


def _load(root, key, make):
  """`kept.load`; of several processes, all take part in what one lacks."""
  if jax.process_count() > 1 and not hosts.all_of(store.is_good(root, key)):
    # Before one of them holds a lock that others wait for.
    made = make()
    return kept.load(root, key, lambda: made)
  return kept.load(root, key, make)


def _root(config):
  return config.data.cache or store.default_root()


def _read_by_teacher(texts):
  return texts.teacher if isinstance(texts, aligned.Aligned) else texts


def _first(texts):
  """[N], the first position of each text that predicts a response's token."""
  return np.maximum(texts.prompts, 1) - 1


def _keys(config, objective, texts):
  """Yields the key of each shard."""
  c = config.teacher
  made_by = {
    'version': _VERSION,
    'kind': c.cache,
    'teacher': models.identity(c.path),
    'quantize': c.quantize,
    'dtype': c.dtype,
    'precision': config.train.precision,
  }
  if c.cache in few.KINDS:
    made_by |= {'size': c.cache_size, 'temperature': objective.temperature}
  for start in range(0, len(texts), _SHARD):
    some = texts.take(slice(start, start + _SHARD))
    ids = [x for text in map(some.__getitem__, range(len(some))) for x in text]
    content = np.concatenate([some.prompts, some.lengths, *ids], dtype=np.int32)
    yield made_by | {'texts': hashlib.sha256(content).hexdigest()}


def _asking(config, objective, both, mesh):
  """A jitted function of a `Batch` on the mesh: {name: [B, T, ...]}.

  Of several processes each gets the whole.
  """
  c = config.teacher
  teacher = dataclasses.replace(
    both, frozen={'teacher': both.frozen.get('teacher')}
  )

  def ask(teacher, batch):
    hidden_BTE = teacher.teacher_hidden(batch)
    if c.cache == 'hidden':
      return {'hidden': hidden_BTE}
    return few.ask(
      c.cache,
      c.cache_size,
      transformer.Outputs(hidden_BTE, teacher.teacher_head()),
      batch.teacher.predicts_BT,
      temperature=objective.temperature,
      chunk=objective.head_chunk,
      key_B=jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(0), batch.rows_B
      ),
    )

  place = sharding.replicated(mesh) if jax.process_count() > 1 else None
  return functools.partial(jax.jit(ask, out_shardings=place), teacher)


def _said(config, ask, texts, some, tokenizer, mesh):
  """{name: [positions of some texts, ...]}, a text after the other."""
  c = config
  some = np.array(some)
  order = some[np.argsort(texts.lengths[some], kind='stable')]
  size = c.train.microbatch_size or c.train.batch_size
  buckets = np.array(pipeline.default_buckets(c.data.max_length))
  pad_id = tokenizer_lib.pad_id(tokenizer)
  found = {}
  first = _first(texts)
  for start in range(0, len(order), size):
    these = order[start : start + size]
    length = buckets[np.searchsorted(buckets, texts.lengths[these].max())]
    bins = [[texts[i]] for i in these] + [[]] * (size - len(these))
    tokens = pipeline.collate(bins, length, pad_id)
    rows_B = np.zeros(size, np.int32)
    rows_B[: len(these)] = these
    own = sharding.own_rows(size, mesh)
    batch = jax.tree.map(
      lambda x, own=own: x[own], pipeline.Batch(tokens, tokens, rows_B=rows_B)
    )
    said = jax.tree.map(np.asarray, ask(sharding.put_batch(batch, mesh)))
    for b, i in enumerate(these):
      found[i] = {k: x[b, first[i] : texts.lengths[i]] for k, x in said.items()}
  return {
    name: np.concatenate([found[i][name] for i in some])
    for name in found[some[0]]
  }
