"""The page of benchmarks, of the JSON that they leave."""

import importlib
import json

from tools.bench import __main__ as bench
from tools.bench import page

ONE = {
  'command': 'python -m tools.bench.kd_step',
  'date': '2026-01-02',
  'minutes': 6.7,
  'load before': 0.25,
  'hardware': '2 cores, A Processor',
  'versions': {'jax': '0.10.2'},
}


def write(folder, **found):
  folder.mkdir(exist_ok=True)
  for name, x in found.items():
    (folder / f'{name}.json').write_text(json.dumps(ONE | {'found': x}))
  page.write(folder, bench.BENCHMARKS)
  return folder.with_name(f'{folder.name}.md').read_text()


def test_the_page_says_what_was_found_and_how(tmp_path):
  text = write(
    tmp_path / 'speed',
    parts={
      'GB/s of a sum': 10.24,
      'parts': {'heads': {'floor, s': 0.5, 'gap, times': 1.64}},
    },
    rkl_step={
      'sides': {'jax': {'seconds': [2.5, 2.0, 1234.5]}, 'eager': {}},
      'ratios': {'memory of eager': [0.41, 0.4, 0.5]},
    },
  )
  lines = text.splitlines()
  # In the order of the benchmarks, whoever was written first.
  assert lines.index('| rkl_step | memory of eager | 0.41 (0.4 to 0.5) |') < (
    lines.index('| parts | heads, times its floor | 1.64 |')
  )
  assert '| jax | 2.5 (2 to 1,234) |' in lines
  assert '| eager |  |' in lines
  assert 'GB/s of a sum: 10.2' in lines
  assert sum(line.startswith('## ') for line in lines) == 2
  assert (
    '`python -m tools.bench.kd_step`, 2026-01-02, 7 minutes; 2 cores, '
    'A Processor, load 0.2 before; jax 0.10.2.'
  ) in lines
  assert '.svg' not in text  # Nothing is faster than something.


def test_what_is_faster_is_plotted(tmp_path):
  text = write(
    tmp_path / 'speed',
    rkl_step={'ratios': {'times faster than eager': [1.6, 1.5, 1.7]}},
  )
  assert '![ratios to others](speed.svg)' in text
  assert '<svg' in (tmp_path / 'speed.svg').read_text()


def test_every_benchmark_says_what_it_measures():
  for program, _ in bench.BENCHMARKS.values():
    about = importlib.import_module(f'tools.bench.{program}').__doc__
    assert f'python -m tools.bench.{program}' in about
