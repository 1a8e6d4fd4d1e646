"""A teacher of which a file is all that there is: its answers, and their odds.

A row may have `logprobs` of its response (`config.teacher.cache='data'`), as
`python -m gakd_jax.generate --logprobs=64` writes them:

  ids     [n, k] of each token of the response, the most likely ids that could
          have stood there; its end counts as a token. k may differ: APIs add
          the token that was drawn where it is not among them
  values  [n, k] their log-probabilities, at temperature 1
  rest    [n] that of all others together; it may be missing, and is then what
          the values leave of 1
  tokens  [n] the response's ids; they may be missing, and are otherwise
          compared with those that the tokenizer gives

A row without them is learned by its text alone, and so is an end that they
leave out. The `config.teacher.cache_size` largest values are read.
"""

import collections
import dataclasses

import numpy as np

from gakd_jax import UserError
from gakd_jax.data import kept, sources, store
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow

_CHUNK = 256  # rows that are held at once
_LEAST = 1e-7  # mass of what is not said, which rounding would make negative


@dataclasses.dataclass(frozen=True)
class Known:
  """What a data spec has of a teacher, of each of its texts.

  arrays: {name: [positions of all texts, ...]}. places, starts: [N], of each
  text its place in the data, and where it begins in these.
  """

  arrays: dict
  places: np.ndarray
  starts: np.ndarray

  def kept(self, texts):
    """`kept.Kept` of some of the texts, which may be cut."""
    starts = self.starts[np.searchsorted(self.places, texts.places)]
    n = len(texts)
    return kept.Kept([self.arrays], _positions(texts), n, starts=starts)


def load(spec, contents, texts, reader, *, rules, size, root=None):
  """Texts with what is `known` of them, and a Counter of bad rows by reason.

  Args:
    spec, contents, rules, root: see `texts.load`.
    texts: what that gives, uncut.
    reader: (tokenizer, template) that it was given.
    size: how many ids are read of each token.

  Raises:
    UserError: if no row has any.
  """
  tokenizer, template = reader
  vocab = tokenizer_lib.size(tokenizer)
  key = {
    'code': store.code('logprobs.py'),
    'data': contents,
    'texts': texts.digest,
    'template': template,
    'tokenizer': tokenizer_lib.identity(tokenizer),
    'on_bad_row': rules.on_bad_row,
    'size': size,
  }

  def make(add):
    bad, known, tokens = collections.Counter(), 0, 0
    refuse = rules.refuse(bad)
    rows = sources.column(spec, rules, 'logprobs')
    for start in range(0, len(texts), _CHUNK):
      found = []
      for i in range(start, min(start + _CHUNK, len(texts))):
        place = texts.places[i]
        where, value = next(x[1:] for x in rows if x[0] == place)
        found.append(_of_text(where, value, texts[i], size, vocab, refuse))
        known += int(found[-1]['is_known'].sum())
        tokens += len(texts[i][1])
      names = found[0]
      add(**{k: np.concatenate([x[k].ravel() for x in found]) for k in names})
    return {'bad': bad, 'known': known, 'tokens': tokens}

  arrays, facts = store.load(root or store.default_root(), key, make)
  bad, known = collections.Counter(facts['bad']), facts['known']
  if not known:
    reasons = ', '.join(f'{n} {why}' for why, n in bad.items())
    raise UserError(
      f"config.teacher.cache='data': no row of {spec} has logprobs that can be "
      f'used ({reasons or "none has any"}); write them with python -m '
      f'gakd_jax.generate --logprobs={size} (config.teacher.cache_size), or '
      "set it to 'none'"
    )
  share = known / facts['tokens']
  print(f'logprobs: of {share:.1%} of response tokens', flush=True)
  is_good_N = arrays.pop('is_good')
  for name in ('ids', 'log_probs'):
    arrays[name] = arrays[name].reshape(-1, size)
  starts = np.concatenate([[0], np.cumsum(_positions(texts))[:-1]])
  known = Known(arrays, texts.places, starts)
  texts = texts.take(np.flatnonzero(is_good_N))
  digest = f'{texts.digest} {facts["digest"]}'
  return dataclasses.replace(texts, known=known, digest=digest), bad


def _of_text(where, value, text, size, vocab, refuse):
  """What `Known.arrays` have of a text, and whether it `is_good`."""
  n = len(text[1]) + 1  # See `_positions`.
  found = {
    'ids': np.tile(np.arange(size, dtype=np.int32), (n, 1)),
    'log_probs': np.full((n, size), kept.NOTHING, np.float16),
    'rest': np.zeros(n, np.float16),
    'is_known': np.zeros(n, bool),
    'is_good': np.ones(1, bool),
  }
  try:
    given = read(where, value, text[1], size, vocab)
  except BadRow as error:
    refuse(error)
    return found | {'is_good': np.zeros(1, bool)}
  for name, x in given.items():
    found[name][: len(x)] = x
  return found


def read(where, value, response, size, vocab):
  """{'ids', 'log_probs' [m, size], 'rest', 'is_known' [m]} of a row, or {}.

  Args:
    where: of the row, for errors.
    value: what it has as `logprobs`; None: nothing.
    response: its ids, the end among them; m is their number, or one less.
    size: ids that are read of each token.
    vocab: how many ids there are.

  Raises:
    BadRow: if they are not of this response.
  """
  if value is None:
    return {}

  def column(name, kinds, ndim):
    try:
      x = np.asarray(value[name])
    except (LookupError, TypeError, ValueError) as error:
      raise BadRow(where, f'logprobs have no {name}') from error
    if x.ndim != ndim or x.dtype.kind not in kinds:
      raise BadRow(where, f'logprobs have no {name}')
    return x

  value = _rectangular(value)
  ids_Mk, values_Mk = column('ids', 'i', 2), column('values', 'if', 2)
  m, n = len(ids_Mk), len(response)
  if ids_Mk.shape != values_Mk.shape or m not in (n, n - 1):
    raise BadRow(where, 'logprobs are not of as many tokens as the response')
  if value.get('tokens') is not None:
    tokens = column('tokens', 'i', 1)
    if (
      len(tokens) not in (n, n - 1) or (tokens != response[: len(tokens)]).any()
    ):
      raise BadRow(where, 'logprobs are of other tokens than the response')
  if ids_Mk.shape[1] < size:
    raise BadRow(
      where,
      f'logprobs have {ids_Mk.shape[1]} ids where config.teacher.cache_size '
      f'asks for {size}',
    )
  if ((ids_Mk < 0) | (ids_Mk >= vocab)).any():
    raise BadRow(where, 'logprobs have ids that are no tokens')
  order_Mk = np.argsort(-values_Mk, axis=1, kind='stable')[:, :size]
  ids_MK = np.take_along_axis(ids_Mk, order_Mk, 1)
  values_MK = np.take_along_axis(values_Mk, order_Mk, 1)
  if (np.diff(np.sort(ids_MK, axis=1), axis=1) == 0).any():
    raise BadRow(where, 'logprobs have an id twice')
  sum_M = np.exp(values_MK).sum(axis=1)
  if np.isnan(sum_M).any() or (values_MK > 1e-3).any() or (sum_M > 1.01).any():
    raise BadRow(where, 'logprobs are no log-probabilities')
  rest_M = np.log(np.maximum(1 - sum_M, _LEAST))
  # Theirs is of the ids that they have, more than are read.
  if value.get('rest') is not None and ids_Mk.shape[1] == size:
    rest_M = column('rest', 'if', 1)
    if rest_M.shape != (m,) or not (rest_M <= 1e-3).all():
      raise BadRow(where, 'logprobs have a rest that is none')
  return {
    'ids': ids_MK.astype(np.int32),
    'log_probs': np.maximum(values_MK, kept.NOTHING).astype(np.float16),
    'rest': np.maximum(rest_M, kept.NOTHING).astype(np.float16),
    'is_known': np.ones(m, bool),
  }


def _rectangular(value):
  """With as many ids of each token as the fewest have; the most likely."""
  try:
    k = min(map(len, value['ids']))
    if all(len(x) == k for x in value['ids']):
      return value
    pairs = [
      sorted(zip(values, ids, strict=True), reverse=True)[:k]
      for values, ids in zip(value['values'], value['ids'], strict=True)
    ]
    return value | {
      'ids': [[i for _, i in x] for x in pairs],
      'values': [[p for p, _ in x] for x in pairs],
      'rest': None,  # It was of others.
    }
  except (LookupError, TypeError, ValueError):
    return value  # What is wrong will be said.


def _positions(texts):
  """[N], how many positions are kept: one before each token of the response,
  and the last, which predicts nothing.
  """
  return texts.lengths - texts.prompts + 1
