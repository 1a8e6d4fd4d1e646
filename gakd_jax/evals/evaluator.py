"""Evaluators: what is measured of a model, while it trains or when it is done.

An evaluator is a frozen dataclass of settings with `run(subject, params, tag)`,
which gives {'metrics': {name: a number, or a dict with its 'mean'}} and what
else there is to say, such as how many prompts were 'shortened'; `params` are
those of the student that are trained. `metrics(has_teacher)` names what a
training may be chosen by. `teacher_reads_student_ids` says whether it runs the
teacher on the student's token ids. One with `rows` has in `about` where they
are from, their digest, and how many were 'dropped' and why. To add one: a file
here, and its line in `_KINDS`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from gakd_jax import UserError, fingerprint
from gakd_jax import settings as settings_lib
from gakd_jax.data import encoding, sources
from gakd_jax.evals import (
  comet,
  draft,
  fidelity,
  generation,
  loss,
  multiple_choice,
  tasks,
)
from gakd_jax.models import pair
from gakd_jax.settings import Count, DataSpec, Name, Natural, Text


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
  thinking: str = 'refuse'  # or 'keep', see `data.encoding.encode`
  # Of an evaluation that stands alone: what tells these weights from others,
  # so that answers may go on after an interruption. It shows its progress.
  identity: str | None = None
  teacher_workdir: Path | None = None  # where the teacher's answers are
  force: bool = False  # answers go on under whatever settings they were begun


_CHUNK = 256  # rows that are looked at together
_KINDS = {
  'loss': loss.Loss,
  'generation': generation.Generation,
  'multiple_choice': multiple_choice.MultipleChoice,
  'fidelity': fidelity.Fidelity,
  'draft': draft.Draft,
  'comet': comet.Comet,
}


def measure(evaluator, subject, params, tag):
  """What results.json says of one evaluator, see `results`."""
  of = getattr(evaluator, 'of', evaluator)
  found = evaluator.run(subject, params, tag)
  metrics = {
    name: x if isinstance(x, dict) else {'mean': x}
    for name, x in found['metrics'].items()
  }
  bad = [name for name, x in metrics.items() if not math.isfinite(x['mean'])]
  if bad:
    print(f'{evaluator.name}: {", ".join(bad)}: not a number', flush=True)
  return (
    {'rows': len(of.rows)}
    | of.about
    | _rules(evaluator)
    | found
    | {'metrics': metrics}
  )


def curves(evaluators):
  """{'<name>/<metric>': mean} of {name: what `measure` gives}."""
  return {
    f'{name}/{metric}': x['mean']
    for name, found in evaluators.items()
    for metric, x in found['metrics'].items()
  }


def _rules(evaluator):
  """By what answers are scored, if they are."""
  if not hasattr(evaluator, 'task'):
    return {}
  version = tasks.get(evaluator.task).version
  return {'task': evaluator.task, 'task_version': version}


def contents(evaluators):
  """{'config.evals.<name>': what tells its rows and rules from others}."""
  return {
    f'config.evals.{name}': ', '.join(
      [f'rows {x.about["data"]}', *(f'{k} {v}' for k, v in _rules(x).items())]
    )
    for name, x in evaluators.items()
    if hasattr(x, 'rows')
  }


def check_metric(metric, evaluators, has_teacher):
  """Refuses to choose by a '<set>/<metric>' that none of these will measure."""
  known = [
    f'{name}/{x}'
    for name, evaluator in evaluators.items()
    for x in evaluator.metrics(has_teacher)
  ]
  if metric not in (None, *known):
    raise UserError(
      f'config.checkpoint.best_metric={metric!r} is not measured; known are '
      f'{", ".join(known) or "none: config.evals is empty"}'
    )


def check(config):
  """{name: settings} of `config.evals`, of the types that they are to have.

  Raises:
    UserError: for a kind or a setting that there is not.
  """
  settings_lib.check('config.evals', config, Mapping)
  return {name: _checked(name, line) for name, line in config.items()}


def kind_of(name, line):
  """The class of a line of `config.evals`."""
  return _KINDS[line.get('kind', name)]


def settings_of(kind):
  """{setting: type} of a line of `config.evals`."""
  known = settings_lib.types_of(_KINDS[kind], 'name', 'about')
  if known.pop('rows', None):
    known |= {'data': DataSpec | None, 'limit': Count | None}
  if 'of' in known:
    known |= {'of': Text}
  return known | {'kind': Text, 'every': Natural}


def _checked(name, line):
  where = f'config.evals.{name}'
  settings_lib.check('a name in config.evals', name, Name)
  settings_lib.check(where, line, Mapping)
  kind = line.get('kind', name)
  settings_lib.check(f'{where}: kind', kind, Literal[*_KINDS])
  known = settings_of(kind)
  settings = settings_lib.checked(f'{where}.', line, known, kind)
  if 'of' in known and 'of' not in settings:
    raise UserError(
      f'{where}: `of` is missing: name the evaluator whose answers it reads'
    )
  return settings | {'kind': kind}


def make(config, default_data, prompters, on_bad_row='skip', thinking='refuse'):
  """{name: evaluator} of `config.evals`, in the order to run and show them.

  Each line's settings may have `kind` (default: the name), `data` (default:
  the run's validation set), `limit` (its first rows only) and `every` (steps of
  a training, instead of `config.eval_every`). Greedy answers come after those
  that are drawn, and what reads the answers of another evaluator, which it
  names with `of`, after these.

  Args:
    config: `config.evals`.
    default_data: `config.data.validation`.
    prompters: a function that gives the (template, tokenizer) of all models
      to be measured, which is on the same rows: those that each can hold.
    on_bad_row: 'skip' counts the others, 'fail' raises the first.
    thinking: as in training, see `data.encoding.encode`.
  """
  lines = check(config)
  order = sorted(lines, key=lambda x: lines[x].get('temperature') == 0)
  lines = {name: lines[name] for name in order}

  def rows_of(name, data, limit):
    data = data or default_data
    if not data:
      raise UserError(
        f'config.evals.{name}: no data; set config.data.validation, or empty '
        'config.evals'
      )
    found, bad = sources.load(data, on_bad_row=on_bad_row)
    rows = []
    for row, error in _fitting(found, prompters(), thinking):
      if len(rows) == limit:
        break
      if error is None:
        rows.append(row)
      elif on_bad_row == 'fail':
        raise error
      else:
        bad[error.reason] += 1
    for reason, n in sorted(bad.items()):
      print(f'{name}: {n} rows skipped: {reason}', flush=True)
    if not rows:
      raise UserError(f'config.evals.{name}: no row of {data} is left')
    about = {
      'source': data,
      'data': fingerprint.digest(
        [dataclasses.astuple(dataclasses.replace(r, where='')) for r in rows]
      ),
      'dropped': dict(sorted(bad.items())),
    }
    return {'rows': tuple(rows), 'about': about}

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


def _fitting(rows, prompters, thinking):
  """Yields (row, None or the `BadRow` of a model that cannot hold it)."""
  for start in range(0, len(rows), _CHUNK):
    some = rows[start : start + _CHUNK]
    encoded = [
      encoding.encode_batch(tokenizer, some, template, thinking)
      for template, tokenizer in prompters
    ]
    for i, row in enumerate(some):
      found = (ids[i] for ids in encoded if isinstance(ids[i], sources.BadRow))
      yield row, next(found, None)


def _make(name, settings, rows_of):
  cls = _KINDS[settings['kind']]
  own = settings_lib.types_of(cls)
  values = {key: x for key, x in settings.items() if key in own}
  if 'rows' in own:
    values |= rows_of(name, settings.get('data'), settings.get('limit'))
  return cls(name=name, **values)
