"""The pieces of report.html, one page that needs nothing but itself.

Every text goes through `html.escape`, or, for the script, through
`answers.to_script`. Without JavaScript the page lacks what can be sorted,
searched and picked, and nothing else.
"""

import html
import string
from pathlib import Path

from gakd_jax import log
from gakd_jax.page import answers as answers_lib
from gakd_jax.page import figures

_FILES = Path(__file__).parent


def write(path, title, about, sections):
  """Writes the page.

  Args:
    path: the file to write.
    title: the page's heading.
    about: a line below it.
    sections: (heading, HTML); those without HTML are left out.
  """
  sections = {heading: body for heading, body in sections if body}
  page = _template('page.html').substitute(
    title=html.escape(title),
    about=f'<p class="note">{html.escape(about)}</p>' if about else '',
    contents=_contents(sections) if len(sections) > 1 else '',
    body=''.join(
      f'<section id="{_id(heading)}"><h2>{heading}</h2>\n{body}</section>\n'
      for heading, body in sections.items()
    ),
    style=_read('style.css'),
    script=_read('tables.js') + _read('answers.js'),
  )
  log.write_atomically(path, page)


def table(title, columns, rows, *, note='', best=()):
  """A table that a click on a column's head sorts.

  Args:
    title: its heading; '' for none.
    columns: their names, or (set, name) in two lines.
    rows: of texts, numbers, None, or `Html` that stands for a number.
    note: what there is to say below it.
    best: (row, column) of the cells in bold.
  """
  texts = log.format_rows(
    [[x.text if isinstance(x, Html) else x for x in row] for row in rows]
  )
  kinds = [
    ' class="number"' if log.is_numeric([row[i] for row in texts]) else ''
    for i in range(len(columns))
  ]
  head = ''.join(
    f'<th scope="col"{kind}><button type="button">{_head(name)}</button></th>'
    for name, kind in zip(columns, kinds, strict=True)
  )
  body = ''
  for i, cells in enumerate(texts):
    body += f'<tr><th scope="row"{kinds[0]}>{html.escape(cells[0])}</th>'
    for j, text in enumerate(cells[1:], start=1):
      shown = html.escape(text)
      if (i, j) in best:
        shown = f'<strong>{shown}</strong>'
      if isinstance(rows[i][j], Html):
        shown = rows[i][j].html
        body += f'<td data-value="{html.escape(text)}">{shown}</td>'
      else:
        body += f'<td{kinds[j]}>{shown}</td>'
    body += '</tr>\n'
  heading = f'<h3>{html.escape(title)}</h3>' if title else ''
  label = html.escape(title or 'Table')
  note = f'<p class="note">{html.escape(note)}</p>' if note else ''
  return f"""<div class="card">{heading}
<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>
<thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>{note}</div>
"""


class Html:
  """A cell that is drawn; it sorts by `text`, a number."""

  def __init__(self, text, html):
    self.text, self.html = text, html


def interval(middle, low, high, reach):
  """A point and its interval around 0, on a scale of -reach to reach."""

  def place(x):
    return 0.5 + 0.5 * x / (reach or 1)

  return Html(
    str(middle),
    '<div class="interval" aria-hidden="true"><u></u>'
    f'<i style="{figures.span(place(low), place(high))}"></i>'
    f'<b style="left: {100 * place(middle):.1f}%"></b></div>',
  )


def grid(parts):
  return f'<div class="grid">{"".join(parts)}</div>\n' if parts else ''


def details(heading, body, *, is_open=False):
  if not body:
    return ''
  heading = html.escape(heading)
  tag = '<details open>' if is_open else '<details>'
  return f'{tag}<summary>{heading}</summary>\n{body}</details>\n'


def text(text):
  """A paragraph of what somebody wrote, its lines as they are."""
  text = text.strip('\n')
  if not text.strip():
    return '<p class="empty">(empty)</p>'
  return f'<p class="text">{html.escape(text)}</p>'


def browser(sets, names, first):
  """The browser of answers.

  Args:
    sets: see `answers.collect`.
    names: {metric: how it is called}.
    first: how many prompts of the first set to show without JavaScript.
  """
  if not any(s['rows'] for s in sets):
    return ''
  cut = '; '.join(
    f'{s["name"]}, the first {len(s["rows"])} of {s["total"]} rows'
    for s in sets
    if len(s['rows']) < s['total']
  )
  note = f'<p class="note">Cut to fit: {html.escape(cut)}.</p>' if cut else ''
  static = [_answer(row) for row in sets[0]['rows'][:first]]
  return _template('answers.html').substitute(
    note=note,
    static='\n'.join(static),
    data=answers_lib.to_script({'sets': sets, 'names': names}),
  )


def _answer(row):
  """A prompt, and what everybody answered with the first seed."""
  prompt = '\n\n'.join(filter(None, [row['prompt'], row['input']]))
  name = 'Reference' if len(row['references']) == 1 else 'References'
  given = ''.join(map(text, row['references']))
  answers = next(iter(row['answers'].values()))
  models = ''.join(
    f'<div><h4>{html.escape(model)}</h4>{text(answer["text"])}</div>'
    for model, answer in answers.items()
  )
  return f"""<article class="card">
<h4>Prompt</h4>{text(prompt)}
<div class="reference"><h4>{name}</h4>{given}</div>
<div class="models">{models}</div></article>"""


def settings(pairs):
  """Names and values, one below the other."""
  if not pairs:
    return ''
  items = ''.join(
    f'<dt>{html.escape(str(label))}</dt><dd>{html.escape(str(value))}</dd>\n'
    for label, value in pairs
  )
  return details('All settings', f'<dl class="card">{items}</dl>')


def _contents(sections):
  links = ''.join(
    f'<li><a href="#{_id(heading)}">{heading}</a></li>' for heading in sections
  )
  return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _id(heading):
  return heading.lower().replace(' ', '-')


def _head(name):
  if isinstance(name, str):
    return html.escape(name)
  return ' '.join(f'<span>{html.escape(part)}</span>' for part in name if part)


def _read(name):
  return (_FILES / name).read_text('utf-8')


def _template(name):
  return string.Template(_read(name))
