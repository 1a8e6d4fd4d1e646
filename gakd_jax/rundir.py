"""A run's directory: what ran there, and what other stages may take from it.

config.json (resolved, with versions and commit), metrics.jsonl, checkpoints/,
best/ (a Hugging Face directory), answers/, rollouts.jsonl where the student
writes, results.json once it has finished, report.html.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NotRequired

from gakd_jax import UserError, json_file, json_lines, log
from gakd_jax import settings as settings_lib
from gakd_jax.settings import Measured, Only

STAGE = 'stage:'

_RESULTS = {
  'best': Mapping,
  'last': Mapping,
  'step': NotRequired[int | None],
  'seed': NotRequired[int | None],
  'recipe': NotRequired[str | None],
  'template': NotRequired[str | None],
  'is_teacher': NotRequired[bool],
  'peak_memory_gb': NotRequired[Measured | None],
  'averages': NotRequired[Mapping],
}
_NUMBER = {
  'mean': Measured | None,
  'std': NotRequired[Measured | None],
  'by_length': NotRequired[Mapping],
  'by_position': NotRequired[Mapping],
  'by_row': NotRequired[tuple[Measured | None, ...]],
}


def _is_pieces(pieces):
  """Whether a list is of [text, whether it is the teacher's]."""
  return all(
    isinstance(x, list) and [*map(type, x)] == [str, bool] for x in pieces
  )


_ROLLOUT = {
  'step': int,
  'index': int,
  'instruction': str,
  'input': str,
  'pieces': Annotated[list, Only('of texts and their writers', _is_pieces)],
  'tokens': int,
  'finished': bool,
}
_ANSWER = {
  'instruction': str,
  'answer': str,
  'step': NotRequired[int],
  'index': NotRequired[int],
  'input': NotRequired[str],
  'references': NotRequired[tuple[str, ...]],
  'scores': NotRequired[Mapping],
  'rouge_l': NotRequired[Measured | None],
  'tokens': NotRequired[int],
  'ids': NotRequired[
    Annotated[list, Only('of ids', lambda x: {*map(type, x)} <= {int})]
  ],
}
_COMPARISON = dict.fromkeys(('set', 'metric', 'a', 'b'), str) | dict.fromkeys(
  ('difference', 'low', 'high', 'p'), Measured | None
)
_SPEED = dict.fromkeys(('tokens_per_second', 'seconds', 'padding'), float)


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

  def origin(path, shape, keep, seen=()):
    if not str(path).startswith(STAGE):
      return path, shape, keep
    name = path.removeprefix(STAGE)
    if name not in stages or name in seen:
      raise UserError(
        f'{path}: config.stages has no stage {name} to start from'
      )
    if root is not None and is_finished(Path(root) / name):
      return f'{Path(root) / name}/best', shape, keep
    student = stages[name].student
    below = student.shape
    if below is not None or shape is not None:
      below = dict(below or {}) | dict(shape or {})
    if student.keep is not None:
      if shape is not None or keep is not None:
        raise UserError(
          f'{path}: what this stage cuts is cut or made anew here, and cannot '
          'be planned before it has run'
        )
      keep = student.keep
    return origin(student.path, below, keep, (*seen, name))

  with config.ignore_type(), config.unlocked():
    for part in (config.student, config.teacher):
      part.path, part.shape, part.keep = origin(
        part.path, part.get('shape'), part.get('keep')
      )
    path, shape, keep = origin(config.critic.init_from, None, None)
    if shape or keep:
      raise UserError(
        f'config.critic.init_from={config.critic.init_from}: the shape of this '
        'stage is its own, and cannot be planned before the stage has run'
      )
    config.critic.init_from = path
  return config


def _finished(root, spec):
  directory = finished_stage(root, spec)
  if directory is None:
    raise UserError(
      f'{spec}: stage {spec.removeprefix(STAGE)} has not finished in {root}; '
      'put it before this one in config.stages'
    )
  return str(directory)


def finished_stage(root, spec):
  """The directory of the stage that a 'stage:<name>' is; else None."""
  directory = Path(root) / str(spec).removeprefix(STAGE)
  is_stage = str(spec).startswith(STAGE) and is_finished(directory)
  return directory if is_stage else None


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
    results = json_file.read(path)
    settings_lib.check_row('', results, _RESULTS)
    for name, sets in results.get('averages', {}).items():
      settings_lib.check(f'averages.{name}', sets, tuple[str, ...])
    for when in ('best', 'last'):
      where = f'{when}.evaluators'
      _check_evaluators(where, results[when].get('evaluators'))
  except UserError as error:
    raise UserError(
      f'{path}: of an earlier version, or none of ours; delete it, and the run '
      f'or evaluation makes it anew, or use another --workdir ({error})'
    ) from error
  return results


def _check_evaluators(where, evaluators):
  settings_lib.check(where, evaluators, Mapping)
  for name, found in evaluators.items():
    where_one = f'{where}.{name}'
    settings_lib.check(where_one, found, Mapping)
    settings_lib.check(f'{where_one}.metrics', found.get('metrics'), Mapping)
    for metric, value in found['metrics'].items():
      _check_number(f'{where_one}.metrics.{metric}', value)


def _check_number(where, value):
  settings_lib.check(where, value, Mapping)
  settings_lib.check_row(f'{where}.', value, _NUMBER)
  for parts in ('by_length', 'by_position'):
    for bucket, part in value.get(parts, {}).items():
      _check_number(f'{where}.{parts}.{bucket}', part)


def read_config(workdir):
  """The config of a run as JSON; {} where it says nothing of it.

  Raises:
    UserError: for what is no config.json of a run.
  """
  path = Path(workdir) / 'config.json'
  if not path.exists():
    return {}
  config = json_file.read(path).get('config')
  settings_lib.check(f'{path}: config', config, Mapping)
  return config


def read_contents(workdir):
  """{what a run was made of: its digest}; {} where nothing is known."""
  path = Path(workdir) / 'config.json'
  contents = json_file.read(path).get('contents', {}) if path.exists() else {}
  settings_lib.check(f'{path}: contents', contents, Mapping)
  return contents


def read_rollouts(workdir):
  """The lines of rollouts.jsonl; [] if there are none."""
  return json_lines.read(Path(workdir) / 'rollouts.jsonl', _ROLLOUT)


def read_answers(path):
  """The lines of a file of answers/.

  Raises:
    UserError: naming the line that is none.
  """
  lines = json_lines.read(path, _ANSWER)
  if not lines:
    raise UserError(f'{path}: empty, or not there; move it away')
  for i, line in enumerate(lines, 1):
    for metric, score in line.get('scores', {}).items():
      settings_lib.check(f'{path}:{i}: scores.{metric}', score, Measured | None)
  return lines


def read_comparisons(folder):
  """What an evaluation wrote of models against each other; [] if nothing."""
  path = Path(folder) / 'comparisons.json'
  if not path.exists():
    return []
  found = json_file.read(path, kind=list)
  for i, comparison in enumerate(found):
    settings_lib.check(f'{path}: {i}', comparison, Mapping)
    settings_lib.check_row(f'{path}: {i}: ', comparison, _COMPARISON)
  return found


def read_speed(workdir):
  """{answers: how fast they were decoded}; {} if there are none."""
  path = Path(workdir) / 'speed.json'
  if not path.exists():
    return {}
  found = json_file.read(path)
  for name, speed in found.items():
    settings_lib.check(f'{path}: {name}', speed, Mapping)
    settings_lib.check_row(f'{path}: {name}: ', speed, _SPEED)
  return found
