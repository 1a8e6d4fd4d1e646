"""A table of results as texts: for the screen, in Markdown, in LaTeX."""

import itertools
from pathlib import Path

from gakd_jax import log, results


def write(folder, runs):
  """What of the runs is compared first, for a README and for a paper.

  Those are table.md and table.tex; `runs` are {name: directory}.
  """
  table, _ = results.tables(results.read(runs), results.teachers(runs))
  log.write_atomically(Path(folder) / 'table.md', markdown(table))
  log.write_atomically(Path(folder) / 'table.tex', latex(table))


def plain(table):
  """Columns (set, metric) and rows of texts, names first."""
  columns = [(where, results.title(m)) for where, m in table.columns]
  rows = [
    [name, *itertools.starmap(with_deviation, texts)]
    for (name, _), texts in zip(table.rows, table.texts(), strict=True)
  ]
  return columns, rows


def with_deviation(mean, std, sign='±'):
  return f'{mean} {sign} {std}' if std else mean


def markdown(table):
  """The table as Markdown, the best of a column in bold."""
  columns, rows = plain(table)
  best = table.best()
  lines = [['', *(' '.join(column) for column in columns)]]
  lines.append(['---'] + ['---:'] * len(columns))
  for i, (name, *cells) in enumerate(rows):
    bold = [
      f'**{text}**' if (i, j) in best else text for j, text in enumerate(cells)
    ]
    lines.append([name, *bold])
  return ''.join(
    f'| {" | ".join(text.replace("|", chr(92) + "|") for text in line)} |\n'
    for line in lines
  )


def latex(table):
  """The table for LaTeX with booktabs, the best of a column in bold."""
  best = table.best()
  heads = [results.title(metric) for _, metric in table.columns]
  spans = []  # [metric, first column, columns]
  for i, head in enumerate(heads, start=2):
    if spans and spans[-1][0] == head:
      spans[-1][2] += 1
    else:
      spans.append([head, i, 1])
  lines = ['% Needs \\usepackage{booktabs}.']
  lines.append(f'\\begin{{tabular}}{{l{"r" * len(heads)}}}\n\\toprule')
  lines.append(
    ''.join(
      f' & \\multicolumn{{{n}}}{{c}}{{{_escape(head)}}}' for head, _, n in spans
    )
    + r' \\'
  )
  lines.append(
    ' '.join(f'\\cmidrule(lr){{{i}-{i + n - 1}}}' for _, i, n in spans)
  )
  lines.append(
    ''.join(f' & {_escape(where)}' for where, _ in table.columns) + r' \\'
  )
  lines.append('\\midrule')
  for i, texts in enumerate(table.texts()):
    cells = [_escape(table.rows[i][0])]
    for j, (mean, std) in enumerate(texts):
      if len(mean) > 1 and mean.startswith('-'):
        mean = f'$-${mean[1:]}'
      text = with_deviation(mean, std, r'$\pm$')
      cells.append(f'\\textbf{{{text}}}' if (i, j) in best else text)
    lines.append(' & '.join(cells) + r' \\')
  return '\n'.join([*lines, '\\bottomrule', '\\end{tabular}', ''])


_SPECIAL = {
  '\\': r'\textbackslash{}',
  '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}',
} | {x: '\\' + x for x in '&%$#_{}'}


def _escape(text):
  return ''.join(_SPECIAL.get(x, x) for x in text)
