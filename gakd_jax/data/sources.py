"""Rows of text from files, the Hugging Face hub or a function.

A spec names where rows come from: a JSON Lines file, a JSON array (either may
end in .gz), a Parquet or Arrow file, a directory of such files, a directory
that `datasets` saved to disk, a data set of the hub as
`org/name[/config][@revision][:split]` (split `train`, if none is named), or
`python:<module>:<function>[:<argument>...]`, a function that returns records.
Of a directory of several splits (a snapshot of the hub, say) these are the rows
of `train` as well. What a row may hold is in `rows`.
"""

import collections
import gzip
import hashlib
import importlib
import itertools
import json
import pathlib
import re
import zlib

from gakd_jax import UserError
from gakd_jax.data import rows as rows_lib
from gakd_jax.data.rows import BadRow as BadRow
from gakd_jax.data.rows import Row as Row
from gakd_jax.data.rows import Rules as Rules

SUFFIXES = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet', '.arrow')
# Beside the data of a directory; none of it is a row.
_METADATA = ('dataset_info.json', 'dataset_infos.json', 'dataset_dict.json')
_METADATA += ('state.json',)
# The words by which `datasets` finds the split of a file in its path.
_SPLIT_WORDS = {
  **dict.fromkeys(('train', 'training'), 'train'),
  **dict.fromkeys(('validation', 'valid', 'val', 'dev'), 'validation'),
  **dict.fromkeys(('test', 'testing', 'eval', 'evaluation'), 'test'),
}
# Name, configuration, revision and split of a data set on the hub.
_HUB_ID = re.compile(
  r'([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::([\w.-]+))?'
)


def load(spec, *, on_bad_row='skip', need_response=True):
  """Returns (the usable rows of a spec or of several, Counter of bad rows).

  For the settings see `rows.Rules`. Raises UserError if the spec cannot be read
  or has no usable row.
  """
  rules = Rules(on_bad_row, need_response)
  rows, bad = [], collections.Counter()
  refuse = rules.refuse(bad)
  for _, _, row in stream(spec, rules):
    if isinstance(row, BadRow):
      refuse(row)
    else:
      rows.append(row)
  if not rows:
    raise UserError(nothing_left(spec, bad))
  return rows, bad


def stream(spec, rules):
  """Yields (number of the spec, place, Row or BadRow) of a spec or of several.

  A row's place counts all rows, of all specs, bad ones among them.
  """
  place = itertools.count()
  for number, part in enumerate(parts(spec)):
    for where, record in _records(part):
      try:
        rows = rows_lib.read(where, record, rules)
      except BadRow as error:
        rows = [error]
      for row in rows:
        yield number, next(place), row


def at(spec, rules, places):
  """The rows at some places, by reading up to the last of them."""
  wanted = {int(place): i for i, place in enumerate(places)}
  found = [None] * len(places)
  some = itertools.islice(stream(spec, rules), 1 + max(wanted, default=-1))
  for _, place, row in some:
    if place in wanted:
      found[wanted[place]] = row
  return found


def parts(spec):
  """The specs of a spec, which may be several."""
  several = spec if isinstance(spec, list | tuple) else [spec]
  if not several:
    raise UserError(f'no data: {spec!r} names no file; give at least one')
  return [str(part) for part in several]


def nothing_left(spec, bad):
  """What to say where there is no usable row."""
  reasons = ', '.join(f'{n} {reason}' for reason, n in bad.most_common())
  return (
    f'{" and ".join(parts(spec))}: no usable row ({reasons or "it is empty"}); '
    'see the row schemas in gakd_jax/data/rows.py'
  )


def identity(spec):
  """Of each part, a text that differs between different contents."""
  return [_identity(part) for part in parts(spec)]


def _identity(spec):
  path = pathlib.Path(spec)
  if path.exists():
    files = _files(path) if path.is_dir() else [path]
  else:
    records = _by_name(spec)
    # A data set of the hub lies in files.
    files = [x['filename'] for x in getattr(records, 'cache_files', ())]
  digest = hashlib.blake2b(digest_size=16)
  if not files:
    for record in records:
      digest.update(json.dumps(record, default=str).encode())
  for file in map(pathlib.Path, files):
    # What a file is called says how it is read.
    digest.update(''.join(file.suffixes).encode())
    try:
      with file.open('rb') as content:
        digest.update(hashlib.file_digest(content, 'blake2b').digest())
    except OSError as error:
      raise _unreadable(file, error) from error
  return digest.hexdigest()


def _records(spec):
  """Yields (where, record) of one spec; a record is a dict or a BadRow."""
  path = pathlib.Path(spec)
  if path.is_dir():
    for file in _files(path):
      yield from _file(file)
  elif path.exists():
    if not _is_data(path):
      raise UserError(f'{spec}: unknown kind of file; expected {_expected()}')
    yield from _file(path)
  else:
    yield from _indexed(spec, _by_name(spec))


def _by_name(spec):
  """The records of what is no file."""
  path, hub = pathlib.Path(spec), _HUB_ID.fullmatch(spec)
  if spec.startswith('python:'):
    return _function(spec)
  if hub and not _is_data(path) and not path.parent.exists():
    return _hub(spec, *hub.groups())
  raise UserError(
    f'{spec}: no such file or directory, and not a hub id '
    '(org/name[/config][@revision][:split])'
  )


def _is_data(path):
  return path.name.endswith(SUFFIXES) and not path.name.startswith('.')


def _expected():
  return ', '.join(SUFFIXES)


def _files(path):
  """The data files of a directory, of one split."""
  if (path / 'dataset_dict.json').exists():  # DatasetDict.save_to_disk
    splits = [p.parent.name for p in sorted(path.glob('*/state.json'))]
    if 'train' not in splits and len(splits) != 1:
      raise UserError(
        f'{path}: has the splits {", ".join(splits) or "of nothing"}, and none '
        f'is train; name one, as in {path}/{(splits or ["test"])[0]}'
      )
    path /= 'train' if 'train' in splits else splits[0]
  if (path / 'state.json').exists():  # Dataset.save_to_disk
    try:
      # What earlier versions left beside these is not of the set.
      state = json.loads((path / 'state.json').read_text('utf-8'))
      return [path / x['filename'] for x in state['_data_files']]
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{path}/state.json: not what save_to_disk writes ({error!r}); save it '
        'again'
      ) from error
  files = [p for p in sorted(path.iterdir()) if _is_listed(p)]
  if not files:
    files = [
      p
      for p in sorted(path.rglob('*'))
      if _is_listed(p) and not re.search(r'/\.', f'/{p.relative_to(path)}')
    ]
  if not files:
    raise UserError(f'{path}: no data file here; expected {_expected()}')
  return _of_one_split(path, files)


def _of_one_split(path, files):
  """Training files where there are others; raises UserError to ask."""
  by_split, homes = {}, {}
  for file in files:
    parts = file.relative_to(path).parts
    words = re.findall('[a-z]+', '/'.join(parts).lower())
    splits = [_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS]
    by_split.setdefault(splits[-1] if splits else None, []).append(file)
    home = [p for p in parts[:-1] if p.lower() not in _SPLIT_WORDS]
    homes.setdefault('/'.join(home), []).append(file)
  if len(homes) > 1:
    raise UserError(
      f'{path}: has data in {", ".join(sorted(homes))}; name one of these'
    )
  if len(by_split) == 1 or by_split.keys() == {'train', None}:
    return files
  if None in by_split or 'train' not in by_split:
    some = ', '.join(str(x[0].relative_to(path)) for x in by_split.values())
    raise UserError(
      f'{path}: has files of several splits ({some}), and what to take is not '
      'clear; name the files'
    )
  return by_split['train']


def _is_listed(path):
  """Whether a file of a directory has rows."""
  return _is_data(path) and path.name not in _METADATA and path.is_file()


def _file(path):
  """Yields (where, record) of one file."""
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
    raise _unreadable(path, error) from error


def _unreadable(path, error):
  return UserError(
    f'{path}: cannot read it ({error}); check the file, or fetch it again'
  )


def _starts_array(file):
  start = file.read(1024).removeprefix(b'\xef\xbb\xbf').lstrip()
  file.seek(0)
  return start.startswith(b'[')


def _lines(path, file):
  # Bytes, not text: one line that is not UTF-8 must not lose the others.
  for number, line in enumerate(file, start=1):
    where = f'{path}:{number}'
    line = line.removeprefix(b'\xef\xbb\xbf') if number == 1 else line
    if not line.strip():
      continue
    try:
      yield where, json.loads(line.decode('utf-8'))
    except UnicodeDecodeError:
      yield where, BadRow(where, 'not UTF-8')
    except (ValueError, RecursionError):
      yield where, BadRow(where, 'not JSON')


def _array(path, content):
  try:
    records = json.loads(content.decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not a JSON array ({error}); fix it') from error
  yield from _indexed(path, records)


def _table(path):
  import pyarrow  # Slow to import, and most data is JSON.
  import pyarrow.parquet

  def records():
    if path.suffix == '.parquet':
      batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    else:  # A stream, as `datasets` writes it.
      batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    for batch in batches:
      yield from batch.to_pylist()

  try:
    yield from _indexed(path, records())
  except pyarrow.ArrowException as error:
    raise OSError(str(error).splitlines()[0]) from error


def _hub(spec, name, config, revision, split):
  import datasets  # Slow to import, and only wanted here.

  try:
    return datasets.load_dataset(
      name, config, revision=revision, split=split or 'train'
    )
  except Exception as error:  # Its errors have no common class.
    # The second line names the configurations, if there are several.
    reason = ' '.join(str(error).splitlines()[:2])
    raise UserError(
      f'{spec}: no such file, and the hub does not give it '
      f'({type(error).__name__}: {reason}); check the connection and the '
      'name (org/name[/config][@revision][:split])'
    ) from error


def _function(spec):
  try:
    _, module, name, *arguments = spec.split(':')
    arguments = [int(x) if x.isdecimal() else x for x in arguments]
    return getattr(importlib.import_module(module), name)(*arguments)
  except Exception as error:  # It may raise anything.
    raise UserError(
      f'{spec}: {type(error).__name__}: {error}; expected '
      'python:<module>:<function>[:<argument>...] that returns rows'
    ) from error


def _indexed(source, records):
  return ((f'{source}[{i}]', record) for i, record in enumerate(records))
