"""What a config file may do, and the one line that names it and the place."""

import os
import sys

import jax
import pytest
from absl import flags

from gakd_jax import UserError, binary, config_file

BASE = (
  'from configs import base\n\n\ndef get_config():\n  c = base.get_config()\n'
)
# {what it is: (its text, where it goes wrong or 0, what is said)}
BROKEN = {
  'JSON': ('{"a": 1}', 0, 'it has no function get_config'),
  'JSON with true': ('{"a": true}', 1, "NameError: name 'true' is not"),
  'YAML': ('a: 1\nb:\n  - c\n', 2, 'SyntaxError: invalid syntax'),
  'TOML': ('[a]\nb = 1\n', 1, "NameError: name 'a' is not defined"),
  'empty': ('', 0, 'it has no function get_config'),
  'without get_config': ('x = 3\n', 0, 'it has no function get_config'),
  'no function': ('get_config = 3\n', 0, 'it has no function get_config'),
  'a syntax error': ('x = 1\ndef get_config(:\n', 2, 'SyntaxError: '),
  'indented wrongly': ('def f():\nreturn 3\n', 2, 'IndentationError: '),
  'tabs': ('def f():\n\tx=1\n        y=2\n', 3, 'TabError: '),
  'a missing package': ('import nosuch\n', 1, 'ModuleNotFoundError: No module'),
  'a missing name': ('from configs import no\n', 1, 'ImportError: cannot impo'),
  'a division by zero': ('x = 1\ny = x / 0\n', 2, 'ZeroDivisionError: divisi'),
  'an assertion': ('assert False\n', 1, 'AssertionError'),
  'an exit': ('import sys\nsys.exit("no")\n', 2, 'SystemExit: no'),
  'a file of its own': ('open("/no/such")\n', 1, 'FileNotFoundError: [Errno 2]'),
  'gives nothing': ('def get_config():\n  pass\n', 0, 'returns a NoneType, and'),
  'gives a dict': ('def get_config():\n  return {}\n', 0, 'returns a dict, and'),
  'gives a text': ('def get_config():\n  return ""\n', 0, 'returns a str, and'),
  'a generator': ('def get_config():\n  yield 3\n', 0, 'returns a generator'),
  'a class': ('class get_config:\n  pass\n', 0, 'returns a get_config, and'),
  'raises': ('def get_config():\n  raise ValueError("a\\nb")\n', 2, 'Error: a b'),
  'a key error': ('def get_config():\n  return {}["a"]\n', 2, "KeyError: 'a'"),
  'a type error': ('def get_config():\n  return 1 + ""\n', 2, 'TypeError: unsup'),
  'recursion': ('def get_config():\n  get_config()\n', 2, 'RecursionError: '),
  'no memory': ('def get_config():\n  raise MemoryError\n', 2, 'MemoryError'),
  'stops': ('def get_config():\n  next(iter([]))\n', 2, 'StopIteration'),
  'an argument': ('def get_config(x):\n  pass\n', 0, 'needs an argument, as in'),
  'two arguments': ('def get_config(x, y):\n  pass\n', 0, 'needs an argument'),
  'a keyword': ('def get_config(*, x):\n  pass\n', 0, 'needs an argument, as'),
  'an unknown key': (BASE + '  c.trian = 3\n', 6, "did you mean 'train'?"),
  'an unknown field': (BASE + '  c.train.stpes = 3\n', 6, "no key 'stpes'; did"),
  'a wrong type': (BASE + '  c.train.steps = "x"\n', 6, "override field 'steps'"),
  'a part of no type': (BASE + '  c.train = 3\n', 6, "override field 'train'"),
}  # fmt: skip


@pytest.fixture
def refusal(tmp_path):
  """The line about a file of some content; `line` is where it went wrong."""

  def load(content, line=0):
    file = tmp_path / 'config.py'
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
      config_file.load(str(file))
    text = str(error.value)
    start = f'--config={file}: '
    assert text.startswith(f'{start}{file}:{line}: ' if line else start)
    assert '\n' not in text
    return text

  return load


@pytest.mark.parametrize(('text', 'line', 'said'), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line(refusal, text, line, said):
  assert said in refusal(text.encode(), line)


@pytest.mark.parametrize(
  'content',
  [b'\0\1\2', b'x = "\xff\xfe"', 'x = 1'.encode('utf-16'), b'\x7fELF\2\1\1\0'],
  ids=['binary', 'Latin-1', 'UTF-16', 'a program'],
)
def test_what_is_no_text_is_one_line(refusal, content):
  text = refusal(content)
  assert 'SyntaxError: ' in text or 'ValueError: ' in text


def test_what_is_no_file_is_one_line(tmp_path):
  os.mkfifo(tmp_path / 'pipe')  # It would be waited for.
  for name, why in (
    ('pipe', 'not a file'),
    ('', 'not a file'),
    ('none.py', 'no such file'),
  ):
    with pytest.raises(UserError, match=f'{name}: {why}; name a Python file'):
      config_file.load(f'{tmp_path}/{name}')


def test_an_argument_that_it_does_not_take(tmp_path):
  file = tmp_path / 'a.py'
  file.write_text(BASE + '  return c\n')
  assert config_file.load(str(file)).seed == 0
  with pytest.raises(UserError, match=r'a\.py:b: its get_config takes no arg'):
    config_file.load(f'{file}:b')


def test_what_the_config_says_itself_is_told_as_it_is(refusal, tmp_path):
  file = tmp_path / 'a.py'
  file.write_text(
    'from gakd_jax import UserError\n\n\ndef get_config(which):\n'
    "  raise UserError(f'no recipe {which}')\n"
  )
  with pytest.raises(UserError, match=r'^no recipe b:c$'):
    config_file.load(f'{file}:b:c')


def test_a_file_may_define_dataclasses(tmp_path):
  """They look for their module where modules are."""
  file = tmp_path / 'a.py'
  file.write_text(
    'from __future__ import annotations\nimport dataclasses\n\n'
    '@dataclasses.dataclass\nclass A:\n  x: int = 3\n\n' + BASE
    + '  c.seed = A().x\n  return c\n'
  )  # fmt: skip
  assert config_file.load(str(file)).seed == 3


def parsed(tmp_path, *arguments):
  file = tmp_path / 'a.py'
  file.write_text(
    BASE
    + "  c.evals = {'gen': {'kind': 'generation'}}\n  c.train.epochs = 3.0\n"
    + '  return c\n'
  )
  values = flags.FlagValues()
  argv = ['main', *(x.format(file=file) for x in arguments)]
  config = binary.config_flag('', flag_values=values, sys_argv=argv)
  binary.parse(argv, values)
  return config.value


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('foo=3', "config has no key 'foo'; see configs/base.py"),
    ('train.stpes=3', "config has no key 'stpes'; did you mean 'steps'?"),
    ('train=3', '--config.train: expected a dict of settings, as in'),
    ('evals=loss', '--config.evals: expected a dict of settings, as in'),
    ('evals.new.limit=3', "config has no key 'new'"),
    ('student.lora.rank=3', "config.student.lora is None and has no 'rank'"),
    ('train.steps=1.5', '--config.train.steps=1.5: invalid literal'),
    ('train.steps=', '--config.train.steps='),
    ('optimizer.learning_rate=a', '--config.optimizer.learning_rate=a: could'),
    ('data.packing=maybe', '--config.data.packing=maybe'),
    ('', '--config.: no setting; see'),
    ('train..steps=1', '--config.train..steps: no setting; see'),
    ('train.steps.x=3', 'steps'),
    ('train.steps[0]=3', 'steps'),
  ],
)
def test_flags_that_set_what_they_cannot(tmp_path, flag, said):
  with pytest.raises(UserError) as error:
    parsed(tmp_path, '--config={file}', f'--config.{flag}')
  assert said in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--config.train.steps=3'], "Unknown command line flag 'config.train"),
    (['--config.seed=3', '--config={file}'], 'before a value for --config'),
    (['--config={file}', '--nosuch=3'], "Unknown command line flag 'nosuch'"),
    (
      ['--config={file}', '--config.train.steps=3', '--config.train={{}}'],
      'will overwrite the value',
    ),
  ],
)
def test_command_lines_that_make_no_sense(tmp_path, arguments, said):
  with pytest.raises(UserError, match=said):
    parsed(tmp_path, *arguments)


def test_a_file_of_flags_that_is_not_there(tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    parsed(tmp_path, '--config={file}', '--flagfile=/no/such')
  assert stopped.value.code == 2
  assert 'Unable to open flagfile' in capsys.readouterr().err


def test_a_flag_may_say_none(tmp_path):
  """As for the other of steps and epochs."""
  c = parsed(
    tmp_path,
    '--config={file}',
    *('--config.train.epochs=None', '--config.train.steps=2'),
    *('--config.data.template=None', '--config.optimizer.clip_norm=None'),
  )
  assert (c.train.epochs, c.train.steps) == (None, 2)
  assert (c.data.template, c.optimizer.clip_norm) == (None, None)


def test_errors_of_a_system_and_of_its_limits_are_one_line(tmp_path, capsys):
  (tmp_path / 'file').touch()

  def said(do):
    with pytest.raises(SystemExit) as stopped:
      binary.guarded(lambda argv: do(), ['x'])
    assert stopped.value.code == 2
    return capsys.readouterr().err

  below = tmp_path / 'file' / 'a'
  assert said(below.mkdir) == (
    f'error: {below}: Not a directory; mend that, or name another place\n'
  )
  assert said((tmp_path / 'file').mkdir).endswith(
    'file: File exists; mend that, or name another place\n'
  )
  assert said((tmp_path / 'a\0b').touch) == (
    'error: a path has a null character in it; name another\n'
  )

  def too_large():
    raise MemoryError('7 PiB\nat once')

  assert said(too_large).startswith('error: out of memory (7 PiB at once); low')

  def bug():
    raise ValueError('of ours')

  with pytest.raises(ValueError, match='of ours'):
    binary.guarded(lambda argv: bug(), ['x'])


def test_compiled_programs_are_kept_with_the_rest(monkeypatch):
  options = (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in options}
  monkeypatch.setenv('GAKD_JAX_CACHE', '/kept')
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    binary.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == '/kept/compiled'
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_modules_that_were_there_stay(tmp_path):
  (tmp_path / 'json.py').write_text(BASE + '  return c\n')
  before = sys.modules['json']
  config_file.load(str(tmp_path / 'json.py'))
  assert sys.modules['json'] is before
