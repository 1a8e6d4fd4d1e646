"""Arrays that are made once, and are read from a file ever after.

What an array was made of is its key. <root>/<digest of the key> has about.json
(the key, sizes, facts) and a file for each array, which is mapped into memory:
processes of a machine share it, and none holds it whole. Both have checksums:
what a disk has changed is made again.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from gakd_jax import UserError, fingerprint


def default_root():
  """What is kept for all runs of a user; GAKD_JAX_CACHE overrides."""
  cache = os.environ.get('GAKD_JAX_CACHE', '~/.cache/gakd_jax')
  return Path(cache).expanduser() / 'data'


def load(root, key, make):
  """Returns (arrays, facts) of a key.

  Args:
    root: directory of all keys.
    key: a JSON value, of everything that the arrays depend on.
    make: called where there are none yet, with a function that appends to
      arrays of one dimension, `add(name=array, ...)`; returns facts, a dict of
      JSON values.

  Returns:
    Read-only arrays by name, and the facts, with `digest`, that of all arrays'
    contents.

  Raises:
    UserError: if root cannot be written to.
  """
  directory = Path(root) / fingerprint.digest(key)
  with _locked(directory.with_suffix('.lock')):
    about = _good(directory)
    if about is None:
      _write(directory, key, make)
      about = _read(directory)
  arrays = {
    name: np.memmap(directory / f'{name}.bin', dtype, 'r')
    if size
    else np.empty(0, dtype)
    for name, (dtype, size) in about['arrays'].items()
  }
  return arrays, about['facts'] | {'digest': about['digest']}


def has(root, key):
  """Whether there is something for a key; `is_good` looks if it is whole."""
  return (Path(root) / fingerprint.digest(key) / 'about.json').exists()


def is_good(root, key):
  """Whether `load` would make nothing; what is damaged is removed."""
  directory = Path(root) / fingerprint.digest(key)
  with _locked(directory.with_suffix('.lock')):
    return _good(directory) is not None


@functools.cache
def code(*patterns):
  """A digest of files of this package: what they make depends on them."""
  folder = Path(__file__).parent
  files = sorted({file for p in patterns for file in folder.glob(p)})
  return fingerprint.digest([file.read_text('utf-8') for file in files])


@contextlib.contextmanager
def _locked(path):
  """Others wait meanwhile, where the file system has locks."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('w')
  except OSError as error:
    if error.errno == errno.ENOSPC:
      raise
    raise UserError(
      f'{path.parent}: cannot write there ({error.strerror}); name another '
      'directory for config.data.cache, or GAKD_JAX_CACHE'
    ) from error
  with file:
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _hash():
  return hashlib.blake2b(digest_size=16)


def _read(directory):
  """about.json; None if there is none, or if a file is not as it says."""
  try:
    about = json.loads((directory / 'about.json').read_text())
    if about.pop('checksum') != fingerprint.digest(about):
      return None
    hashes = []
    for name in about['arrays']:
      with (directory / f'{name}.bin').open('rb') as file:
        digest = hashlib.file_digest(file, _hash)
        hashes.append(digest.hexdigest())
  except (OSError, ValueError, LookupError, AttributeError, TypeError):
    return None
  return about if about['digest'] == fingerprint.digest(hashes) else None


def _good(directory):
  """`_read`; removes what is damaged, so that `has` knows."""
  about = _read(directory)
  if about is None:
    shutil.rmtree(directory, ignore_errors=True)
  return about


def _write(directory, key, make):
  """Makes the directory, which appears when it is complete."""
  new = directory.with_suffix(f'.{os.uname().nodename}.{os.getpid()}.tmp')
  shutil.rmtree(new, ignore_errors=True)  # Of a killed process with our number.
  new.mkdir()
  with contextlib.ExitStack() as stack:
    stack.callback(shutil.rmtree, new, ignore_errors=True)
    files, hashes, dtypes = {}, {}, {}

    def add(**arrays):
      for name, array in arrays.items():
        if name not in files:
          file = (new / f'{name}.bin').open('wb')
          files[name] = stack.enter_context(file)
          hashes[name] = _hash()
          dtypes[name] = array.dtype.str
        content = np.ascontiguousarray(array, dtypes[name]).data
        files[name].write(content)
        hashes[name].update(content)

    facts = make(add)
    sizes = {name: file.tell() for name, file in files.items()}
    for file in files.values():
      file.close()
    about = {
      'key': key,
      'facts': facts,
      'arrays': {name: (dtypes[name], sizes[name]) for name in files},
      'digest': fingerprint.digest(
        [hashes[name].hexdigest() for name in files]
      ),
    }
    about['checksum'] = fingerprint.digest(about)
    (new / 'about.json').write_text(json.dumps(about, indent=2) + '\n')
    try:
      new.rename(directory)
    except OSError:
      # Another host was as quick, on a file system without locks.
      if _read(directory) is None:
        raise
