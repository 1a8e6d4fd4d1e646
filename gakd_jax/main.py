"""The training binary.

  python -m gakd_jax.main --config=configs/quickstart.py --workdir=runs/first

`--config.a.b=value` overrides a setting. Run again, the same command continues
where it stopped. `--check` shows what it would do, `--plan` what it would take;
both run nothing. On several hosts it is started on each, see docs/scale.md.
"""

import sys

import jax
from absl import flags

from gakd_jax import UserError, binary, check, fields, planning, train

_CONFIG = binary.config_flag('The experiment.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where it all goes; default: runs/<name of the config>.'
)
_FORCE = binary.force_flag()
_STRICT_RESUME = flags.DEFINE_bool(
  'strict_resume',
  False,
  'Refuse to go on from an older checkpoint where the newest is damaged.',
)
flags.adopt_module_key_flags(binary)  # So that --help shows them.
_CHECK = flags.DEFINE_bool(
  'check', False, 'Show settings, data, sizes and the first batch; run nothing.'
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


_PLAN_TARGET = flags.DEFINE_string(
  'plan_target',
  None,
  'Plan for machines that are not here, as h100:8 or v5p:2x2x2; all: compare.',
)


def _main(argv):
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags look like --name=x')
  if _CONFIG.value is None:
    raise UserError('--config is missing; try --config=configs/quickstart.py')
  binary.use_compilation_cache()
  config = _CONFIG.value
  fields.check(config)
  binary.check_overrides(config)
  if _CHECK.value and _PLAN.value:
    raise UserError('--check and --plan: give one of them')
  if _PLAN.value:
    if _PLAN_TARGET.value is not None:
      if _PLAN_DEVICES.value is not None:
        raise UserError(
          '--plan_target has its own devices; leave out the other'
        )
      jax.config.update('jax_platforms', 'cpu')
    if _PLAN_DEVICES.value is not None:
      # In time: the backend has not started.
      jax.config.update('jax_platforms', 'cpu')
      jax.config.update('jax_num_cpu_devices', _PLAN_DEVICES.value)
    planning.run(
      config,
      _PLAN_MEMORY_GB.value,
      _PLAN_TFLOPS.value,
      _PLAN_TARGET.value,
    )
    return
  for flag in (_PLAN_DEVICES, _PLAN_MEMORY_GB, _PLAN_TFLOPS, _PLAN_TARGET):
    if flag.value is not None:
      raise UserError(f'--{flag.name} is of --plan; give both, or none')
  workdir = _WORKDIR.value or binary.default_workdir()
  if not _CHECK.value:
    binary.start_hosts()
  if _CHECK.value:
    # What the package does not import, a config of ours has.
    base = sys.modules.get('configs.base')
    check.run(config, workdir, base and base.get_config(), _FORCE.value)
    return
  how = {'force': _FORCE.value, 'strict_resume': _STRICT_RESUME.value}
  if config.stages:
    train.run_stages(config, workdir, **how)
  else:
    train.run(config, workdir, **how)


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
