"""Writes one page about any set of runs, and its table as Markdown and LaTeX.

  python tools/report.py RUN... [--output=FILE.html]

RUN is the directory of a finished training or of an evaluated model, or one
that contains several: the workdir of a pipeline or of an evaluation. The page
goes to report.html in RUN, or, of several, where one stands; table.md and
table.tex go beside it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from absl import flags

from gakd_jax import UserError, binary, page, rundir
from gakd_jax.page import tables

_OUTPUT = flags.DEFINE_string('output', None, 'The page to write.')


def find_runs(paths):
  """{name: directory} of all runs in these directories.

  Names are the directories' own, with as much of their path as it takes.

  Raises:
    UserError: for what is no run, or contains none.
  """
  found = {}
  for path in map(Path, paths):
    if not path.is_dir():
      raise UserError(f'{path}: no such directory')
    runs = [x.parent for x in path.glob('*/results.json')]
    # As they finished: a pipeline's stages build on each other.
    runs.sort(key=lambda run: ((run / 'results.json').stat().st_mtime, run))
    if rundir.is_finished(path):
      runs = [path]
    if not runs:
      started = (path / 'config.json').exists()
      why = 'has not finished' if started else 'is no run, and contains none'
      raise UserError(f'{path} {why}: results.json is missing')
    found |= dict.fromkeys(run.absolute() for run in runs)
  depth = 1
  while len({run.parts[-depth:] for run in found}) < len(found):
    depth += 1
  return {'/'.join(run.parts[-depth:]): run for run in found}


def find_comparisons(paths, runs):
  """What evaluations wrote into comparisons.json about these runs."""
  names = {directory: name for name, directory in runs.items()}
  found = []
  for path in map(Path, paths):
    for c in rundir.read_comparisons(path):
      of = {x: names.get((path / c[x]).absolute()) for x in ('a', 'b')}
      if all(of.values()):
        found.append(c | of)
  return found


def _main(argv):
  paths = argv[1:]
  if not paths:
    raise UserError('usage: python tools/report.py RUN... [--output=FILE]')
  runs = find_runs(paths)
  default = Path(paths[0] if len(paths) == 1 else '.') / 'report.html'
  path = Path(_OUTPUT.value or default)
  if path.is_dir():
    path = path / 'report.html'
  page.write(path, runs, comparisons=find_comparisons(paths, runs))
  tables.write(path.parent, runs)


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
