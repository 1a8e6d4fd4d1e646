"""A config file: Python whose `get_config` makes a config."""

import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path

import ml_collections

from gakd_jax import UserError

_MODULE = 'gakd_jax_config'  # what it is called while it runs


def load(spec):
  """The config of '<file>', or of '<file>:<argument>' for those that take one.

  Raises:
    UserError: naming the file, and the line in it, for whatever goes wrong.
  """
  file, *argument = spec.split(':', 1)
  if not Path(file).is_file():
    what = 'no such file' if not Path(file).exists() else 'not a file'
    raise UserError(
      f'--config={file}: {what}; name a Python file, as configs/quickstart.py'
    )
  try:
    get_config = getattr(_run(file), 'get_config', None)
    if not callable(get_config):
      raise UserError(
        f'--config={file}: it has no function get_config, which would return '
        'the config; see configs/quickstart.py'
      )
    _check_argument(spec, get_config, argument)
    config = get_config(*argument)
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    raise UserError(
      f'--config={spec}: {_place(error, file)}: {type(error).__name__}: '
      f'{explain(error)}'
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'--config={spec}: get_config returns a {type(config).__name__}, and no '
      'ConfigDict; begin with get_config() of configs/base.py'
    )
  return config


def explain(error):
  """What an error of absl or ml_collections means, in one line."""
  text = ' '.join(str(error).split())
  for pattern, meaning in _MEANINGS:
    if found := re.search(pattern, text):
      return found.expand(meaning)
  if isinstance(error, KeyError) and _is_of_flags(error):
    key = text.strip('"\'')
    return f'config has no key {key!r}; see configs/base.py'
  return text or type(error).__name__


def _is_of_flags(error):
  """Whether --config.a.b=x found no b, and not somebody's dict."""
  frames = traceback.extract_tb(error.__traceback__)
  return 'ml_collections' in Path(frames[-1].filename).parts


_MEANINGS = (
  (
    r'Did you mean "(\w+)" instead of "(\w+)"',
    r"config has no key '\2'; did you mean '\1'?",
  ),
  (
    r'Key "(\w+)" does not exist',
    r"config has no key '\1'; see configs/base.py",
  ),
  (
    r'Override (\S+)\.(\w+) can not be applied because field',
    r"config.\1 is None and has no '\2'; give it whole, as in "
    r'--config.\1="{' + r"'\2': ...}" + '"',
  ),
  (
    r'flag (--config\S*)=.* as a ConfigDict',
    r'\1: expected a dict of settings, as in "{' + "'name': ...}" + '"',
  ),
  (
    r"Could not parse '(.*?)': SyntaxError",
    r'--config.\1: no setting; see configs/base.py',
  ),
)


def _run(file):
  loader = importlib.machinery.SourceFileLoader(_MODULE, file)
  module = importlib.util.module_from_spec(
    importlib.util.spec_from_loader(_MODULE, loader)
  )
  sys.modules[_MODULE] = module  # A dataclass in it looks there.
  loader.exec_module(module)
  return module


def _check_argument(spec, get_config, argument):
  """Refuses an argument too many or one too few."""
  try:
    inspect.signature(get_config).bind(*argument)
  except TypeError:
    why = (
      'its get_config takes no argument; leave out what is after the colon'
      if argument
      else 'its get_config needs an argument, as in --config=FILE:ARGUMENT'
    )
    raise UserError(f'--config={spec}: {why}') from None


def _place(error, file):
  """Where an error is from: the last line in the file that led to it."""
  if isinstance(error, SyntaxError) and error.lineno:
    return f'{error.filename}:{error.lineno}'
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame for frame in frames if frame.filename == file]
  return f'{file}:{own[-1].lineno}' if own else file
