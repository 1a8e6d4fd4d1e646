"""What students wrote while they trained: the texts, and what is told of them.

Unlike an answer, a text may be of two writers: what the teacher put into it is
marked. A run that wrote nothing has no part in it.
"""

import html
import itertools
import math
import statistics

import numpy as np

from gakd_jax import rundir
from gakd_jax.page import figures, parts, training

_SHOWN = 5  # texts of a prompt before one asks for more
_PLACE = 'train/rollout/accepted_{}'  # of a draft in its block, from 1
_ABOUT = 'What the student wrote to the same prompts as it trained.'
_LEGEND = (
  '<mark>Marked like this</mark>: what the teacher put in place of what the '
  'student had drafted.'
)


def curves(metrics, palette):
  """Figures of what all runs logged about rollouts; see `training.curves`."""
  shown = training.curves(metrics, palette, 'rollouts')
  series = {}
  for label, rows in metrics.values():
    shares = by_place(rows)
    if len(shares) > 1:
      line = range(1, len(shares) + 1), shares
      series.setdefault(label, []).append(line)
  if series:
    title = 'share of drafts accepted at the end'
    figure = figures.curves(title, 'place in the block', series, palette)
    shown.append(figure)
  return shown


def by_place(rows):
  """The share of drafts that stay at each place of a block, from the first.

  Means over the last tenth of the steps that wrote; [] without drafts.
  """
  rows = training.at_the_end(rows, _PLACE.format(1))
  shares = []
  for place in itertools.count(1):
    metric = _PLACE.format(place)
    if not any(metric in row for row in rows):
      return shares
    seen = [row[metric] for row in rows if math.isfinite(row[metric])]
    shares.append(statistics.fmean(seen) if seen else math.nan)


def texts(runs):
  """HTML of the texts of each run, by prompt; '' if there are none.

  Args:
    runs: {name: directory}; rollouts.jsonl as `rollout_log` describes it.
  """
  found = {name: rundir.read_rollouts(path) for name, path in runs.items()}
  found = {name: lines for name, lines in found.items() if lines}
  if not found:
    return ''
  is_marked = any(
    is_teachers
    for lines in found.values()
    for line in lines
    for _, is_teachers in line['pieces']
  )
  note = f'{_ABOUT} {_LEGEND}' if is_marked else _ABOUT
  first = next(iter(found))
  return f'<p class="note">{note}</p>\n' + ''.join(
    parts.details(name, _run(lines), is_open=name == first)
    for name, lines in found.items()
  )


def _run(lines):
  by_prompt = {}
  for line in lines:
    by_prompt.setdefault(line['index'], []).append(line)
  return ''.join(map(_prompt, by_prompt.values()))


def _prompt(lines):
  """One prompt, and its texts from the first step to the last."""
  prompt = '\n\n'.join(
    filter(None, [lines[0]['instruction'], lines[0]['input']])
  )
  n = min(len(lines), _SHOWN)
  shown = {round(x) for x in np.linspace(0, len(lines) - 1, n)}
  rest = [line for i, line in enumerate(lines) if i not in shown]
  heading = f'Steps in between: {len(rest)}'
  return f"""<article class="card">
<h4>Prompt</h4>{parts.text(prompt)}
{_list(lines[i] for i in sorted(shown))}
{parts.details(heading, _list(rest) if rest else '')}</article>
"""


def _list(lines):
  return f'<ol class="rollouts">{"".join(map(_text, lines))}</ol>\n'


def _text(line):
  tokens = '1 token' if line['tokens'] == 1 else f'{line["tokens"]:,} tokens'
  end = 'ended' if line['finished'] else '<strong>cut off</strong>'
  return (
    f'<li><p class="when"><b>Step {line["step"]:,}</b> {tokens}, {end}</p>'
    f'{_pieces(line["pieces"])}</li>\n'
  )


def _pieces(pieces):
  if not any(text.strip() for text, _ in pieces):
    return '<p class="empty">(nothing but white space)</p>'
  shown = ''.join(
    f'<mark>{html.escape(text)}</mark>' if is_teachers else html.escape(text)
    for text, is_teachers in pieces
  )
  return f'<p class="text">{shown}</p>'
