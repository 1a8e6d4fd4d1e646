"""What a text answers: a number, a letter, or one of a row's options.

Each function returns None where there is no such thing in a text.
"""

import re

from gakd_jax import UserError

# Signs belong to a number unless something stands before them: 8-4 has a 4.
_NUMBER = re.compile(r'(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)')
_LETTER = re.compile(
  # The first of these that occurs; of it, what the text says last. An A before
  # a word is an article.
  r'[Aa]nswer(?: is|:)[\s:*]*(?:option )?\(?([A-E])(?![\w])(?! +[a-z])'
  r'|\(([A-E])\)'
  r'|(?<![\w])([A-E])(?![\w])(?! +[a-z])'
)
_FORMAT = re.compile(r'Answer format: *([\w/]+)\s*$')
TOLERANCE = 1e-3


def number(text):
  """The last number of a text; its thousands may have commas."""
  found = _NUMBER.findall(re.sub(r'(?<=\d),(?=\d{3}\b)', '', text))
  return float(found[-1]) if found else None


def gsm8k(text):
  """The first number after the last '####', as GSM8K marks its answers."""
  _, mark, marked = text.rpartition('####')
  if not mark:
    return number(text)
  found = _NUMBER.findall(re.sub(r'(?<=\d),(?=\d{3}\b)', '', marked))
  return float(found[0]) if found else None


def letter(text):
  """A to E, of AQuA's choices."""
  found = [match.groups() for match in _LETTER.finditer(text)]
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
