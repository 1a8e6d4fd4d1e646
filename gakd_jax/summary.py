"""Runs side by side: one table, their curves, and what they answered."""

import json
import statistics
from pathlib import Path

import numpy as np

from gakd_jax import report, report_html, rundir

_SEED = '-seed'  # 'sft-seed2' is one of several runs of 'sft'
# What the table compares; results.json of each run has everything.
_SHOWN = ('rouge_l', 'ce', 'forward_kl', 'reverse_kl')
_SCORES = ('train/critic/histogram_teacher', 'train/critic/histogram_student')
_FIRST_CURVES = ('train/loss', 'train/ce')
_NO_CURVE = ('train/tokens', 'train/seconds')  # tokens_per_second says it


def write(path, runs, answers=6):
  """Prints the comparison of finished runs and writes it as an HTML page.

  Runs named <name>-seed<n> share a row: mean and standard deviation.

  Args:
    path: of the page.
    runs: {name: run directory}.
    answers: how many prompts to show with everybody's answer.
  """
  columns, rows = table(runs)
  metrics = {name: report.read_metrics(path) for name, path in runs.items()}
  report.print_table(columns, rows, 'Results')
  report_html.write_report(
    path,
    title=Path(path).absolute().parent.name,
    summary=_settings(runs),
    tables=[('Results', columns, rows)],
    curves=_curves(metrics) + _histograms(metrics),
    answers=_answers(runs, answers),
  )
  print(f'report: {path}', flush=True)


def table(runs):
  """Columns and rows of the final results, in the order of the runs."""
  groups = {}
  for name, directory in runs.items():
    results = rundir.read_results(directory)
    groups.setdefault(name.partition(_SEED)[0], []).append(results)
  metrics = list(
    dict.fromkeys(
      metric
      for group in groups.values()
      for results in group
      for metric in results
      if metric.rpartition('/')[2] in _SHOWN
    )
  )
  rows = [
    [name.replace('_', ' ')] + [_cell(group, m) for m in metrics]
    for name, group in groups.items()
  ]
  return ['run', *metrics], rows


def _cell(results, metric):
  values = [r[metric] for r in results if metric in r]
  if len(values) < 2:
    return values[0] if values else None
  mean, std = statistics.fmean(values), statistics.stdev(values)
  digits = 2 if abs(mean) >= 10 else 3
  return f'{mean:.{digits}f} ± {std:.{digits}f}'


def _curves(metrics):
  curves = {}
  for name, rows in metrics.items():
    for row in rows:
      for metric, value in row.items():
        if metric != 'step' and not isinstance(value, list):
          xs, ys = curves.setdefault(metric, {}).setdefault(name, ([], []))
          xs.append(row['step'])
          ys.append(value)
  return [
    (metric, 'step', series)
    for metric, series in sorted(curves.items(), key=_importance)
    if metric not in _NO_CURVE and any(len(x) > 1 for x, _ in series.values())
  ]


def _histograms(metrics):
  """What the critic thought of teacher and student at the end, as stairs.

  Of the last tenth of the steps, counts of sequences by score.
  """
  figures = []
  for name, rows in metrics.items():
    rows = [row for row in rows if _SCORES[0] in row]
    if not rows:
      continue
    counts = [
      sum(np.array(row[metric]) for row in rows[-max(1, len(rows) // 10) :])
      for metric in _SCORES
    ]
    (seen,) = np.nonzero(counts[0] + counts[1])
    shown = slice(seen[0], seen[-1] + 1)
    edges = report.HISTOGRAM_EDGES[seen[0] : seen[-1] + 2]
    stairs = {
      metric.rpartition('_')[2]: (
        np.repeat(edges, 2),
        np.concatenate([[0], np.repeat(n[shown], 2), [0]]),
      )
      for metric, n in zip(_SCORES, counts, strict=True)
    }
    figures.append((f'{name}: critic scores at the end', 'score', stairs))
  return figures


def _importance(curve):
  return curve[0] not in _FIRST_CURVES, curve[0]


def _answers(runs, count):
  """The first prompts, with the answers of each run's first answers file."""
  shown = {}
  for name, directory in runs.items():
    files = sorted((Path(directory) / 'answers').glob('*.jsonl'))
    text = files[0].read_text('utf-8') if files else ''
    # Not splitlines: an answer may hold other line separators.
    for line in text.split('\n')[:-1][:count]:
      row = json.loads(line)
      prompt = '\n'.join(filter(None, [row['instruction'], row['input']]))
      first = {'prompt': prompt, 'references': row['references']}
      shown.setdefault(prompt, first)[name] = row['answer']
  return list(shown.values())


def _settings(runs):
  """Every setting that was used, by run where runs differ."""
  configs = {
    name: rundir.flatten(
      json.loads((Path(directory) / 'config.json').read_text())['config']
    )
    for name, directory in runs.items()
    if (Path(directory) / 'config.json').exists()
  }
  keys = dict.fromkeys(key for config in configs.values() for key in config)
  pairs = []
  for key in keys:
    values = {name: config.get(key) for name, config in configs.items()}
    if len(set(map(str, values.values()))) == 1:
      pairs.append((key, str(next(iter(values.values())))))
    else:
      text = ', '.join(f'{name}: {value}' for name, value in values.items())
      pairs.append((key, text))
  return pairs
