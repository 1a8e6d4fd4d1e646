"""What the binaries have in common: flags, and how they end."""

import errno
import os
import pathlib
import re
import sys
import traceback

import jax
from absl import app, flags
from ml_collections import config_flags

from gakd_jax import Interrupted, UserError, hosts, stopping

_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'Of several processes: <host>:<port> of the first. Under SLURM, MPI and on '
  'TPU VMs they find each other.',
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many they are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is.')
HOSTS = (_COORDINATOR, _PROCESSES, _PROCESS_ID)
_START_TIMEOUT = flags.DEFINE_float(
  'start_timeout', 300, 'Seconds to wait for all processes.', lower_bound=1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_float(
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
  return config_flags.DEFINE_config_file(
    'config',
    None,
    help_string,
    lock_config=False,
    accept_new_attributes=True,
    **settings,
  )


def force_flag():
  """`--force`, see `fingerprint.check`."""
  return flags.DEFINE_bool(
    'force',
    False,
    'Go on with what was begun with other settings, data or models.',
  )


def default_workdir():
  """runs/skd for configs/skd.py, runs/skd_math_sft for skd.py:math,sft."""
  config = config_flags.get_config_filename(flags.FLAGS['config'])
  file, _, argument = config.partition(':')
  words = [pathlib.Path(file).stem, *re.findall(r'[\w.-]+', argument)]
  return os.path.join('runs', '_'.join(words))


def use_compilation_cache():
  """A restarted run compiles nothing; JAX_COMPILATION_CACHE_DIR overrides."""
  if jax.config.jax_compilation_cache_dir is None:
    cache = os.path.expanduser('~/.cache/gakd_jax/compiled')
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)


def one_line(error):
  """What to tell the user about an error of theirs; None for a bug."""
  text = str(error)
  if isinstance(error, UserError):
    return text
  if isinstance(error, flags.Error):
    lines = text.strip().splitlines()
    in_config = 'parsing config file' in lines[0]
    return f'--config: {lines[-1].strip()}' if in_config else lines[0]
  # ml_collections names a key that does not exist in one of these ways.
  near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
  if near:
    return f'config has no key {near[2]!r}; did you mean {near[1]!r}?'
  unknown = re.search(r'Key "(\w+)" does not exist', text)
  if isinstance(error, KeyError) and _is_of_flags(error):
    unknown = unknown or re.fullmatch(r"\W*'(\w+)'\W*", text)
  if unknown:
    return f'config has no key {unknown[1]!r}; see configs/base.py'
  whole = re.search(r'Override (\S+) can not be applied because field', text)
  if whole:
    part, _, key = whole[1].rpartition('.')
    return (
      f'config.{part} is None and has no {key!r}; give it whole, as in '
      f'--config.{part}="{{{key!r}: ...}}"'
    )
  if 'Failed loading config file' in text:
    return f'--config: {text.splitlines()[-1].strip()}'
  full = getattr(error, 'errno', None) == errno.ENOSPC
  if full or 'No space left on device' in text:
    return (
      'the disk is full: free some space and run the same command again, '
      'which continues from the last complete checkpoint'
    )
  return None


def _is_of_flags(error):
  """Whether the parser of --config.a.b found no b, and not somebody's dict."""
  frames = traceback.extract_tb(error.__traceback__)
  return 'ml_collections' in pathlib.Path(frames[-1].filename).parts


def guarded(main, argv):
  """Runs a binary's main: user errors are one line and exit status 2.

  Of several processes, an error ends all.
  """
  app.define_help_flags()
  try:
    main(flags.FLAGS(argv))
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
    sys.exit(2)
  hosts.finish()
