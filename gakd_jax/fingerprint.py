"""Whose directory it is: of one config, and of the contents that it names.

config.json says what a run was begun with. Started again, what is *computed*
must be the same: those settings that are no `HOW`, the data's rows as tokens,
the models. How it is carried out may change, which is printed; `--force` goes
on with anything.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path

import jax

from gakd_jax import UserError, __version__, partial, report

# Settings that say how a result comes about, and not which: where, in what
# pieces, and how often it is looked at.
HOW = re.compile(
  r'report\..*|mesh\..*|stages|attention|eval_every|checkpoint\.(every|keep)|'
  r'data\.cache|student\.remat|train\.(microbatch_size|head_chunk)|'
  r'evals\.[^.]+\.(every|batch_size)'
)
# What scores, token ids and parameters depend on.
_PACKAGES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'),
  *('transformers', 'tokenizers', 'sacrebleu', 'rouge-score'),
)


def record(config, workdir, force=False):
  """Writes config.json, or refuses a directory of another config.

  Raises:
    UserError: naming the settings that differ from those of `workdir`, unless
      they are a `HOW`, or `force`.
  """
  path = Path(workdir) / 'config.json'
  # An infinite setting is no JSON; its name is.
  ours = json.loads(config.to_json_best_effort(), parse_constant=str)
  if not path.exists():
    about = {'versions': _versions(), 'commit': commit()}
    _write(path, {'config': ours} | recipe(ours) | about)
    return
  content = json.loads(path.read_text(), parse_constant=str)
  changes = _changes(content['config'], ours)
  _refuse(
    [text for key, text in changes.items() if not HOW.fullmatch(key)],
    f'{workdir} has a run with another config',
    'or the config it was started with',
    force,
  )
  for key, text in changes.items():
    print(f'{workdir}: {"" if HOW.fullmatch(key) else "forced: "}{text}')
  for text in _changes(content['versions'], _versions()).values():
    print(f'{workdir}: version of {text}')
  if changes and not (Path(workdir) / 'results.json').exists():
    _write(path, content | {'config': ours} | recipe(ours))


def recipe(config):
  """{'recipe': a text that runs share which differ in their seed, 'seed'}.

  config: as JSON. `HOW` they are carried out is no part of it, nor a seed in
  the name of what they start from.
  """
  seed = config['seed']
  names = re.compile(rf'[-_.]?seed[-_.]?{seed}\b')
  what = {
    key: names.sub('', value) if isinstance(value, str) else value
    for key, value in flatten(config).items()
    if key != 'seed' and not HOW.fullmatch(key)
  }
  return {'recipe': partial.digest(sorted(what.items())), 'seed': seed}


def check_contents(workdir, contents, force=False):
  """The same for what a config names: {what it is: its digest}.

  Of several processes, the first looks.
  """
  if jax.process_index() != 0:
    return
  path = Path(workdir) / 'config.json'
  content = json.loads(path.read_text())
  theirs = content.get('contents', contents)
  changed = [key for key in contents if theirs.get(key) != contents[key]]
  _refuse(
    changed,
    f'{workdir} was begun with other contents than there are now',
    'or what it was started with',
    force,
  )
  for key in changed:
    print(f'{workdir}: forced: other contents of {key}')
  _write(path, content | {'contents': contents})


def _refuse(changed, what, hint, force):
  if changed and not force:
    raise UserError(
      f'{what}: {"; ".join(changed)}; use another --workdir, {hint}, or --force'
    )


def note(workdir, **facts):
  """Adds to config.json what is known once a run has begun."""
  if jax.process_index() == 0:
    path = Path(workdir) / 'config.json'
    _write(path, json.loads(path.read_text()) | facts)


def _write(path, content):
  text = json.dumps(content, indent=2) + '\n'
  if jax.process_index() != 0:
    return
  if not path.exists() or path.read_text() != text:
    report.write_atomically(path, text)


@contextlib.contextmanager
def lock(workdir):
  """Nobody else works in a directory meanwhile.

  Of the processes of one run, the first has the lock. A process that dies lets
  go of it. Where files cannot be locked, nothing is.

  Raises:
    UserError: if somebody does.
  """
  if jax.process_index() != 0:
    yield
    return
  path = Path(workdir) / '.lock'
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
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


def _changes(theirs, ours):
  """{key: what it was and is}."""
  theirs, ours = flatten(theirs), flatten(ours)
  return {
    key: f'{key} was {theirs.get(key)!r} and is {ours.get(key)!r}'
    for key in sorted(theirs.keys() | ours.keys())
    if theirs.get(key) != ours.get(key)
  }


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
