"""What runs logged while they trained, as figures: losses, and the critic."""

import re

import numpy as np

from gakd_jax import report
from gakd_jax.page import figures

_SCORES = ('train/critic/histogram_teacher', 'train/critic/histogram_student')
_FIRST = ('train/loss', 'train/ce')
_CRITICS = re.compile('train/(critic/|generator|hidden_grad)')
# tokens_per_second says it; deviations and lengths are of the final results.
_NO_CURVE = re.compile(r'train/(tokens|seconds)$|.*_std$|.*_\d+(-\d+|\+)$')


def curves(metrics, palette, *, critic):
  """Figures of everything that changes over the steps, of all runs.

  Args:
    metrics: {run: (label, rows of metrics.jsonl)}; seeds share a label.
    palette: {label: colour}.
    critic: whether to draw what is about the critic, or everything else.
  """
  found = {}
  for run, (label, rows) in metrics.items():
    for row in rows:
      for metric, value in row.items():
        if metric != 'step' and not isinstance(value, list):
          lines = found.setdefault(metric, {}).setdefault(label, {})
          xs, ys = lines.setdefault(run, ([], []))
          xs.append(row['step'])
          ys.append(value)
  shown = []
  first = {metric: i for i, metric in enumerate(_FIRST)}
  for metric in sorted(found, key=lambda m: (first.get(m, len(first)), m)):
    series = {
      label: list(lines.values()) for label, lines in found[metric].items()
    }
    moves = any(len(xs) > 1 for lines in series.values() for xs, _ in lines)
    is_critic = _CRITICS.match(metric) is not None
    if moves and is_critic == critic and not _NO_CURVE.match(metric):
      shown.append(figures.curves(metric, 'step', series, palette))
  return shown


def critic_scores(metrics):
  """Figures of what the critics thought of teacher and student at the end."""
  shown = []
  palette = figures.colours(['teacher', 'student'])
  for run, (_, rows) in metrics.items():
    stairs = histogram(rows)
    if stairs:
      series = {name: [line] for name, line in stairs.items()}
      title = f'{run}: critic scores at the end'
      shown.append(figures.curves(title, 'score', series, palette))
  return shown


def histogram(rows):
  """{'teacher': (xs, ys), 'student': ...}: counts of sequences by score.

  Of the last tenth of the steps, as stairs; None without a critic.
  """
  rows = [row for row in rows if _SCORES[0] in row]
  if not rows:
    return None
  counts = [
    sum(np.array(row[metric]) for row in rows[-max(1, len(rows) // 10) :])
    for metric in _SCORES
  ]
  (seen,) = np.nonzero(counts[0] + counts[1])
  shown = slice(seen[0], seen[-1] + 1)
  edges = report.HISTOGRAM_EDGES[seen[0] : seen[-1] + 2]
  return {
    metric.rpartition('_')[2]: (
      np.repeat(edges, 2),
      np.concatenate([[0], np.repeat(n[shown], 2), [0]]),
    )
    for metric, n in zip(_SCORES, counts, strict=True)
  }
