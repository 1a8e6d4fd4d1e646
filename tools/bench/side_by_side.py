"""Ways of doing the same thing, each in a process of its own, in turns.

Turns go A B B A: a machine that drifts favours none. The peak resident memory
is that of one way. Ratios are of pairs of one round.
"""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path


def add_arguments(parser, sides):
  parser.add_argument('--side', choices=sides, help='measure this one only')
  parser.add_argument('--steps', type=int, default=3)
  parser.add_argument('--rounds', type=int, default=3)


def installed(*packages):
  """Whether a side's packages are there; says so if one is not."""
  for package in packages:
    if importlib.util.find_spec(package) is None:
      print(f'left out what needs {package}', file=sys.stderr)
      return False
  return True


def measure(take, steps):
  """Median seconds of a step after a first one, peak memory, its results."""
  first = take()
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    result = take()
    seconds.append(time.perf_counter() - start)
  return {
    'seconds': statistics.median(seconds),
    'peak_gb': peak_gb(),
    'first': first,
    'result': result,
  }


def peak_gb():
  """Of this process's resident memory so far.

  Linux counts a parent's as its child's in `getrusage`, and here not.
  """
  status = Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) * 1024 / 1e9


def run(args, sides, *extra):
  """Runs this program with `--side=...` for every side in turns.

  With `args.side` it measures that side here, prints it, and returns None.
  `sides` maps a name to a function that builds a step: a function that takes
  one and returns what JSON holds, such as its loss. `extra` arguments are
  handed on. Returns {side: [measurement of each round]}.
  """
  if args.side:
    print(json.dumps(measure(sides[args.side](), args.steps)))
    return None
  results = {side: [] for side in sides}
  program = sys.modules['__main__'].__spec__.name
  for i in range(args.rounds):
    for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
      command = [sys.executable, '-m', program, *sys.argv[1:], *extra]
      done = subprocess.run(
        [*command, f'--side={side}'],
        capture_output=True,
        text=True,
        check=False,
      )
      if done.returncode:
        sys.exit(f'{side}: {done.stderr}')
      results[side].append(json.loads(done.stdout.splitlines()[-1]))
      print(side, done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
  return results


def check_alike(results, rtol, key='first'):
  """Ends the program unless all sides' first results are the same number."""
  found = {side: measured[0][key] for side, measured in results.items()}
  low, high = min(found.values()), max(found.values())
  if high - low > rtol * abs(high):
    sys.exit(f'these are not the same computation: {found}')


def spread(values):
  """[median, minimum, maximum]."""
  values = list(values)
  return [statistics.median(values), min(values), max(values)]


def summary(results, ratios, tokens=None, keys=('seconds', 'peak_gb')):
  """{'sides': {side: {key: `spread`}}, 'ratios': {name: `spread`}}.

  ratios: {name: (key, above, below)}; those whose sides were left out are too.
  tokens: of a step, to give tokens a second as well.
  """

  def of(key, above, below):
    pairs = zip(results[above], results[below], strict=True)
    return spread(a[key] / b[key] for a, b in pairs)

  if tokens:
    keys = (*keys, 'tokens/s')
    results = {
      side: [x | {'tokens/s': tokens / x['seconds']} for x in measured]
      for side, measured in results.items()
    }
  return {
    'sides': {
      side: {key: spread(x[key] for x in measured) for key in keys}
      for side, measured in results.items()
    },
    'ratios': {
      name: of(key, above, below)
      for name, (key, above, below) in ratios.items()
      if above in results and below in results
    },
  }
