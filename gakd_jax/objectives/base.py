"""What an objective is: the one part in which distillation methods differ."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from gakd_jax.objectives import divergences, head
from gakd_jax.settings import Count


@struct.dataclass
class Own:
  """What belongs to a method itself; nested dicts of arrays, {} if none."""

  extra: dict = struct.field(default_factory=dict)  # descends with the student
  critic: dict = struct.field(default_factory=dict)  # descends `critic_loss`
  memory: dict = struct.field(default_factory=dict)  # moved by `remember`
  constants: dict = struct.field(default_factory=dict)  # never moves
  step: Any = None  # optimizer steps taken


class Target(NamedTuple):
  """What the text goes on with after a token, and who wrote that.

  Where models write in the run, what counts on one side only is weighted: so
  that a mean over all tokens is that over the tokens which the `data` wrote,
  or which were `written`; 0 on the others. Else None, which is all and none.
  """

  id_N: jax.Array
  data_N: jax.Array | None = None
  written_N: jax.Array | None = None
  known: Any = ()  # of a teacher that is known by `few` numbers


@dataclasses.dataclass(frozen=True)
class Objective:
  """A method: what the student descends, given its outputs and the teacher's.

  Methods are final, frozen dataclasses of settings, one file each.
  """

  head_chunk: Count = 512  # tokens whose logits exist at a time, on each device

  needs_teacher = True
  one_tokenizer = True  # Whether the teacher's must be the student's.
  takes = ()  # Of `few.KINDS`: what is enough to know of a teacher.
  temperature = 1.0  # at which that is asked
  # Whether it asks the teacher about the data's responses alone, where others
  # are written beside them.
  asks_of_data = False
  # Whether it asks what the student gave to its text when it wrote it, if that
  # was steps ago.
  asks_old = False
  # Whether it reads the teacher's hidden states where no response is predicted.
  reads_prompts = False
  # What it reads of `Batch.align` where tokenizers differ, of its names the
  # part before '_'.
  align = ()
  # Whether the teacher's logits are computed over the student's ids. What some
  # read besides, of ids that only the teacher has, `flops` leaves out.
  teacher_over_students = False
  # Products of heads with all hidden states of a text, the student's and the
  # teacher's, beyond those that a loss of logits takes, see `flops.of_step`.
  more_head_passes = 0, 0
  critic_steps = 1  # updates of the critic in one step
  # Whether the critic is updated by every microbatch alone instead of once by
  # the whole batch.
  critic_by_microbatch = False

  def updates_critic_first(self, microbatches):
    """Whether the critic sees all microbatches before the student's loss.

    The student then runs twice.
    """
    return microbatches > 1 and not self.critic_by_microbatch

  def check(self, config):
    """Refuses a run's config that the method cannot work with."""

  def for_run(self, steps_per_epoch, total_steps):
    """The method with what it plans in epochs, or over a run, in steps."""
    del steps_per_epoch, total_steps
    return self

  def init(self, key, student, teacher, mesh=None):
    """The method's `Own` at the start.

    `student` and `teacher` are the models' `DecoderConfig`s (the teacher's may
    be None); parameters are placed on `mesh`.
    """
    del key, student, teacher, mesh
    return Own()

  def begin(self, own, models, params):
    """`init`'s, with what starts from the weights of the models.

    models: `models.pair.Models`; params: those of the student to train.
    """
    del models, params
    return own

  def shapes(self, student, teacher):
    """What `init` returns, as shapes; no weight is read."""
    return jax.eval_shape(
      lambda: self.init(jax.random.key(0), student, teacher)
    )

  def constants(self, models):
    """Arrays that the loss reads and nothing moves, made once, on the host.

    models: `models.pair.Models`, for tokenizers and configs.
    """
    del models
    return {}

  def count(self, batch):
    """{name: total} over the whole optimizer step, what losses divide by.

    They are `batch.totals` to a loss, whose sum over microbatches is then the
    mean over the step. At least 1, for a step without any.
    """
    totals_B = jnp.sum(batch.student.mask_BT, axis=1)
    totals = {'tokens': jnp.sum(totals_B)}
    if batch.written_B is not None:
      totals['written'] = jnp.sum(totals_B, where=batch.written_B)
      totals['data'] = totals['tokens'] - totals['written']
    return {name: jnp.maximum(n, 1) for name, n in totals.items()}

  def terms(self):
    """{name: function like `loss`}: the student descends their sum."""
    return {'loss': self.loss}

  def token_mean(self, token_loss, outputs, batch):
    """Mean over response tokens of a loss of next-token logits.

    token_loss: see `head.weighted_sum`; targets are a `Target`.
    outputs: of models that read the same ids, over those that all have.
    """
    return self._mean(head.weighted_sum, token_loss, outputs, batch)

  def mean_over_ids(self, id_loss, outputs, batch):
    """As `token_mean`, of a loss that is a sum over the vocabulary.

    id_loss: (log-probabilities [N, v] of each of `outputs`, of ids that follow
      each other; a `Target` whose ids count from the first of these) -> what
      these ids add to (loss [N], {name: metric [N]}).
    """

    def relative(log_probs, target, first):
      return id_loss(log_probs, target._replace(id_N=target.id_N - first))

    return self._mean(head.sum_over_ids, relative, outputs, batch)

  def _mean(self, weighted, loss, outputs, batch):
    target, mask_BT = targets(batch)
    return weighted(
      loss,
      head.shared(outputs),
      target,
      mask_BT / batch.totals['tokens'],
      chunk=self.head_chunk,
    )

  def loss(self, student, teacher, batch, own, key):
    """The loss of a (micro)batch.

    Args:
      student, teacher: `models.transformer.Outputs` on `batch.student` and
        `batch.teacher`; the teacher's is None if `needs_teacher` is false.
      batch: `data.pipeline.Batch` with its totals.
      own: `Own`.
      key: of this step and microbatch.

    Returns:
      (scalar, {name: metric}): sums divided by a total of the whole step.
      Gradients are taken with respect to the student's outputs and `own.extra`.
    """
    raise NotImplementedError

  def critic_loss(self, student, teacher, batch, own, key):
    """What `own.critic` descends on a (micro)batch; as `loss`."""
    raise NotImplementedError

  def remember(self, own, metrics):
    """The memory after a step, whose metrics are those of the whole batch."""
    del metrics
    return own.memory

  def flops(self, student, teacher, own, rows, length, microbatches):
    """{part: operations of a step} of what the method adds to two models.

    `own` may be shapes; a batch has `rows` of `length` tokens.
    """
    del own, microbatches
    return {
      f'{side} head, again': rows * length * 2 * x.vocab_size * x.width * passes
      for side, x, passes in zip(
        ('student', 'teacher'),
        (student, teacher),
        self.more_head_passes,
        strict=True,
      )
      if passes
    }


def targets(batch):
  """What each position of the student predicts, a `Target` of [B, T].

  And which positions count.
  """
  ids_BT, mask_BT = head.next_token(batch.student)
  return Target(ids_BT, **_by_writer(batch), known=batch.known), mask_BT


def imitation(log_q_NV, target):
  """Cross-entropy with what the data wrote, and metrics; `log_q` as in
  `divergences`.

  A student must not be trained to imitate itself. Where it writes, its entropy
  on that text is a metric: what falls when responses collapse.
  """
  ce_N = divergences.cross_entropy(log_q_NV, target.id_N)
  if target.data_N is None:
    return ce_N, {'ce': ce_N}
  ce_N *= target.data_N
  entropy_N = divergences.entropy(log_q_NV) * target.written_N
  return ce_N, {'ce': ce_N, 'entropy': entropy_N}


def _by_writer(batch):
  """The weights of a `Target`, [B, T]; {} where no model writes."""
  if batch.written_B is None:
    return {}
  shape_BT, totals = batch.student.ids_BT.shape, batch.totals
  return {
    f'{name}_N': jnp.broadcast_to(
      (is_so_B * (totals['tokens'] / totals[name]))[:, None], shape_BT
    )
    for name, is_so_B in (
      ('data', ~batch.written_B),
      ('written', batch.written_B),
    )
  }
