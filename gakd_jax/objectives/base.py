"""What an objective is: the one part in which distillation methods differ."""

import dataclasses

from gakd_jax import UserError


@dataclasses.dataclass(frozen=True)
class Objective:
  """A method: what the student descends, given its outputs and the teacher's.

  Methods are final, frozen dataclasses of settings, one file each; parameters
  of their own (projectors, say) are made by `init` and descend with the
  student.
  """

  head_chunk: int = 512  # tokens whose logits exist at a time, on each device

  needs_teacher = True

  def __post_init__(self):
    if self.head_chunk < 1:
      raise UserError(
        f'config.train.head_chunk={self.head_chunk} must be 1 or more tokens'
      )

  def init(self, rng, student, teacher):
    """The method's own parameters, a tree of nested dicts; {} if none."""
    del rng, student, teacher
    return {}

  def loss(self, student, teacher, batch, extra, rng, step):
    """The loss of a (micro)batch.

    Args:
      student, teacher: `models.transformer.Outputs` on `batch.student` and
        `batch.teacher`; the teacher's is None if `needs_teacher` is false.
      batch: `data.pipeline.Batch`, with `num_tokens` set.
      extra: the method's own parameters.
      rng: a key for this step and microbatch.
      step: the number of optimizer steps taken.

    Returns:
      (scalar, {name: scalar}): the terms of response tokens, divided by
      `batch.num_tokens`, so that the sum over microbatches is the mean over
      the optimizer step; metrics likewise.
    """
    raise NotImplementedError
