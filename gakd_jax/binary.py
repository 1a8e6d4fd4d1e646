"""What the binaries have in common: flags, and how they end."""

import errno
import os
import pathlib
import re
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from gakd_jax import Interrupted, UserError, config_file, hosts, stopping
from gakd_jax.data import store

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'Of several processes: <host>:<port> of the first. Under SLURM, MPI and on '
  'TPU VMs they find each other.',
)
_PROCESSES = flags.DEFINE_integer(
  'processes', None, 'How many they are.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which one this is, from 0.', lower_bound=0
)
HOSTS = (_COORDINATOR, _PROCESSES, _PROCESS_ID)
_START_TIMEOUT = flags.DEFINE_integer(
  'start_timeout', 300, 'Seconds to wait for all processes.', lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  'heartbeat_timeout',
  60,
  'Seconds after which a host that is silent counts as dead.',
  lower_bound=5,
)


def start_hosts():
  """Joins the other processes of the run, if there are any."""
  hosts.start(
    _COORDINATOR.value,
    _PROCESSES.value,
    _PROCESS_ID.value,
    _START_TIMEOUT.value,
    _HEARTBEAT_TIMEOUT.value,
  )


def config_flag(help_string, **settings):
  """`--config=FILE`, and `--config.a.b=value` for all that it may hold.

  An objective, a writer and each evaluator of a config hold what is not the
  default, and may be given any other setting: it is checked when they are
  made, before any weight is loaded. All else is locked by configs/base.py.
  """
  try:
    holder = config_flags.DEFINE_config_file(
      'config',
      None,
      help_string,
      lock_config=False,
      accept_new_attributes=True,
      **settings,
    )
  except flags.Error as error:  # It looks into --flagfile now.
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  # What goes wrong in the file is told by us.
  settings.get('flag_values', flags.FLAGS)['config'].parser = _ConfigFile()
  return holder


class _ConfigFile(flags.ArgumentParser):
  def parse(self, argument):
    return config_file.load(argument)


class _OrNone(flags.ArgumentParser):
  """Of settings that may be None."""

  def __init__(self, parser):
    self._parser = parser

  def parse(self, argument):
    return None if argument == 'None' else self._parser.parse(argument)

  def flag_type(self):
    return self._parser.flag_type()


for kind, parser in (
  (int, flags.IntegerParser()),
  (float, flags.FloatParser()),
  (str, flags.ArgumentParser()),
):
  config_flags.register_flag_parser_for_type(kind, _OrNone(parser))


def force_flag():
  """`--force`, see `fingerprint.check`."""
  return flags.DEFINE_bool(
    'force',
    False,
    'Go on with what was begun with other settings, data or models.',
  )


def check_overrides(config):
  """Refuses settings of a command line that no stage of a config would have."""
  if config.stages:
    flag = flags.FLAGS['config']
    for name in config_flags.get_override_values(flag):
      if name not in ('stages', 'report.answers'):  # These are of all of them.
        raise UserError(
          f'--config.{name}: {config_flags.get_config_filename(flag)} is of '
          'stages, which have settings of their own; change it there'
        )


def default_workdir(config=None):
  """runs/skd for configs/skd.py, runs/skd_math_sft for skd.py:math,sft.

  config: None is that of the command line.
  """
  if config is None:
    config = config_flags.get_config_filename(flags.FLAGS['config'])
  file, _, argument = config.partition(':')
  words = [pathlib.Path(file).stem, *re.findall(r'[\w.-]+', argument)]
  return os.path.join('runs', '_'.join(words))


def use_compilation_cache():
  """A process that is started again compiles nothing.

  In GAKD_JAX_CACHE; JAX_COMPILATION_CACHE_DIR and
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS override.
  """
  if jax.config.jax_compilation_cache_dir is None:
    cache = store.default_root().with_name('compiled')
    jax.config.update('jax_compilation_cache_dir', str(cache))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def one_line(error):
  """What to tell the user about an error of theirs; None for a bug."""
  text = ' '.join(str(error).splitlines())
  if isinstance(error, UserError):
    return text
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    return _FULL
  if isinstance(error, OSError) and error.filename is not None:
    return (
      f'{error.filename}: {error.strerror}; mend that, or name another place'
    )
  if isinstance(error, BrokenPipeError):
    return 'whoever read what this prints has gone'
  if isinstance(error, ValueError) and 'embedded null' in text:
    return 'a path has a null character in it; name another'
  if 'No space left on device' in text:
    return _FULL
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text:
    return (
      f'out of memory ({text[:200]}); lower a batch size or a length, or see '
      'with --plan what a run takes'
    )
  return None


_FULL = (
  'the disk is full: free some space and run the same command again, which '
  'continues from the last complete checkpoint'
)


def parse(argv, values=flags.FLAGS):
  """Reads a command line; what is no flag is returned.

  Raises:
    UserError: for what is wrong with it, or with the config that it names.
  """
  try:
    return values(argv)
  except UserError:
    raise
  except Exception as error:  # Of absl and ml_collections, of many kinds.
    raise UserError(config_file.explain(error)) from error


def guarded(main, argv):
  """Runs a binary's main: user errors are one line and exit status 2.

  Of several processes, an error ends all.
  """
  app.define_help_flags()
  try:
    main(parse(argv))
  except Interrupted as e:  # All are, at the same step.
    print(e, file=sys.stderr)
    hosts.finish()
    stopping.leave()
  except KeyboardInterrupt:
    hosts.fail(stopping.STATUS, 'interrupted')
    print('interrupted', file=sys.stderr)
    sys.exit(stopping.STATUS)
  except Exception as e:
    text = one_line(e)
    if text is None:
      hosts.fail_by_bug(e)
      raise
    hosts.fail(2, text)
    print(f'error: {text}', file=sys.stderr)
    if isinstance(e, BrokenPipeError):  # What is left to print, to nobody.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)
  hosts.finish()
