"""Lines that an interrupted run has written already, to go on from there."""

import json
import os

import jax

from gakd_jax import UserError, fingerprint, hosts


class Partial:
  """A file of JSON lines that grows while something is made.

  Its first line tells under which settings the others were made. Under others
  it is refused, or, by `force`, begun anew. Of several processes, the first one
  reads it and tells the others, and writes.
  """

  def __init__(self, path, settings, force=False):
    self._path = path
    self._force = force
    self._settings = json.loads(json.dumps(settings, default=str))  # As read.

  def read(self, take):
    """{key: value} of the lines written so far; {} if there are none.

    What a killed process left of its last line is cut off. `take` makes a key
    and a value of a line; of one that is something else, it raises.

    Raises:
      UserError: if they were made under other settings, or are no such lines.
    """
    return hosts.of_first(lambda: self._read(take))

  def _read(self, take):
    if not self._path.exists():
      return {}
    content = self._path.read_bytes()
    whole = content[: content.rfind(b'\n') + 1]
    # Not splitlines: a text may hold other ends of lines.
    found = self._checked(whole.split(b'\n')[:-1], take)
    if found is None:
      self._path.unlink()
      return {}
    if whole != content:
      os.truncate(self._path, len(whole))
    return found

  def _checked(self, lines, take):
    """{key: value}; None: made under other settings, which is forced."""
    if not lines:
      return {}
    try:
      theirs, *lines = map(json.loads, lines)
      theirs = dict(theirs['settings'])
      found = dict(map(take, lines))
    except (
      UserError,
      ValueError,
      LookupError,
      TypeError,
      AttributeError,
      RecursionError,
    ) as error:
      raise UserError(
        f'{self._path}: is not what an interrupted run leaves; move it away'
      ) from error
    has_changed = fingerprint.check(
      self._path, theirs, self._settings, self._force
    )
    return None if has_changed else found

  def append(self, lines):
    """Adds lines, in one piece."""
    if jax.process_index() != 0:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with self._path.open('ab') as file:
      if not file.tell():
        lines = [{'settings': self._settings}, *lines]
      text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines)
      file.write(text.encode())

  def remove(self):
    """What it was for is complete."""
    if jax.process_index() == 0:
      self._path.unlink(missing_ok=True)
