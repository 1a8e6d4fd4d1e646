"""Checkpoints: the train state, and what the host must remember beside it.

<directory>/<step>/ has `state/`, arrays as Orbax writes them, and
manifest.json: size and SHA-256 of every file of it, and the `host`. A directory
gets the name of its step when all of that is on the disk; what is restored was
compared with its manifest, so that what the disk has damaged since is noticed,
and the step before is taken. Such a directory is kept as <step>.damaged.
"""

import concurrent.futures
import copy
import functools
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import jax

from gakd_jax import UserError, hosts, log

_MANIFEST = 'manifest.json'
_SAVING, _DAMAGED, _DELETED = '.saving', '.damaged', '.deleted'


def _is_said_by_us(record):
  """Of logged errors, all but those that Orbax's threads also raise in `wait`.

  They would be several hundred lines before our one.
  """
  return not (record.exc_info and 'orbax' in record.pathname)


class Checkpoints:
  """The checkpoints of a run.

  Each holds a tree of arrays (the `TrainState`, wherever it lies) and `host`, a
  JSON dict: the position of the data iterator, the best score so far and
  whether it is this state's (`is_best`) ...

  newest: the step that was saved or restored last; None: none was.

  Args:
    directory: of a file system that all processes see.
    keep: the newest so many stay. With them stays the newest that `is_best`.
    keep_every: and those whose step is a multiple of this; 0: no other.
    strict: refuse to go on from another checkpoint than the newest.
  """

  def __init__(self, directory, keep=1, keep_every=0, strict=False):
    self._directory = Path(directory).absolute()
    self._keep = keep
    self._keep_every = keep_every
    self._strict = strict
    self.newest = None
    # Hashes and renames once Orbax has written, behind the training's back.
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._saving = None
    logging.getLogger('absl').addFilter(_is_said_by_us)
    hosts.only_first(self._clean)

  @functools.cached_property
  def _orbax(self):
    import orbax.checkpoint  # Slow to import, and the first steps do without.

    return orbax.checkpoint.StandardCheckpointer()

  def _clean(self):
    self._directory.mkdir(parents=True, exist_ok=True)
    for path in self._directory.iterdir():
      if path.suffix in (_SAVING, _DELETED):  # Of a process that was killed.
        shutil.rmtree(path)

  def save(self, step, state, host):
    """Starts to save; returns when the arrays may be changed again.

    Raises:
      UserError: if it does not fit on the disk, as far as is known before.
    """
    self.wait()
    partial = self._path(step, _SAVING)
    hosts.only_first(lambda: self._make_room(state, partial))
    self._orbax.save(partial / 'state', state)
    host = copy.deepcopy(host)  # It may be changed at once, too.
    self._saving = self._thread.submit(self._finish, step, host)
    self.newest = step

  def amend(self, step, host):
    """Replaces what a checkpoint remembers of the host."""
    self.wait()

    def do():
      files = self._read(step)['files']
      _write_manifest(self._path(step), step, host, files)

    hosts.only_first(do)

  def restore(self, abstract_of):
    """(state, host) of the newest whole checkpoint; None: there is none.

    Prints a line for each that is damaged.

    Args:
      abstract_of: host -> (abstract) state, of the shapes, dtypes and shardings
        wanted.

    Raises:
      UserError: if one is damaged, and that is to be refused; if it is of
        another state.
    """
    found = hosts.of_first(self._newest_whole)
    if found is None:
      return None
    host = found['host']
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      abstract_of(host),
    )
    path = self._path(found['step'])
    try:
      state = self._orbax.restore(path / 'state', abstract)
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{path}: of another state than this config has '
        f'({str(error).strip().splitlines()[0]}); use another --workdir'
      ) from error
    self.newest = found['step']
    return state, host

  def wait(self):
    """Until the last save is on disk."""
    if self._saving is not None:
      saving, self._saving = self._saving, None
      saving.result()
      hosts.only_first(lambda: None)  # It hashes, while others only write.

  def close(self):
    """Without a word to the others: an error of one comes here alone."""
    try:
      if self._saving is not None:
        self._saving.result()
    finally:
      self._thread.shutdown()
      if '_orbax' in vars(self):  # Else it was never asked for.
        self._orbax.close()

  def steps(self):
    """Of all checkpoints that were finished, damaged since or not."""
    names = (path.name for path in self._directory.iterdir())
    return sorted(int(name) for name in names if name.isdecimal())

  def _path(self, step, suffix=''):
    return self._directory / f'{step}{suffix}'

  def _make_room(self, state, partial):
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      raise UserError(
        f'the disk is full: a checkpoint needs {needed / 1e6:,.0f} MB and '
        f'{self._directory} has {free / 1e6:,.0f} MB left; free some space and '
        'run the same command again, which continues from the last checkpoint'
      )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

  def _finish(self, step, host):
    self._orbax.wait_until_finished()
    if jax.process_index() != 0:
      return
    partial = self._path(step, _SAVING)
    _write_manifest(partial, step, host, _digests(partial))
    partial.rename(self._path(step))
    _sync(self._directory)
    self._retire()

  def _retire(self):
    """Deletes what is not to stay, now that there is a newer one."""
    steps = self.steps()
    keep = set(steps[-self._keep :])
    if self._keep_every:
      keep |= {step for step in steps if step % self._keep_every == 0}
    best = (x for x in reversed(steps) if self._is_best(x))
    keep |= {next(best, None)}
    for step in set(steps) - keep:
      # Half deleted, it would count as damaged.
      gone = self._path(step).rename(self._path(step, _DELETED))
      shutil.rmtree(gone)

  def _is_best(self, step):
    try:
      return self._read(step)['host'].get('is_best', False)
    except _Damaged:
      return False

  def _newest_whole(self):
    """The manifest of it, or None."""
    problems = {}
    found = None
    for step in reversed(self.steps()):
      try:
        found = self._read(step)
        _compare(self._path(step), found['files'])
        break
      except _Damaged as error:
        found, problems[step] = None, error
    if not problems:
      return found
    last = max(problems)
    begins = 'the beginning' if found is None else f'step {found["step"]}'
    lost = last - (found['step'] if found else 0)
    text = '; '.join(map(str, problems.values()))
    if self._strict:
      raise UserError(
        f'{text}; refused, as --strict_resume asks: without it, the run goes '
        f'on from {begins}, {lost} steps before'
      )
    print(f'{text}: going on from {begins}, {lost} steps are lost', flush=True)
    for step in problems:
      kept = self._path(step, _DAMAGED)
      shutil.rmtree(kept, ignore_errors=True)
      self._path(step).rename(kept)
    return found

  def _read(self, step):
    """The manifest of a step."""
    path = self._path(step) / _MANIFEST
    try:
      manifest = json.loads(path.read_bytes())
      digest = manifest.pop('sha256')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise _Damaged(f'{path} cannot be read') from error
    if digest != _digest_of(manifest) or manifest['step'] != step:
      raise _Damaged(f'{path} is damaged')
    return manifest


class _Damaged(Exception):
  """What is wrong with a checkpoint, for people."""


def _write_manifest(directory, step, host, files):
  manifest = {'step': step, 'host': host, 'files': files}
  manifest = json.loads(log.to_json(manifest))  # As it will be read.
  text = log.to_json(manifest | {'sha256': _digest_of(manifest)}, indent=1)
  log.write_atomically(directory / _MANIFEST, text + '\n')


def _digest_of(manifest):
  return hashlib.sha256(log.to_json(manifest).encode()).hexdigest()


def _digests(directory):
  """{name: [bytes, SHA-256]} of the files of `state`, once they are on disk."""
  paths = sorted((directory / 'state').rglob('*'))
  for path in paths:
    _sync(path)
  names = [str(p.relative_to(directory)) for p in paths if p.is_file()]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = pool.map(lambda name: _digest(directory / name), names)
    return dict(zip(names, found, strict=True))


def _digest(path):
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  return [path.stat().st_size, digest]


def _compare(directory, files):
  """Raises `_Damaged` for the first file that is not as it was written."""

  def problem(name):
    size, digest = files[name]
    path = directory / name
    try:
      if path.stat().st_size != size:
        return f'{path} has {path.stat().st_size:,} bytes instead of {size:,}'
      return f'{path} is damaged' if _digest(path)[1] != digest else None
    except FileNotFoundError:
      return f'{path} is missing'
    except OSError as error:
      return f'{path} cannot be read ({error.strerror})'

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for found in pool.map(problem, files):
      if found:
        raise _Damaged(found)


def _sync(path):
  """What was written to a file, or renamed in a directory, outlasts a crash."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
