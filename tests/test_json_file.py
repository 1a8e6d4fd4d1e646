"""What JSON files may hold that are none, or not what they should be."""

import os

import pytest

from gakd_jax import UserError, json_file

# By what they are. Each is one more thing that a file may be.
BROKEN = {
  'empty': b'',
  'of blanks': b' \n\n',
  'a text': b'hello',
  'half of it': b'{"hidden_size": 32, "nu',
  'with a comma too many': b'{"a": 1,}',
  'two objects': b'{}{}',
  'with comments': b'{"a": 1 // one\n}',
  'of Python': b"{'a': None}",
  'Latin-1': b'{"a": "caf\xe9"}',
  'UTF-16': '{"a": 1}'.encode('utf-16'),
  'with a mark': b'\xef\xbb\xbf{}',
  'zeros': bytes(100),
  'a pickle': b'\x80\x04\x95\n\x00.',
  'of a pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:0',
  'a web page': b'<!doctype html>\n<title>404</title>',
  'lists in lists': b'[' * 100_000,
  'objects in objects': b'{"a":' * 100_000,
  'of a long number': b'{"a": ' + b'9' * 5000 + b'}',
  'a list': b'[]',
  'null': b'null',
  'a number': b'3',
  'no number': b'NaN',
  'one text': b'"{}"',
}
# For readers of what this one reads.
SOME = {
  name: BROKEN[name]
  for name in ('empty', 'half of it', 'Latin-1', 'lists in lists', 'a list')
}


def refusal(file):
  with pytest.raises(UserError) as error:
    json_file.read(file)
  message = str(error.value)
  assert message.startswith(f'{file}: ')
  assert '\n' not in message
  assert len(message) < 350 + len(str(file))
  return message


@pytest.mark.parametrize('content', BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(content, tmp_path):
  (tmp_path / 'config.json').write_bytes(content)
  assert 'JSON' in refusal(tmp_path / 'config.json')


def test_a_good_file_is_its_object(tmp_path):
  (tmp_path / 'a').write_bytes('{"a": [1, null, "\u4f60"]}'.encode())
  assert json_file.read(tmp_path / 'a') == {'a': [1, None, '\u4f60']}


def test_what_is_no_file_is_one_line(tmp_path):
  (tmp_path / 'directory').mkdir()
  os.mkfifo(tmp_path / 'pipe')  # That nobody writes to.
  (tmp_path / 'loop').symlink_to('loop')
  (tmp_path / 'file').write_text('{}')
  for name, word in (
    ('directory', 'not a file'),
    ('pipe', 'not a file'),
    ('loop', 'not readable'),
    ('none', 'not found'),
    ('file/config.json', 'not readable'),
    ('x' * 300, 'not readable'),
  ):
    assert word in refusal(tmp_path / name)
  with pytest.raises(UserError, match='none: a model has one'):
    json_file.read(tmp_path / 'none', missing='a model has one')


@pytest.mark.parametrize(
  'value',
  ['x' * 10**6, ['x' * 1000] * 1000, {str(i): 'y' * 99 for i in range(99)}],
)
def test_what_is_shown_is_short_and_one_line(value):
  assert len(json_file.shown(value)) <= 120
  assert json_file.shown('a\nb') == r"'a\nb'"
  assert json_file.shown({'a': [1, 2.5, None]}) == "{'a': [1, 2.5, None]}"
