"""JSON files that others wrote, and one line for what is wrong with them."""

import json
import reprlib
from pathlib import Path

from gakd_jax import UserError

_LONGEST = 120
_short = reprlib.Repr()  # However deep it is.
_short.maxstring = _short.maxother = _LONGEST


def shown(value):
  """What a file or a user says, in a line about it: however long it is."""
  text = _short.repr(value)
  return text if len(text) <= _LONGEST else f'{text[:90]}...{text[-20:]}'


def read(file, missing='not found', kind=dict):
  """The object that a JSON file holds, as a dict; or its array, as a list.

  Raises:
    UserError: if there is no such file (`missing` says what there should be),
      or it cannot be read, or holds anything else.
  """
  file = Path(file)
  try:
    if file.exists() and not file.is_file():  # A pipe would be waited for.
      raise UserError(f'{file}: not readable (not a file)')
    content = json.loads(file.read_text('utf-8'))
  except FileNotFoundError:
    raise UserError(f'{file}: {missing}') from None
  except OSError as e:
    raise UserError(f'{file}: not readable ({e.strerror})') from None
  except (ValueError, RecursionError) as e:
    raise UserError(
      f'{file}: not valid JSON ({e}); mend it, or fetch it again'
    ) from None
  if not isinstance(content, kind):
    what = {dict: 'object', list: 'array'}[kind]
    raise UserError(f'{file}: not a JSON {what}; mend it, or fetch it again')
  return content
