"""Evaluators: what a run measures of a student while it trains.

An evaluator is a frozen dataclass of settings with
`run(subject, params, tag) -> {metric: float}`. To add one: a file here, and
its line in `make`.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gakd_jax import UserError
from gakd_jax.data import sources
from gakd_jax.evals import generation, loss
from gakd_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Subject:
  """What does not change between evaluations of one run."""

  student: Any  # definition, see `models.transformer.split`
  teacher: Any  # definition; None without a teacher
  frozen: dict  # {'teacher': parameters} or {}
  tokenizer: Any
  template: str
  max_length: int
  max_prompt_length: int
  dtype: Any  # of the computation
  head_chunk: int
  mesh: Mesh
  workdir: Path

  def cast(self, params):
    return transformer.cast(params, self.dtype)


def make(name, settings, default_data):
  """The evaluator of one line of `config.evals`, its data loaded.

  `settings` may have `kind` (default: the name), `data` (default: the run's
  validation set) and `limit` (its first rows only).
  """
  kinds = {'loss': loss.Loss, 'generation': generation.Generation}
  settings = dict(settings)
  kind = settings.pop('kind', name)
  if kind not in kinds:
    raise UserError(
      f'config.evals: no evaluator {kind!r}; known are {", ".join(kinds)}'
    )
  data = settings.pop('data', default_data)
  limit = settings.pop('limit', None)
  if not data:
    raise UserError(
      f'config.evals.{name}: no data; set config.data.validation, or empty '
      'config.evals'
    )
  known = [f.name for f in dataclasses.fields(kinds[kind]) if f.name != 'rows']
  for key in settings:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1, 0)
      raise UserError(
        f'config.evals.{name}: no setting {key!r}; did you mean {near[0]!r}? '
        f'known are kind, data, limit, {", ".join(known)}'
      )
  rows, _ = sources.load(data)
  return kinds[kind](name=name, rows=tuple(rows[:limit]), **settings)
