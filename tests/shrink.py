"""Experiments made small."""

import re


def shrink(config, *, model, data, steps=2):
  """A tiny version of any experiment: same parts, small sizes.

  Args:
    config: of configs/ or docs/; of its seeds, the first is kept.
    model: a small HF directory, for student and teacher alike.
    data: a data file with a few rows.
    steps: optimizer steps of each stage.
  """
  config = config.copy_and_resolve_references()
  config.stages = tuple(
    (name, shrink(stage, model=model, data=data, steps=steps))
    for name, stage in config.stages
    if not re.search('-seed[1-9]', name)
  )

  def tiny(spec, replacement):
    if isinstance(spec, tuple):
      return tuple(tiny(s, replacement) for s in spec)
    return spec if not spec or spec.startswith('stage:') else replacement

  with config.ignore_type():
    config.student.path = tiny(config.student.path, model)
    config.teacher.path = tiny(config.teacher.path, model)
    config.data.train = tiny(config.data.train, data)
    config.data.validation = tiny(config.data.validation, data)
  if config.student.shape is not None:
    config.student.shape = {'width': 16, 'layers': 1}
  if config.student.keep is not None:
    config.student.keep = dict(config.student.keep) | {'layers': 1, 'rows': 2}
  if config.student.lora is not None:
    config.student.lora = dict(config.student.lora) | {'rank': 2}
  if config.objective.name == 'gakd':
    config.objective = dict(config.objective) | {'warmup_steps': 1}
  config.critic.init_from = tiny(config.critic.init_from, model)
  config.critic.width, config.critic.layers = 16, 1
  config.critic.heads, config.critic.ff_width = 2, 16
  config.data.max_length = 96
  config.data.max_prompt_length = 64
  if config.rollout.writer in ('student', 'speculative'):
    config.rollout.max_new_tokens = 16
  config.data.buckets = None
  config.data.drop_last = False
  config.optimizer.warmup_steps = 0
  if config.train.steps != 0:
    config.train.steps, config.train.epochs = steps, None
  config.train.batch_size = 8
  config.train.microbatch_size = None
  config.train.head_chunk = 32
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 1
  config.evals = {
    name: dict(settings) | _small(name, settings, data)
    for name, settings in config.evals.items()
  }
  return config


def _small(name, settings, data):
  if 'of' in settings:
    return {}
  small = {'limit': 4}
  if settings.get('kind', name) == 'generation':
    small |= {'max_new_tokens': 4, 'batch_size': 4, 'seeds': (0,)}
  if settings.get('data'):
    small['data'] = data
  return small
