"""Writers of responses that are there before a step: the data's, the teacher's.

And what a writer is, see `rollout`.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

from gakd_jax import UserError, sharding
from gakd_jax.answering import MOST_SAMPLES
from gakd_jax.data import pipeline
from gakd_jax.models import caches
from gakd_jax.settings import Count, Length, Mass, Natural, NotNegative, Only


class Ends(NamedTuple):
  """What a writer knows of the tokenizer."""

  eos_ids: tuple  # each ends a response
  pad_id: int
  vocab: int  # ids from here on are no tokens


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The responses of the data, as they are."""

  needs_teacher = False
  one_tokenizer = False  # Whether the teacher's must be the student's.
  makes_rows = False  # Whether it writes the rows before the first batch.
  needs_responses = True  # Whether the data must have some.
  room = 0  # tokens that it may write after a prompt
  prefix = None  # the first tokens of a response, which alone are trained on
  every = 1  # optimizer steps that one `write` serves
  group = 1  # rows of a batch that one row of the data becomes
  beside = False  # whether one of these is that of the data

  def for_tokenizer(self, template, tokenizer):
    """The writer of responses that end as the template's do."""
    del template, tokenizer
    return self

  def for_objective(self, objective):
    """The writer of what this method asks."""
    del objective
    return self

  def check(self, config):
    """Refuses a run's config that the writer cannot work with."""

  def write(self, models, params, group, mesh, *, key, step, progress):
    """The batches that are trained on, and metrics of each.

    Args:
      models: `models.pair.Models`.
      params: of the student, those that are trained, before the step.
      group: `every` batches of the data (or what is left of them), this
        process's rows, for as many optimizer steps.
      mesh: of the run.
      key: of all writing in the run.
      step: the first of these optimizer steps, counted from 1.
      progress: the share of the run that is done.

    Returns:
      A list of (`data.pipeline.Batch` on the mesh, {metric: scalar}).
    """
    del models, params, key, step, progress
    return [
      (sharding.put_batch(batch, mesh), pipeline.coverage(batch))
      for batch in group
    ]


_Samples = Annotated[
  int, Only(f'1 to {MOST_SAMPLES}', lambda x: 1 <= x <= MOST_SAMPLES)
]


@dataclasses.dataclass(frozen=True)
class Teacher(Dataset):
  """The teacher answers the prompts of the data once, before training.

  Sequence-level distillation (arXiv 1606.07947). The answers are kept in
  <workdir>/answers.jsonl. Settings are those of `answering.write`.
  """

  needs_teacher = True
  makes_rows = True

  max_new_tokens: Length = 256
  temperature: NotNegative = 1.0
  top_k: Natural = 0
  top_p: Mass = 1.0
  no_repeat_ngram: Natural = 0
  batch_size: Count = 32
  samples: _Samples = 1
  cache: Literal[*caches.KINDS] | None = None

  def __post_init__(self):
    refuse_copies(self)

  def check(self, config):
    if config.data.turns != 'last':
      raise UserError(
        f'config.data.turns={config.data.turns!r}: the teacher answers the '
        "last turn of a conversation; set it to 'last'"
      )
    if config.data.weights is not None:
      raise UserError(
        'config.data.weights: all that the teacher answers is one data set; '
        'leave them out'
      )


def refuse_copies(writer):
  """Refuses several answers to a prompt where nothing is drawn."""
  if writer.samples > 1 and writer.temperature == 0:
    raise UserError(
      f'samples={writer.samples} at temperature=0 would all be the same; raise '
      'the temperature, or take 1'
    )
