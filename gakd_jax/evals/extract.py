"""What a text answers: a number, a letter, or one of a row's options.

Each function returns None where there is no such thing in a text.
"""

import math
import re

from gakd_jax import UserError

# Full-width forms, and the minus, dashes and hyphens that stand for a sign.
_PLAIN = {i: i - 0xFEE0 for i in range(0xFF01, 0xFF5F)}
_PLAIN |= dict.fromkeys(map(ord, '\u2010\u2011\u2012\u2013\u2212\ufe63'), '-')
# What groups the digits of a number by three, or, as in India, by two: a comma,
# LaTeX's {,} and \, and blanks that do not break.
_GROUPS = re.compile(
  r'(?<=\d)(?:,|\{,\}|\\,|[\u00a0\u2009\u202f])(?=(?:\d\d,)*\d{3}(?!\d))'
)
# Signs belong to a number unless something stands before them: 8-4 has a 4, and
# -$4 is -4. With two points it is a date or a section: no number.
_NUMBER = re.compile(
  r'(?<![a-zA-Z_\d])(?<!\d\.)([-+]?)(?:\\?[$€£¥₹]([-+]?))?'
  r'(\d+(?:\.\d+)?|(?<!\.)\.\d+)(?!\.?\d)'
)
# '####' with a number right after it, but for what may enclose that.
_MARKED = re.compile(r'####[\s*:$€£¥₹({\\+-]*(?:boxed\{[$+-]*)?\.?\d')
# Where a model that does not stop asks itself the next question.
_NEXT = re.compile(r'\n\s*(?:Question:|Q:|Problem:|#+ *(?:Instruction|Input):)')
_BLANK_LINE = re.compile(r'\n\s*\n')
_LETTER = re.compile(
  # The first of these that occurs; of it, what the text says last. An A before
  # a word is an article, but for words that none stands before.
  r'(?i:answer)(?: is|:)[\s:*]*(?i:option |choice )?\(?'
  r'([B-E](?!\w)|A(?!\w)(?! +[a-z])|A(?= (?:as|because|but|for|since) ))'
  r'|\(([A-E])\)'
  r'|(?<!\w)([B-E](?!\w)|A(?!\w)(?! +[a-z]))',
  re.ASCII,
)
_FORMAT = re.compile(r'Answer format: *([\w/]+)\s*$')
TOLERANCE = 1e-3


def number(text):
  """The last number of a text; its thousands may have commas.

  As LLM-Adapters reads answers, without what follows another question. Units,
  currencies and % are left aside, and nothing is computed: of 3/4, the last
  number is 4. What no float holds is no number.
  """
  found = _numbers(_before_next(text)) or _numbers(text)
  return found[-1] if found else None


def gsm8k(text):
  """The number after '####', as GSM8K marks its answers.

  What follows another question, or the blank line after a marked number, is no
  part of the answer; of what is left, the last mark counts. A text without any
  mark is read by `number`.
  """
  if '####' not in text:
    return number(text)
  following = _NEXT.search(text, text.index('####'))
  text = _plain(text[: following.start()] if following else text)
  mark = _MARKED.search(text)
  if mark:
    over = _BLANK_LINE.search(text, mark.end())
    text = text[: over.start()] if over else text
    start = [*_MARKED.finditer(text)][-1].start()
  else:
    start = text.rindex('####')
  found = _numbers(text[start:])
  return found[0] if found else None


def _before_next(text):
  following = _NEXT.search(text)
  return text[: following.start()] if following else text


def _plain(text):
  return text.translate(_PLAIN)


def _numbers(text):
  """All numbers of a text; None in place of one that no float holds."""
  found = _NUMBER.findall(_GROUPS.sub('', _plain(text)))
  values = [float(f'{a or b}{digits}') for a, b, digits in found]
  return [x if math.isfinite(x) else None for x in values]


def letter(text):
  """A to E, of AQuA's choices."""
  for part in (_before_next(text), text):
    found = [match.groups() for match in _LETTER.finditer(_plain(part))]
    for kind in zip(*found, strict=True):
      letters = [x for x in kind if x]
      if letters:
        return letters[-1]
  return None


def labels(row):
  """('answer1', 'answer2'): what a row's last line says it may be answered."""
  found = _FORMAT.search(row.instruction)
  if not found:
    raise UserError(
      f'{row.where}: no line "Answer format: a/b/c" ends its instruction; '
      'multiple choice needs one'
    )
  return tuple(found[1].lower().split('/'))


def choice(text, labels):
  """The label that a text names first."""
  found = re.search(rf'\b({"|".join(map(re.escape, labels))})\b', text.lower())
  return found and found[1]


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
