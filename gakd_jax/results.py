"""The final results of runs as one table; `tables` writes it.

results.json of a run has '<set>/<metric>', '<set>/<metric>_std' (over the seeds
of sampling), and '<set>/<metric>_11-50' of the references of so many tokens.
'<set>/<metric>_stderr' and '<set>/task_version' are in no table.
"""

import collections
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

from gakd_jax import report, rundir

SEED = '[-_.]?seed[-_.]?'  # 'sft-seed2' is one of several runs of 'sft'
BUCKETS = ('0-10', '11-50', '51-100', '101+')
_KEY = re.compile(
  r'(?P<set>.+)/(?P<metric>.+?)'
  rf'(_(?P<bucket>{"|".join(map(re.escape, BUCKETS))}))?(?P<std>_std)?'
)
NAMES = {
  'ce': 'CE',
  'forward_kl': 'KL(teacher, student)',
  'reverse_kl': 'KL(student, teacher)',
  'accuracy': 'accuracy',
  'rouge_l': 'ROUGE-L',
  'comet': 'COMET',
  'corpus_bleu': 'corpus BLEU',
  'corpus_chrf': 'corpus chrF',
  'exact_match': 'exact match',
  'bleu': 'BLEU',
  'chrf': 'chrF',
}
_LOSSES = ('ce', 'forward_kl', 'reverse_kl')
# Of these, and of what their names begin with (`ece_gold`), less is better.
_LESS_IS_BETTER = (*_LOSSES, 'jsd', 'ece', 'unfinished', 'left_out')
# Of a set, what stands in the first table: its losses, and one of these.
_HEADLINES = tuple(name for name in NAMES if name not in _LOSSES)


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
      if len(printed) > 1 and metric in NAMES:
        better = min if metric in _LOSSES else max
        best = better(printed.values())
        found |= {(i, j) for i, x in printed.items() if x == best}
    return found


def is_better(key, new, old):
  """Whether a value of '<set>/<metric>' is better than another, or than None.

  What is no number never is.
  """
  if math.isnan(new):
    return False
  if old is None or math.isnan(old):
    return True
  metric = key.rpartition('/')[2]
  less = any(re.fullmatch(rf'{m}(_.*)?', metric) for m in _LESS_IS_BETTER)
  return new < old if less else new > old


def title(metric):
  """What a metric is called in tables and figures."""
  return NAMES.get(metric, metric.replace('_', ' '))


def labels(runs):
  """{name: what its row is called}; a row is of runs that differ in their seed.

  Their configs tell, whatever they are called; for a model that was evaluated,
  its gakd_jax.json. Of a run about which nothing is known, or of two with one
  seed, each is a row.
  """
  groups, found = {}, {}
  for name, directory in runs.items():
    about = _about(directory)
    recipe, seed = about.get('recipe'), about.get('seed')
    group = groups.setdefault(recipe or ('alone', name), {})
    if seed in group:
      group = groups[recipe, name] = {}
    group[seed] = name
  for group in groups.values():
    # What they have in common: without their seeds, in most.
    common = {re.sub(rf'{SEED}{s}\b', '', name) for s, name in group.items()}
    single = len(common) == 1 and common.isdisjoint(found.values())
    for name in group.values():
      found[name] = min(common) if single else name
  return {name: found[name] for name in runs}


def teachers(runs):
  """The rows of those that the others should behave like."""
  label = labels(runs)
  return frozenset(label[n] for n, d in runs.items() if _is_teacher(_about(d)))


def _is_teacher(about):
  """An evaluation says so; a run of a teacher is a student of itself.

  One that was not trained: from the same path others start.
  """
  config = about.get('config') or {}
  paths = [(config.get(x) or {}).get('path') for x in ('student', 'teacher')]
  is_itself = paths[0] == paths[1] is not None
  is_trained = (config.get('train') or {}).get('steps', 0) != 0
  return about.get('is_teacher') or (is_itself and not is_trained)


def _about(directory):
  """What a run, or an evaluation of a model, says of itself."""
  for file in ('config.json', 'model.json'):
    if (Path(directory) / file).exists():
      return json.loads((Path(directory) / file).read_text())
  return {}


def _sets(runs):
  """{run: {set: what it is called}}; with other rows, one of a name is another.

  As validation and test rows are, whatever evaluator they were given to.
  """
  digests, titles = {}, {}
  for run, directory in runs.items():
    about = _about(directory)
    found = about.get('data') or about.get('contents') or {}
    digests[run] = {
      key.removeprefix('config.evals.'): x for key, x in found.items()
    }
    for name, digest in digests[run].items():
      of_name = titles.setdefault(name, {})
      title = f'{name} ({_data(about, name) or len(of_name) + 1})'
      if title in of_name.values():
        title = f'{title} {len(of_name) + 1}'
      of_name.setdefault(digest, title)
  return {
    run: {
      name: titles[name][digest] if len(titles[name]) > 1 else name
      for name, digest in found.items()
    }
    for run, found in digests.items()
  }


def _data(about, name):
  """Where the rows of an evaluator come from, as short as it can be told."""
  config = about.get('config') or {}
  settings = (config.get('evals') or {}).get(name) or {}
  spec = settings.get('data') or (config.get('data') or {}).get('validation')
  return '/'.join(Path(spec).parts[-2:]) if isinstance(spec, str) else None


def read(runs):
  """{label: [{(set, metric, bucket or None): Cell}]}, a dict for each run."""
  groups, label, sets = {}, labels(runs), _sets(runs)
  for name, directory in runs.items():
    cells = {}
    for key, value in rundir.read_results(directory).items():
      match = _KEY.fullmatch(key)
      if match and not key.endswith(('_stderr', '/task_version')):
        where = sets[name].get(match['set'], match['set'])
        where = where, match['metric'], match['bucket']
        old = cells.get(where, Cell(mean=None))
        new = {'std': value} if match['std'] else {'mean': value}
        cells[where] = dataclasses.replace(old, **new)
    cells = {k: cell for k, cell in cells.items() if cell.mean is not None}
    groups.setdefault(label[name], []).append(cells)
  return groups


def tables(groups, teachers=frozenset()):
  """Two tables, of what is compared first, and of all other results.

  Sets that share a metric have its average beside them. A set that only one of
  many was measured on compares nothing.
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
      *[x for x in _HEADLINES if x in metrics][:1],
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
      if bucket is not None and metric in NAMES:
        row = found.setdefault((where, metric), {})
        row[name] = [_cell(runs, (where, metric, b)) for b in BUCKETS]
  return found


def _table(groups, columns, teachers):
  order = {name: i for i, name in enumerate(NAMES)}
  metrics = dict.fromkeys(metric for _, metric in columns)
  ordered = []
  for metric in sorted(metrics, key=lambda m: order.get(m, len(order))):
    sets = [where for where, m in columns if m == metric]
    ordered += [(where, metric, sets) for where in sets]
    if len(sets) > 1:
      ordered.append(('average', metric, sets))
  rows = tuple(
    (
      name,
      tuple(
        _cell(runs, (where, metric, None))
        if where in sets
        else _average(runs, metric, sets)
        for where, metric, sets in ordered
      ),
    )
    for name, runs in groups.items()
  )
  columns = tuple((where, metric) for where, metric, _ in ordered)
  return Table(columns, rows, teachers)


def _cell(runs, key):
  """Of several runs the mean and deviation; of one, what it has itself."""
  cells = [cells[key] for cells in runs if key in cells]
  if len(cells) < 2:
    return cells[0] if cells else None
  means = [cell.mean for cell in cells]
  return _mean(means)


def _average(runs, metric, sets):
  """Over sets, if all are there: what others averaged would be no equal.

  One run has no deviation: those of its sets do not tell that of their mean.
  """
  keys = [(where, metric, None) for where in sets]
  means = [
    statistics.fmean(cells[key].mean for key in keys)
    for cells in runs
    if all(key in cells for key in keys)
  ]
  if len(means) < 2:
    return Cell(means[0]) if means else None
  return _mean(means)


def _mean(values):
  mean = statistics.fmean(values)
  # `stdev` computes with fractions, and no fraction is NaN.
  return Cell(mean, statistics.stdev(values) if math.isfinite(mean) else mean)


def _format(cells):
  """(mean, deviation) as texts with the same decimals in a column."""
  flat = [[x] for cell in cells if cell for x in (cell.mean, cell.std or 0.0)]
  texts = iter(text for (text,) in report.format_rows(flat))
  shown = []
  for cell in cells:
    pair = (next(texts), next(texts)) if cell else ('-', '')
    shown.append(pair if cell and cell.std is not None else (pair[0], ''))
  return shown
