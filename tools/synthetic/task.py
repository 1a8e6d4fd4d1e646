"""A task and its wording: the mechanism behind all families.

A family is a function of a random generator that draws one content and returns
a `Task`. Its prompts are a text of one phrasing a line; its answer is a text
of parts, separated by blank lines, again of one phrasing a line, from likely
to rare.
"""

import itertools
import random
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


def say(rng: random.Random, task: Task) -> str:
  """One answer, each part drawn on its own."""
  lines = [line.strip() for line in task.answer.splitlines()]
  said = []
  for is_part, part in itertools.groupby(lines, bool):
    if is_part:
      phrasings = list(part)
      said += rng.choices(phrasings, ODDS[: len(phrasings)])
  return ' '.join(said)


def a(noun: str) -> str:
  """The noun with its article; right for the words of this data set."""
  return f'{"an" if noun[0] in "aeiou" else "a"} {noun}'


def cap(text: str) -> str:
  return text[0].upper() + text[1:]


def both(items) -> str:
  """'x and y', 'x, y and z'."""
  *rest, last = items
  return f'{", ".join(rest)} and {last}'
