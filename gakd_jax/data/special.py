"""Special tokens are what templates write: a text that looks like one is text.

A chat template renders one string, with what people said inside of it. There
the text of a special token (`</s>`, say) is cut, and its two parts are read by
themselves; a text without any is read as it always was.
"""

import dataclasses
import re

from gakd_jax.data import templates
from gakd_jax.data.sources import BadRow

# Stands in a text where it is cut for the tokenizer; no character of Unicode.
_CUT = '\U000ffffe'
_NO_CHARACTER = re.compile(f'[\ud800-\udfff{_CUT}]')


@dataclasses.dataclass(frozen=True)
class Special:
  """The tokens that a text must not turn into: by their names, and by ids."""

  names: re.Pattern
  ids: frozenset

  @classmethod
  def of(cls, tokenizer, but=frozenset()):
    stops = templates.stops(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special}
    tokens.update(tokenizer.all_special_tokens)
    tokens.update(tokenizer.convert_ids_to_tokens(sorted(stops)))
    # Of some generation_config.json, ids without a token.
    tokens = sorted(tokens - but - {None, ''}, key=len, reverse=True)
    ids = {*tokenizer.convert_tokens_to_ids(tokens)}
    if tokenizer.unk_token_id not in stops:
      ids.discard(tokenizer.unk_token_id)  # Of characters that are unknown.
    names = re.compile('|'.join(map(re.escape, tokens)) or '(?!)')
    return cls(names, frozenset(ids))

  def apart(self, where, text):
    """A text cut inside of what looks like a special token.

    Tokenizers that put a blank before every text put one there too. Raises
    BadRow for a token of one character.
    """

    def cut(match):
      token = match[0]
      if len(token) == 1:
        raise BadRow(where, f'has {token!r}, a special token of the tokenizer')
      return token[0] + _CUT + token[1:]

    return self.names.sub(cut, text)

  def check(self, where, text, ids):
    """Raises BadRow if there are more of them than a text names.

    Whatever a tokenizer makes one of: case and normal forms are its own.
    """
    n = sum(map(self.ids.__contains__, ids))
    if n and n > len(self.names.findall(text)):
      raise BadRow(where, 'has what the tokenizer reads as a special token')


def check_characters(where, *texts):
  """Raises BadRow for what no tokenizer takes, or what is our own mark."""
  if any(map(_NO_CHARACTER.search, texts)):
    raise BadRow(where, 'has what is no character of Unicode')


def as_unicode(text):
  """A text that a model wrote, which may be bytes of what is no character."""
  return _NO_CHARACTER.sub('\ufffd', text)


def ids(tokenizer, texts):
  """The ids of texts, a list each; what is cut apart is read apart."""
  parts = [text.split(_CUT) for text in texts]
  if not parts:
    return []
  # One call for all texts: the tokenizer splits it over its Rust threads.
  found = iter(
    tokenizer(
      [part for cut in parts for part in cut],
      add_special_tokens=False,
      return_attention_mask=False,
      verbose=False,
    ).input_ids
  )
  return [[i for _ in cut for i in next(found)] for cut in parts]
