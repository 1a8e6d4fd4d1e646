"""Data of every wrong kind: one line that says what, where and what to do."""

import gzip
import io
import json
import os
import signal
import socket

import pyarrow
import pyarrow.parquet
import pytest

from gakd_jax import UserError
from gakd_jax.data import records, sources
from gakd_jax.data.records import BadRow

pytestmark = pytest.mark.slow  # Many.

ROW = {'instruction': 'a', 'output': 'b'}
LINE = json.dumps(ROW).encode()
TABLE = pyarrow.Table.from_pylist([ROW] * 300)


@pytest.fixture(autouse=True)
def no_hanging():
  """A pipe that is opened for reading would wait for ever."""
  signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it hangs'))
  signal.alarm(60)
  yield
  signal.alarm(0)


def refused(spec, said):
  """Both readers of a spec refuse it in one line."""
  for read in (sources.load, sources.identity):
    with pytest.raises(UserError) as error:
      read(spec)
    message = str(error.value)
    assert said in message
    assert message.isprintable()
    assert len(message) < 700


# Files that are none.


def pipe(path):
  os.mkfifo(path)


def listening(path):
  with socket.socket(socket.AF_UNIX) as one:
    one.bind(path.name)


def zeros(path):
  path.symlink_to('/dev/zero')


def nothing(path):
  path.symlink_to('/dev/null')


def loop(path):
  path.symlink_to(path.name)


def dangling(path):
  path.symlink_to('nowhere')


@pytest.mark.parametrize(
  ('make', 'said'),
  [
    (pipe, 'it is a pipe or device; name a file'),
    (listening, 'it is a pipe or device'),
    (zeros, 'it is a pipe or device'),
    (nothing, 'it is a pipe or device'),
    (loop, 'no such file or directory'),
    (dangling, 'no such file or directory'),
  ],
)
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, make, said):
  monkeypatch.chdir(tmp_path)  # Names of sockets are short.
  path = tmp_path / 'rows.jsonl'
  make(path)
  refused(str(path), said)
  # Nor in a directory, where other things may lie.
  (tmp_path / 'folder').mkdir()
  path.rename(tmp_path / 'folder' / 'rows.jsonl')
  refused(str(tmp_path / 'folder'), 'no data file here')


def test_a_directory_that_holds_itself(tmp_path):
  (tmp_path / 'self').symlink_to('.')
  refused(str(tmp_path), 'no data file here')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_what_may_not_be_read(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_bytes(LINE)
  path.chmod(0)
  refused(str(path), 'cannot read it (Permission denied)')
  tmp_path.chmod(0)
  refused(str(path), 'cannot read it (Permission denied)')
  tmp_path.chmod(0o700)


# Names that name nothing.


@pytest.mark.parametrize(
  ('spec', 'said'),
  [
    ('', "no data: '' is the name of no file"),
    ('  ', "no data: '  ' is the name of no file"),
    ('a\0b', r"no data: 'a\x00b' is the name of no"),
    ('a\nb.jsonl', r"no data: 'a\nb.jsonl' is the name of no"),
    (None, 'no data: None is the name of no'),
    (5, 'no data: 5 is'),
    (True, 'no data: True is'),
    ({'train': 'x'}, "no data: {'train': 'x'} is"),
    ((None,), 'no data: None is'),
    ([['a']], "no data: ['a'] is"),
    ((), 'no data: () names no file'),
    ('a' * 600, 'cannot read it (File name too long)'),
    ('no/such/*.jsonl', '* is not expanded: name the directory'),
    ('https://x.y/z.jsonl', 'no such file or directory, and not a hub id'),
    ('hf://datasets/x/y', 'no such file or directory, and not a hub id'),
    ('s3://x/y.parquet', 'no such file or directory, and not a hub id'),
    ('org/none', 'the hub does not give it'),
    ('org/none/config@main:test', 'the hub does not give it'),
    ('org/none/@:', 'not a hub id'),
    ('/dev/null', 'unknown kind of file; expected .jsonl'),
    ('/dev/zero', 'unknown kind of file'),
    ('python:', 'python:: ValueError: not enough values'),
    ('python:json', 'python:json: ValueError: not enough values'),
    ('python::', 'python::: ValueError: Empty module name'),
    ('python:.json:loads', "TypeError: the 'package' argument"),
    ('python:json.none:x', "ModuleNotFoundError: No module named 'json.none'"),
    ('python:json:nothing', "AttributeError: module 'json' has no attribute"),
    ('python:json:dumps', 'TypeError: dumps() missing 1 required'),
    ('python:json:__name__', "TypeError: 'str' object is not callable"),
    ('python:os:getcwd', 'TypeError: it returns a str; expected python:<mod'),
    ('python:os:getpid', "TypeError: 'int' object is not iterable"),
    ('python:gc:collect:9', 'ValueError'),
  ],
)
def test_names_of_nothing(spec, said):
  refused(spec, said)


@pytest.mark.parametrize('name', ['rows.jsonl', './rows.jsonl', 'link.jsonl'])
def test_a_file_is_named_once(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'rows.jsonl').write_bytes(LINE)
  (tmp_path / 'link.jsonl').symlink_to('rows.jsonl')
  refused(('rows.jsonl', name), f'{name}: is named twice; name it once')


def test_a_file_is_no_directory(tmp_path):
  (tmp_path / 'rows.jsonl').write_bytes(LINE)
  refused(str(tmp_path / 'rows.jsonl' / 'more.jsonl'), 'no such file')


# Files of other contents than their names say.


def arrow(table=TABLE, chunk=100):
  buffer = io.BytesIO()
  with pyarrow.ipc.new_stream(buffer, table.schema) as stream:
    for batch in table.to_batches(max_chunksize=chunk):
      stream.write_batch(batch)
  return buffer.getvalue()


def parquet(table=TABLE):
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(table, buffer)
  return buffer.getvalue()


def flipped(content, start, end):
  middle = bytes(b ^ 255 for b in content[start:end])
  return content[:start] + middle + content[end:]


def up_to_a_batch(content, batches):
  """A stream that ends where a batch does."""
  reader = pyarrow.ipc.MessageReader.open_stream(pyarrow.py_buffer(content))
  messages = [reader.read_next_message() for _ in range(1 + batches)]
  return content[: sum(len(m.serialize()) for m in messages)]


ZIP = gzip.compress(LINE, mtime=0)
NO_ROW = 'no usable row'


@pytest.mark.parametrize(
  ('name', 'content', 'said'),
  [
    ('a.jsonl', b'', f'{NO_ROW} (it is empty); docs/guide/data.md'),
    ('a.jsonl', b'\n \r\n\t\n', f'{NO_ROW} (it is empty)'),
    ('a.jsonl', b'\xef\xbb\xbf', f'{NO_ROW} (it is empty)'),
    ('a.jsonl', b'\0' * 5000, f'{NO_ROW} (1 not JSON)'),
    ('a.jsonl', LINE + b'\r' + LINE, f'{NO_ROW} (1 not JSON)'),
    ('a.jsonl', b'\xef\xbb\xbf' * 2 + LINE, f'{NO_ROW} (1 not JSON)'),
    ('a.jsonl', LINE.decode().encode('utf-16'), f'{NO_ROW} (1 not UTF-8)'),
    ('a.jsonl', b'instruction,output\na,b', f'{NO_ROW} (2 not JSON)'),
    ('a.jsonl', LINE[:-1], f'{NO_ROW} (1 not JSON)'),
    ('a.jsonl', LINE + b',', f'{NO_ROW} (1 not JSON)'),
    ('a.jsonl', ZIP, NO_ROW),
    ('a.json', b'5', f'{NO_ROW} (1 not an object)'),
    ('a.json', b'"abc"', f'{NO_ROW} (1 not an object)'),
    ('a.json', b'null', f'{NO_ROW} (1 not an object)'),
    ('a.json', b'NaN', f'{NO_ROW} (1 not an object)'),
    ('a.json', b'[1, [2], null]', f'{NO_ROW} (3 not an object)'),
    ('a.json', b'{"data": [%b]}' % LINE, f'{NO_ROW} (1 missing instruction'),
    ('a.jsonl', b'{"instrution": ""}', "dialogue; did you mean 'instruction'?"),
    ('a.jsonl', b'{"query": "", "respons": ""}', "mean 'response'?)"),
    ('a.json', b'{\n"data": [\n%b\n]\n}' % LINE[:-1], f'{NO_ROW} (5 not JSON'),
    ('a.json', b'[%b] x' % LINE, 'not a JSON array (Extra data: line 1'),
    ('a.json', b'[%b,' % LINE, 'not a JSON array (Expecting value: line 1'),
    ('a.json', b'[' * 100_000, 'not a JSON array (maximum recursion'),
    ('a.json', b'[{"a": 1, "a": 2}]', "an object has the key 'a' twice); fix"),
    ('a.json', b'[{"x": "caf\xe9"}]', "not a JSON array ('utf-8' codec can't"),
    ('a.json', b'[%b]' % (b'9' * 5000), 'not a JSON array (Exceeds the limit'),
    ('a.jsonl.gz', b'', f'{NO_ROW} (it is empty)'),
    ('a.jsonl.gz', LINE, 'cannot read it (Not a gzipped file'),
    ('a.jsonl.gz', ZIP[:-9], 'cannot read it (Compressed file ended before'),
    ('a.jsonl.gz', ZIP[:5], 'cannot read it (Compressed file ended before'),
    ('a.jsonl.gz', ZIP + b'more', 'cannot read it (Not a gzipped file'),
    ('a.jsonl.gz', flipped(ZIP, -8, -4), 'cannot read it (CRC check failed'),
    ('a.jsonl.gz', flipped(ZIP, 10, 12), 'cannot read it (Error -3 while'),
    ('a.json.gz', ZIP[:-9], 'cannot read it (Compressed file ended before'),
    ('a.parquet', b'', 'cannot read it (Parquet file size is 0 bytes)'),
    ('a.parquet', b'a,b\n1,2', 'cannot read it (Parquet file size is 7'),
    ('a.parquet', parquet()[:-20], 'cannot read it (Parquet magic bytes'),
    ('a.parquet', arrow(), 'cannot read it (Parquet magic bytes'),
    ('a.parquet', flipped(parquet(), 4, 60), 'cannot read it'),
    (
      'a.parquet',
      parquet().replace(b'instruction', b'instruct\xff\xffn'),
      "cannot read it ('utf-8' codec",
    ),
    ('a.parquet', flipped(parquet(), -200, -150), 'cannot read it'),
    ('a.parquet', parquet(TABLE[:0]), f'{NO_ROW} (it is empty)'),
    ('a.arrow', b'', 'cannot read it'),
    ('a.arrow', b'a,b\n1,2', 'cannot read it'),
    ('a.arrow', parquet(), 'cannot read it'),
    ('a.arrow', arrow()[:-1000], 'the end of its stream is missing'),
    ('a.arrow', arrow()[:-8], 'the end of its stream is missing'),
    ('a.arrow', up_to_a_batch(arrow(), 2), 'the end of its stream is missing'),
    ('a.arrow', flipped(arrow(), 0, 80), 'cannot read it'),
    ('a.arrow', b'ARROW1' + arrow(), 'cannot read it'),
    ('a.csv', b'a,b', 'unknown kind of file; expected .jsonl'),
    ('a.txt', LINE, 'unknown kind of file'),
    ('a.jsonl.zst', LINE, 'unknown kind of file'),
    ('.a.jsonl', LINE, 'unknown kind of file'),
  ],
)
def test_files_of_another_content(tmp_path, name, content, said):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError) as error:
    sources.load(path)
  message = str(error.value)
  assert message.startswith(f'{path}: ')
  assert said in message
  assert message.isprintable()


def test_both_forms_of_an_arrow_file(tmp_path):
  with pyarrow.ipc.new_file(str(tmp_path / 'a.arrow'), TABLE.schema) as writer:
    writer.write_table(TABLE, max_chunksize=100)
  (tmp_path / 'b.arrow').write_bytes(arrow())
  for name in 'ab':
    assert len(sources.load(tmp_path / f'{name}.arrow')[0]) == 300


def test_damaged_offsets_of_texts_are_not_followed(tmp_path):
  """They say where in memory a text begins: anywhere, where they are wrong."""
  path = tmp_path / 'a.arrow'
  path.write_bytes(flipped(arrow(), -300, -200))
  rows, bad = sources.load(path)
  assert len(rows) + bad.total() == 300
  assert bad.keys() == {'has a value that cannot be read'}


NOT_TEXT = pyarrow.array([b'\xff', b'ok'], pyarrow.binary()).view('string')
FAR = pyarrow.array([1 << 60, 0], pyarrow.timestamp('us'))


@pytest.mark.parametrize(
  ('column', 'reason'),
  [
    ({'instruction': NOT_TEXT}, 'not UTF-8'),
    ({'at': FAR}, 'has a value that cannot be read'),
    (
      {'instruction': pyarrow.array([None, 'ok'])},
      'missing instruction, quest',
    ),
    ({'output': pyarrow.array([None, 'ok'])}, 'missing output'),
    ({'instruction': [['a'], ['b']]}, 'instruction is not text'),
    ({'instruction': [1, 2]}, 'instruction is not text'),
    ({'instruction': [b'a', b'b']}, 'instruction is not text'),
    ({'output': [[1], [2]]}, 'output is not text'),
    ({'answer': [{'x': 1}, {'x': 2}]}, 'answer is neither text nor a number'),
    ({'answer': [float('nan'), 1.0]}, 'answer is neither text nor a number'),
    ({'tools': [['t'], []]}, 'has tools, which no template shows'),
  ],
)
@pytest.mark.parametrize('write', [parquet, arrow])
def test_columns_of_other_types(tmp_path, write, column, reason):
  """A row that cannot be read loses no other."""
  columns = {'instruction': ['a', 'b'], 'output': ['a', 'b']} | column
  path = tmp_path / f'a.{write.__name__}'
  path.write_bytes(write(pyarrow.table(columns)))
  of_all = isinstance(column.get('instruction'), list) or column.get(
    'output'
  ) == [[1], [2]]
  of_all = of_all or isinstance(column.get('answer', [0])[0], dict)
  if of_all:
    with pytest.raises(UserError, match=f'no usable row .2 {reason[:30]}'):
      sources.load(path)
  else:
    rows, bad = sources.load(path)
    assert (len(rows), bad.total()) == (1, 1)
    assert next(iter(bad)).startswith(reason)
  with pytest.raises(BadRow) as error:
    sources.load(path, on_bad_row='fail')
  assert str(error.value).startswith(f'{path}[0]: {reason}')


# Rows. Beside those of test_sources.

USER, ANSWER = ({'role': r, 'content': 'a'} for r in ('user', 'assistant'))
DEEP = b'[' * 50_000
ROLE = 'messages need a role and text as content'
WEIGHT = "a turn's weight is neither 0 nor 1"
NUMBER = 'answer is neither text nor a number'


def turns(*messages, **rest):
  return {'messages': list(messages), **rest}


@pytest.mark.parametrize(
  ('record', 'reason'),
  [
    (
      b'{"instruction": "a", "instruction": "b", "output": "c"}',
      'has a key tw',
    ),
    (
      b'{"instruction": "a", "output": "b", "x": {"y": 1, "y": 1}}',
      'has a key',
    ),
    (b'{"instruction": "a", "output": NaN}', 'output is not text'),
    (b'{"instruction": -Infinity, "output": "b"}', 'instruction is not text'),
    (b'{"instruction": "a", "output": "b", "x": %b}' % DEEP, 'not JSON'),
    (DEEP, 'not JSON'),
    (
      b'{"instruction": "a", "output": "b", "x": ' + b'9' * 5000 + b'}',
      'not J',
    ),
    (b'{"instruction": "a\x00", "output": "b"}', 'not JSON'),
    (b'{"instruction": "a\xed\xa0\x80", "output": "b"}', 'not UTF-8'),
    (b'{"instruction": "\\udc80", "output": "b"}', 'not UTF-8'),
    (b'{"\\ud800": 1, "instruction": "a", "output": "b"}', 'not UTF-8'),
    (b"{'instruction': 'a', 'output': 'b'}", 'not JSON'),
    (LINE + LINE, 'not JSON'),
    (b'// comment', 'not JSON'),
    ({}, 'missing instruction, question, prompt, query, messages, dialogue'),
    ({**ROW, 'answer': [1]}, NUMBER),
    ({**ROW, 'answer': {}}, NUMBER),
    ({**ROW, 'answer': float('nan')}, NUMBER),
    ({**ROW, 'answer': float('inf')}, NUMBER),
    ({**ROW, 'answer': -1e999}, NUMBER),
    ({**ROW, 'output': 5}, 'output is not text'),
    ({**ROW, 'output': {'a': 1}}, 'output is not text'),
    ({**ROW, 'output': [['b']]}, 'output is not text'),
    ({**ROW, 'output': None}, 'missing output'),
    ({**ROW, 'instruction': ['a']}, 'instruction is not text'),
    ({**ROW, 'instruction': True}, 'instruction is not text'),
    ({**ROW, 'input': 0}, 'input is not text'),
    ({**ROW, 'system': ['x']}, 'system is not text'),
    ({**ROW, 'system_prompt': 3}, 'system_prompt is not text'),
    ({**ROW, 'history': {'a': 'b'}}, 'history is no list of [user, assistant]'),
    ({**ROW, 'history': 'ab'}, 'history is no list of [user, assistant]'),
    ({**ROW, 'history': [['a']]}, 'history is no list of [user, assistant]'),
    ({**ROW, 'history': ['ab']}, 'history is no list of [user, assistant]'),
    ({**ROW, 'history': 7}, 'history is no list of [user, assistant]'),
    ({'dialogue': ['a'], 'summary': 'b'}, 'input is not text'),
    ({'dialogue': 'a', 'summary': 5}, 'output is not text'),
    ({'dialogue': 'a'}, 'empty response'),
    (turns(), 'messages is not a list'),
    ({'messages': {'role': 'user'}}, 'messages is not a list'),
    ({'conversations': 0}, 'conversations is not a list'),
    (turns('a', 'b'), ROLE),
    (turns(None), ROLE),
    (turns([]), ROLE),
    (turns({'role': ['user'], 'content': 'a'}, ANSWER), ROLE),
    (turns({'role': 'user', 'content': 5}, ANSWER), ROLE),
    (turns({'role': 'user', 'content': None}, ANSWER), ROLE),
    (turns({'role': 'user'}, ANSWER), ROLE),
    (turns({'content': 'a'}, ANSWER), ROLE),
    (
      turns({'role': 'user', 'content': ['a']}),
      'a part of a content is not te',
    ),
    (turns(USER), 'empty response'),
    (turns(USER, output=[]), 'empty response'),
    (turns(USER, output=3), 'output is not text'),
    (turns(USER, output='b', answer=[1]), NUMBER),
    (turns(ANSWER), 'messages without a last user turn'),
    (turns(USER, ANSWER, ANSWER), 'messages without a last user turn'),
    (turns({'role': 'system', 'content': 'a'}), 'messages without a last user'),
    (turns({**USER, 'content': ' '}, ANSWER), 'empty prompt'),
    (turns(USER, {**ANSWER, 'content': ''}), 'empty response'),
    (turns(USER, {**ANSWER, 'role': 'tool'}), "a turn of role 'tool'"),
    (turns(USER, {**ANSWER, 'role': ''}), "a turn of role ''"),
    (turns(USER, {**ANSWER, 'role': 'x\n' * 9999}), r"a turn of role 'x\nx\nx"),
    (turns(USER, {**ANSWER, 'role': '\ud7c7'}), r"a turn of role '\ud7c7'"),
    (turns(USER, {**ANSWER, 'weight': '1'}), WEIGHT),
    (turns(USER, {**ANSWER, 'weight': [1]}), WEIGHT),
    (turns(USER, {**ANSWER, 'weight': 0.5}), WEIGHT),
    (turns(USER, {**ANSWER, 'weight': -1}), WEIGHT),
    (turns(USER, {**ANSWER, 'weight': float('nan')}), WEIGHT),
    (turns(USER, {**ANSWER, 'weight': 0}), 'empty response'),
    ({**ROW, 'instruction': 'x' * (records.LONGEST + 1)}, 'longer than 16 MB'),
  ],
)
def test_bad_rows(tmp_path, record, reason):
  line = record if isinstance(record, bytes) else json.dumps(record).encode()
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\n'.join([LINE, line, LINE]))
  rows, bad = sources.load(path)
  # The lines before and after it are read, under their numbers.
  assert [row.where for row in rows] == [f'{path}:1', f'{path}:3']
  assert bad.total() == 1
  with pytest.raises(BadRow) as error:
    sources.load(path, on_bad_row='fail')
  message = str(error.value)
  assert message.startswith(f'{path}:2: {reason}')
  assert message.isprintable()
  assert len(message) < 400


# Functions.

FUNCTIONS = """
import sys
import numpy as np

ROW = {'instruction': 'a', 'output': 'b'}
PART = {'dialogue': 'a', 'summary1': 'b', 1: 2}


class Odd:
  def __repr__(self):
    raise ValueError('no name')

  def __iter__(self):
    raise RuntimeError('not now')


def circular():
  row = {**ROW}
  return [row | {'self': row, 'x': row.setdefault('self', row)}]


def deep():
  found = []
  for _ in range(5000):
    found = [found]
  return [ROW | {'x': found}]


def halfway():
  yield ROW
  raise ValueError('half\\nway')


def ends():
  yield ROW
  sys.exit(0)


def leaves():
  sys.exit(0)


def fails():
  raise RuntimeError('out of rows')


def nothing():
  pass
"""

EXPRESSIONS = {
  'nothing()': "TypeError: 'NoneType' object is not iterable",
  'ROW': 'TypeError: it returns a dict',
  "'ab'": 'TypeError: it returns a str',
  "b'ab'": 'TypeError: it returns a bytes',
  'dict': "TypeError: 'type' object is not iterable",
  'Odd()': 'RuntimeError: not now',
  'halfway()': 'ValueError: half way',
  'ends()': 'SystemExit: 0',
  'leaves()': 'SystemExit: 0',
  'fails()': 'RuntimeError: out of rows',
  '[]': 'no usable row (it is empty)',
  '[1, None]': 'no usable row (2 not an object)',
  'circular()': 'no usable row (1 not JSON)',
  'deep()': 'no usable row (1 not JSON)',
  "[ROW | {('a', 'b'): 1}]": 'no usable row (1 not JSON)',
  "[ROW | {'x': Odd()}]": 'no usable row (1 not JSON)',
  "[ROW | {'output': b'b'}]": 'no usable row (1 output is not text)',
  "[ROW | {'output': np.array(['b'])}]": 'no usable row (1 output is not',
  "[ROW | {'tools': np.zeros(2)}]": 'no usable row (1 has tools, which',
  "[ROW | {'history': np.zeros((2, 2))}]": 'no usable row (1 history is no',
  "[{'messages': (1, 2)}]": 'no usable row (1 messages is not a list)',
}


@pytest.mark.parametrize('expression', EXPRESSIONS)
def test_functions_that_give_no_rows(tmp_path, monkeypatch, expression):
  name = f'odd_{[*EXPRESSIONS].index(expression)}'
  source = f'{FUNCTIONS}\n\ndef rows():\n  return {expression}\n'
  (tmp_path / f'{name}.py').write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError) as error:
    sources.load(f'python:{name}:rows')
  assert EXPRESSIONS[expression] in str(error.value)
  assert str(error.value).isprintable()


@pytest.mark.parametrize(
  ('source', 'said'),
  [
    ('def rows(:', 'SyntaxError: invalid syntax'),
    ('import sys; sys.exit(0)', 'SystemExit: 0'),
    ('1 / 0', 'ZeroDivisionError: division by zero'),
  ],
)
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, source, said):
  name = f'broken_{len(source)}'
  (tmp_path / f'{name}.py').write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  refused(f'python:{name}:rows', said)


def test_what_no_field_reads_may_be_anything(tmp_path, monkeypatch):
  source = f'{FUNCTIONS}\n\ndef rows():\n  return [PART, ROW | {{"x": object}}]'
  (tmp_path / 'free.py').write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  rows, bad = sources.load('python:free:rows')
  assert (len(rows), bad) == (2, {})
  assert sources.identity('python:free:rows')


# What `datasets` saves beside its files.


def state(*names):
  return json.dumps({'_data_files': [{'filename': x} for x in names]})


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    ('[]', 'not what save_to_disk writes'),
    ('5', 'not what save_to_disk writes'),
    ('{}', "not what save_to_disk writes (KeyError('_data_files'))"),
    ('{"_data_files": "abc"}', 'not what save_to_disk writes'),
    ('{"_data_files": 3}', 'not what save_to_disk writes'),
    ('{"_data_files": [{}]}', "not what save_to_disk writes (KeyError('file"),
    ('{"_data_fi', 'not what save_to_disk writes (JSONDecodeError'),
    ('[' * 100_000, 'not what save_to_disk writes (RecursionError'),
    (b'\xff\xfe\x00', 'not what save_to_disk writes'),
    (state(5), 'not what save_to_disk writes (TypeError'),
    (state('../a.arrow'), "names '../a.arrow', which is no file beside it"),
    (state('/etc/passwd'), "names '/etc/passwd', which is no file beside it"),
    (state('..'), '..: it is a directory; name a file'),
    (state(''), "names '', which is no file beside it"),
    (state('none.arrow'), 'none.arrow: it is not there; name a file'),
  ],
)
def test_a_saved_set_that_is_none(tmp_path, content, said):
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / 'state.json').write_bytes(content)
  refused(str(tmp_path), said)


def test_a_saved_set_without_files(tmp_path):
  (tmp_path / 'state.json').write_text(state())
  with pytest.raises(UserError, match=r'no usable row \(it is empty\)'):
    sources.load(tmp_path)
  assert sources.identity(tmp_path)
  (tmp_path / 'dataset_dict.json').write_text('{}')
  refused(str(tmp_path), 'no split with a state.json; save it again')
  (tmp_path / 'train' / 'state.json').mkdir(parents=True)
  refused(str(tmp_path), 'state.json: it is a directory')
