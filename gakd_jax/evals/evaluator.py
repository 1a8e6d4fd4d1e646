"""Evaluators: what is measured of a model, while it trains or when it is done.

An evaluator is a frozen dataclass of settings with
`run(subject, params, tag) -> {metric: float}`; `params` are those of the
student that are trained. `teacher_reads_student_ids` says whether it runs the
teacher on the student's token ids. One with `rows` has in `left_out` how many
of its data are none of them. To add one: a file here, and its line in `_KINDS`.
"""

import dataclasses
import itertools
from pathlib import Path

from jax.sharding import Mesh

from gakd_jax import UserError, partial
from gakd_jax import settings as settings_lib
from gakd_jax.data import sources, templates
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
  thinking: str = 'refuse'  # or 'keep', see `data.tokenizer.encode`
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


def measure(evaluator, subject, params, tag):
  """{'<name>/<metric>': value} of a model.

  `<name>/left_out`, if it is there, counts the rows without a part in it.
  """
  values = evaluator.run(subject, params, tag)
  if getattr(evaluator, 'left_out', 0):
    more = values.get('left_out', 0)
    values = values | {'left_out': evaluator.left_out + more}
  return {f'{evaluator.name}/{key}': value for key, value in values.items()}


def contents(evaluators):
  """{name: a digest of its rows} of the evaluators that have some."""
  return {
    name: partial.digest(
      [dataclasses.astuple(dataclasses.replace(r, where='')) for r in x.rows]
    )
    for name, x in sorted(evaluators.items())
    if hasattr(x, 'rows')
  }


def check(config):
  """{name: settings} of `config.evals`, of the types that they are to have.

  Raises:
    UserError: for a kind or a setting that there is not.
  """
  return {name: _checked(name, line) for name, line in config.items()}


def kind_of(name, line):
  """The class of a line of `config.evals`."""
  kind = line.get('kind', name)
  if kind not in _KINDS:
    raise UserError(
      f'config.evals: no evaluator {kind!r}; known are {", ".join(_KINDS)}'
    )
  return _KINDS[kind]


def _checked(name, line):
  kind = line.get('kind', name)
  known = {'kind': str, 'every': int}
  known |= settings_lib.types_of(kind_of(name, line), 'name', 'left_out')
  if known.pop('rows', None):
    known |= {'data': object, 'limit': int | None}
  where = f'config.evals.{name}: {kind}'
  settings = {'kind': kind} | settings_lib.checked(where, line, known)
  if 'of' in known and 'of' not in settings:
    raise UserError(
      f'config.evals.{name}: `of` is missing: name the evaluator whose answers '
      'it reads'
    )
  limit = settings.get('limit')
  if limit is not None and limit < 1:
    raise UserError(f'config.evals.{name}: limit={limit}; expected 1 or more')
  return settings


def make(config, default_data, prompters, on_bad_row='skip'):
  """{name: evaluator} of `config.evals`, in the order to run them.

  Each line's settings may have `kind` (default: the name), `data` (default:
  the run's validation set), `limit` (its first rows only) and `every` (steps of
  a training, instead of `config.eval_every`). What reads the answers of another
  evaluator names it with `of`, and comes after it.

  Args:
    config: `config.evals`.
    default_data: `config.data.validation`.
    prompters: a function that gives the (template, tokenizer) of all models
      to be measured, which is on the same rows: those that each can hold.
    on_bad_row: 'skip' counts the others, 'fail' raises the first.
  """
  lines = check(config)

  def refuse(row):
    for template, tokenizer in prompters():
      templates.prompt_text(template, row, tokenizer)

  def rows_of(name, data, limit):
    data = data or default_data
    if not data:
      raise UserError(
        f'config.evals.{name}: no data; set config.data.validation, or empty '
        'config.evals'
      )
    rows, bad = sources.load(data, on_bad_row=on_bad_row)
    fitting = _fitting(rows, refuse, on_bad_row, bad)
    rows = tuple(itertools.islice(fitting, limit))
    for reason, n in sorted(bad.items()):
      print(f'{name}: {n} rows skipped: {reason}', flush=True)
    if not rows:
      raise UserError(f'config.evals.{name}: no row of {data} is left')
    return {'rows': rows, 'left_out': bad.total()}

  made = {
    name: _make(name, settings, rows_of)
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
      made[name] = _make(name, settings | {'of': of}, rows_of)
  return made


def _fitting(rows, refuse, on_bad_row, bad):
  """Yields the rows that are not refused, and counts the others in `bad`."""
  for row in rows:
    try:
      refuse(row)
    except sources.BadRow as error:
      if on_bad_row == 'fail':
        raise
      bad[error.reason] += 1
    else:
      yield row


def _make(name, settings, rows_of):
  cls = _KINDS[settings['kind']]
  own = settings_lib.types_of(cls)
  values = {key: x for key, x in settings.items() if key in own}
  if 'rows' in own:
    values |= rows_of(name, settings.get('data'), settings.get('limit'))
  return cls(name=name, **values)
