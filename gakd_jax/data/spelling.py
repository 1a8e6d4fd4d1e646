"""What the tokens of a tokenizer spell: the bytes of each, and of a row of ids.

From ids alone, so that what a model writes is read as data are. A token covers
the bytes that it spells, be they a part of a character. Special tokens spell
nothing.
"""

import dataclasses
import re

import numpy as np

from gakd_jax import UserError
from gakd_jax.data import templates

_BLANK = '\u2581'  # How SentencePiece writes a blank.


@dataclasses.dataclass(frozen=True)
class Spelling:
  """What each id of a tokenizer spells; [V] ids.

  bytes: uint8, of all tokens. lengths: of each. starts: where each begins.
  strings: the bytes of each as Latin-1; the name of a special token, and of a
    byte that a token spells as well, so that no two are equal; None for an id
    without a token.
  written: its name in the vocabulary with ' ' for a blank, where names are
    made of characters; else None.
  stops: ids that end a turn.
  blank: whether the tokenizer puts a blank before every text.
  """

  bytes: np.ndarray
  lengths: np.ndarray
  starts: np.ndarray
  strings: tuple
  written: tuple | None
  stops: frozenset
  blank: bool


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a row of ids spells; [n] tokens.

  text: bytes, UTF-8 but for a character that the end of the row cuts.
  starts, ends: int64, the bytes of text that each token covers.
  legible: False for tokens with bytes that are no text; those are left out.
  ended: whether the last token ends the turn.
  blank: whether the text begins with a blank that the tokenizer has added.
  """

  text: bytes
  starts: np.ndarray
  ends: np.ndarray
  legible: np.ndarray
  ended: bool
  blank: bool

  def without_blank(self):
    """The same but for the added blank; a token may then cover nothing."""
    if not self.blank:
      return self
    starts, ends = (np.maximum(x - 1, 0) for x in (self.starts, self.ends))
    return dataclasses.replace(
      self, text=self.text[1:], starts=starts, ends=ends, blank=False
    )


def of(tokenizer):
  """The Spelling of a tokenizer; raises UserError if its kind is unknown."""
  characters, spell = _speller(tokenizer)
  names = {i: name for name, i in tokenizer.get_vocab().items()}
  silent = _silent(tokenizer)
  spelt = {i: b'' if i in silent else spell(name) for i, name in names.items()}
  fallback = {i for i, name in names.items() if _byte(name)}
  spelt_whole = {s for i, s in spelt.items() if i not in fallback}

  def string(i):
    twice = i in fallback and spelt[i] in spelt_whole
    return names[i] if i in silent or twice else spelt[i].decode('latin-1')

  ids = range(1 + max(names))
  # One more, which spells nothing: the ids that only a model's head has.
  every = [spelt.get(i, b'') for i in (*ids, len(ids))]
  lengths = np.array([len(s) for s in every])
  probe = tokenizer('x', add_special_tokens=False).input_ids
  return Spelling(
    bytes=np.frombuffer(b''.join(every), np.uint8),
    lengths=lengths,
    starts=np.cumsum(lengths) - lengths,
    strings=tuple(string(i) if i in names else None for i in ids),
    written=tuple(
      names[i].replace(_BLANK, ' ') if i in names else None for i in ids
    )
    if characters
    else None,
    stops=frozenset(templates.stops(tokenizer)),
    blank=b''.join(every[i] for i in probe) == b' x',
  )


def strings(a, b):
  """The tokens of two Spellings as strings to compare; two tuples, by id.

  Of characters where both vocabularies are written in them; else of bytes,
  each a character of Latin-1: a byte-level vocabulary has parts of characters.
  """
  if a.written and b.written:
    return a.written, b.written
  return a.strings, b.strings


def words(strings, ids, blanks=False):
  """Those of `strings` that a row's ids are, a list; '' for no token.

  Without blanks, as MinED compares them; MCW-KD compares them with blanks.
  """
  n = len(strings)
  found = [strings[i] or '' if i < n else '' for i in np.asarray(ids).tolist()]
  return found if blanks else [x.replace(' ', '') for x in found]


def read(spelling, ids):
  """The Reading of a row's ids: of its prompt or of its response.

  Each of the two is tokenised by itself, and begins with a blank where the
  tokenizer adds one.
  """
  ids = np.asarray(ids, np.int64)
  known = np.minimum(ids, len(spelling.lengths) - 1)
  lengths = spelling.lengths[known]
  ends = np.cumsum(lengths)
  starts = ends - lengths
  shift = np.repeat(spelling.starts[known] - starts, lengths)
  all_bytes = spelling.bytes[shift + np.arange(len(shift))]
  text = all_bytes.tobytes()
  legible = np.ones(len(ids), bool)
  ended = len(ids) > 0 and int(ids[-1]) in spelling.stops
  if bad := [*_no_text(text, cut=not ended)]:
    keep = np.ones(len(text), bool)
    for span in bad:
      keep[span] = False
    at = np.concatenate([np.zeros(1, int), np.cumsum(keep)])
    legible = at[ends] - at[starts] == lengths
    text, starts, ends = all_bytes[keep].tobytes(), at[starts], at[ends]
  blank = spelling.blank and text.startswith(b' ')
  return Reading(text, starts, ends, legible, ended, blank)


def _speller(tokenizer):
  """(whether names are of characters, function from a name to its bytes)."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  decoder = getattr(backend, 'decoder', None)
  kind = decoder.__getstate__().decode() if decoder else ''
  if 'ByteLevel' in kind:
    of = _byte_alphabet()

    def spell(name):
      # Tokens that were added are written as they are.
      known = all(c in of for c in name)
      return bytes(of[c] for c in name) if known else name.encode()

    return False, spell
  if _BLANK in kind:

    def spell(name):
      return _byte(name) or name.replace(_BLANK, ' ').encode()

    return True, spell
  raise UserError(
    f'tokenizer {tokenizer.name_or_path}: it is neither byte-level nor '
    "SentencePiece's, and which bytes its tokens spell is not known; use an "
    'objective that needs no alignment, such as uld'
  )


def _byte(name):
  """The byte of a token such as <0xE2>; None of others."""
  found = re.fullmatch('<0x([0-9A-F]{2})>', name)
  return found and bytes.fromhex(found[1])


def _byte_alphabet():
  """Character -> byte, of byte-level BPE.

  Printable bytes stand for themselves, others for what follows U+00FF.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return {chr(b): b for b in plain} | {
    chr(256 + n): b for n, b in enumerate(others)
  }


def _silent(tokenizer):
  """Ids of special tokens; those that enclose thoughts are text."""
  added = tokenizer.added_tokens_decoder.items()
  silent = {i for i, token in added if token.special}
  text = (templates.THINK, templates.THOUGHT)
  return silent - {templates.token_id(tokenizer, x) for x in text}


def _no_text(text, cut):
  """Yields the slices that are not UTF-8; cut: the last character may be."""
  start = 0
  while True:
    try:
      text[start:].decode()
      return
    except UnicodeDecodeError as error:
      if cut and error.reason == 'unexpected end of data':
        return
      yield slice(start + error.start, start + error.end)
      start += error.end
