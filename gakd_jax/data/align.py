"""Two tokenizations of one text, related; functions of one row, on the host.

Positions are those of tokens in the ids given, of a response as a rule. Align
whole rows, and cut the result: tokenizers change text (normal forms, blanks),
and where two readings differ a shortest edit of one into the other says what
they have in common, which takes their ends for one place.
"""

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

_FAR = 1 << 40


def exact_pairs(s, t, ends=True):
  """Tokens that cover the same bytes after the same text.

  Args:
    s, t: `spelling.Reading` of the student's and the teacher's ids.
    ends: whether the ends of both turns are a pair, where both have one.

  Returns:
    (student's positions, teacher's positions), int32 [P], both ascending.
  """
  s, t, s_at, t_at = _together(s, t)
  s_n, t_n = _of_common_text(s, s_at), _of_common_text(t, t_at)
  # No two of them start at one place: each covers a byte.
  _, s_i, t_i = np.intersect1d(
    s_at[s.starts[s_n]],
    t_at[t.starts[t_n]],
    assume_unique=True,
    return_indices=True,
  )
  s_n, t_n = s_n[s_i], t_n[t_i]
  same = s.ends[s_n] - s.starts[s_n] == t.ends[t_n] - t.starts[t_n]
  s_n, t_n = s_n[same], t_n[same]
  if ends and s.ended and t.ended:
    s_n = np.append(s_n, len(s.ends) - 1)
    t_n = np.append(t_n, len(t.ends) - 1)
  return s_n.astype(np.int32), t_n.astype(np.int32)


def spans(s, t, ends=True):
  """The smallest pieces of text that both split into tokens of their own.

  A token that covers nothing is of the piece that follows it. Those after the
  last common boundary, and pieces with bytes that are no text, are of none.

  Args:
    s, t, ends: see `exact_pairs`; the ends of both turns are the last piece.

  Returns:
    The number of each token's piece, -1 for none: int32 [n] of the student and
    of the teacher, ascending.
  """
  s, t, s_at, t_at = _together(s, t)
  common = np.intersect1d(s_at[s.ends], t_at[t.ends])
  common = common[common > 0]

  def numbers(x, at):
    silent = at[x.starts] == at[x.ends]
    return np.searchsorted(common, at[x.ends] + silent)

  s_n, t_n = numbers(s, s_at), numbers(t, t_at)
  bad = [*s_n[~s.legible], *t_n[~t.legible], len(common)]
  s_n[np.isin(s_n, bad)] = -1
  t_n[np.isin(t_n, bad)] = -1
  if ends and s.ended and t.ended:
    s_n[-1] = t_n[-1] = len(common)
  return s_n.astype(np.int32), t_n.astype(np.int32)


def dtw(rows, columns):
  """Dynamic time warping of two lists of strings, by edit distance.

  Of paths of the least cost, the one that goes, from the end, diagonally where
  it can, else to the previous row. MinED's rows are the teacher's tokens.

  Returns:
    (rows, columns, distances), int32 [P], of the path's cells in order.
  """
  cost = process.cdist(
    rows, columns, scorer=Levenshtein.distance, dtype=np.int32
  )
  total = np.full((len(rows) + 1, len(columns) + 1), _FAR)
  total[0, 0] = 0
  for above, here, c in zip(total[:-1], total[1:], cost, strict=True):
    # here[j] = c[j] + min(above[j], above[j - 1], here[j - 1]), of all j at
    # once: a row is entered from above at some k <= j, and left at j.
    sums = np.cumsum(c)
    entered = np.minimum(above[1:], above[:-1]) + c - sums
    here[1:] = sums + np.minimum.accumulate(entered)
  i, j = len(rows), len(columns)
  path = []
  while i and j:
    path.append((i - 1, j - 1))
    diagonal, up, left = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
    best = min(diagonal, up, left)
    if diagonal == best:
      i, j = i - 1, j - 1
    elif up == best:
      i -= 1
    else:
      j -= 1
  i, j = np.array(path[::-1], np.int32).reshape(-1, 2).T
  return i, j, cost[i, j]


def cut(s, t, s_length, t_length):
  """`spans` of the first tokens of both rows; a piece that is cut is none."""
  lost = np.concatenate([s[s_length:], t[t_length:]])
  first = np.min(lost[lost >= 0], initial=len(s))
  return tuple(np.where(x < first, x, -1) for x in (s[:s_length], t[:t_length]))


def partners(of, partner, n):
  """int32 [n]: the partner of each that has exactly one, else -1."""
  found = np.full(n, -1, np.int32)
  found[of] = partner
  found[np.bincount(of, minlength=n) != 1] = -1
  return found


def _together(s, t):
  """(s, t, their `_scale`); a blank that one tokenizer has added is no text."""
  if s.blank != t.blank:
    s, t = s.without_blank(), t.without_blank()
  return s, t, *_scale(s.text, t.text)


def _scale(a, b):
  """Where the boundaries of two texts' bytes stand, on one scale.

  4 for each byte that both have. Where they differ it is 3 wide, with no
  boundary in common within, and 0 where only one of them has anything.
  """
  if a.startswith(b) or b.startswith(a):
    at = 4 * np.arange(1 + max(len(a), len(b)))
    return at[: len(a) + 1], at[: len(b) + 1]
  a_at, b_at = np.zeros(len(a) + 1, int), np.zeros(len(b) + 1, int)
  i = j = at = 0
  for same in Levenshtein.editops(a, b).as_matching_blocks():
    both = same.a > i and same.b > j
    a_at[i + 1 : same.a] = at + both
    b_at[j + 1 : same.b] = at + 2 * both
    within = at + 3 * both + 4 * np.arange(same.size + 1)
    i, j, at = same.a + same.size, same.b + same.size, within[-1]
    a_at[same.a : i + 1] = b_at[same.b : j + 1] = within
  return a_at, b_at


def _of_common_text(x, at):
  """Positions of tokens that cover bytes, all of which are common."""
  n = x.ends - x.starts
  common = at[x.ends] - at[x.starts] == 4 * n
  return np.flatnonzero(common & (n > 0) & x.legible)


def coverage(numbers):
  """The share of tokens with a partner, or in a piece; -1 says none."""
  return float(np.mean(numbers >= 0)) if len(numbers) else 0.0
