"""Lines that an interrupted run has written already, to go on from there."""

import hashlib
import json
import os

import jax

from gakd_jax import UserError


class Partial:
  """A file of JSON lines that grows while something is made.

  Its first line tells under which settings the others were made.

  Of several processes, all read it and the first one writes.
  """

  def __init__(self, path, settings):
    self._path = path
    text = json.dumps(settings, sort_keys=True)
    self._settings = hashlib.sha256(text.encode()).hexdigest()

  def read(self):
    """The lines written so far; [] if there are none.

    What a killed process left of its last line is cut off.

    Raises:
      UserError: if they were made under other settings.
    """
    if not self._path.exists():
      return []
    content = self._path.read_bytes()
    whole = content[: content.rfind(b'\n') + 1]
    if jax.process_index() == 0 and whole != content:
      os.truncate(self._path, len(whole))
    head, *lines = [json.loads(x) for x in whole.split(b'\n')[:-1]] or [None]
    if head not in (None, {'settings': self._settings}):
      raise UserError(
        f'{self._path}: an interrupted run has left this, with other settings '
        'or another model; repeat those, or delete the file'
      )
    return lines

  def append(self, lines):
    """Adds lines, all or none of them as far as `read` can tell."""
    if jax.process_index() != 0:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open('ab') as file:
      if not file.tell():
        lines = [{'settings': self._settings}, *lines]
      text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines)
      file.write(text.encode())
