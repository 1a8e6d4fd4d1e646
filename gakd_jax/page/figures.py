"""Plots of a page: SVG in the colours and the font of the page.

A figure holds only axes, lines and bars: the texts of users stand in HTML
beside it, as there they can be escaped.
"""

import collections
import html
import io
import itertools

import numpy as np

_INK = '#123456'  # What stands in a figure for the page's text colour.
# Okabe and Ito's colours, which the colour-blind can tell apart, less yellow,
# which fades on white; and two more, for many runs.
_COLOURS = (
  *('#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9'),
  *(_INK, '#7a5bb5', '#8a6239'),
)
_DASHES = ('solid', 'dashed', 'dotted')  # Of one colour in a figure.
_SIZE = (4.6, 2.5)  # Inches; the page scales it.
_BOX = (0.13, 0.2, 0.85, 0.75)  # The axes in it: left, bottom, width, height.


def colours(labels):
  """{label: colour}, the same in all figures of a page."""
  labels = dict.fromkeys(labels)
  return dict(zip(labels, itertools.cycle(_COLOURS), strict=False))


def css(colour):
  return colour.replace(_INK, 'currentColor')


def curves(title, xlabel, series, palette):
  """A figure of lines.

  Args:
    title: its heading.
    xlabel: what x is.
    series: {label: [(xs, ys)]}: the lines of one label, which look alike.
    palette: {label: colour}.
  """
  styles = _styles(series, palette)

  def draw(axes):
    for label, lines in series.items():
      colour, dash = styles[label]
      for xs, ys in lines:
        axes.plot(
          xs,
          ys,
          color=colour,
          linestyle=dash,
          linewidth=1.5 if len(lines) == 1 else 1.1,
          marker='o' if len(xs) == 1 else None,
        )
    if all(
      np.asarray(xs).dtype.kind == 'i'
      for lines in series.values()
      for xs, _ in lines
    ):
      axes.locator_params(axis='x', integer=True)

  return _figure(title, styles, _svg(draw, xlabel))


def bars(title, xlabel, groups, series, palette):
  """A figure of bars, side by side in each group, with error bars.

  Args:
    title: its heading.
    xlabel: what the groups are.
    groups: their names, which must be no text of users.
    series: {label: [(height, deviation)]}, one for each group; a height may be
      NaN, and a deviation 0.
    palette: {label: colour}.
  """
  width = 0.8 / len(series)

  def draw(axes):
    for i, (label, cells) in enumerate(series.items()):
      heights, deviations = np.array(cells, float).T
      axes.bar(
        np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width,
        heights,
        width * 0.9,
        color=palette[label],
        yerr=np.where(deviations > 0, deviations, np.nan),
        error_kw={'ecolor': _INK, 'elinewidth': 1, 'capsize': 2},
      )
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis='x', length=0, pad=6)
    axes.set_ylim(bottom=0)

  styles = {label: (palette[label], 'solid') for label in series}
  return _figure(title, styles, _svg(draw, xlabel))


def _styles(labels, palette):
  """{label: (colour, dash)}; what has one colour differs in its dashes."""
  seen, styles = collections.Counter(), {}
  for label in labels:
    colour = palette[label]
    styles[label] = colour, _DASHES[seen[colour] % len(_DASHES)]
    seen[colour] += 1
  return styles


def _figure(title, styles, svg):
  keys = ''.join(
    f'<li style="--key: {dash} {css(colour)}">{html.escape(label)}</li>'
    for label, (colour, dash) in styles.items()
  )
  return f"""<figure class="card"><figcaption>
<h3>{html.escape(title)}</h3>
<ul class="keys">{keys}</ul></figcaption>
{svg}</figure>"""


def _svg(draw, xlabel):
  import matplotlib  # Slow to import, and only a finished run draws.
  from matplotlib.figure import Figure

  settings = {
    'svg.fonttype': 'none',  # Text stays text, in the font of the page.
    'svg.hashsalt': 'gakd_jax',  # The same curves give the same file.
    'font.size': 9.5,
    'path.simplify_threshold': 0.5,  # Pixels: a long run stays a small file.
    # Short tick labels, so that fixed margins hold them: to measure each
    # figure's own takes half of the time.
    'axes.formatter.limits': (-3, 4),
  } | dict.fromkeys(('axes.edgecolor', 'xtick.color', 'ytick.color'), _INK)
  with matplotlib.rc_context(settings):
    figure = Figure(figsize=_SIZE)
    axes = figure.add_axes(_BOX)
    draw(axes)
    axes.grid(axis='y', color=_INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(axis='y', length=0)
    axes.set_xlabel(xlabel, color=_INK)
    file = io.StringIO()
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(file, format='svg', transparent=True, metadata=nothing)
  svg = file.getvalue()
  # The heading and the keys beside it say what is to see.
  svg = svg[svg.index('<svg') :].replace('<svg', '<svg aria-hidden="true"', 1)
  return svg.replace(_INK, 'currentColor')
