"""Which token of one vocabulary stands for a token of another."""

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from gakd_jax.data import spelling as spelling_lib
from gakd_jax.data import store
from gakd_jax.data import tokenizer as tokenizer_lib

_CHUNK = 1024  # Strings compared at once with all of one length.


def shared(student, teacher, ends=None):
  """Tokens that spell the same: (student's ids, teacher's ids), int32 [n].

  student, teacher: tokenizers. ends: the ids (student's, teacher's) that end a
  turn, a pair whatever they are called. Ascending in the student's.
  """
  s_strings, t_strings = _strings(student, teacher)
  teacher_id = _ids(t_strings)
  pairs = {
    i: teacher_id[string]
    for string, i in _ids(s_strings).items()
    if string in teacher_id
  }
  if ends:
    s_end, t_end = ends
    pairs = {s: t for s, t in pairs.items() if t != t_end}
    pairs[s_end] = t_end
  found = np.array(sorted(pairs.items()), np.int32).reshape(-1, 2)
  return found[:, 0], found[:, 1]


def nearest(student, teacher, root=None):
  """The student's token with the least edit distance to each of the teacher's.

  Exact, the lowest id of several: MinED's map, but that a byte-level and
  another vocabulary are compared by bytes, where MinED takes the alphabet that
  stands for bytes for characters. It is made once and kept in root (None:
  `store.default_root()`); of Qwen3's 151,669 tokens to GPT-2's 50,257 in half
  a minute on two cores (tools/bench/align.py).

  Returns:
    int32 [U], the student's ids by the teacher's; -1 for an id without token.
  """
  key = {
    'nearest': [tokenizer_lib.identity(x) for x in (student, teacher)],
    'code': store.code('vocab_map.py', 'spelling.py'),
  }

  def make(add):
    add(ids=closest(*_strings(student, teacher))[0])
    return {}

  arrays, _ = store.load(root or store.default_root(), key, make)
  return np.array(arrays['ids'])


def closest(names, queries):
  """The string of least edit distance to each query, the first of several.

  Args:
    names, queries: strings; None for what is not there.

  Returns:
    (indices of names, distances), int32 [len(queries)]; -1 for None.
  """
  first = _ids(names)
  found = np.array([first.get(q, -1) for q in queries], np.int32)
  far = 1 + max(map(len, filter(None, (*names, *queries))), default=0)
  best = np.where(found >= 0, 0, far).astype(np.int32)
  by_length = _by_length(first.items())
  open_ = ((q, n) for n, q in enumerate(queries) if q is not None)
  for length, (strings, rows) in _by_length(
    (q, n) for q, n in open_ if found[n] < 0
  ).items():
    # A string that is d longer or shorter is at least d away.
    order = sorted(by_length, key=lambda n: abs(n - length))
    for start in range(0, len(rows), _CHUNK):
      chunk = slice(start, start + _CHUNK)
      some = np.array(strings[chunk], object)
      for n in order:
        left = np.flatnonzero(best[rows[chunk]] >= abs(n - length))
        if not len(left):
          break
        _improve(some[left], rows[chunk][left], *by_length[n], found, best)
  best[found < 0] = -1
  return found, best


def _improve(queries, rows, names, ids, found, best):
  """Sets found and best of some rows where some names are closer."""
  distances = process.cdist(
    queries, names, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1
  )
  first = distances.argmin(axis=1)
  distance, at = distances[np.arange(len(rows)), first], ids[first]
  nearer = distance < best[rows]
  nearer |= (distance == best[rows]) & (at < found[rows])
  found[rows[nearer]], best[rows[nearer]] = at[nearer], distance[nearer]


def inverse(student_ids_U, size):
  """int32 [size]: the first of the teacher's ids that has each of a map's.

  -1 for those of the student's that no token of the teacher has.
  """
  teacher_ids_V = np.full(size, -1, np.int32)
  there = np.flatnonzero(student_ids_U >= 0)[::-1]
  teacher_ids_V[student_ids_U[there]] = there
  return teacher_ids_V


def _strings(student, teacher):
  spellings = map(spelling_lib.of, (student, teacher))
  return spelling_lib.strings(*spellings)


def _ids(strings):
  """The first place of each string."""
  ids = {}
  for i, string in enumerate(strings):
    if string is not None:
      ids.setdefault(string, i)
  return ids


def _by_length(pairs):
  """{length: (strings, numbers)} of (string, number), in their order."""
  groups = {}
  for string, number in pairs:
    strings, numbers = groups.setdefault(len(string), ([], []))
    strings.append(string)
    numbers.append(number)
  return {n: (s, np.array(numbers)) for n, (s, numbers) in groups.items()}
