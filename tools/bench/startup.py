"""Seconds from the command to the first optimizer step that is done.

  python -m tools.bench.startup

The quickstart's first stage that trains (sft), from `python` on, with a home
directory of its own: `cold` finds nothing there, `warm` what the run before has
kept, compiled programs and tokenised data. The step is done when its state is
there. `first step` is tracing, lowering, compiling or finding in the cache, and
running. `import gakd_jax.main` is that of a process of its own; its heaviest
packages are by `-X importtime`, each without what it imports.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time

from tools.bench import side_by_side

_HEAVIEST = 5


def get_config():
  """This file is a config, too: what is started."""
  from configs import quickstart

  return quickstart.sft(seed=0)


def child(start, workdir):
  """Runs the training binary up to its first step; prints seconds by part."""
  began = time.time()
  import jax

  from gakd_jax import binary, build, inputs, main, training
  from gakd_jax.data import tokenizer

  now = time.time()
  spent = {'python': began - start, 'imports': now - began}
  inner = []  # seconds of parts inside the part that runs

  def timed(name, function):
    """Its own time goes to `name`, without that of others inside."""

    def call(*args, **kwargs):
      before = time.time()
      inner.append(0.0)
      try:
        return jax.block_until_ready(function(*args, **kwargs))
      finally:
        took = time.time() - before
        spent[name] = spent.get(name, 0.0) + took - inner.pop()
        if inner:
          inner[-1] += took

    return call

  tokenizer.load = timed('tokenizer', tokenizer.load)
  inputs.texts = timed('data', inputs.texts)
  inputs.training_batches = timed('data', inputs.training_batches)
  build.build = timed('models, objective, evaluators', build.build)
  make = training.make

  def stopping_make(*args):
    made = make(*args)
    step = timed('first step', made.step)

    def take(*args):
      step(*args)
      total = time.time() - start
      rest = total - sum(spent.values())
      print(json.dumps(spent | {'other': rest, 'all': total}), flush=True)
      os._exit(0)

    return training.Training(
      take, made.state, timed('weights, optimizer', made.init)
    )

  training.make = stopping_make
  argv = ['main', f'--config={__file__}', f'--workdir={workdir}']
  binary.guarded(main._main, argv)


def started(*command, home):
  """(stdout, stderr) of a process in a home of its own."""
  kept = 'JAX_COMPILATION_CACHE_DIR', 'GAKD_JAX_CACHE'
  env = {k: v for k, v in os.environ.items() if k not in kept}
  done = subprocess.run(
    [sys.executable, *command],
    env=env | {'HOME': home},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    sys.exit(done.stderr)
  return done.stdout, done.stderr


def once(home, run):
  workdir = f'{home}/{run}'
  module = '-m', 'tools.bench.startup', f'--workdir={workdir}'
  out, _ = started(*module, f'--start={time.time()!r}', home=home)
  return json.loads(out.splitlines()[-1])


def imports(home):
  """{what: seconds} of importing gakd_jax.main."""
  before = time.perf_counter()
  started('-c', 'import gakd_jax.main', home=home)
  found = {'import gakd_jax.main': time.perf_counter() - before}
  before = time.perf_counter()
  started('-c', 'import jax', home=home)
  found['import jax'] = time.perf_counter() - before
  _, err = started(
    *('-X', 'importtime', '-c', 'import gakd_jax.main'), home=home
  )
  by_package = collections.Counter()
  for line in err.splitlines():
    own, _, name = line.removeprefix('import time:').split('|', 2)
    if own.strip().isdecimal():
      by_package[name.strip().partition('.')[0]] += int(own) / 1e6
  return found | dict(by_package)


def table(rounds):
  """{key: `spread`} of dicts of seconds, by their first one's order."""
  return {
    key: side_by_side.spread(x.get(key, 0.0) for x in rounds)
    for key in rounds[0]
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--start', type=float, help=argparse.SUPPRESS)
  parser.add_argument('--workdir', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.start is not None:
    child(args.start, args.workdir)
  cold, warm, imported = [], [], []
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as home:
      cold.append(once(home, 'cold'))
      warm.append(once(home, 'warm'))
      imported.append(imports(home))
      print(cold[-1], warm[-1], file=sys.stderr, flush=True)
  parts = {'cold': table(cold), 'warm': table(warm)}
  found = table(imported)
  first = list(found)[:2]  # The whole, and what jax takes of it.
  packages = sorted(set(found) - {*first}, key=lambda x: -found[x][0])
  print(
    json.dumps(
      {
        'seconds to the first step': {
          part: {name: seconds[part] for name, seconds in parts.items()}
          for part in parts['cold']
        },
        'seconds of an import': {
          key: found[key] for key in [*first, *packages[:_HEAVIEST]]
        },
      }
    )
  )


if __name__ == '__main__':
  main()
