"""Ways of doing the same thing, each in a process of its own, in turns.

A machine that drifts then favours none of them, and the peak resident memory
is that of one way. Ratios are medians over the rounds.
"""

import json
import resource
import statistics
import subprocess
import sys
import time


def add_arguments(parser, sides):
  parser.add_argument('--side', choices=sides, help='measure this one only')
  parser.add_argument('--steps', type=int, default=3)
  parser.add_argument('--rounds', type=int, default=3)


def measure(take, steps):
  """Median seconds of a step after a first one, peak memory, last result."""
  take()
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    result = take()
    seconds.append(time.perf_counter() - start)
  peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  return {
    'seconds': statistics.median(seconds),
    'peak_gb': peak_gb,
    'result': result,
  }


def run(file, args, sides, *extra):
  """Runs `file --side=...` for every side in turns; {side: [measurement]}.

  With `args.side` it measures that side here, prints it, and returns None.
  `sides` maps a name to a function that builds a step: a function that takes
  one and returns what JSON holds, such as its loss. `extra` arguments are
  handed on.
  """
  if args.side:
    print(json.dumps(measure(sides[args.side](), args.steps)))
    return None
  results = {side: [] for side in sides}
  for _ in range(args.rounds):
    for side in sides:
      command = [sys.executable, file, *sys.argv[1:], *extra, f'--side={side}']
      done = subprocess.run(
        command, capture_output=True, text=True, check=False
      )
      if done.returncode:
        sys.exit(f'{side}: {done.stderr}')
      results[side].append(json.loads(done.stdout.splitlines()[-1]))
      print(side, done.stdout.splitlines()[-1], flush=True)
  return results


def ratio(results, key, above, below):
  """The median of `above` / `below`, measured in the same round."""
  pairs = zip(results[above], results[below], strict=True)
  return statistics.median(a[key] / b[key] for a, b in pairs)
