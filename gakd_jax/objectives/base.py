"""What an objective is: the one part in which distillation methods differ."""

import dataclasses

import jax

from gakd_jax import UserError


@dataclasses.dataclass(frozen=True)
class Objective:
  """A method: what the student descends, given its outputs and the teacher's.

  Methods are final, frozen dataclasses of settings, one file each. Parameters
  of their own are made by `init`: `extra` (projectors, say) descends `loss`
  with the student, `critic` descends `critic_loss`.
  """

  head_chunk: int = 512  # tokens whose logits exist at a time, on each device

  needs_teacher = True
  critic_steps = 1  # updates of the critic in one step
  # Whether the critic is updated by every microbatch alone instead of once by
  # the whole batch.
  critic_by_microbatch = False
  # What an update of the critic and what `loss` cost, in forward passes of the
  # critic over one model's sequences: a gradient counts 2, without that of the
  # weights 1.
  critic_passes = 0, 0
  whole_rows = False  # Whether a row must hold one document: no packing.

  def __post_init__(self):
    if self.head_chunk < 1:
      raise UserError(
        f'config.train.head_chunk={self.head_chunk} must be 1 or more tokens'
      )

  def for_run(self, steps_per_epoch, total_steps):
    """The method with what it plans in epochs, or over a run, in steps."""
    del steps_per_epoch, total_steps
    return self

  def init(self, rng, student, teacher, mesh=None):
    """(extra, critic): the method's own parameters, nested dicts; {} if none.

    `student` and `teacher` are the models' `DecoderConfig`s (the teacher's may
    be None); parameters are placed on `mesh`.
    """
    del rng, student, teacher, mesh
    return {}, {}

  def shapes(self, student, teacher):
    """What `init` returns, as shapes; no weight is read."""
    return jax.eval_shape(
      lambda: self.init(jax.random.key(0), student, teacher)
    )

  def loss(self, student, teacher, batch, extra, critic, rng, step):
    """The loss of a (micro)batch.

    Args:
      student, teacher: `models.transformer.Outputs` on `batch.student` and
        `batch.teacher`; the teacher's is None if `needs_teacher` is false.
      batch: `data.pipeline.Batch`, its numbers of the whole step set.
      extra, critic: the method's own parameters.
      rng: a key for this step and microbatch.
      step: the number of optimizer steps taken.

    Returns:
      (scalar, {name: metric}): the terms of response tokens, divided by
      `batch.num_tokens`, so that the sum over microbatches is the mean over
      the optimizer step; metrics likewise.
    """
    raise NotImplementedError

  def critic_loss(self, critic, student, teacher, batch, rng):
    """What the critic descends on a (micro)batch; as `loss`.

    No gradient reaches `student` or `teacher`.
    """
    raise NotImplementedError

  def summarize(self, metrics):
    """The metrics of a step, from their sums over its microbatches."""
    return metrics
