"""What a record must be, whatever it comes from, before a row is read from it.

An object of JSON, in its keys and values as in its size.
"""

import json

from gakd_jax import UserError

# Bytes of a line, or characters of a record as JSON: no model reads as much,
# and a file without ends of lines is not held in memory as one.
LONGEST = 1 << 24
TOO_LONG = 'longer than 16 MB'


class BadRow(UserError):
  """One unusable row: `reason` is what it is counted under."""

  def __init__(self, where, reason):
    super().__init__(
      f"{where}: {reason}; fix the row, or skip such rows: on_bad_row='skip'"
    )
    self.reason = reason


def check(where, record):
  """The fields of a record that are there; raises BadRow.

  record: anything, also the BadRow that it was found to be.
  """
  if isinstance(record, BadRow):
    raise record
  if not isinstance(record, dict):
    raise BadRow(where, 'not an object')
  try:
    text = as_json(record)
    # JSON can hold half a surrogate pair ("\ud800"); no tokenizer takes it.
    text.encode()
  except UnicodeEncodeError as error:
    raise BadRow(where, 'not UTF-8') from error
  except ValueError as error:
    raise BadRow(where, 'not JSON') from error
  if len(text) > LONGEST:
    raise BadRow(where, TOO_LONG)
  # Parquet and the hub write an absent field as None.
  return {
    key: value
    for key, value in record.items()
    if isinstance(key, str) and value is not None
  }


def as_json(record):
  """What a record says; two that differ in a field that is read differ here.

  Raises ValueError for what cannot be said so: an object within itself, or too
  deep, or keys of other kinds.
  """
  try:
    return json.dumps(record, ensure_ascii=False, default=repr)
  except Exception as error:  # A function may give any objects.
    raise ValueError(f'not JSON: {error}') from error


def is_nothing(value):
  """Whether a field is as good as absent."""
  return value is None or (
    isinstance(value, str | list | dict) and value in ('', '[]', [], {})
  )
