"""What a text answers: a number, a letter, or one of a row's options.

A `Rule` is an ordered list of patterns, and returns None where none of them is
in a text. `number`, `gsm8k`, `letter` and `choice` read what people and models
write; the others are what the authors of a protocol compute, to the letter.
"""

import dataclasses
import math
import re
import unicodedata
from collections.abc import Callable

from gakd_jax import UserError

TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Of all that a regular expression finds in a text, one match."""

  regex: str  # LABELS stands for what a row may be answered
  first: bool = False  # or the last


@dataclasses.dataclass(frozen=True)
class Rule:
  """The first of its patterns that a text has says what the text answers."""

  patterns: tuple[Pattern, ...]
  value: Callable  # match -> what it says, None if that is nothing
  clean: Callable = str  # text -> the text that patterns read
  # Where group 1 of one of these begins, an answer is over. What follows is
  # read only if there is nothing before.
  over: tuple[str, ...] = ()

  @property
  def has_labels(self):
    """Whether what it reads is one of a row's `labels`."""
    return any('LABELS' in pattern.regex for pattern in self.patterns)

  def __call__(self, text, labels=()):
    names = '|'.join(map(re.escape, labels))
    text = self.clean(text)
    ends = [found.start(1) for x in self.over if (found := re.search(x, text))]
    for part in dict.fromkeys((text[: min(ends, default=None)], text)):
      for pattern in self.patterns:
        regex = pattern.regex.replace('LABELS', names)
        found = [*re.finditer(regex, part)]
        if found:
          return self.value(found[0 if pattern.first else -1])
    return None


# Full-width forms, and the minus, dashes and hyphens that stand for a sign.
_PLAIN = {i: i - 0xFEE0 for i in range(0xFF01, 0xFF5F)}
_PLAIN |= dict.fromkeys(map(ord, '\u2010\u2011\u2012\u2013\u2212\ufe63'), '-')
_SPACE = '[ \u00a0\u2000-\u200a\u202f\u205f\u3000]'
# What groups the digits of a number by three, or, as in India, by two.
_GROUPS = re.compile(
  r"(?<=\d)(?:,|\{,\}|\\,|[_'\u2019])(?=(?:\d\d,)*\d{3}(?!\d))"
)
# Blanks do so as well, but not in 1 2 345, nor in 5 100-dollar notes.
_SPACED = re.compile(
  rf'(?<![\d.,])(?<!\d{_SPACE})[1-9]\d?\d?(?:{_SPACE}\d{{3}})+'
  rf'(?!{_SPACE}?\d|-[a-z])'
)
_FRACTION = re.compile(
  r'(\d?)(?:\\[dt]?frac *\{?(\d+)\}? *\{?(\d+)\}?|([\xbc-\xbe\u2150-\u215e]))'
)
_POWER_OF_TEN = re.compile(
  r'(?:(?<=\d) *(\*|x|\xd7|\\times|\\cdot) *|(?<![\w.,]))'
  r'10(?:\^|\*\*)\{?([-+]?\d+)\}?'
)
# That of a unit or a variable: no number of its own.
_EXPONENT = re.compile(
  r'\^ *[{(]?[-+]?\d+[})]?|(?<=[\w)])\*\*[-+]?\d+(?![\d.,]*\*)'
)
_DATE = re.compile(r'(?<!\d)\d+(?:/\d+){2,}')
# Signs belong to a number unless something stands before them: 8-4 has a 4, and
# -$4 is -4. With two points it is a date or a section: no number. _18_ is in
# italics, x_18 has an index.
_NUMBER = (
  r'(?<![a-zA-Z\d])(?<![a-zA-Z\d]_)(?<!\d\.)'
  r'(?P<sign>[-+]?)(?:\\?[$€£¥₹] ?(?P<sign_2>[-+]?))?(?:(?P<whole>\d+) )?'
  r'(?P<digits>(?:\d+(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d+)?)'
  r'(?(whole)(?=/))(?:/(?P<below>\d+(?:\.\d+)?))?(?!\.?\d)'
)
# Where a model that does not stop asks itself the next question.
_NEXT = r'(?<=\n)[ \t]*(?:Question:|Q:|Problem:|#+ *(?:Instruction|Input):)'
# '####' up to a number right after it, but for what may enclose that.
# (Patterns must be quick where a text is one sign, endlessly repeated.)
_MARK = r'####[\s*_:$€£¥₹({\\+-]*?(?:boxed\{[$+-]*?)?'


def _fraction(match):
  """3/4, with a blank after the whole number that it is added to."""
  before, above, below, sign = match.groups()
  text = unicodedata.normalize('NFKC', sign) if sign else f'{above}/{below}'
  return f'{before} {text}' if before else text


def _plain_numbers(text):
  """A text whose numbers are written as in a program, fractions as 1 3/4."""
  text = _GROUPS.sub('', text.translate(_PLAIN))
  text = _SPACED.sub(lambda found: re.sub(_SPACE, '', found[0]), text)
  text = _FRACTION.sub(_fraction, text).replace('\u2044', '/')
  text = _POWER_OF_TEN.sub(
    lambda found: f'{"" if found[1] else 1}e{found[2]}', text
  )
  text = _DATE.sub(lambda found: found[0].replace('/', ' / '), text)
  return _EXPONENT.sub('', text)


def _number(match):
  """The value of `_NUMBER`; None for one that no float holds."""
  parts = match.groupdict()
  if not parts.get('digits'):
    return None
  value = float(parts['digits'])
  if parts['below']:
    below = float(parts['below'])
    value = value / below if below else math.nan
  value += float(parts['whole'] or 0)
  if '-' in (parts['sign'], parts['sign_2']):
    value = -value
  return value if math.isfinite(value) else None


_LAST_NUMBER = (
  Pattern(rf'\\boxed\{{(?:(?!\\boxed)[^}}])*?{_NUMBER}'),
  Pattern(_NUMBER),
)

# The last number of a text: with units, currencies and %, which are left aside,
# of a fraction its value. Nothing else is computed.
number = Rule(_LAST_NUMBER, _number, _plain_numbers, (f'({_NEXT})',))

# The number after '####', as GSM8K marks its answers. What follows another
# question, or the blank line after a marked number, is no part of the answer;
# of what is left, the last mark counts. Without any, as `number`.
gsm8k = Rule(
  (
    Pattern(_MARK + _NUMBER),
    Pattern(r'(?s:(?<!#)#{4,}(?:(?!####).)*?)' + _NUMBER),
    Pattern('####'),
    *_LAST_NUMBER,
  ),
  _number,
  _plain_numbers,
  (
    rf'(?s:\A(?>(?!.*####)|.*?####).*?)({_NEXT})',
    rf'(?s:\A(?>.*?{_MARK}\.?\d).*?)(\n\s*\n)',
  ),
)

_CAPITAL = r'(?:(?P<a>A)|(?P<letter>[B-E]))'
# An A before a word is an article, but for words that none stands before.
_AFTER_A = (
  r'(?(a)(?! +(?!(?:and|as|because|but|for|given|is|not|or|rather|since|so|'
  r'which|with)\b)[a-z]))'
)
_ENDS = r"(?!['\u2019]?\w)"
# Small ones may be articles, variables and shortenings as well.
_ANY_CASE = (
  r'(?:(?P<a>[Aa])|(?P<letter>[B-E])|(?P<small>[b-e]))'
  + _ENDS
  + _AFTER_A
  + r'(?(small)(?!\.\w| *[=+*/^<>-]))'
)
_OPEN = r'[\s*_"\'`$\[{(]*+'
_NEGATED = r'(?<!not )(?<!nor )(?<!than )'

# A to E, of AQuA's choices. Stated ones go before those in parentheses, and
# these before bare ones.
letter = Rule(
  (
    Pattern(r'\\boxed\{(?:\\\w+\{)?' + _OPEN + r'(?P<letter>[A-Ea-e])(?!\w)'),
    Pattern(
      r'(?i:answer|option|choice)(?i: is| must be| should be| would be|:| =)+:?'
      r'(?i: thus| therefore| clearly| probably)?'
      rf'{_OPEN}(?i:(?:option|choice)\b:?)?{_OPEN}(?:\\\w+\{{)?{_OPEN}{_ANY_CASE}'
    ),
    Pattern(
      r'(?<!\w)\(?(?P<letter>[A-E])[)*]*'
      r' is (?:the |indeed |therefore |thus )*(?:answer|best|correct|right)\b'
    ),
    Pattern(_NEGATED + r'\((?P<letter>[A-E])\)'),
    Pattern(_NEGATED + r'(?<![\w(])' + _CAPITAL + _ENDS + _AFTER_A),
  ),
  lambda found: next(
    x.upper()
    for key in ('letter', 'a', 'small')
    if (x := found.groupdict().get(key))
  ),
  lambda text: text.translate(_PLAIN),
  (f'({_NEXT})',),
)

# The label that a text names first.
choice = Rule(
  (Pattern(r'\b(LABELS)\b', first=True),), lambda found: found[0], str.lower
)


def _float(match):
  try:
    value = float(match[1].replace(',', ''))
  except ValueError:  # As of 1.2.3
    return None
  return value if math.isfinite(value) else None


# LLM-Adapters' code (arXiv 2304.01933): commas are dropped, and the last number
# counts; the first capital A to E, even of a word; the first label, as spelled.
llm_adapters_math = Rule(
  (Pattern(r'(-?\d+\.?\d*)'),), _float, lambda text: text.replace(',', '')
)
llm_adapters_aqua = Rule(
  (Pattern('[A-E]', first=True),), lambda found: found[0]
)
llm_adapters_choice = Rule(
  (Pattern('LABELS', first=True),), lambda found: found[0]
)

# lm-evaluation-harness: `gsm8k` by strict match.
lm_eval_gsm8k = Rule((Pattern(r'#### (-?[0-9.,]+)', first=True),), _float)

_FORMAT = re.compile(r'Answer format: *([\w/]+)\s*$')


def labels(row):
  """('answer1', 'answer2'): what a row's last line says it may be answered."""
  found = _FORMAT.search(row.instruction)
  if not found:
    raise UserError(
      f'{row.where}: no line "Answer format: a/b/c" ends its instruction; '
      'multiple choice needs one'
    )
  return tuple(found[1].lower().split('/'))


def option_texts(row):
  """What each of `labels(row)` stands for: the label itself if nothing."""
  names = labels(row)
  pattern = '|'.join(re.escape(name.capitalize()) for name in names)
  head, *parts = re.split(
    rf'(?<!\w)({pattern}):', _FORMAT.sub('', row.instruction)
  )
  del head
  texts = {
    name.lower(): text.strip()
    for name, text in zip(parts[::2], parts[1::2], strict=True)
  }
  return tuple(texts.get(name) or name for name in names)


def same(a, b):
  """Whether two extracted answers agree; nothing agrees with None."""
  if a is None or b is None:
    return False
  if isinstance(a, float) and isinstance(b, float):
    return abs(a - b) <= TOLERANCE
  return a == b
