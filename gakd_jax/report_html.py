"""The report of a run as one HTML page that needs nothing but itself.

User text goes through `html.escape` and never into a figure, which therefore
holds only axes and lines; its colours and font are those of the page.
"""

import collections
import html
import io
import itertools
import string

from gakd_jax import report

_INK = '#123456'  # What stands in a figure for the page's text colour.
# Okabe and Ito's colours, which the colour-blind can tell apart, less yellow,
# which fades on white.
_COLOURS = (
  *('#0072b2', '#e69f00', '#009e73', '#d55e00', '#cc79a7', '#56b4e9'),
  _INK,
)
_DASHES = ('solid', 'dashed', 'dotted')  # Of one colour in a figure.


def write_report(path, *, title, summary=(), tables=(), curves=(), answers=()):
  """Writes the page.

  Args:
    path: the file to write, `report.html` of a run.
    title: the page's heading.
    summary: (label, value) pairs, the configuration: shown collapsed.
    tables: (title, columns, rows); cells are text, numbers or None.
    curves: (title, xlabel, {label: (xs, ys)}). A label has the same colour in
      all curves.
    answers: one dict per prompt: 'prompt', 'reference' or 'references' (a text
      or several), and every other key a model's name with its answer.
  """
  labels = dict.fromkeys(label for *_, series in curves for label in series)
  colours = dict(zip(labels, itertools.cycle(_COLOURS), strict=False))
  sections = [
    _section('Results', [_table(*table) for table in tables]),
    _section('Training', [_figure(*curve, colours) for curve in curves]),
    _section('Sample answers', [_answers(row) for row in answers]),
    _summary(summary),
  ]
  page = string.Template(_PAGE).substitute(
    title=html.escape(title),
    style=_STYLE,
    script=_SCRIPT,
    body=''.join(sections),
  )
  report.write_atomically(path, page)


def _section(heading, parts):
  if not parts:
    return ''
  body = '\n'.join(parts)
  return f'<section><h2>{heading}</h2><div>{body}</div></section>\n'


def _table(title, columns, rows):
  rows = report.format_rows(rows)
  kinds = [
    ' class="number"' if report.is_numeric([row[i] for row in rows]) else ''
    for i in range(len(columns))
  ]
  head = ''.join(
    f'<th scope="col"{kind}><button>{html.escape(name)}</button></th>'
    for name, kind in zip(columns, kinds, strict=True)
  )
  body = ''
  for name, *cells in rows:
    body += f'<tr><th scope="row"{kinds[0]}>{html.escape(name)}</th>'
    for cell, kind in zip(cells, kinds[1:], strict=True):
      body += f'<td{kind}>{html.escape(cell)}</td>'
    body += '</tr>\n'
  return f"""<div class="card"><h3>{html.escape(title)}</h3>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div></div>"""


def _figure(title, xlabel, series, colours):
  lines, keys, seen = [], '', collections.Counter()
  for label, (xs, ys) in series.items():
    colour = colours[label]
    dash = _DASHES[seen[colour] % len(_DASHES)]
    seen[colour] += 1
    lines.append((xs, ys, {'color': colour, 'linestyle': dash}))
    key = f'{dash} {colour}'.replace(_INK, 'currentColor')
    keys += f'<li style="--key: {key}">{html.escape(label)}</li>'
  return f"""<figure class="card"><figcaption>
<h3>{html.escape(title)}</h3>
<ul class="keys">{keys}</ul></figcaption>
{_svg(lines, xlabel)}</figure>"""


def _svg(lines, xlabel):
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
    figure = Figure(figsize=(4.6, 2.6))
    axes = figure.add_axes((0.13, 0.19, 0.85, 0.73))
    for xs, ys, style in lines:
      marker = 'o' if len(xs) == 1 else None
      axes.plot(xs, ys, linewidth=1.5, marker=marker, **style)
    axes.grid(axis='y', color=_INK, alpha=0.15, linewidth=0.8)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    axes.tick_params(axis='y', length=0)
    axes.set_xlabel(xlabel, color=_INK)
    file = io.StringIO()
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(file, format='svg', transparent=True, metadata=nothing)
  svg = file.getvalue()
  return svg[svg.index('<svg') :].replace(_INK, 'currentColor')


def _answers(row):
  row = dict(row)
  prompt = row.pop('prompt')
  texts = row.pop('reference', None) or row.pop('references', ())
  texts = [texts] if isinstance(texts, str) else texts
  name = 'Reference' if len(texts) == 1 else 'References'
  given = ''.join(_text(text) for text in texts)
  models = ''.join(
    f'<div><h4>{html.escape(model)}</h4>{_text(answer)}</div>'
    for model, answer in row.items()
  )
  return f"""<article class="card">
<h4>Prompt</h4>{_text(prompt)}
<div class="reference"><h4>{name}</h4>{given}</div>
<div class="models">{models}</div></article>"""


def _text(text):
  text = text.strip('\n')
  if not text.strip():
    return '<p class="empty">(empty)</p>'
  return f'<p class="text">{html.escape(text)}</p>'


def _summary(summary):
  if not summary:
    return ''
  items = ''.join(
    f'<dt>{html.escape(str(label))}</dt><dd>{html.escape(str(value))}</dd>\n'
    for label, value in summary
  )
  return (
    '<details class="card"><summary>Configuration</summary>'
    f'<dl>{items}</dl></details>'
  )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
<script>$script</script>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --muted: #59636e; --line: #dde2e8; --accent: #0a5cad;
  --page: #f5f6f8; --card: #fff;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --muted: #98a2ae; --line: #343a43; --accent: #7cb7f5;
    --page: #111316; --card: #1a1d21;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; color: var(--ink); background: var(--page);
  font: 1rem/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
}
main { max-width: 76rem; margin: auto; padding: clamp(1rem, 3vw, 2.5rem); }
h1 { margin: 0 0 .5rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1rem; }
h4 { margin: 0; font-size: .8rem; color: var(--muted); }
.card {
  margin: 0 0 1rem; padding: 1rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem;
}
.scroll { overflow-x: auto; }

table { width: 100%; border-spacing: 0; }
th, td { padding: .45rem .75rem; text-align: left; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
thead th, td { white-space: nowrap; }
tbody th { font-weight: 500; }
tbody tr:hover > * { background: var(--page); }
th:first-child { position: sticky; left: 0; background: var(--card); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th button {
  all: unset; cursor: pointer; font-size: .85rem; font-weight: 600;
  line-height: 1.25; color: var(--muted);
}
th button:hover, th[aria-sort] button { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: ' ↑'; }
th[aria-sort=descending] button::after { content: ' ↓'; }

:has(> figure) { display: grid; gap: 1rem; }
figure.card { margin: 0; min-width: 0; }
@media (min-width: 50rem) {
  :has(> figure + figure) { grid-template-columns: 1fr 1fr; }
}
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg text { font-family: inherit !important; }
.keys {
  display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin: .25rem 0 .5rem;
  padding: 0; list-style: none; font-size: .85rem;
}
.keys li::before {
  display: inline-block; width: 1.4em; margin-right: .4em;
  border-top: .2em var(--key); vertical-align: .25em; content: '';
}

.text, .empty { margin: .15rem 0 .6rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.empty { color: var(--muted); font-style: italic; }
.reference { padding-left: .8rem; border-left: 3px solid var(--accent); }
.models {
  display: grid; gap: .75rem 1.5rem; margin-top: .9rem; padding-top: .75rem;
  border-top: 1px solid var(--line); font-size: .92rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 14.5rem), 1fr));
}
.models h4 { color: var(--accent); }

details.card { margin-top: 2.25rem; }
summary { cursor: pointer; font-weight: 600; }
dl {
  display: grid; grid-template-columns: auto 1fr; gap: .3rem 1.5rem;
  align-items: baseline;
}
dt { color: var(--muted); }
dd {
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.6 ui-monospace, Menlo, Consolas, monospace;
}
@media (max-width: 40rem) {
  .card { padding: .8rem; }
  th, td { padding: .4rem .5rem; }
  figure svg text { font-size: 11.5px !important; } /* Scales with the svg. */
  dl { display: block; }
  dd { margin-bottom: .5rem; }
}
@media print {
  :root { font-size: 9pt; }
  body { background: none; }
  .card { break-inside: avoid; }
  .scroll { overflow: visible; }
  :has(> figure + figure) { grid-template-columns: 1fr 1fr; }
  h2 { break-after: avoid; }
  details::details-content { content-visibility: visible; }
}
"""

# A click sorts by the column, a second one the other way; cells without a
# number stay below those with one.
_SCRIPT = """
for (const th of document.querySelectorAll('thead th')) {
  th.firstChild.onclick = () => {
    const up = th.ariaSort !== 'ascending', sign = up ? 1 : -1;
    const text = row => row.cells[th.cellIndex].textContent;
    const compare = (a, b) => {
      const [x, y] = [parseFloat(text(a)), parseFloat(text(b))];
      if (isNaN(x) && isNaN(y)) return sign * text(a).localeCompare(text(b));
      return isNaN(x) - isNaN(y) || sign * (x - y);
    };
    for (const other of th.parentNode.cells) other.removeAttribute('aria-sort');
    th.ariaSort = up ? 'ascending' : 'descending';
    const body = th.closest('table').tBodies[0];
    body.append(...[...body.rows].sort(compare));
  };
}
"""
