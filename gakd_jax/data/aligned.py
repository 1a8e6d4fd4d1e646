"""Rows as two models read them, each in its own tokens, and how they relate.

What relates the tokens of two responses is made once a row, like the tokens
themselves, and lies in a file beside theirs:

  pairs_t         of each of the student's tokens, the teacher's that covers the
                  same bytes after the same text; -1 for none
  dtw_t           of what the student has read when it predicts each of these,
                  what the teacher has read that time warping by edit distance
                  pairs with it alone
  span_s, span_t  the number of the piece of text that a token is in; both
                  sides end a piece at the same byte
  path_s, path_t, path_d  cells of the warping paths of whole rows, of both
                  directions, and the edit distances there

Positions are counted from where the responses begin (those of `path`, the
rows); what is read there is the token before.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from gakd_jax import UserError
from gakd_jax.data import align, spelling, store
from gakd_jax.data import texts as texts_lib
from gakd_jax.data import tokenizer as tokenizer_lib

_CHUNK = 4096  # Rows whose alignments are held at once.


@dataclasses.dataclass(frozen=True)
class Aligned:
  """Rows that both models have; [N] of them, in both `texts.Texts`.

  parts: {name: (array of all rows, begins [N], ends [N])}, see above.
  """

  student: texts_lib.Texts
  teacher: texts_lib.Texts
  parts: dict

  places = property(lambda self: self.student.places)
  sets = property(lambda self: self.student.sets)
  stats = property(lambda self: self.student.stats)

  def __len__(self):
    return len(self.student)

  @property
  def prompts(self):
    return np.maximum(self.student.prompts, self.teacher.prompts)

  @property
  def lengths(self):
    return np.maximum(self.student.lengths, self.teacher.lengths)

  @property
  def digest(self):
    return self.student.digest + self.teacher.digest

  def coverage(self, rows=1000):
    """{name: share of tokens with a partner, or in a piece} of some rows."""
    some = self.take(np.arange(min(rows, len(self))))
    found = {}
    for name, (array, begins, ends) in some.parts.items():
      if name.startswith('path'):  # All of both texts, always.
        continue
      numbers = np.concatenate(
        [array[b:e] for b, e in zip(begins, ends, strict=True)]
      )
      found[name] = align.coverage(numbers)
    return found

  def __getitem__(self, i):
    """(student's text, teacher's text, {name: int32 [tokens]}) of a row."""
    parts = {x: a[b[i] : e[i]] for x, (a, b, e) in self.parts.items()}
    return kept(self.student[i], self.teacher[i], parts)

  def take(self, indices):
    return Aligned(
      self.student.take(indices),
      self.teacher.take(indices),
      {
        name: (array, begins[indices], ends[indices])
        for name, (array, begins, ends) in self.parts.items()
      },
    )

  def fit(self, max_length, max_prompt_length, prefix=None):
    """The rows that fit both, see `Texts.fit`."""
    few = self.take(np.flatnonzero(self.prompts <= max_prompt_length))
    s, _ = few.student.fit(max_length, max_prompt_length, prefix)
    t, _ = few.teacher.fit(max_length, max_prompt_length)
    cut = s.lengths < few.student.lengths
    cut |= t.lengths < few.teacher.lengths
    return dataclasses.replace(few, student=s, teacher=t), int(cut.sum())


def kept(s, t, parts):
  """(s, t, parts) of a row whose texts s and t may have been cut.

  A token that has lost its partner has none, nor has a piece that has lost a
  token.
  """
  found = dict(parts)
  for name in found.keys() & {'pairs_t', 'dtw_t'}:
    there = found[name][: len(s[1])]
    found[name] = np.where(there < len(t[1]), there, -1)
  if 'path_d' in found:
    read = found['path_s'] < len(s[0]) + len(s[1])
    read &= found['path_t'] < len(t[0]) + len(t[1])
    found |= {x: found[x][read] for x in found if x.startswith('path')}
  if 'span_s' in found:
    found['span_s'], found['span_t'] = align.cut(
      found['span_s'], found['span_t'], len(s[1]), len(t[1])
    )
  return s, t, found


def relate(kinds, spellings, s, t):
  """{name: int32 [tokens]} of `kinds`, of a row's (prompt ids, response ids).

  spellings: `spelling.of` both tokenizers, the student's first.
  """
  found = {}
  for kind in kinds:
    found |= KINDS[kind](*spellings, s, t)
  found.pop('path_n', None)
  return found


def load(student, teacher, tokenizers, kinds, root=None):
  """The rows that two `Texts` of a data set have in common, as `Aligned`.

  Args:
    student, teacher: of the same spec, with their places; whole, see `fit`.
    tokenizers: of both.
    kinds: of `KINDS`: what relates their tokens.
    root: see `texts.load`.
  """
  _, s_rows, t_rows = np.intersect1d(
    student.places, teacher.places, assume_unique=True, return_indices=True
  )
  if not len(s_rows):
    raise UserError(
      'no row is left that both tokenizers and templates can hold'
    )
  both = Aligned(student.take(s_rows), teacher.take(t_rows), {})
  starts = np.stack([both.student.starts, both.teacher.starts])
  identities = [tokenizer_lib.identity(x) for x in tokenizers]
  spellings = functools.cache(lambda: [*map(spelling.of, tokenizers)])
  parts = {}
  for kind in kinds:
    key = {
      'kind': kind,
      'texts': [student.digest, teacher.digest],
      'rows': hashlib.blake2b(starts.tobytes(), digest_size=16).hexdigest(),
      'tokenizers': identities,
      'code': store.code('align*.py', 'spelling.py'),
    }
    arrays, _ = store.load(
      root or store.default_root(),
      key,
      functools.partial(_make, both, spellings, KINDS[kind]),
    )
    cells = arrays.pop('path_n', None)
    for name, array in arrays.items():
      texts = both.teacher if name == 'span_t' else both.student
      sizes = texts.lengths - texts.prompts if cells is None else cells
      ends = np.cumsum(sizes, dtype=np.int64)
      parts[name] = array, ends - sizes, ends
  return dataclasses.replace(both, parts=parts)


def _make(both, spellings, kind, add):
  some = []
  for i in range(len(both)):
    some.append(kind(*spellings(), both.student[i], both.teacher[i]))
    if len(some) == _CHUNK or i + 1 == len(both):
      add(**{x: np.concatenate([row[x] for row in some]) for x in some[0]})
      some = []
  return {}


def _pairs(s_spelling, t_spelling, s, t):
  s_read = spelling.read(s_spelling, s[1])
  pairs = align.exact_pairs(s_read, spelling.read(t_spelling, t[1]))
  return {'pairs_t': align.partners(*pairs, len(s[1]))}


def _spans(s_spelling, t_spelling, s, t):
  s_read = spelling.read(s_spelling, s[1])
  pieces = align.spans(s_read, spelling.read(t_spelling, t[1]))
  return dict(zip(('span_s', 'span_t'), pieces, strict=True))


def _dtw(s_spelling, t_spelling, s, t):
  t_strings, s_strings = spelling.strings(t_spelling, s_spelling)
  read = [
    np.concatenate([prompt[-1:], response])[:-1] for prompt, response in (s, t)
  ]
  rows, columns, _ = align.dtw(
    spelling.words(t_strings, read[1]), spelling.words(s_strings, read[0])
  )
  return {'dtw_t': align.partners(columns, rows, len(s[1]))}


def _paths(s_spelling, t_spelling, s, t):
  t_words, s_words = (
    spelling.words(strings, np.concatenate(text), blanks=True)
    for strings, text in zip(
      spelling.strings(t_spelling, s_spelling), (t, s), strict=True
    )
  )
  t_at, s_at, there = align.dtw(t_words, s_words)
  s_too, t_too, back = align.dtw(s_words, t_words)
  return {
    'path_t': np.concatenate([t_at, t_too]),
    'path_s': np.concatenate([s_at, s_too]),
    'path_d': np.concatenate([there, back]),
    'path_n': np.array([len(there) + len(back)], np.int32),
  }


KINDS = {'pairs': _pairs, 'span': _spans, 'dtw': _dtw, 'path': _paths}
