"""A task and its wording: the mechanism behind all families.

A family is a function of a random generator that draws one content and returns
a `Task`. Its prompts are a text of one phrasing a line; its answer is a text
of parts, separated by blank lines, again of one phrasing a line, from likely
to rare.
"""

import itertools
import random
import re
from typing import NamedTuple

ODDS = (6, 3, 1)  # of an answer part's phrasings, in their order


class Task(NamedTuple):
  """`key` is the content: the same, however the task is worded."""

  key: tuple
  prompts: str
  answer: str
  input: str = ''


def ask(rng: random.Random, task: Task) -> str:
  """One of the prompts, all equally likely."""
  return rng.choice(task.prompts.strip().splitlines()).strip()


def parts(answer: str) -> list[list[str]]:
  """The phrasings of each part of a task's answer."""
  lines = [line.strip() for line in answer.splitlines()]
  return [
    list(part) for is_part, part in itertools.groupby(lines, bool) if is_part
  ]


def say(rng: random.Random, task: Task) -> str:
  """One answer, each part drawn on its own."""
  said = []
  for phrasings in parts(task.answer):
    said += rng.choices(phrasings, ODDS[: len(phrasings)])
  return ' '.join(said)


def share_said(answer: str, said: str) -> float:
  """The share of a text's sentences that are parts of an answer, in order.

  Of the answer's parts, where these are more: what is missing is wrong too.
  """
  rest, left, right, wrong = said.strip(), parts(answer), 0, 0
  n = len(left)
  while rest:
    length, skipped = max(
      (
        (len(phrasing), -i)
        for i, phrasings in enumerate(left)
        for phrasing in phrasings
        if re.match(re.escape(phrasing) + r'(?!\S)', rest)
      ),
      key=lambda x: (x[1], x[0]),
      default=(0, 0),
    )
    if length:
      right, left = right + 1, left[1 - skipped :]
    else:
      end = re.search(r'[.!?](?!\S)', rest)
      wrong, length = wrong + 1, end.end() if end else len(rest)
    rest = rest[length:].lstrip()
  return right / max(n, right + wrong)


def a(noun: str) -> str:
  """The noun with its article; right for the words of this data set."""
  return f'{"an" if noun[0] in "aeiou" else "a"} {noun}'


def cap(text: str) -> str:
  return text[0].upper() + text[1:]


def both(items) -> str:
  """'x and y', 'x, y and z'."""
  *rest, last = items
  return f'{", ".join(rest)} and {last}'
