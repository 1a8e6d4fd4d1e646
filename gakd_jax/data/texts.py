"""Texts as token ids: a prompt and a response each, of a data set or of rows.

A data set is tokenised once: ids and lengths lie in a file (see `store`), whose
key is all that they depend on: the contents of the data, the tokenizer, the
template, and this package's own code. How much of a text is read, and which
texts are, is chosen afterwards, from its lengths.
"""

import collections
import dataclasses
import itertools
from typing import Any

import numpy as np

from gakd_jax import UserError
from gakd_jax.data import encoding, sources, store
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow

_CHUNK = 4096  # Rows tokenised at once: bounds memory, keeps all cores busy.


@dataclasses.dataclass(frozen=True)
class Texts:
  """What of a long array of ids each text is; [N] of N texts.

  ids: int32, of all texts, maybe in a file.
  starts: where each text begins. prompts: tokens of its prompt. lengths: tokens
  that are read, prompt and response.
  places: of the row that it is from, see `sources.stream`.
  sets: which of several sets it is from.
  digest: differs between different ids.
  known: what the data has of a teacher, `logprobs.Known`; None: not read.
  """

  ids: np.ndarray
  starts: np.ndarray
  prompts: np.ndarray
  lengths: np.ndarray
  places: np.ndarray
  sets: np.ndarray
  digest: str = ''
  known: Any = None

  def __len__(self):
    return len(self.starts)

  def __getitem__(self, i):
    """(prompt ids, response ids) of a text."""
    start, n = self.starts[i], self.prompts[i]
    ids = self.ids[start : start + self.lengths[i]]
    return ids[:n], ids[n:]

  @property
  def stats(self):
    """Counts of texts and tokens."""
    prompts = int(self.prompts.sum(dtype=np.int64))
    return {
      'rows': len(self),
      'prompt_tokens': prompts,
      'response_tokens': int(self.lengths.sum(dtype=np.int64)) - prompts,
    }

  def fit(self, max_length, max_prompt_length, prefix=None):
    """The texts that fit, cut to what does, and how many are cut.

    Those with longer prompts than max_prompt_length are left out. A response
    keeps `prefix` tokens, if it is given, and what max_length leaves it.
    """
    fits = np.flatnonzero(self.prompts <= max_prompt_length)
    few = self if len(fits) == len(self) else self.take(fits)
    lengths = np.minimum(few.lengths, max_length)
    if prefix is not None:
      lengths = np.minimum(lengths, few.prompts + prefix)
    cut = int(np.sum(lengths < few.lengths))
    return dataclasses.replace(few, lengths=lengths), cut

  def take(self, indices):
    """Some of the texts."""
    some = {
      name: getattr(self, name)[indices]
      for name in ('starts', 'prompts', 'lengths', 'places', 'sets')
    }
    return dataclasses.replace(self, **some)


def of(pairs):
  """Texts of some (prompt ids, response ids)."""
  prompts = np.array([len(p) for p, _ in pairs], np.int32)
  lengths = np.array([len(p) + len(r) for p, r in pairs], np.int32)
  n = np.arange(len(pairs), dtype=np.int32)
  parts = itertools.chain.from_iterable(pairs)
  return Texts(
    ids=np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32),
    starts=_starts(lengths),
    prompts=prompts,
    lengths=lengths,
    places=n,
    sets=np.zeros_like(n),
  )


def load(spec, contents, tokenizer, *, template, rules, thinking, root=None):
  """Returns (the Texts of a data spec, Counter of bad rows by reason).

  Args:
    spec: of `sources`, or several.
    contents: `sources.identity(spec)`.
    tokenizer, template, thinking: see `encoding.encode`.
    rules: `sources.Rules`: which rows are read, and what is a bad one.
    root: where they are kept; None: `store.default_root()`.

  Raises:
    UserError: if no row is left, and at the first bad row if the rules say so.
  """
  key = {
    'data': contents,
    'tokenizer': tokenizer_lib.identity(tokenizer),
    'template': template,
    'thinking': thinking,
    'rules': dataclasses.asdict(rules),
    'code': store.code('*.py'),
  }

  def make(add):
    bad = collections.Counter()
    rows = sources.stream(spec, rules)
    for chunk in encode(rows, tokenizer, template, thinking, rules.refuse(bad)):
      add(**chunk)
    return {'bad': bad}

  arrays, facts = store.load(root or store.default_root(), key, make)
  bad = collections.Counter(facts['bad'])
  if 'lengths' not in arrays:
    raise UserError(sources.nothing_left(spec, bad))
  lengths = np.array(arrays.pop('lengths'))
  return Texts(
    **arrays, lengths=lengths, starts=_starts(lengths), digest=facts['digest']
  ), bad


def encode(rows, tokenizer, template, thinking, refuse):
  """Yields {'ids', 'lengths', 'prompts', 'places', 'sets'} of some rows.

  rows: yields (set, place, Row or BadRow). refuse: is given bad rows.
  """
  rows = iter(rows)
  while chunk := [*itertools.islice(rows, _CHUNK)]:
    good = [x for x in chunk if not isinstance(x[2], BadRow)]
    encoded = iter(
      encoding.encode_batch(
        tokenizer, [row for _, _, row in good], template, thinking
      )
    )
    kept = []
    for number, place, row in chunk:
      found = row if isinstance(row, BadRow) else next(encoded)
      if isinstance(found, BadRow):
        refuse(found)
      else:
        kept.append((number, place, *found))
    if kept:
      sets, places, prompts, responses = zip(*kept, strict=True)
      parts = itertools.chain.from_iterable(
        zip(prompts, responses, strict=True)
      )
      yield {
        'ids': np.fromiter(itertools.chain.from_iterable(parts), np.int32),
        'lengths': _int32(len(p) + len(r) for _, _, p, r in kept),
        'prompts': _int32(map(len, prompts)),
        'places': _int32(places),
        'sets': _int32(sets),
      }


def _int32(values):
  return np.fromiter(values, np.int32)


def _starts(lengths):
  ends = np.cumsum(lengths, dtype=np.int64)
  return np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(lengths)]
