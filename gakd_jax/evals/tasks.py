"""What makes an answer good: the scores of each kind of data set.

This module and what it imports do without jax: processes that only score
start quickly (`Pool`).
"""

import dataclasses
import os
from collections.abc import Callable

from gakd_jax import UserError
from gakd_jax.evals import extract, scores

_CHUNK = 32  # rows that are sent to a process at a time
_WORTH_PROCESSES = 500  # answers; fewer are scored before processes start


@dataclasses.dataclass(frozen=True)
class Task:
  """Scores lie in [0, 100] and are means over rows, but for `corpus`."""

  scores: tuple[str, ...]  # of each answer; the first is what tables show
  corpus: tuple[str, ...] = ()  # of all answers at once
  extract: Callable | None = None  # text -> what it answers


TASKS = {
  # Dolly, SelfInst, Vicuna, S-NI, UnNI.
  'instruct': Task(
    ('rouge_l', 'bleu', 'exact_match'),
    ('corpus_bleu', 'distinct_1', 'distinct_2'),
  ),
  'summary': Task(('rouge_l', 'bleu'), ('corpus_bleu',)),
  'translation': Task(
    ('bleu', 'chrf'),
    ('corpus_bleu', 'corpus_chrf'),
  ),
  # AddSub, MultiArith, SingleEq, SVAMP, MAWPS.
  'math': Task(('accuracy',), extract=extract.number),
  'gsm8k': Task(('accuracy',), extract=extract.gsm8k),
  'aqua': Task(('accuracy',), extract=extract.letter),
  # BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA.
  'choice': Task(('accuracy',), extract=extract.choice),
}


def get(name):
  if name not in TASKS:
    raise UserError(
      f'config.evals: no task {name!r}; known are {", ".join(TASKS)}'
    )
  return TASKS[name]


def extracted(name, row, text):
  """What a text answers; None for tasks that compare whole texts."""
  rule = TASKS[name].extract
  if rule is None:
    return None
  return rule(text, extract.labels(row) if rule.has_labels else ())


def gold(name, row):
  """What should have been answered: extracted from the reference.

  Raises:
    UserError: if there is nothing.
  """
  text = row.answer or row.references[0]
  right = extracted(name, row, text)
  if right is None:
    raise UserError(
      f'{row.where}: nothing that task {name!r} could extract from {text!r}'
    )
  return right


def score(name, row, answer, first_only=False):
  """{metric: score} of one answer.

  Args:
    name: of a task.
    row: `data.sources.Row`.
    answer: text.
    first_only: score against the first reference, not the best of all.

  Raises:
    UserError: if a row's reference does not hold what the task asks for.
  """
  if TASKS[name].extract:
    correct = extract.same(extracted(name, row, answer), gold(name, row))
    return {'accuracy': 100.0 * correct}
  references = row.references[:1] if first_only else row.references
  return {
    metric: getattr(scores, metric)(answer, references)
    for metric in TASKS[name].scores
  }


def corpus_scores(name, rows, answers, first_only=False):
  """{metric: score} of all answers at once."""
  references = [r.references[:1] if first_only else r.references for r in rows]
  return {
    metric: getattr(scores, metric)(answers, references)
    for metric in TASKS[name].corpus
  }


def _score_all(name, rows, answers, first_only):
  return [
    score(name, row, answer, first_only)
    for row, answer in zip(rows, answers, strict=True)
  ]


class Pool:
  """Scores answers while the caller does something else.

  with Pool('instruct', expected=1694) as pool:
    pool.add({0: (row, answer)})
    scores = pool.results()  # {0: {'rouge_l': ...}}

  Few answers are scored at once, in this process. Processes do not change a
  result.
  """

  def __init__(self, task, *, expected, first_only=False):
    self._task = task
    self._first_only = first_only
    self._futures = []
    self._executor = None
    if expected >= _WORTH_PROCESSES:
      import loky

      # Its processes do not import __main__, as those of multiprocessing do,
      # and with it jax.
      self._executor = loky.ProcessPoolExecutor(
        min(os.cpu_count() or 1, 16), timeout=60
      )

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._executor:
      self._executor.shutdown(kill_workers=exception[0] is not None)

  def add(self, answers):
    """Takes {index: (row, answer)}."""
    items = list(answers.items())
    for i in range(0, len(items), _CHUNK):
      indices, pairs = zip(*items[i : i + _CHUNK], strict=True)
      rows, texts = zip(*pairs, strict=True)
      args = self._task, rows, texts, self._first_only
      if self._executor:
        future = self._executor.submit(_score_all, *args)
      else:
        future = _Done(_score_all(*args))
      self._futures.append((indices, future))

  def results(self):
    """{index: scores} of everything since the last call; waits for it."""
    futures, self._futures = self._futures, []
    return {
      index: result
      for indices, future in futures
      for index, result in zip(indices, future.result(), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class _Done:
  value: list

  def result(self):
    return self.value
