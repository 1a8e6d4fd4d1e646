"""Rows of text from files, the Hugging Face hub or the synthetic task.

A spec names where rows come from: a JSON Lines file, a JSON array (either may
end in .gz), a Parquet file, a directory of such files, a data set of the hub
as `org/name[/config][@revision][:split]` (split `train`, if none is named), or
`synthetic:<split>:<n>[:<seed>]`. A row holds `messages`, or
`instruction, input, output` (the last two may be called `context, response`),
or `question, answer`, or `prompt, response`, or `query, response`, or
`dialogue, summary` (`summary1` and so on are several references); the first of
these that is there counts, since some data sets also store a rendered `prompt`.
`output` and `response` may be a list of references.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import zlib

from gakd_jax import UserError

SUFFIXES = ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.parquet')
# A prompt, and what its response may be called, in order of priority.
_FIELDS = {
  'instruction': ('output', 'response'),
  'question': ('answer',),
  'prompt': ('response',),
  'query': ('response',),
}
# Name, configuration, revision and split of a data set on the hub.
_HUB_ID = re.compile(
  r'([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?(?::([\w.-]+))?'
)


class BadRow(UserError):
  """One unusable row: `reason` is what it is counted under."""

  def __init__(self, where, reason):
    super().__init__(
      f"{where}: {reason}; fix the row, or skip such rows: on_bad_row='skip'"
    )
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Row:
  """A prompt and its references.

  `references`: train on the first, score against all; empty if there is only a
  prompt. `messages`: the turns before the answer (role and content), for rows
  with a system message or several turns, else None. `where`: 'file:line', or
  'file[index]' where a file has no lines. `answer`: the short answer of a row
  with an `answer` beside its `output`, which shows how one comes to it (math
  and multiple choice of LLM-Adapters); it alone tells right from wrong.
  """

  instruction: str
  input: str = ''
  references: tuple[str, ...] = ()
  messages: tuple[dict, ...] | None = None
  where: str = ''
  answer: str = ''


def load(spec, *, on_bad_row='skip', need_response=True):
  """Returns (the usable rows of a spec or of several, Counter of bad rows).

  on_bad_row: 'skip' counts a bad row by reason, 'fail' raises it.
  need_response: whether a row without a response is a bad row.
  Raises UserError if the spec cannot be read or has no usable row.
  """
  if on_bad_row not in ('skip', 'fail'):
    raise UserError(f"on_bad_row is {on_bad_row!r}: use 'skip' or 'fail'")
  rows, bad = [], collections.Counter()
  for part in spec if isinstance(spec, list | tuple) else [spec]:
    some, reasons = _load_one(str(part), on_bad_row, need_response)
    rows += some
    bad += reasons
  if not rows:
    raise UserError(f'no data: {spec!r} names no file; give at least one')
  return rows, bad


def _load_one(spec, on_bad_row, need_response):
  rows, bad = [], collections.Counter()
  for where, record in _records(spec):
    try:
      rows.append(_row(where, record, need_response))
    except BadRow as error:
      if on_bad_row == 'fail':
        raise
      bad[error.reason] += 1
  if not rows:
    reasons = ', '.join(f'{n} {reason}' for reason, n in bad.most_common())
    raise UserError(
      f'{spec}: no usable row ({reasons or "it is empty"}); '
      f'see the row schemas in gakd_jax/data/sources.py'
    )
  return rows, bad


def _records(spec):
  """Yields (where, record) of one spec; a record is a dict or a BadRow."""
  path = pathlib.Path(spec)
  hub = _HUB_ID.fullmatch(spec)
  if spec.startswith('synthetic:'):
    yield from _synthetic(spec)
  elif path.is_dir():
    files = [p for p in sorted(path.iterdir()) if _is_data(p)]
    if not files:
      raise UserError(f'{spec}: no data file here; expected {_expected()}')
    for file in files:
      yield from _file(file)
  elif path.exists():
    if not _is_data(path):
      raise UserError(f'{spec}: unknown kind of file; expected {_expected()}')
    yield from _file(path)
  elif hub and not _is_data(path) and not path.parent.exists():
    yield from _hub(spec, *hub.groups())
  else:
    raise UserError(
      f'{spec}: no such file or directory, and not a hub id '
      '(org/name[/config][@revision][:split])'
    )


def _is_data(path):
  return path.name.endswith(SUFFIXES) and not path.name.startswith('.')


def _expected():
  return ', '.join(SUFFIXES)


def _file(path):
  """Yields (where, record) of one file."""
  try:
    if path.suffix == '.parquet':
      yield from _parquet(path)
    else:
      opened = gzip.open if path.suffix == '.gz' else open
      with opened(path, 'rb') as file:
        # Only .json may be an array: a stray `[` in a .jsonl is a bad row.
        if '.json' in path.suffixes and _starts_array(file):
          yield from _array(path, file.read())
        else:
          yield from _lines(path, file)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(
      f'{path}: cannot read it ({error}); check the file, or fetch it again'
    ) from error


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


def _parquet(path):
  import pyarrow  # Slow to import, and most data is not Parquet.
  import pyarrow.parquet

  try:
    records = pyarrow.parquet.ParquetFile(path).read().to_pylist()
  except pyarrow.ArrowException as error:
    raise OSError(str(error).splitlines()[0]) from error
  yield from _indexed(path, records)


def _hub(spec, name, config, revision, split):
  import datasets  # Slow to import, and only wanted here.

  try:
    records = datasets.load_dataset(
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
  yield from _indexed(spec, records)


def _synthetic(spec):
  from gakd_jax.data import synthetic

  try:
    _, split, n, *seed = spec.split(':')
    (seed,) = map(int, seed or ['0'])
    records = synthetic.rows(split, int(n), seed)
  except ValueError as error:
    raise UserError(
      f'{spec}: expected synthetic:<split>:<n>[:<seed>] ({error})'
    ) from error
  yield from _indexed(spec, records)


def _indexed(source, records):
  return ((f'{source}[{i}]', record) for i, record in enumerate(records))


def _row(where, record, need_response):
  """The Row that a record holds; raises BadRow."""
  if isinstance(record, BadRow):
    raise record
  if not isinstance(record, dict):
    raise BadRow(where, 'not an object')
  # Parquet and the hub write an absent field as None.
  record = {key: value for key, value in record.items() if value is not None}
  if 'messages' in record:
    row = _conversation(where, record['messages'])
  elif 'dialogue' in record:
    row = _pair(where, _dialogue(record), need_response)
  else:
    row = _pair(where, record, need_response)
  if need_response and not row.references:
    raise BadRow(where, 'empty response')
  turns = [message['content'] for message in row.messages or ()]
  try:
    # JSON can hold half a surrogate pair ("\ud800"); no tokenizer takes it.
    ''.join([row.instruction, row.input, *row.references, *turns]).encode()
  except UnicodeEncodeError as error:
    raise BadRow(where, 'not UTF-8') from error
  return row


def _pair(where, record, need_response):
  prompt_key = next((key for key in _FIELDS if key in record), None)
  if prompt_key is None:
    raise BadRow(where, 'missing instruction, question, prompt or query')
  names = _FIELDS[prompt_key]
  response_key = next((name for name in names if name in record), names[0])
  if need_response and response_key not in record:
    raise BadRow(where, f'missing {response_key}')
  prompt = record[prompt_key]
  # Only instruction rows have an input; elsewhere `input` means something else.
  extra_key = 'input' if 'input' in record else 'context'
  extra = record.get(extra_key, '') if prompt_key == 'instruction' else ''
  answer = str(record.get('answer', '')) if response_key == 'output' else ''
  response = record.get(response_key, [])
  if response == '':
    response = answer
  references = response if isinstance(response, list) else [response]
  fields = {prompt_key: [prompt], extra_key: [extra], response_key: references}
  for key, values in fields.items():
    if not all(isinstance(value, str) for value in values):
      raise BadRow(where, f'{key} is not text')
  if not (prompt.strip() or extra.strip()):
    raise BadRow(where, 'empty prompt')
  return Row(
    instruction=prompt,
    input=extra if extra.strip() else '',
    references=tuple(text for text in references if text.strip()),
    where=where,
    answer=answer,
  )


def _dialogue(record):
  """A DialogSum record as an instruction."""
  return {
    'instruction': 'Summarize the following dialogue.',
    'input': record['dialogue'],
    'output': [
      text
      for key, text in sorted(record.items())
      if re.fullmatch(r'summary\d*', key)
    ],
  }


def _conversation(where, messages):
  if not isinstance(messages, list) or not messages:
    raise BadRow(where, 'messages is not a list')
  for message in messages:
    if (
      not isinstance(message, dict)
      or message.get('role') not in ('system', 'user', 'assistant')
      or not isinstance(message.get('content'), str)
    ):
      raise BadRow(where, 'messages need a role and text as content')
  turns = [{'role': m['role'], 'content': m['content']} for m in messages]
  answer = turns.pop()['content'] if turns[-1]['role'] == 'assistant' else ''
  if not turns or turns[-1]['role'] != 'user':
    raise BadRow(where, 'messages without a last user turn')
  question = turns[-1]['content']
  if not question.strip():
    raise BadRow(where, 'empty prompt')
  return Row(
    instruction=question,
    references=(answer,) if answer.strip() else (),
    messages=tuple(turns) if len(turns) > 1 else None,
    where=where,
  )
