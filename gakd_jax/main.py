"""The training binary.

  python -m gakd_jax.main --config=configs/quickstart.py --workdir=runs/first

`--config.a.b=value` overrides a setting. Run again, the same command continues
where it stopped. `--plan` says what it would take, and runs nothing.
"""

import errno
import os
import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from gakd_jax import UserError, plan, train

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where it all goes; default: runs/<name of the config>.'
)
_PLAN = flags.DEFINE_bool(
  'plan', False, 'Print memory, operations and time of a step; run nothing.'
)
_PLAN_DEVICES = flags.DEFINE_integer(
  'plan_devices',
  None,
  'Plan for so many devices, all of them of this CPU.',
  lower_bound=1,
)
_PLAN_MEMORY_GB = flags.DEFINE_float(
  'plan_memory_gb', None, 'Memory of a device: what batch fits in it?'
)
_PLAN_TFLOPS = flags.DEFINE_float(
  'plan_tflops', None, 'What a device sustains: how long is a step?'
)


def _main(argv):
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags look like --name=x')
  if _CONFIG.value is None:
    raise UserError('--config is missing; try --config=configs/quickstart.py')
  _use_compilation_cache()
  config = _CONFIG.value
  if _PLAN.value:
    if _PLAN_DEVICES.value is not None:
      # In time: the backend has not started.
      jax.config.update('jax_platforms', 'cpu')
      jax.config.update('jax_num_cpu_devices', _PLAN_DEVICES.value)
    plan.run(config, _PLAN_MEMORY_GB.value, _PLAN_TFLOPS.value)
    return
  for flag in (_PLAN_DEVICES, _PLAN_MEMORY_GB, _PLAN_TFLOPS):
    if flag.value is not None:
      raise UserError(f'--{flag.name} is of --plan; give both, or none')
  workdir = _WORKDIR.value or default_workdir()
  if config.stages:
    train.run_stages(config, workdir)
  else:
    train.run(config, workdir)


def default_workdir():
  """runs/rkl_0p6b for --config=configs/rkl_0p6b.py."""
  file = config_flags.get_config_filename(flags.FLAGS['config'])
  return os.path.join('runs', os.path.splitext(os.path.basename(file))[0])


def _use_compilation_cache():
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
    return text.splitlines()[0]
  # ml_collections names a key that does not exist in one of these ways.
  near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
  if near:
    return f'config has no key {near[2]!r}; did you mean {near[1]!r}?'
  unknown = re.search(r'Key "(\w+)" does not exist', text)
  if unknown:
    return f'config has no key {unknown[1]!r}; see configs/base.py'
  if 'Failed loading config file' in text:
    return f'--config: {text.splitlines()[-1].strip()}'
  full = getattr(error, 'errno', None) == errno.ENOSPC
  if full or 'No space left on device' in text:
    return (
      'the disk is full: free some space and run the same command again, '
      'which continues from the last complete checkpoint'
    )
  return None


def guarded(main, argv):
  """Runs a binary's main: user errors are one line and exit status 2."""
  try:
    main(flags.FLAGS(argv))
  except (train.Interrupted, KeyboardInterrupt) as e:
    print(str(e) or 'interrupted', file=sys.stderr)
    sys.exit(130)
  except Exception as e:
    text = one_line(e)
    if text is None:
      raise
    print(f'error: {text}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  guarded(_main, sys.argv)
