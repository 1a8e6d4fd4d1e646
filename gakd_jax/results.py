"""The results of runs, and many of them as one table; `page.tables` writes it.

results.json of a training, or of a model that was evaluated, has

  step, seed, recipe  of the training; runs of one recipe differ in their seed
  template, is_teacher, peak_memory_gb
  averages            {title: the sets that it is over}
  best                {step, evaluators, metric, value} of what best/ holds, and
                      by what it is the best
  last                {step, evaluators} of the last evaluation

and of each evaluator, where it applies, `source` and `data` (its digest),
`rows` (scored), `dropped` ({reason: rows}), `shortened` prompts, `truncated`
references, `task`, `task_version` and `metrics`: {name: {'mean', 'std' over
seeds, 'stderr' over rows, 'by_seed', 'by_row' (their mean is 'mean'; null is
of an empty answer, and not counted), 'by_length' and 'by_position': {bucket:
the same}}}. null is what is not finite. Tables are of `best`.
"""

import collections
import dataclasses
import itertools
import json
import math
import re
import statistics
from pathlib import Path

from gakd_jax import log, rundir

BUCKETS = ('0-10', '11-50', '51-100', '101+')  # tokens of a reference
# Metrics: what they are called, and which is the best. Tables have them in this
# order, the losses and, of each set, one of the scores first.
_LOSSES = {
  'ce': ('CE', min),
  'forward_kl': ('KL(teacher, student)', min),
  'reverse_kl': ('KL(student, teacher)', min),
}
_SCORES = {
  'accuracy': ('accuracy', max),
  'rouge_l': ('ROUGE-L', max),
  'comet': ('COMET', max),
  'corpus_bleu': ('corpus BLEU', max),
  'corpus_chrf': ('corpus chrF', max),
  'exact_match': ('exact match', max),
  'bleu': ('BLEU', max),
  'chrf': ('chrF', max),
}
_TOKENS = _LOSSES | {
  'jsd': ('JSD', min),
  'ece': ('calibration error', min),
  'agreement': ('agreement', max),
}
_METRICS = (
  _LOSSES
  | _SCORES
  | _TOKENS
  | {'unfinished': ('unfinished', min)}
  | {  # of `evals.fidelity`
    f'{metric}_{text}': (f'{title}, {text}', best)
    for text in ('gold', 'teacher', 'student')
    for metric, (title, best) in _TOKENS.items()
  }
  | {'sequence_kl_student': ('KL(student, teacher) of an answer', min)}
)
NAMES = {metric: title for metric, (title, _) in _METRICS.items()}


@dataclasses.dataclass(frozen=True)
class Cell:
  mean: float
  std: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  columns: tuple  # (set, metric)
  rows: tuple  # (name, one `Cell` or None a column)
  teachers: frozenset = frozenset()  # names of rows

  def texts(self):
    """Of each row, a (mean, deviation or '') a column."""
    columns = [
      _format([cells[i] for _, cells in self.rows])
      for i in range(len(self.columns))
    ]
    return [[column[i] for column in columns] for i in range(len(self.rows))]

  def best(self):
    """{(row, column)} of the best of each column, as printed; ties share.

    A teacher competes with nobody. A column of one number has no best, nor one
    of an unknown metric.
    """
    texts, found = self.texts(), set()
    for j, (_, metric) in enumerate(self.columns):
      printed = {
        i: float(row[j][0])
        for i, row in enumerate(texts)
        if self.rows[i][1][j] is not None
        and self.rows[i][0] not in self.teachers
      }
      printed = {i: x for i, x in printed.items() if math.isfinite(x)}
      if len(printed) > 1 and metric in _METRICS:
        best = _METRICS[metric][1](printed.values())
        found |= {(i, j) for i, x in printed.items() if x == best}
    return found


def is_better(metric, new, old):
  """Whether a value of a metric is better than another, or than None.

  What is no finite number never is.
  """
  if not math.isfinite(new):
    return False
  if old is None or not math.isfinite(old):
    return True
  _, best = _METRICS.get(metric, (metric, max))
  return new != old and best(new, old) == new


def difference(middle, low, high):
  """Texts of a difference and its interval's ends.

  Of as many decimals as tell the ends apart, two at least.
  """
  width = high - low
  places = max(2, 1 - math.floor(math.log10(width))) if width > 0 else 2
  return [f'{x:+.{places}f}' for x in (middle, low, high)]


def title(metric):
  """What a metric is called in tables and figures."""
  return NAMES.get(metric, metric.replace('_', ' '))


def labels(runs):
  """{name: what its row is called}; a row is of runs that differ in their seed.

  Of a run whose recipe is not known, or of two with one seed, each is a row.
  """
  groups = {}
  for name, directory in runs.items():
    about = rundir.read_results(directory)
    recipe, seed = about.get('recipe'), about.get('seed')
    group = groups.setdefault(recipe or ('alone', name), {})
    if seed in group:
      group = groups[recipe, name] = {}
    group[seed] = name
  found = {
    name: _together([*group.values()])
    for group in groups.values()
    for name in group.values()
  }
  return {name: found[name] for name in runs}


def _together(names):
  """'sft-{0,1}' for sft-0 and sft-1."""
  if len(names) == 1:
    return names[0]
  columns = zip(*names, strict=False)
  same = itertools.takewhile(lambda letters: len({*letters}) == 1, columns)
  start = re.sub(r'\d+$', '', ''.join(letters[0] for letters in same))
  return f'{start}{{{",".join(name[len(start) :] for name in names)}}}'


def teachers(runs):
  """The rows of those that the others should behave like."""
  label = labels(runs)
  return frozenset(
    label[name]
    for name, directory in runs.items()
    if rundir.read_results(directory).get('is_teacher')
  )


def _evaluators(directory):
  """{set: what was measured}, with the averages over sets that are all there.

  An average has no deviation: those of its sets do not tell it.
  """
  about = rundir.read_results(directory)
  found = dict(about['best']['evaluators'])
  for name, sets in about.get('averages', {}).items():
    if found.keys() >= {*sets}:
      parts = [found[x] for x in sets]
      shared = set.intersection(*({*x['metrics']} for x in parts))
      found[name] = {
        'data': [x.get('data') for x in parts],
        'metrics': {
          metric: {
            'mean': statistics.fmean(
              _number(x['metrics'][metric]['mean']) for x in parts
            )
          }
          for metric in parts[0]['metrics']
          if metric in shared
        },
      }
  return found


def _titles(evaluators):
  """{run: {set: what it is called}} of {run: `_evaluators`}.

  With other rows, one of a name is another, as validation and test rows are.
  """
  digests, titles = {}, {}
  for run, found in evaluators.items():
    digests[run] = {
      name: json.dumps(x.get('data')) for name, x in found.items()
    }
    for name, digest in digests[run].items():
      of_name = titles.setdefault(name, {})
      source = found[name].get('source')
      where = (
        '/'.join(Path(source).parts[-2:]) if isinstance(source, str) else ''
      )
      text = f'{name} ({where or len(of_name) + 1})'
      if text in of_name.values():
        text = f'{text} {len(of_name) + 1}'
      of_name.setdefault(digest, text)
  return {
    run: {
      name: titles[name][digest] if len(titles[name]) > 1 else name
      for name, digest in found.items()
    }
    for run, found in digests.items()
  }


def read(runs):
  """{label: [{(set, metric, bucket or None): Cell}]}, a dict for each run."""
  label = labels(runs)
  evaluators = {name: _evaluators(path) for name, path in runs.items()}
  titles, groups = _titles(evaluators), {}
  for run, found in evaluators.items():
    cells = {}
    for name, evaluator in found.items():
      for metric, x in evaluator['metrics'].items():
        parts = x.get('by_length', {}) | x.get('by_position', {})
        for bucket, part in ({None: x} | parts).items():
          key = titles[run][name], metric, bucket
          cells[key] = Cell(_number(part['mean']), part.get('std'))
    groups.setdefault(label[run], []).append(cells)
  return groups


def _number(x):
  return math.nan if x is None else x


def tables(groups, teachers=frozenset()):
  """Two tables, of what is compared first, and of all other results.

  A set that only one of many was measured on compares nothing.
  """
  columns = dict.fromkeys(
    (where, metric)
    for runs in groups.values()
    for cells in runs
    for where, metric, bucket in cells
    if bucket is None
  )
  measured = collections.Counter(
    where
    for runs in groups.values()
    for where in {key[0] for cells in runs for key in cells}
  )
  of_set = {}
  for where, metric in columns:
    if measured[where] > 1 or len(groups) < 3:
      of_set.setdefault(where, []).append(metric)
  first = [
    (where, metric)
    for where, metrics in of_set.items()
    for metric in [
      *[x for x in _SCORES if x in metrics][:1],
      *[x for x in _LOSSES if x in metrics],
    ]
  ]
  rest = [column for column in columns if column not in first]
  return _table(groups, first, teachers), _table(groups, rest, teachers)


def by_length(groups):
  """{(set, metric): {label: [Cell or None, one for each of `BUCKETS`]}}."""
  found = {}
  for name, runs in groups.items():
    for where, metric, bucket in {key: 0 for cells in runs for key in cells}:
      if bucket in BUCKETS and metric in NAMES:
        row = found.setdefault((where, metric), {})
        row[name] = [_cell(runs, (where, metric, b)) for b in BUCKETS]
  return found


def by_position(groups, teachers=frozenset()):
  """{(set, metric): a `Table` by where in an answer tokens are}."""
  places = {}
  for where, metric, bucket in {
    key: 0 for runs in groups.values() for cells in runs for key in cells
  }:
    if bucket is not None and bucket not in BUCKETS:
      places.setdefault((where, metric), []).append(bucket)
  return {
    (where, metric): Table(
      tuple((bucket, metric) for bucket in buckets),
      tuple(
        (name, tuple(_cell(runs, (where, metric, b)) for b in buckets))
        for name, runs in groups.items()
      ),
      teachers,
    )
    for (where, metric), buckets in places.items()
  }


def _table(groups, columns, teachers):
  order = {name: i for i, name in enumerate(_METRICS)}
  metrics = dict.fromkeys(metric for _, metric in columns)
  columns = tuple(
    column
    for metric in sorted(metrics, key=lambda m: order.get(m, len(order)))
    for column in columns
    if column[1] == metric
  )
  rows = tuple(
    (name, tuple(_cell(runs, (*column, None)) for column in columns))
    for name, runs in groups.items()
  )
  return Table(columns, rows, teachers)


def _cell(runs, key):
  """Of several runs the mean and deviation; of one, what it has itself."""
  cells = [cells[key] for cells in runs if key in cells]
  if len(cells) < 2:
    return cells[0] if cells else None
  return Cell(*spread([cell.mean for cell in cells]))


def spread(values):
  """Mean and standard deviation of some values; of one, the latter is None."""
  mean = statistics.fmean(values)
  if len(values) < 2:
    return mean, None
  # `stdev` computes with fractions, and no fraction is NaN.
  return mean, statistics.stdev(values) if math.isfinite(mean) else math.nan


def _format(cells):
  """(mean, deviation) as texts with the same decimals in a column."""
  flat = [[x] for cell in cells if cell for x in (cell.mean, cell.std or 0.0)]
  texts = iter(text for (text,) in log.format_rows(flat))
  shown = []
  for cell in cells:
    pair = (next(texts), next(texts)) if cell else ('-', '')
    shown.append(pair if cell and cell.std is not None else (pair[0], ''))
  return shown
