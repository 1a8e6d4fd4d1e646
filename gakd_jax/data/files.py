"""Records of one data file, whatever it holds.

JSON Lines, a JSON array (either may end in .gz), Parquet, or Arrow.
A record is what a row is read from, or a `BadRow` where one line or one value
cannot be read; a file that cannot be read at all is a UserError.
"""

import gzip
import json
import zlib

from gakd_jax import UserError
from gakd_jax.data.records import LONGEST, TOO_LONG, BadRow

SUFFIXES = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet', '.arrow')
_BOM = b'\xef\xbb\xbf'
_END_OF_STREAM = b'\xff\xff\xff\xff\x00\x00\x00\x00'  # of Arrow's
# What a value of a table raises that is no text or no date of Python's; or the
# name of a column.
_NO_VALUE = (ValueError, OverflowError)


class _Twice(ValueError):
  """An object of JSON with two values for one key."""


def is_data(path):
  """Whether a path is called as data files are."""
  return path.name.endswith(SUFFIXES) and not path.name.startswith('.')


def check(path):
  """Raises UserError for what must not be opened: a pipe may never end."""
  try:
    if not path.is_file():
      what = 'a directory' if path.is_dir() else 'a pipe or device'
      what = what if path.exists() else 'not there'
      raise UserError(f'{path}: it is {what}; name a file')
  except OSError as error:
    raise unreadable(path, error) from error


def read(path):
  """Yields (where, record) of one file."""
  check(path)
  try:
    if path.suffix in ('.parquet', '.arrow'):
      yield from _table(path)
    else:
      opened = gzip.open if path.suffix == '.gz' else open
      with opened(path, 'rb') as file:
        # Only .json may be an array: a stray `[` in a .jsonl is a bad row.
        if '.json' in path.suffixes and _starts_array(file):
          yield from _array(path, file.read())
        else:
          yield from _lines(path, file)
  except (OSError, EOFError, zlib.error) as error:
    raise unreadable(path, error) from error


def unreadable(path, error):
  reason = getattr(error, 'strerror', None) or error
  return UserError(
    f'{path}: cannot read it ({reason}); check the file, or fetch it again'
  )


def indexed(source, records):
  return ((f'{source}[{i}]', record) for i, record in enumerate(records))


def _starts_array(file):
  start = file.read(1024).removeprefix(_BOM).lstrip()
  file.seek(0)
  return start.startswith(b'[')


def _lines(path, file):
  # Bytes, not text: one line that is not UTF-8 must not lose the others.
  for number, line in enumerate(_parts(file), start=1):
    where = f'{path}:{number}'
    if number == 1:
      line = line.removeprefix(_BOM)
    if len(line) > LONGEST:
      yield where, BadRow(where, TOO_LONG)
    elif line.strip():
      yield where, _parsed(where, line)


def _parts(file):
  """Yields lines, of which a part is enough to tell that one is too long."""
  while line := file.readline(LONGEST + 1):
    rest = line
    while len(rest) > LONGEST and not rest.endswith(b'\n'):
      rest = file.readline(LONGEST + 1)
    yield line


def _parsed(where, line):
  try:
    return _loads(line.decode('utf-8'))
  except UnicodeDecodeError:
    return BadRow(where, 'not UTF-8')
  except _Twice:
    return BadRow(where, 'has a key twice')
  except (ValueError, RecursionError):
    return BadRow(where, 'not JSON')


def _array(path, content):
  try:
    records = _loads(content.decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not a JSON array ({error}); fix it') from error
  yield from indexed(path, records)


def _loads(text):
  return json.loads(text, object_pairs_hook=_object)


def _object(pairs):
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise _Twice(f'an object has the key {twice!r:.40} twice')
  return found


def _table(path):
  import pyarrow  # Slow to import, and most data is JSON.
  import pyarrow.parquet

  def batches():
    if path.suffix == '.parquet':
      return pyarrow.parquet.ParquetFile(path).iter_batches()
    source = pyarrow.memory_map(str(path))
    if source.read_at(6, 0) == b'ARROW1':
      found = pyarrow.ipc.open_file(source)
      return map(found.get_batch, range(found.num_record_batches))
    # A stream, as `datasets` writes it.
    found = pyarrow.ipc.open_stream(source)
    # One that ends between two batches is read as if it were whole.
    if source.read_at(len(_END_OF_STREAM), source.size() - 8) != _END_OF_STREAM:
      raise OSError('it is not whole: the end of its stream is missing')
    return found

  try:
    records = (record for batch in batches() for record in _records(batch))
    for where, record in indexed(path, records):
      bad = isinstance(record, str)
      yield where, BadRow(where, record) if bad else record
  except (pyarrow.ArrowException, *_NO_VALUE) as error:
    raise OSError(str(error)) from error


def _records(batch):
  """The rows of a batch; of one that cannot be had, the reason."""
  try:
    return _values(batch)
  except _NO_VALUE:
    return [_record(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _record(batch):
  try:
    return _values(batch)[0]
  except _NO_VALUE as error:
    is_text = isinstance(error, UnicodeDecodeError) or 'UTF8' in str(error)
    return 'not UTF-8' if is_text else 'has a value that cannot be read'


def _values(batch):
  """The rows of a batch; of damaged ones, Python would read anything."""
  batch.validate(full=True)
  return batch.to_pylist()
