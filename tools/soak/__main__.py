"""Runs that are killed, stopped and damaged, and must end as if they were not.

  python -m tools.soak --faults=100
  python -m tools.soak --minutes=60 --kinds=gakd,on_policy --seed=7

Small runs (tools/soak/runs.py) are started again and again, and on the way
  kill       a SIGKILL at a random time
  kill_at    one before a random change of a file: checkpoints, metrics, best/,
             answers, results, report
  kill_save  one while a checkpoint is being written
  stop       a SIGTERM at a random time: it has to save, and end with status 130
  damage     bytes of a random file of the newest checkpoint change, or are gone
  clock      a clock that is off by days; dates of files that are in the future
  full       a disk with a random rest of room (in a tmpfs, which only root may
             mount; left out elsewhere)
until `--faults` have come about. Each attempt must go on from the newest
checkpoint that nothing was done to, and each run must end with the same
parameters, losses, answers and results as one that was left alone. What
happened is printed as JSON; the exit status is 1 if anything was lost.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy

from gakd_jax.models import families
from tools import make_tiny_teacher, synthetic
from tools.soak import attempt, runs

FAULTS = ('kill', 'kill_at', 'kill_save', 'stop', 'damage', 'clock', 'full')
_TIMES = ('train/seconds', 'train/tokens_per_second')
_CONFIG = str(Path(runs.__file__))


class Lost(Exception):
  """What was lost."""


class Trial:
  """One run, disturbed until it has ended."""

  def __init__(self, config, workdir, whole, rng, faults, counts):
    self.config = config
    self.workdir = workdir
    self.whole = whole  # (directory, seconds, changes of files) of its twin
    self.rng = rng
    self.faults = faults
    self.counts = counts
    self.damaged = set()  # steps
    self.expected = 0  # from which the last attempt should have gone on
    self.attempts = 0
    self.longest_stop = 0.0

  def run(self, more):
    """Until it has ended; disturbed as long as `more()`."""
    while True:
      if self.attempts > 500:
        raise Lost(f'{self.workdir}: no end after {self.attempts} attempts')
      fault = self._draw() if more() else 'none'
      process = getattr(self, f'_{fault}')()
      self._check_begin(process)
      if process.status != 0:  # Else it had ended before.
        self.counts[fault] += 1
      if process.status == 0:
        break
    self._compare()

  def _draw(self):
    """A fault; what is not there yet is not damaged."""
    fault = self.rng.choice(self.faults)
    steps = self._steps()
    if fault == 'damage' and (not steps or max(steps) in self.damaged):
      return 'kill'
    return fault

  def _start(self, **settings):
    self.attempts += 1
    self.expected = max(set(self._steps()) - self.damaged, default=0)
    log = self.workdir.parent / f'{self.workdir.name}-{self.attempts}.log'
    return attempt.Attempt(self.config, self.workdir, log, **settings)

  def _none(self):
    process = self._start()
    self._expect(process, 0)
    return process

  def _kill(self):
    process = self._start()
    self._sleep(process)
    self._end(process)
    return process

  def _kill_at(self):
    process = self._start(kill_at=self.rng.randint(1, self.whole[2]))
    self._expect(process, 0, -signal.SIGKILL)
    return process

  def _kill_save(self):
    """While Orbax writes, or the manifest is made."""
    process = self._start()
    skip = self.rng.randrange(4)
    while process.is_alive():
      if list((self.workdir / 'checkpoints').glob('*.saving')):
        if skip == 0:
          time.sleep(self.rng.uniform(0, 0.05))
          break
        skip -= 1
        time.sleep(0.1)
      time.sleep(0.001)
    self._end(process)
    return process

  def _stop(self):
    process = self._start()
    while process.is_alive() and 'batches:' not in process.text():
      time.sleep(0.01)  # Before that, nobody has begun to listen.
    time.sleep(self.rng.uniform(0, self.whole[1]))
    if process.is_alive():
      began = time.monotonic()
      process.send(self.rng.choice((signal.SIGTERM, signal.SIGINT)))
      self._expect(process, 0, 130, -signal.SIGTERM)
      self.longest_stop = max(self.longest_stop, time.monotonic() - began)
    if process.status == 130 and 'saved at step' in process.text():
      step = int(process.text().split('saved at step ')[1].split()[0])
      if step != max(self._steps()):
        raise Lost(f'{process.log}: step {step} was not saved')
    return process

  def _damage(self):
    step = max(self._steps())
    shutil.rmtree(
      self.workdir / f'checkpoints/{step}.damaged', ignore_errors=True
    )
    how = attempt.damage(self.workdir / 'checkpoints' / str(step), self.rng)
    self.damaged.add(step)
    self.counts[f'damage: {how}'] += 1
    return self._kill()

  def _clock(self):
    days = self.rng.uniform(-4000, 4000)
    for path in self.workdir.rglob('*') if self.workdir.exists() else ():
      if path.exists() and self.rng.random() < 0.3:
        when = time.time() + self.rng.uniform(-1e8, 1e8)
        os.utime(path, (when, when))
    process = self._start(clock=days * 86400)
    self._sleep(process)
    self._end(process)
    return process

  def _full(self):
    self.workdir.mkdir(exist_ok=True)
    filler = attempt.fill(self.workdir, self.rng.randrange(3_000_000))
    try:
      process = self._start()
      if self._expect(process, 0, 2) == 2 and 'disk is full' not in (
        process.text()
      ):
        raise Lost(f'{process.log}: a full disk is not what it says')
    finally:
      filler.unlink()
    return process

  def _sleep(self, process):
    """For some of the time that the run takes."""
    end = time.monotonic() + self.rng.uniform(0, 1.1 * self.whole[1])
    while process.is_alive() and time.monotonic() < end:
      time.sleep(0.005)

  def _end(self, process):
    if process.is_alive():
      process.send(signal.SIGKILL)
    self._expect(process, 0, -signal.SIGKILL)

  def _expect(self, process, *statuses):
    status = process.wait()
    if status not in statuses or 'Traceback' in process.text():
      raise Lost(f'{process.log}: ended with {status}')
    return status

  def _steps(self):
    folder = self.workdir / 'checkpoints'
    names = os.listdir(folder) if folder.exists() else ()
    return [int(name) for name in names if name.isdecimal()]

  def _check_begin(self, process):
    """Compares where an attempt began with the newest good checkpoint."""
    text, expected = process.text(), self.expected
    for step in set(self.damaged):
      if (self.workdir / f'checkpoints/{step}.damaged').exists():
        self.damaged.discard(step)
    lines = [x for x in text.split('\n') if x.startswith('continuing from')]
    if lines and lines != [f'continuing from step {expected}']:
      raise Lost(f'{process.log}: {lines[0]}, and step {expected} was whole')
    first = re.search(rf'^{self.workdir.name}  (\d+)/', text, re.MULTILINE)
    if not lines and first and int(first[1]) <= expected:
      raise Lost(f'{process.log}: began anew, and step {expected} was whole')

  def _compare(self):
    ours, theirs = _outcome(self.workdir), _outcome(self.whole[0])
    for what, x in theirs.items():
      if not _same(x, ours.get(what)):
        raise Lost(f'{self.workdir}: {what} differs from {self.whole[0]}')
    if ours.keys() != theirs.keys():
      raise Lost(f'{self.workdir} has {ours.keys() ^ theirs.keys()}')


def _outcome(workdir):
  """{what: content} of all that a run leaves, but for its times."""
  found = {
    f'best/{name}': x
    for name, x in safetensors.numpy.load_file(
      workdir / 'best/model.safetensors'
    ).items()
  }
  lines = (workdir / 'metrics.jsonl').read_text().split('\n')[:-1]
  rows = map(json.loads, lines)
  found['metrics.jsonl'] = [
    {k: x for k, x in row.items() if k not in _TIMES} for row in rows
  ]
  results = json.loads((workdir / 'results.json').read_text())
  found['results.json'] = results | {'peak_memory_gb': 0}
  for path in (
    *workdir.glob('answers/*'),
    *workdir.glob('rollouts.jsonl'),
    workdir / 'best/config.json',
  ):
    found[str(path.relative_to(workdir))] = path.read_bytes()
  about = json.loads((workdir / 'best/gakd_jax.json').read_text())
  found['best/gakd_jax.json'] = about | {'commit': None}
  found['report.html'] = (workdir / 'report.html').exists()
  return found


def _same(a, b):
  if isinstance(a, np.ndarray):
    return b is not None and a.dtype == b.dtype and np.array_equal(a, b)
  return a == b


def _config(kind, out):
  """The flag of a kind of run; that of two tokenizers has a teacher made."""
  if kind != 'cross':
    return f'{_CONFIG}:{kind}'
  source, made = out / 'tokenizer', out / 'teacher'
  synthetic.train_tokenizer(source, 400)
  shape = dataclasses.replace(make_tiny_teacher.SHAPE, vocab_size=400)
  config = families.FAMILIES['qwen3'].to_hf(shape)
  (source / 'config.json').write_text(json.dumps(config))
  _undisturbed(f'{_CONFIG}:teacher,{source}', made)
  return f'{_CONFIG}:cross,{made}/best'


@contextlib.contextmanager
def _small_disk(out, megabytes):
  """A file system of its own, if it can be had: (its directory, whether)."""
  path = out / 'disk'
  path.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', path]
  try:
    is_own = subprocess.run(command, capture_output=True).returncode == 0
  except FileNotFoundError:
    is_own = False
  try:
    yield path, is_own
  finally:
    if is_own:
      subprocess.run(['umount', '--lazy', path], check=False)


def _undisturbed(config, workdir):
  """(directory, seconds from the first step to the end, changes of files)."""
  process = attempt.Attempt(config, workdir, f'{workdir}.log')
  if process.wait() != 0:
    raise SystemExit(f'{process.log}: the undisturbed run failed')
  seconds = time.monotonic() - process.began
  changes = int(process.text().rsplit('changes ', 1)[1])
  return workdir, seconds, changes


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kinds', default=','.join(runs.KINDS))
  parser.add_argument('--only', default=','.join(FAULTS), help='of the faults')
  parser.add_argument('--faults', type=int, default=50, help='how many')
  parser.add_argument('--minutes', type=float, help='at most')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', help='a new directory, to keep all that was run')
  args = parser.parse_args()
  kinds, faults = args.kinds.split(','), args.only.split(',')
  for given, known in ((kinds, runs.KINDS), (faults, FAULTS)):
    if set(given) - set(known):
      parser.error(f'{set(given) - set(known)}: known are {", ".join(known)}')
  out = Path(args.out or tempfile.mkdtemp(prefix='soak'))
  out.mkdir(parents=True, exist_ok=True)
  end = time.monotonic() + 60 * (args.minutes or float('inf'))
  counts, ended, rng = collections.Counter(), 0, random.Random(args.seed)
  stops, lost = [0.0], None

  def more():
    happened = sum(counts[x] for x in FAULTS)
    return happened < args.faults and time.monotonic() < end

  with _small_disk(out, 64) as (disk, is_own):
    if not is_own and 'full' in faults:
      print('full: left out, as no file system can be mounted here')
      faults.remove('full')
    try:
      configs = {kind: _config(kind, out) for kind in kinds}
      for config in configs.values():  # Compiles what is kept, and counts.
        _undisturbed(config, out / 'warm')
        shutil.rmtree(out / 'warm')
      wholes = {k: _undisturbed(c, out / k) for k, c in configs.items()}
      while more():
        kind = kinds[ended % len(kinds)]
        workdir = disk / f'{kind}{ended}'
        trial = Trial(configs[kind], workdir, wholes[kind], rng, faults, counts)
        trial.run(more)
        stops.append(trial.longest_stop)
        ended += 1
        print(
          f'{workdir.name}: the same after {trial.attempts} attempts',
          flush=True,
        )
        for path in disk.glob(f'{workdir.name}*'):
          shutil.rmtree(path) if path.is_dir() else path.unlink()
    except Lost as error:
      lost = str(error)
      shutil.copytree(disk, out / 'lost', dirs_exist_ok=True)
  summary = {
    'runs': ended,
    'faults': dict(sorted(counts.items())),
    'longest stop, s': round(max(stops), 2),
    'lost': lost,
  }
  print(json.dumps(summary, indent=2))
  if not args.out and lost is None:
    shutil.rmtree(out)
  sys.exit(1 if lost else 0)


if __name__ == '__main__':
  main()
