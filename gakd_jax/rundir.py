"""A run's directory: what ran there, and what other stages may take from it.

config.json (resolved, with versions and commit), metrics.jsonl, checkpoints/,
best/ (a Hugging Face directory), answers/, rollouts.jsonl where the student
writes, results.json once it has finished, report.html.
"""

import json
from pathlib import Path

from gakd_jax import UserError, log

STAGE = 'stage:'


def resolve_stages(config, root):
  """A copy, with 'stage:<name>' replaced by what that stage of `root` wrote."""
  config = config.copy_and_resolve_references()
  for part, key in (
    (config.student, 'path'),
    (config.teacher, 'path'),
    (config.critic, 'init_from'),
  ):
    if str(part[key]).startswith(STAGE):
      part[key] = _finished(root, part[key]) + '/best'
  if str(config.data.train).startswith(STAGE):
    config.data.train = _finished(root, config.data.train) + '/answers.jsonl'
  elif isinstance(config.data.train, (tuple, list)):
    config.data.train = tuple(
      _finished(root, spec) + '/answers.jsonl'
      if spec.startswith(STAGE)
      else spec
      for spec in config.data.train
    )
  return config


def stage_shapes(config, stages, root=None):
  """A copy whose 'stage:<name>' models are what these stages start from.

  Those have not run, but the shape of what they will write is known. Of those
  that have finished in `root`, it is what they wrote.
  """
  config = config.copy_and_resolve_references()

  def origin(path, shape, seen=()):
    if not str(path).startswith(STAGE):
      return path, shape
    name = path.removeprefix(STAGE)
    if name not in stages or name in seen:
      raise UserError(
        f'{path}: config.stages has no stage {name} to start from'
      )
    if root is not None and is_finished(Path(root) / name):
      return f'{Path(root) / name}/best', shape
    student = stages[name].student
    below = student.shape
    if below is not None or shape is not None:
      below = dict(below or {}) | dict(shape or {})
    return origin(student.path, below, (*seen, name))

  with config.ignore_type(), config.unlocked():
    for part in (config.student, config.teacher):
      part.path, part.shape = origin(part.path, part.get('shape'))
    path, shape = origin(config.critic.init_from, None)
    if shape:
      raise UserError(
        f'config.critic.init_from={config.critic.init_from}: the shape of this '
        'stage is its own, and cannot be planned before the stage has run'
      )
    config.critic.init_from = path
  return config


def _finished(root, spec):
  directory = Path(root) / spec.removeprefix(STAGE)
  if not is_finished(directory):
    raise UserError(
      f'{spec}: stage {directory.name} has not finished in {root}; put it '
      'before this one in config.stages'
    )
  return str(directory)


def is_finished(workdir):
  return (Path(workdir) / 'results.json').exists()


def finish(workdir, results):
  """Records a run's results, see `results`; with them, it is finished."""
  log.write_atomically(
    Path(workdir) / 'results.json', log.to_json(results, indent=2) + '\n'
  )


def read_results(workdir):
  """Of a finished run; None is what was not finite.

  Raises:
    UserError: for what is no results.json of this version.
  """
  path = Path(workdir) / 'results.json'
  try:
    results = json.loads(path.read_text('utf-8'))
    for when in ('best', 'last'):
      results[when]['evaluators'].items()
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path}: of an earlier version, or none of ours; delete it, and the run '
      'or evaluation makes it anew, or use another --workdir'
    ) from error
  return results


def read_rollouts(workdir):
  """The lines of rollouts.jsonl; [] if there are none."""
  path = Path(workdir) / 'rollouts.jsonl'
  if not path.exists():
    return []
  # Not splitlines: a text may hold other ends of lines.
  return [json.loads(x) for x in path.read_text('utf-8').split('\n')[:-1]]
