"""Runs side by side: what the page about them has, and from where."""

import math
import statistics
from pathlib import Path

from gakd_jax import fingerprint, log, results, rundir
from gakd_jax.page import answers as answers_lib
from gakd_jax.page import figures, parts, rollouts, tables, training

_SPREAD = (
  '±: standard deviation, over runs that differ in their seed, or over the '
  'seeds of sampling of one run.'
)
_BOOTSTRAP = (
  'Paired bootstrap over test rows. p is two-sided and of each comparison '
  'alone; in bold, the interval of 95 % leaves 0 out.'
)


def write(path, runs, answers=6, comparisons=()):
  """Prints the comparison of runs and writes it as an HTML page.

  Runs that differ in their seed share a row: mean and standard deviation.

  Args:
    path: of the page.
    runs: {name: directory}, of a finished training or of an evaluated model.
      It has results.json, and may have config.json, metrics.jsonl,
      rollouts.jsonl, speed.json and answers/<set>-<seed>.jsonl.
    answers: how many prompts to show where there is no JavaScript, which shows
      them all; 0 leaves answers out.
    comparisons: dicts of 'set', 'metric', the models 'a' and 'b', 'difference'
      (a - b), its interval 'low' and 'high', and 'p'.
  """
  groups = results.read(runs)
  teachers = results.teachers(runs)
  first, rest = results.tables(groups, teachers)
  label = results.labels(runs)
  metrics = {
    name: (label[name], log.read_metrics(directory))
    for name, directory in runs.items()
  }
  sets = answers_lib.collect(runs) if answers else []
  palette = figures.colours(groups)
  keys = [f'{where}/{metric}' for where, metric in first.columns]
  log.print_table(['run', *keys], tables.plain(first)[1], 'Results')
  sections = [
    ('Results', _table(first) + parts.details('Other metrics', _by_set(rest))),
    ('Comparisons', _comparisons(comparisons)),
    ('Scores', _bars(first, palette)),
    (
      'By length',
      _by_length(groups, palette, metrics=first.columns)
      + parts.details(
        'Other scores', _by_length(groups, palette, metrics=rest.columns)
      ),
    ),
    (
      'By position',
      ''.join(
        _table(table, f'{where}, by the place of a token in its answer')
        for (where, _), table in results.by_position(groups, teachers).items()
      ),
    ),
    ('Training', parts.grid(training.curves(metrics, palette))),
    (
      'Critic',
      parts.grid(
        training.curves(metrics, palette, 'critic')
        + training.critic_scores(metrics)
      ),
    ),
    (
      'Rollouts',
      parts.grid(rollouts.curves(metrics, palette)) + rollouts.texts(runs),
    ),
    ('Speed and memory', _speed_table(runs)),
    ('Answers', parts.browser(sets, results.NAMES, answers)),
    ('Configuration', parts.settings(settings(runs))),
  ]
  title = Path(path).absolute().parent.name
  parts.write(path, title, _about(runs, sets), sections)
  print(f'report: {path}', flush=True)


def _about(runs, sets):
  about = 'one run' if len(runs) == 1 else f'{len(runs)} runs'
  if sets:
    prompts = sum(s['total'] for s in sets)
    where = 'one set' if len(sets) == 1 else f'{len(sets)} sets'
    about += f', {prompts:,} prompts in {where}'
  return about


def _table(table, caption=''):
  if not table.columns:
    return ''
  columns, rows = tables.plain(table)
  best = {(i, j + 1) for i, j in table.best()}
  notes = []
  if best:
    aside = ', the teacher aside' if table.teachers else ''
    notes.append(f'Best of a column in bold{aside}.')
  if any(
    cell and cell.std is not None for _, row in table.rows for cell in row
  ):
    notes.append(_SPREAD)
  return parts.table(
    caption, ['run', *columns], rows, note=' '.join(notes), best=best
  )


def _by_set(table):
  """A table of each set: one of all metrics is wider than a page."""
  by_set = {}
  for j, (where, _) in enumerate(table.columns):
    by_set.setdefault(where, []).append(j)
  return ''.join(
    _table(
      results.Table(
        tuple(table.columns[j] for j in kept),
        tuple(
          (name, tuple(cells[j] for j in kept)) for name, cells in table.rows
        ),
        table.teachers,
      )
    )
    for kept in by_set.values()
  )


def _comparisons(comparisons):
  comparisons = [*comparisons]
  reach = {}  # Of each metric its own scale.
  for c in filter(_is_known, comparisons):
    low, high, metric = abs(c['low']), abs(c['high']), c['metric']
    reach[metric] = max(low, high, reach.get(metric, 0))
  rows, best = [], set()
  for i, c in enumerate(comparisons):
    shown = ['-', '-', '', '-']  # A model's score is no number.
    if _is_known(c):
      numbers = c['difference'], c['low'], c['high']
      middle, low, high = results.difference(*numbers)
      shown = [
        middle,
        f'{low} to {high}',
        parts.interval(*numbers, reach[c['metric']]),
        '<0.001' if c['p'] < 0.001 else f'{c["p"]:.3f}',
      ]
      if c['low'] > 0 or c['high'] < 0:
        best.add((i, 4))
    rows.append([c['set'], results.title(c['metric']), c['a'], c['b'], *shown])
  if not rows:
    return ''
  columns = ['set', 'score', 'A', 'B', 'A - B', '95 % interval', '', 'p']
  return parts.table('', columns, rows, note=_BOOTSTRAP, best=best)


def _is_known(comparison):
  difference = comparison['difference']
  return difference is not None and math.isfinite(difference)


def _bars(table, palette):
  """Figures of the columns of a table in which several runs have a score."""
  shown = []
  for j, (where, metric) in enumerate(table.columns):
    rows = [(name, name, *score) for name, *score in _scores(table, j)]
    if len(rows) > 1:
      title = f'{where} {results.title(metric)}'
      shown.append(figures.bars(title, rows, palette))
  return parts.grid(shown)


def _by_length(groups, palette, *, metrics):
  """Figures of the scores by the length of the reference."""
  shown = []
  for (where, metric), runs in results.by_length(groups).items():
    table = results.Table(
      tuple((bucket, metric) for bucket in results.BUCKETS),
      tuple((name, tuple(cells)) for name, cells in runs.items()),
    )
    rows, lengths = [], 0
    for j, bucket in enumerate(results.BUCKETS):
      scores = _scores(table, j)
      lengths += bool(scores)
      names = [f'{bucket} tokens', *[''] * len(scores)]
      rows += [(x, *score) for x, score in zip(names, scores, strict=False)]
    # What is compared over a single length, or no length, is in the table.
    if (where, metric) in metrics and lengths > 1:
      title = f'{where} {results.title(metric)}'
      shown.append(figures.bars(title, rows, palette))
  return parts.grid(shown)


def _scores(table, column):
  """[(run, mean, deviation, text of both)] of those that are finite."""
  found = []
  for (name, cells), texts in zip(table.rows, table.texts(), strict=True):
    cell, text = cells[column], tables.with_deviation(*texts[column])
    if cell and math.isfinite(cell.mean):
      found.append((name, cell.mean, cell.std, text))
  return found


def _speed_table(runs):
  columns, rows = speed(runs)
  return parts.table('', columns, rows) if len(columns) > 1 else ''


def speed(runs):
  """Columns and rows: medians over steps, and over the sets decoded."""
  columns = [
    'run',
    ('training', 'tokens/s'),
    ('decoding', 'tokens/s'),
    ('decoding', 'seconds'),
    ('decoding', 'padding'),
    ('peak', 'memory, GB'),
  ]
  rows = [[name, *_speed(Path(directory))] for name, directory in runs.items()]
  used = [i for i in range(6) if any(row[i] is not None for row in rows)]
  return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


def _speed(directory):
  trained = [
    row['train/tokens_per_second']
    for row in log.read_metrics(directory)
    if 'train/tokens_per_second' in row
  ]
  decoded = rundir.read_speed(directory).values()
  memory = rundir.read_results(directory).get('peak_memory_gb')
  if not decoded:
    return _thousands(trained), None, None, None, memory
  padding = statistics.fmean(x['padding'] for x in decoded)
  return (
    _thousands(trained),
    _thousands([x['tokens_per_second'] for x in decoded]),
    f'{sum(x["seconds"] for x in decoded):,.0f}',
    f'{100 * padding:.0f} %',
    memory,
  )


def _thousands(values):
  return f'{statistics.median(values):,.0f}' if values else None


def settings(runs):
  """Every setting that was used, by run where runs differ."""
  configs = {}
  for name, directory in runs.items():
    if config := rundir.read_config(directory):
      configs[name] = fingerprint.flatten(config)
  keys = dict.fromkeys(key for config in configs.values() for key in config)
  pairs = []
  for key in keys:
    by_value = {}
    for name, config in configs.items():
      by_value.setdefault(str(config.get(key)), []).append(name)
    if len(by_value) == 1:
      pairs.append((key, next(iter(by_value))))
    else:
      lines = (f'{", ".join(names)}: {v}' for v, names in by_value.items())
      pairs.append((key, '\n'.join(lines)))
  return pairs
