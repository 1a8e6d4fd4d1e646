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
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import re

from gakd_jax import UserError
from gakd_jax.data import files as files_lib
from gakd_jax.data import records as records_lib
from gakd_jax.data import rows as rows_lib
from gakd_jax.data.records import BadRow as BadRow
from gakd_jax.data.rows import Row as Row
from gakd_jax.data.rows import Rules as Rules

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
  for number, place, row, _ in _stream(spec, rules):
    yield number, place, row


def column(spec, rules, name):
  """Yields (place, where, what its record has under a name or None) of rows.

  Bad rows are left out. Of the rows that the turns of one record are, it is of
  the last.
  """
  for _, place, row, record in _stream(spec, rules):
    if isinstance(row, BadRow):
      continue
    value = record.get(name) if isinstance(record, dict) else None
    yield place, row.where, value


def _stream(spec, rules):
  """`stream`, and the record of each row; None for the first of its rows."""
  place = itertools.count()
  for number, part in enumerate(parts(spec)):
    for where, record in _records(part):
      try:
        rows = rows_lib.read(where, record, rules)
      except BadRow as error:
        rows = [error]
      for i, row in enumerate(rows, start=1):
        yield number, next(place), row, record if i == len(rows) else None


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
  seen = set()
  for part in several:
    if not _is_name(part):
      raise UserError(
        f'no data: {part!r} is the name of no file, directory or data set'
      )
    if os.path.realpath(part) in seen:
      raise UserError(
        f'{part}: is named twice; name it once, and set config.data.weights to '
        'have its rows more often'
      )
    seen.add(os.path.realpath(part))
  return [str(part) for part in several]


def _is_name(part):
  """No text, blanks and control characters would be taken for a path."""
  text = str(part) if isinstance(part, str | os.PathLike) else ''
  return bool(text.strip()) and not re.search('[\x00-\x1f\x7f]', text)


def nothing_left(spec, bad):
  """What to say where there is no usable row."""
  reasons = ', '.join(f'{n} {reason}' for reason, n in bad.most_common())
  return (
    f'{" and ".join(parts(spec))}: no usable row ({reasons or "it is empty"}); '
    'docs/guide/data.md has what a row may be'
  )


def identity(spec):
  """Of each part, a text that differs between different contents."""
  return [_identity(part) for part in parts(spec)]


def _identity(spec):
  digest = hashlib.blake2b(digest_size=16)
  files = _located(spec)
  if files is None:
    records = _by_name(spec)
    # A data set of the hub lies in files.
    files = [
      pathlib.Path(x['filename']) for x in getattr(records, 'cache_files', ())
    ]
    if not files:
      for _, record in _given(spec, records):
        digest.update(_said(record).encode('utf-8', 'surrogatepass'))
  for file in files:
    # What a file is called says how it is read.
    digest.update(''.join(file.suffixes).encode())
    try:
      with file.open('rb') as content:
        digest.update(hashlib.file_digest(content, 'blake2b').digest())
    except OSError as error:
      raise files_lib.unreadable(file, error) from error
  return digest.hexdigest()


def _said(record):
  try:
    return records_lib.as_json(record)
  except ValueError:
    return 'a bad row'


def _records(spec):
  """Yields (where, record) of one spec; a record is a dict or a BadRow."""
  files = _located(spec)
  if files is None:
    yield from _given(spec, _by_name(spec))
  for file in files or ():
    yield from files_lib.read(file)


def _located(spec):
  """The data files of a spec, in order; None for what is no path."""
  path = pathlib.Path(spec)
  try:
    if path.is_dir():
      files = _files(path)
    elif not path.exists():
      return None
    elif not files_lib.is_data(path):
      raise UserError(f'{spec}: unknown kind of file; expected {_expected()}')
    else:
      files = [path]
  except OSError as error:
    raise files_lib.unreadable(f'{spec:.200}', error) from error
  for file in files:
    files_lib.check(file)
  return files


def _by_name(spec):
  """The records of what is no file."""
  path, hub = pathlib.Path(spec), _HUB_ID.fullmatch(spec)
  if spec.startswith('python:'):
    return _function(spec)
  if hub and not files_lib.is_data(path) and not path.parent.exists():
    return _hub(spec, *hub.groups())
  hint = '; * is not expanded: name the directory' if '*' in spec else ''
  raise UserError(
    f'{spec}: no such file or directory, and not a hub id '
    f'(org/name[/config][@revision][:split]){hint}'
  )


def _expected():
  return ', '.join(files_lib.SUFFIXES)


def _files(path):
  """The data files of a directory, of one split."""
  if (path / 'dataset_dict.json').exists():  # DatasetDict.save_to_disk
    splits = [p.parent.name for p in sorted(path.glob('*/state.json'))]
    if not splits:
      raise UserError(
        f'{path}: has a dataset_dict.json and no split with a state.json; save '
        'it again'
      )
    if 'train' not in splits and len(splits) != 1:
      raise UserError(
        f'{path}: has the splits {", ".join(splits)}, and none is train; name '
        f'one, as in {path}/{splits[0]}'
      )
    path /= 'train' if 'train' in splits else splits[0]
  if (path / 'state.json').exists():  # Dataset.save_to_disk
    return _saved(path, path / 'state.json')
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


def _saved(path, state):
  """The files of a set that `datasets` saved; others beside them are older."""
  files_lib.check(state)
  try:
    names = [
      x['filename'] for x in json.loads(state.read_bytes())['_data_files']
    ]
    outside = [x for x in names if not x or pathlib.Path(x).name != x]
  except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
    raise UserError(
      f'{state}: not what save_to_disk writes ({error!r}); save it again'
    ) from error
  if outside:
    raise UserError(
      f'{state}: names {outside[0]!r}, which is no file beside it; save the '
      'set again'
    )
  return [path / name for name in names]


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
  several = {_named(path, file) for file in by_split.get('train', ())}
  if len(several) > 1:
    raise UserError(
      f'{path}: has several training sets ({", ".join(sorted(several))}); name '
      'the files'
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


def _named(path, file):
  """The part of a file's name that says its split, up to a shard's number."""
  parts = [x.partition('.')[0].lower() for x in file.relative_to(path).parts]
  named = [
    x for x in parts if set(re.findall('[a-z]+', x)) & _SPLIT_WORDS.keys()
  ]
  return re.split(r'[\W_]*\d', named[-1])[0]


def _is_listed(path):
  """Whether a file of a directory has rows."""
  return (
    files_lib.is_data(path) and path.name not in _METADATA and path.is_file()
  )


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
    records = getattr(importlib.import_module(module), name)(*arguments)
    if isinstance(records, str | bytes | dict):
      raise TypeError(f'it returns a {type(records).__name__}')
    return iter(records)
  except UserError:  # It says itself what is missing.
    raise
  except (Exception, SystemExit) as error:  # It may raise anything.
    raise _raised(spec, error) from error


def _raised(spec, error):
  is_function = spec.startswith('python:')
  function = 'python:<module>:<function>[:<argument>...] that returns rows'
  return UserError(
    f'{spec}: {type(error).__name__}: {error}; '
    + (f'expected {function}' if is_function else 'fetch it again')
  )


def _given(spec, records):
  """Yields (where, record) of what a function or the hub gives."""
  try:
    yield from files_lib.indexed(spec, records)
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # A generator may raise anything.
    raise _raised(spec, error) from error
