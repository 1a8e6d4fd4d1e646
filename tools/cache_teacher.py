"""What `config.teacher.cache` keeps, made before a run, by the teacher alone.

  python -m tools.cache_teacher --config=configs/rkl_0p6b.py --config.x=y

The config is that of the run, with its overrides. Stopped, the same command
goes on; the run then reads what is there, and loads none of the teacher's
blocks unless its evaluators ask for them.
"""

import dataclasses
import functools
import sys

import jax

from gakd_jax import UserError, binary, build, models, sharding, teacher_cache
from gakd_jax.models import transformer


def make(config):
  """The `kept.Kept` of the run of a config."""
  if config.stages:
    raise UserError('--config: has stages; name that of a single run')
  if config.teacher.cache == 'none':
    config.teacher.cache = 'hidden'
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    run = build.build(config, None, mesh, weights=False)
    if run.texts is None:
      raise UserError(
        'config.rollout.writer: the teacher has to write its text first; start '
        'the run itself'
      )
    teacher = models.load(
      config.teacher.path,
      dtype=config.teacher.dtype,
      mesh=mesh,
      quantize=config.teacher.quantize,
    )
    both = dataclasses.replace(
      run.models, frozen={'teacher': transformer.split(teacher)[1]}
    )
    return teacher_cache.load(config, run.objective, both, run.texts, mesh)


def _main(flag, argv):
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags look like --name=x')
  if flag.value is None:
    raise UserError('--config is missing; name that of the run')
  binary.use_compilation_cache()
  cache = make(flag.value)
  size = sum(x.nbytes for shard in cache.shards for x in shard.values())
  print(f'{cache.lengths.sum():,} positions, {size / 1e9:.2f} GB')


if __name__ == '__main__':
  config = binary.config_flag('The run whose teacher it is.')
  binary.guarded(functools.partial(_main, config), sys.argv)
