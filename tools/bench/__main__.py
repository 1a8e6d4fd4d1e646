"""All comparisons of speed and memory, and the page that shows them.

  pip install -e '.[bench]'
  python -m tools.bench --out=docs/performance
  python -m tools.bench --out=docs/performance --only=rkl_step,generate

Each is a program of this directory that measures sides in turns and prints
JSON. The folder gets NAME.json of each, with versions and hardware; of all that
are there the page is made that is called like it, docs/performance.md, and its
plot. Without the extra, sides that need PyTorch are left out.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from tools.bench import page

# {name: (program, arguments)}, in the order of the page.
BENCHMARKS = {
  'rkl_step': ('kd_step', ()),
  'forward_kl_step': ('kd_step', ('--objective=forward_kl',)),
  'sft_step': ('kd_step', ('--objective=sft',)),
  'parts': ('parts', ()),
  'compile': ('compile', ('--rounds=1',)),
  'startup': ('startup', ()),
  'teacher_cache': ('teacher_cache', ()),
  'teacher_cache_halves': ('teacher_cache', ('--scale=2', '--rounds=1')),
  'teacher_cache_forward_kl': ('teacher_cache', ('--objective=forward_kl',)),
  'known': ('known', ()),
  'gakd_step': ('critic', ()),
  'gakd_step_of_16_rows': ('critic', ('--rows=16', '--rounds=2')),
  'on_policy_step': ('on_policy', ()),
  'gad_step': ('gad', ()),
  'cross_step': ('cross', ()),
  'lora_step': ('lora', ()),
  'attention': ('attention', ()),
  'generate': ('generate', ()),
  'generate_uneven': (
    'generate',
    ('--uneven', '--vocab=1024', '--rounds=2', '--steps=1'),
  ),
  'generate_samples': ('generate', ('--samples', '--vocab=1024')),
  'evaluate': ('evaluate', ()),
  'speculative': ('speculative', ()),
  'data': ('data', ()),
  'align': ('align', ('--map',)),
  'convert': ('convert', ()),
  'checkpoint': ('checkpoint', ()),
  'plan': ('plan', ()),
}
_PACKAGES = ('jax', 'flax', 'optax', 'torch', 'transformers', 'trl')


def versions():
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def hardware():
  """The processor, as far as it says what it is."""
  info = Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [x.split(': ')[1] for x in lines if x.startswith('model name')]
  return f'{os.cpu_count()} cores, {(names or [platform.machine()])[0]}'


def run(name):
  """One benchmark, in a process of its own; what it found, or None."""
  program, arguments = BENCHMARKS[name]
  command = ['python', '-m', f'tools.bench.{program}', *arguments]
  start, load = time.perf_counter(), os.getloadavg()[0]
  done = subprocess.run(
    [sys.executable, *command[1:]],
    stdout=subprocess.PIPE,
    text=True,
    check=False,
  )
  if done.returncode:
    print(f'{name}: failed', file=sys.stderr)
    return None
  return {
    'command': ' '.join(command),
    'date': time.strftime('%Y-%m-%d'),
    'minutes': (time.perf_counter() - start) / 60,
    'load before': load,
    'hardware': hardware(),
    'versions': versions(),
    'found': json.loads(done.stdout.splitlines()[-1]),
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', required=True, type=Path)
  parser.add_argument('--only', default=','.join(BENCHMARKS))
  args = parser.parse_args()
  args.out = args.out.absolute()
  names = args.only.split(',')
  if unknown := set(names) - set(BENCHMARKS):
    known = ', '.join(BENCHMARKS)
    parser.error(f'--only: no {", ".join(unknown)}; known are {known}')
  args.out.mkdir(parents=True, exist_ok=True)
  failed = []
  for name in names:
    print(f'== {name}', file=sys.stderr, flush=True)
    found = run(name)
    if found is None:
      failed.append(name)
      continue
    (args.out / f'{name}.json').write_text(json.dumps(found, indent=1) + '\n')
    page.write(args.out, BENCHMARKS)
  sys.exit(1 if failed else 0)


if __name__ == '__main__':
  main()
