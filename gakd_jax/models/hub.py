"""Models on the Hugging Face hub: `org/name`, or `org/name@revision`."""

import re
from pathlib import Path

import huggingface_hub

from gakd_jax import UserError, json_file

_ID = re.compile(r'([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]+))?')
# What lies deeper is of other formats, and so is what Mistral calls this.
_IGNORED = (
  *('*/*.json', '*/*.model', '*/*.safetensors', 'consolidated*'),
  '*.py',  # Nobody's code is run.
)


def directory(path):
  """A local directory, as a `Path`; None if there is none."""
  path = Path(path).expanduser()
  try:
    return path if path.is_dir() else None
  except OSError:  # Its name is too long, or a part of it is not ours to read.
    return None


def fetch(name, files):
  """The directory that holds those files of a hub id that match patterns.

  What is there already is not fetched again; with HF_HUB_OFFLINE=1, nothing is.

  Raises:
    UserError: if there is no such directory or id.
  """
  found = _ID.fullmatch(name)
  # Of an owner that is a directory here, another directory is what is missing.
  if not found or name.startswith('.') or Path(name.split('/')[0]).exists():
    raise UserError(
      f'model {_shown(name)}: no such directory; give a Hugging Face directory '
      'or hub id (org/name, or org/name@revision)'
    )
  repo, revision = found.groups()
  try:
    return Path(
      huggingface_hub.snapshot_download(
        repo,
        revision=revision,
        allow_patterns=list(files),
        ignore_patterns=list(_IGNORED),
      )
    )
  except Exception as e:  # The hub's errors have no common base.
    raise UserError(
      f'model {name}: no such directory, and the hub could not provide it '
      f'({type(e).__name__}); check the name or give a local path'
    ) from e


def _shown(name):
  whole = name.isprintable() and len(name) < 256
  return name if whole else json_file.shown(name)


def origin(path):
  """(hub id, commit) of a directory that `fetch` gave; of others, None."""
  *_, repo, snapshots, commit = ('', '', '', *Path(path).absolute().parts)
  kind, _, name = repo.partition('--')
  if kind != 'models' or snapshots != 'snapshots':
    return None
  return name.replace('--', '/', 1), commit
