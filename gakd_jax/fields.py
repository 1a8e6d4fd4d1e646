"""Every field of a config: its type and its range, and what is refused.

Defaults and their reasons stand in configs/base.py; those of an objective, a
writer or an evaluator in the class that a config names.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import ml_collections

from gakd_jax import (
  UserError,
  objectives,
  optim,
  rollout,
  teacher_cache,
  trackers,
)
from gakd_jax import settings as settings_lib
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.models import (
  attention,
  blocks,
  cut,
  families,
  lora,
  quantized,
  transformer,
)
from gakd_jax.settings import (
  BelowOne,
  Count,
  DataSpec,
  Length,
  Lengths,
  Name,
  Natural,
  NotNegative,
  Only,
  Positive,
  Regex,
  Text,
)

_Dtype = Literal['float32', 'bfloat16']
_Devices = Annotated[
  int, Only('1 or more, or -1 for what is left', lambda n: n >= 1 or n == -1)
]
# What is no setting of an objective, though its class has it.
_ELSEWHERE = {
  'head_chunk': 'config.train.head_chunk',
  'critic': 'config.critic',
}
_OPTIMIZER = {
  'name': Literal[*optim.OPTIMIZERS],
  'learning_rate': Positive,
  'schedule': Literal[*optim.SCHEDULES],
  'end': NotNegative,
  'warmup_steps': Natural,
  'b1': BelowOne,
  'b2': BelowOne,
  'eps': Positive,
  'weight_decay': NotNegative,
  'no_decay': Regex,
  'clip_norm': Positive | None,
  'mu_dtype': _Dtype,
}
_SHAPE = {
  name: {int: Count, float: Positive}.get(kind, kind)
  for name, kind in settings_lib.types_of(
    transformer.DecoderConfig, 'rope_scaling'
  ).items()
} | {'family': Literal[*families.FAMILIES], 'windows': tuple[Natural, ...]}
FIELDS = {
  'seed': Natural,
  'stages': object,
  'student': {
    'path': Text | None,
    'shape': Mapping | None,
    'keep': Mapping | None,
    'dtype': _Dtype,
    'lora': Mapping | None,
    'quantize': Literal[*quantized.KINDS] | None,
    'remat': Literal[*blocks.REMAT],
  },
  'teacher': {
    'path': Text | None,
    'template': Text | None,
    'dtype': _Dtype,
    'quantize': Literal[*quantized.KINDS] | None,
    'cache': Literal[*teacher_cache.KINDS],
    'cache_size': Annotated[int, Only('1 to 65535', lambda n: 0 < n < 1 << 16)],
  },
  'attention': Literal[*attention.BACKENDS],
  'data': {
    'train': DataSpec | None,
    'validation': DataSpec | None,
    'template': Text | None,
    'max_length': Length,
    'max_prompt_length': Length,
    'buckets': Lengths | None,
    'packing': bool,
    'on_bad_row': Literal['skip', 'fail'],
    'thinking': Literal['refuse', 'keep'],
    'weights': tuple[Positive, ...] | None,
    'turns': Literal['last', 'all'],
    'drop_last': bool,
    'cache': Text | None,
  },
  'rollout': Mapping,
  'objective': Mapping,
  'critic': {
    'init_from': Text | None,
    'width': Count,
    'layers': Count,
    'heads': Count,
    'ff_width': Count,
  },
  'optimizer': _OPTIMIZER | {'extra_learning_rate': Positive | None},
  'critic_optimizer': _OPTIMIZER,
  'train': {
    'steps': Natural | None,
    'epochs': Positive | None,
    'batch_size': Count,
    'microbatch_size': Count | None,
    'precision': _Dtype,
    'head_chunk': Count,
    'head_memory': Positive | None,
    'max_skipped': Count,
    'skip_spikes': Positive | None,
  },
  'evals': Mapping,
  'eval_every': Natural,
  'eval_first': bool,
  'checkpoint': {
    'every': Natural,
    'keep': Count,
    'keep_every': Natural,
    'best_metric': Text | None,
    'patience': Count | None,
  },
  'mesh': {'data': _Devices, 'fsdp': _Devices, 'tensor': _Devices},
  'report': {
    'trackers': tuple[Literal[*trackers.TRACKERS], ...],
    'answers': Natural,
    'rollouts': Natural,
    'averages': Mapping,
  },
}


def check(config):
  """Refuses what no run could be made of, in a config or one of its stages.

  No file is looked at.

  Raises:
    UserError: naming the first field that is missing, unknown or wrong.
  """
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'{settings_lib.shown(config)} is no config; begin with get_config() of '
      'configs/base.py'
    )
  _check_fields('config.', config, FIELDS)
  _check_parts(config)
  for name, stage in _stages(config.stages):
    try:
      check(stage)
      if stage.stages:
        raise UserError('config.stages: a stage has no stages of its own')
    except UserError as error:
      raise UserError(f'stage {name!r}: {error}') from error


def _check_fields(prefix, given, fields):
  # Of a teacher that a stage will write, a plan knows the shape.
  known = dict(fields)
  if prefix == 'config.teacher.':
    known |= {'shape': object, 'keep': object}
  settings_lib.named(prefix, given, known, 'a config')
  for key, kind in fields.items():
    if key not in given:
      raise UserError(
        f'{prefix}{key} is missing; begin with get_config() of configs/base.py'
      )
    if isinstance(kind, dict):
      _check_fields(f'{prefix}{key}.', given[key], kind)
    else:
      settings_lib.check(f'{prefix}{key}', given[key], kind)


def _check_parts(config):
  """What parts are made with, and fields that depend on each other."""
  for part, key, make in (
    ('objective', 'name', objectives.make),
    ('rollout', 'writer', rollout.make),
  ):
    settings = config[part]
    if key not in settings:
      raise UserError(f'config.{part}.{key} is missing: name one')
    for stray, place in _ELSEWHERE.items():
      if stray in settings:
        raise UserError(f'config.{part}.{stray} is no setting; set {place}')
    make(**settings)
  evaluator_lib.check(config.evals)
  kind = Annotated[tuple[Text, ...], Only('one at least', bool)]
  for title, names in config.report.averages.items():
    where = f'config.report.averages.{title}'
    settings_lib.check(where, names, kind)
    if title in config.evals:
      raise UserError(
        f'{where}: config.evals has a line of that name; name it otherwise'
      )
    for name in names:
      if name not in config.evals:
        raise UserError(
          f'{where}: {name!r} is no line of config.evals; '
          f'{settings_lib.did_you_mean(name, config.evals)}there are '
          f'{", ".join(config.evals) or "none"}'
        )
  trackers.check(config.report.trackers)
  student, train = config.student, config.train
  if student.lora is not None:
    lora.make_config(student.lora)
  if student.shape is not None:
    prefix = 'config.student.shape.'
    settings_lib.checked(prefix, student.shape, _SHAPE, 'a decoder')
  if student.keep is not None:
    cut.make(student.keep)
    for other in ('shape', 'lora'):
      if student[other] is not None:
        raise UserError(
          f'config.student.keep and config.student.{other} are both set: cut '
          'the student in a stage of its own, and name that as the path'
        )
  if student.quantize is not None and student.lora is None:
    raise UserError(
      f'config.student.quantize={student.quantize!r} is for a base that is not '
      'trained; set config.student.lora, or quantize to None'
    )
  if train.steps and train.epochs is not None:
    raise UserError(
      f'config.train: steps={train.steps} and epochs={train.epochs}: set one, '
      'and the other to None'
    )
  for part in ('optimizer', 'critic_optimizer'):
    rate, end = config[part].learning_rate, config[part].end
    if end > rate and config[part].schedule != 'constant':
      raise UserError(
        f'config.{part}.end={end} is more than learning_rate={rate}, and the '
        'rate goes down to it; lower it'
      )


def _stages(stages):
  """The (name, config) pairs of `config.stages`."""
  if not isinstance(stages, list | tuple) or not all(
    isinstance(pair, list | tuple) and len(pair) == 2 for pair in stages
  ):
    raise UserError(
      f'config.stages={settings_lib.shown(stages)}: expected a tuple of pairs, '
      'of a name and a config each'
    )
  names = [name for name, _ in stages]
  for name in names:
    settings_lib.check('a name in config.stages', name, Name)
    if names.count(name) > 1:
      raise UserError(f'config.stages: two stages are called {name!r}')
  return stages
