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
  """The share of an answer's parts that a text says, in their order.

  One that says something else besides all parts has said one thing too many.
  """
  all_parts = parts(answer)
  right, start, found = 0, 0, []
  for phrasings in all_parts:
    places = [(said.find(x, start), x) for x in phrasings]
    places = [(at, x) for at, x in places if at >= 0]
    if places:
      at, phrasing = min(places)
      right, start = right + 1, at + len(phrasing)
      found.append(phrasing)
  more = right == len(all_parts) and said.strip() != ' '.join(found)
  return right / (len(all_parts) + more)


def a(noun: str) -> str:
  """The noun with its article; right for the words of this data set."""
  return f'{"an" if noun[0] in "aeiou" else "a"} {noun}'


def cap(text: str) -> str:
  return text[0].upper() + text[1:]


def both(items) -> str:
  """'x and y', 'x, y and z'."""
  *rest, last = items
  return f'{", ".join(rest)} and {last}'
