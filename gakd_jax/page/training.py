"""What runs logged as they trained, in figures: losses, critics, rollouts."""

import re

import numpy as np

from gakd_jax import log
from gakd_jax.page import figures

_SCORES = ('train/critic/histogram_teacher', 'train/critic/histogram_student')
_FIRST = (
  'train/loss',
  'train/ce',
  'train/rollout/tokens',
  'train/rollout/unfinished',
  'train/rollout/empty',
  'train/rollout/repetition',
)
_SECTIONS = {
  'critic': re.compile('train/(critic/|generator|hidden_grad)'),
  'rollouts': re.compile('train/(rollout/|entropy$)'),
}
# tokens_per_second says it, and `skipped` whether any was.
# by_teacher is 1 - accepted, written is what the config says, and places in a
# block are a figure of `rollouts`.
_NO_CURVE = re.compile(
  r'train/(tokens|seconds)$|train/skipped/|'
  r'train/rollout/(written|by_teacher|accepted_\d+)$'
)


def curves(metrics, palette, section=None):
  """Figures of everything that changes over the steps, of all runs.

  Args:
    metrics: {run: (label, rows of metrics.jsonl)}; seeds share a label.
    palette: {label: colour}.
    section: draw what is about the 'critic', about 'rollouts', or, None, about
      neither.
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

  def place(metric):
    is_evaluation = not metric.startswith('train/')
    return first.get(metric, len(first)), is_evaluation, metric

  for metric in sorted(found, key=place):
    series = {
      label: list(lines.values()) for label, lines in found[metric].items()
    }
    lines = [line for lines in series.values() for line in lines]
    moves = any(len(xs) > 1 for xs, _ in lines)
    moves &= any(
      any(ys) for _, ys in lines
    )  # Of zeros, there is nothing to see.
    if moves and _section(metric) == section and not _NO_CURVE.match(metric):
      shown.append(figures.curves(metric, 'step', series, palette))
  return shown


def _section(metric):
  found = (name for name, part in _SECTIONS.items() if part.match(metric))
  return next(found, None)


def at_the_end(rows, metric):
  """The last tenth, one at least, of the rows that have a metric."""
  rows = [row for row in rows if metric in row]
  return rows[-max(1, len(rows) // 10) :]


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
  rows = [x for x in rows if all(isinstance(x.get(m), list) for m in _SCORES)]
  rows = at_the_end(rows, _SCORES[0])
  if not rows:
    return None
  counts = [sum(np.array(row[metric]) for row in rows) for metric in _SCORES]
  (seen,) = np.nonzero(counts[0] + counts[1])
  shown = slice(seen[0], seen[-1] + 1)
  edges = log.HISTOGRAM_EDGES[seen[0] : seen[-1] + 2]
  return {
    metric.rpartition('_')[2]: (
      np.repeat(edges, 2),
      np.concatenate([[0], np.repeat(n[shown], 2), [0]]),
    )
    for metric, n in zip(_SCORES, counts, strict=True)
  }
