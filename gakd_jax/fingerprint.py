"""What something was begun with, so that nothing else goes on with it.

A run's config.json, and the first line of what is half written, say what it was
begun with. Started again, what is *computed* must be the same: those settings
that are no `HOW`, the data's rows, the models by their contents. How it is
carried out may change, which is printed; `--force` goes on with anything.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path

from gakd_jax import UserError, __version__, hosts, json_file, log, rundir

# Settings that say how a result comes about, and not which: where, in what
# pieces, and how often it is looked at.
HOW = re.compile(
  r'report\..*|mesh\..*|stages|attention|eval_every|checkpoint\.(every|keep.*)|'
  r'data\.cache|student\.remat|'
  r'train\.(microbatch_size|head_chunk|head_memory|max_skipped)|'
  r'evals\.[^.]+\.(every|batch_size)'
)
# What scores, token ids and parameters depend on.
_PACKAGES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'),
  *('transformers', 'tokenizers', 'sacrebleu', 'rouge-score'),
)


def check(where, began, now, force=False, how=()):
  """Goes on only with what was begun.

  Args:
    where: what is gone on with, for people.
    began, now: {what: JSON}, then and now.
    force: go on all the same.
    how: of what the change is no matter; it is printed, as one that is forced.

  Returns:
    Whether anything changed but the `how`.

  Raises:
    UserError: naming all that did, unless `force`.
  """
  texts = {
    key: f'{key} was {began.get(key)!r} and is {now.get(key)!r}'
    for key in sorted(began.keys() | now.keys())
    if began.get(key) != now.get(key)
  }
  matter = [text for key, text in texts.items() if key not in how]
  if matter and not force:
    raise UserError(
      f'{where} was begun with something else: {"; ".join(matter)}; go on with '
      'what it was begun with, name another place (--workdir, --output), or '
      '--force'
    )
  for text in texts.values():
    print(f'{where}: {"forced: " if text in matter else ""}{text}', flush=True)
  return bool(matter)


def begin(workdir, force=False, **parts):
  """Writes what a run is of into config.json; compares what is there already.

  What had finished with something else has not, if that is forced.

  Args:
    workdir: the run's directory.
    force: see `check`.
    parts: dicts, as JSON; what is not known yet may come with a later call.
      'config'; 'contents', {setting: a text that tells what it names from
      others}; what others say is no matter.

  Raises:
    UserError: see `check`; and if another process has other parts.
  """
  parts |= {'versions': _versions()}
  hosts.check_same(flatten(parts))
  hosts.only_first(lambda: _begin(Path(workdir), force, parts))


@contextlib.contextmanager
def unless_refused(workdir):
  """What is refused within, before anything was saved, has not begun.

  Put right, it may come again in the same directory.
  """
  path = Path(workdir) / 'config.json'
  is_new = not path.exists()
  try:
    yield
  except UserError:
    if is_new and not any(path.parent.glob('checkpoints/[0-9]*')):
      path.unlink(missing_ok=True)
    raise


def compare(workdir, force=False, **parts):
  """Whether a run that is there was begun with other parts; see `begin`.

  Returns:
    (what is recorded of it, {} if it is not there, whether anything changed
    that matters).

  Raises:
    UserError: see `check`.
  """
  path = Path(workdir) / 'config.json'
  record = {}
  if path.exists():
    record = json_file.read(path)
    if 'versions' not in record:  # As that of a model.
      raise UserError(f'{path}: not of a run; use another --workdir')
  began, now = (
    flatten({part: x[part] for part in parts if part in record})
    for x in (record, parts)
  )
  config = parts.get('config', {})
  how = {
    key
    for key in began.keys() | now.keys()
    if not key.startswith(('config.', 'contents.'))
    or _is_how(key.removeprefix('config.'), config)
  }
  return record, check(workdir, began, now, force, how)


def _begin(workdir, force, parts):
  record, has_changed = compare(workdir, force, **parts)
  if has_changed:
    (workdir / 'results.json').unlink(missing_ok=True)
  if not rundir.is_finished(workdir):
    first = {'commit': commit(), 'versions': parts.pop('versions')}
    text = json.dumps(first | record | parts, indent=2)
    log.write_atomically(workdir / 'config.json', text + '\n')


def _is_how(key, config):
  """Whether a setting of a config, as JSON, is one of `HOW`."""
  if key == 'train.microbatch_size' and config['objective'].get('reference'):
    return False  # It does something for each of them.
  return bool(HOW.fullmatch(key))


def as_json(config):
  """A `ConfigDict` as JSON; an infinite setting is none, its name is."""
  return json.loads(config.to_json_best_effort(), parse_constant=str)


def digest(value):
  """A short text that differs between JSON values."""
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def recipe(config, origins):
  """{'recipe': a text that runs share which differ in their seed, 'seed'}.

  `HOW` they are carried out is no part of it.

  Args:
    config: as JSON.
    origins: {a path or file in it that a run wrote: the recipe of that run}.
  """

  def named(value):
    if isinstance(value, list):
      return [named(x) for x in value]
    return origins.get(value, value) if isinstance(value, str) else value

  what = {
    key: named(value)
    for key, value in flatten(config).items()
    if key != 'seed' and not _is_how(key, config)
  }
  return {'recipe': digest(sorted(what.items())), 'seed': config['seed']}


@contextlib.contextmanager
def lock(workdir):
  """Nobody else works in a directory meanwhile.

  Of the processes of one run, the first has the lock. A process that dies lets
  go of it. Where files cannot be locked, nothing is.

  Raises:
    UserError: if somebody does.
  """
  with contextlib.ExitStack() as stack:
    hosts.only_first(lambda: stack.enter_context(_locked(Path(workdir))))
    yield


@contextlib.contextmanager
def _locked(workdir):
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / '.lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{workdir}: another process works there; wait for it, or use another '
        '--workdir'
      ) from None
    except OSError:  # A file system without locks.
      pass
    yield


def flatten(config, prefix=''):
  """Nested dicts -> {'train.batch_size': 32}."""
  flat = {}
  for key, value in config.items():
    name = f'{prefix}{key}'
    if isinstance(value, dict):
      flat |= flatten(value, name + '.')
    else:
      flat[name] = value
  return flat


def _versions():
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  python = {'python': platform.python_version()}
  return {'gakd_jax': __version__} | python | versions


def commit():
  """The commit of the source, if the package is a checkout of it, else None."""
  root = Path(__file__).resolve().parents[1]
  git = ['git', '-C', str(root), 'rev-parse', '--show-toplevel', 'HEAD']
  try:
    done = subprocess.run(git, capture_output=True, text=True, check=False)
  except FileNotFoundError:
    return None
  top, _, head = done.stdout.strip().partition('\n')
  # It may lie in somebody else's repository, as in an environment of theirs.
  return head if top and Path(top).resolve() == root else None
