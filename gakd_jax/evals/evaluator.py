"""Evaluators: what is measured of a model, while it trains or when it is done.

An evaluator is a frozen dataclass of settings with
`run(subject, params, tag) -> {metric: float}`; `params` are those of the
student that are trained. `teacher_reads_student_ids` says whether it runs the
teacher on the student's token ids. To add one: a file here, and its line in
`_KINDS`.
"""

import dataclasses
import difflib
from pathlib import Path

from jax.sharding import Mesh

from gakd_jax import UserError
from gakd_jax.data import sources
from gakd_jax.evals import (
  comet,
  fidelity,
  generation,
  loss,
  multiple_choice,
)
from gakd_jax.models import pair


@dataclasses.dataclass(frozen=True)
class Subject:
  """What does not change between evaluations of one run."""

  models: pair.Models
  template: str
  max_length: int
  max_prompt_length: int
  head_chunk: int
  mesh: Mesh
  workdir: Path
  # Of an evaluation that stands alone: what tells these weights from others,
  # so that answers may go on after an interruption. It shows its progress.
  identity: str | None = None
  teacher_workdir: Path | None = None  # where the teacher's answers are


_KINDS = {
  'loss': loss.Loss,
  'generation': generation.Generation,
  'multiple_choice': multiple_choice.MultipleChoice,
  'fidelity': fidelity.Fidelity,
  'comet': comet.Comet,
}


def make(config, default_data):
  """{name: evaluator} of `config.evals`, in the order to run them.

  Each line's settings may have `kind` (default: the name), `data` (default:
  the run's validation set), `limit` (its first rows only) and `every` (steps of
  a training, instead of `config.eval_every`). What reads the answers of another
  evaluator names it with `of`, and comes after it.
  """
  lines = {name: dict(settings) for name, settings in config.items()}
  made = {
    name: _make(name, settings, default_data)
    for name, settings in lines.items()
    if 'of' not in settings
  }
  for name, settings in lines.items():
    if 'of' in settings:
      of = made.get(settings['of'])
      if not isinstance(of, generation.Generation):
        raise UserError(
          f'config.evals.{name}: of={settings["of"]!r} is no evaluator of '
          'kind generation'
        )
      made[name] = _make(name, settings | {'of': of}, default_data)
  return made


def _make(name, settings, default_data):
  kind = settings.pop('kind', name)
  settings.pop('every', None)
  if kind not in _KINDS:
    raise UserError(
      f'config.evals: no evaluator {kind!r}; known are {", ".join(_KINDS)}'
    )
  fields = [f.name for f in dataclasses.fields(_KINDS[kind])]
  required = set(fields) & {'of'} - set(settings)
  if required:
    raise UserError(
      f'config.evals.{name}: `of` is missing: name the evaluator whose answers '
      'it reads'
    )
  known = [f for f in fields if f not in ('name', 'rows')]
  known += ['kind', 'every'] + ['data', 'limit'] * ('rows' in fields)
  for key in settings:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1, 0)
      raise UserError(
        f'config.evals.{name}: no setting {key!r}; did you mean {near[0]!r}? '
        f'known are {", ".join(known)}'
      )
  if 'rows' not in fields:
    return _KINDS[kind](name=name, **settings)
  data = settings.pop('data', default_data)
  limit = settings.pop('limit', None)
  if not data:
    raise UserError(
      f'config.evals.{name}: no data; set config.data.validation, or empty '
      'config.evals'
    )
  rows, bad = sources.load(data)
  for reason, n in sorted(bad.items()):
    print(f'{name}: {n} rows skipped: {reason}', flush=True)
  return _KINDS[kind](name=name, rows=tuple(rows[:limit]), **settings)
