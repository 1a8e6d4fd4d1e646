"""JSON lines that a run wrote, and one line for what is wrong with them."""

import json
from pathlib import Path

from gakd_jax import UserError, settings

_REMEDY = 'mend it, or move the file away'


def read(file, kinds, growing=False):
  """The objects of a file, as dicts; [] if there is no file.

  Args:
    file: its path.
    kinds: of what is read of a line, see `settings.check_row`.
    growing: a process that was killed may have left half of the last line,
      which is then left out.

  Raises:
    UserError: naming the line that is something else.
  """
  file = Path(file)
  if not file.exists():
    return []
  try:
    text = file.read_text('utf-8')
  except UnicodeDecodeError as e:
    raise UserError(f'{file}: not UTF-8 ({e}); {_REMEDY}') from None
  # Not splitlines: a text may hold other ends of lines.
  *whole, rest = text.split('\n')
  if rest and not growing:
    raise UserError(f'{file}: its last line is not whole; {_REMEDY}')
  return [_object(f'{file}:{i}', x, kinds) for i, x in enumerate(whole, 1)]


def _object(where, text, kinds):
  try:
    row = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise UserError(f'{where}: not JSON ({e}); {_REMEDY}') from None
  if not isinstance(row, dict):
    raise UserError(f'{where}: not a JSON object; {_REMEDY}')
  settings.check_row(f'{where}: ', row, kinds)
  return row
