"""Plots of a page: curves in SVG, bars in HTML, in its colours and its font.

A drawing holds only axes and lines: the texts of users stand in HTML beside it,
as there they can be escaped.
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


def bars(title, rows, palette):
  """A figure of horizontal bars, with error bars.

  Args:
    title: its heading.
    rows: (row's name, whose, mean, deviation or None, text of both). Rows that
      have another name than whose they are have a key, and '' goes on with the
      name of the row before.
    palette: {whose: colour}.
  """
  top = max([0, *(mean + (std or 0) for _, _, mean, std, _ in rows)]) or 1
  body = ''
  for name, whose, mean, std, text in rows:
    error = ''
    if std:
      low, high = max(0, mean - std), max(0, mean + std)
      error = f'<i style="{span(low / top, high / top)}"></i>'
    body += (
      f'<li><span>{html.escape(name)}</span><div class="track">'
      f'<b style="{span(0, max(0, mean) / top)};'
      f' background: {_css(palette[whose])}"></b>{error}</div>'
      f'<span class="number">{html.escape(text)}</span></li>\n'
    )
  keyed = dict.fromkeys(whose for name, whose, *_ in rows if name != whose)
  styles = {label: (palette[label], 'solid') for label in keyed}
  return _figure(title, styles, f'<ul class="bars">{body}</ul>')


def span(low, high):
  """Style of what goes from `low` to `high`, in shares of the width."""
  return f'left: {100 * low:.1f}%; width: {100 * (high - low):.1f}%'


def _css(colour):
  return colour.replace(_INK, 'currentColor')


def _styles(labels, palette):
  """{label: (colour, dash)}; what has one colour differs in its dashes."""
  seen, styles = collections.Counter(), {}
  for label in labels:
    colour = palette[label]
    styles[label] = colour, _DASHES[seen[colour] % len(_DASHES)]
    seen[colour] += 1
  return styles


def _figure(title, styles, body):
  keys = ''.join(
    f'<li style="--key: {dash} {_css(colour)}">{html.escape(label)}</li>'
    for label, (colour, dash) in styles.items()
  )
  keys = f'<ul class="keys">{keys}</ul>' if keys else ''
  return f"""<figure class="card"><figcaption>
<h3>{html.escape(title)}</h3>
{keys}</figcaption>
{body}</figure>"""


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
