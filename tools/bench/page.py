"""A page and a plot, of the JSON that benchmarks left in a folder."""

import importlib
import json

_HEAD = """# Speed and memory, measured

Written by `python -m tools.bench`. In each comparison the sides take turns
(A B B A), each in a process of its own; figures are medians of the rounds
(minimum to maximum), ratios are of pairs of one round. Machines differ, and a
shared one drifts: ratios are what to read.
"""


def write(folder, benchmarks):
  """<folder>.md and <folder>.svg.

  benchmarks: {name: (program, arguments)}, in the order of the page.
  """
  every = {
    name: json.loads((folder / f'{name}.json').read_text())
    for name in benchmarks
    if (folder / f'{name}.json').exists()
  }
  ratios = [*_ratios(every)]
  parts = [_HEAD]
  if ratios:
    rows = [f'| {name} | {label} | {_number(x)} |' for name, label, x in ratios]
    parts.append(
      '\n'.join(['| benchmark | what | ratio |', '|---|---|---:|', *rows, ''])
    )
  if _plot(folder.with_name(f'{folder.name}.svg'), ratios):
    parts.append(f'![ratios to others]({folder.name}.svg)\n')
  for name, one in every.items():
    program = importlib.import_module(f'tools.bench.{benchmarks[name][0]}')
    title, *about = program.__doc__.strip().split('\n\n')
    texts = [x for x in about if not x.startswith('  ')]
    parts.append(
      '\n\n'.join(
        [
          f'## {name}: {title}',
          *(x.replace('\n', ' ') for x in texts),
          *_tables(one['found']),
          _origin(one),
        ]
      )
      + '\n'
    )
  folder.with_name(f'{folder.name}.md').write_text('\n'.join(parts))


def _origin(one):
  versions = ', '.join(f'{k} {v}' for k, v in one['versions'].items())
  return (
    f'`{one["command"]}`, {one["date"]}, {one["minutes"]:.0f} minutes; '
    f'{one["hardware"]}, load {one["load before"]:.1f} before; {versions}.'
  )


def _ratios(every):
  """(benchmark, what, ratio) of all that each has, in the order of the page.

  A ratio is a line of a table that is called so, or in a column of gaps.
  """
  for name, one in every.items():
    for title, rows in one['found'].items():
      if title.startswith('ratios'):
        about = title.removeprefix('ratios')
        yield from ((name, label + about, x) for label, x in rows.items())
      elif isinstance(rows, dict):
        for label, row in rows.items():
          if isinstance(row, dict) and 'gap, times' in row:
            yield name, f'{label}, times its floor', row['gap, times']


def _tables(found):
  for title, value in found.items():
    if not isinstance(value, dict):
      yield f'{title}: {_number(value)}'
      continue
    if not isinstance(next(iter(value.values())), dict):
      value = {name: {'': x} for name, x in value.items()}
    columns = list(dict.fromkeys(k for row in value.values() for k in row))
    lines = [
      f'| {title} | ' + ' | '.join(columns) + ' |',
      '|---|' + '---:|' * len(columns),
    ]
    for name, row in value.items():
      cells = (_number(row[k]) if k in row else '' for k in columns)
      lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    yield '\n'.join(lines)


def _number(x):
  """Three digits; of [median, minimum, maximum] the range as well."""
  if isinstance(x, list):
    return f'{_number(x[0])} ({_number(x[1])} to {_number(x[2])})'
  return f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3g}'


def _plot(file, ratios):
  """Bars of how many times faster than others; whether there are any."""
  bars = {
    f'{name}, {label.removeprefix("times faster").strip(" ,")}': x
    for name, label, x in ratios
    if label.startswith('times faster')
  }
  if not bars:
    return False
  import matplotlib

  matplotlib.use('svg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.4 * len(bars)))
  middles = [x[0] for x in bars.values()]
  errors = [
    [x[0] - x[1] for x in bars.values()],
    [x[2] - x[0] for x in bars.values()],
  ]
  axes.barh([*bars], middles, xerr=errors, color='#4878a8', capsize=3)
  axes.axvline(1, color='0.5', linewidth=1)
  axes.invert_yaxis()
  axes.set_xlabel('times faster (median, minimum to maximum)')
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(file, bbox_inches='tight')
  pyplot.close(figure)
  return True
