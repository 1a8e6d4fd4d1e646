"""MinED: the teacher's logits, brought into the student's tokens by spelling.

(1 - kd) CE + kd KL(p', q): p' is the teacher's softmax over the student's ids,
each with the logit of the token of the teacher that is nearest to it by edit
distance (FuseLLM, arXiv 2401.10491; as in DSKD's comparison, arXiv 2406.17328:
kd 0.5, temperature 2, without its square). Positions are paired by time warping
of what was read, with edit distance as its cost: one teaches where exactly one
teacher's token is paired with the student's, and its nearest is that token.
Elsewhere p' is the next token itself, which is cross-entropy at temperature T.

Nearest: each teacher's token goes to the student's of least distance, the
lowest id on a tie; a student's token then has the first of those that went to
it, or no probability. The code that was released overwrites the student's
logits with those that it made, in fp32, and distils nothing; this does not.
With one tokenizer it is forward KL.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gakd_jax.objectives import base, divergences, head, pairs, vocabularies
from gakd_jax.settings import Positive, Share


@dataclasses.dataclass(frozen=True)
class MinED(base.Objective):
  kd: Share = 0.5  # weight of the divergence, 0 to 1
  temperature: Positive = 2.0

  one_tokenizer = False
  teacher_over_students = True
  align = ('dtw',)

  def constants(self, models):
    return vocabularies.nearest(models)

  def loss(self, student, teacher, batch, own, key):
    del key
    index_BT, paired_BT = pairs.warped(batch)
    if 'student_id_U' in own.constants:
      t_read_BT = jnp.take_along_axis(batch.teacher.ids_BT, index_BT, axis=1)
      nearest_BT = own.constants['student_id_U'][t_read_BT]
      paired_BT &= nearest_BT == batch.student.ids_BT
    target, mask_BT = base.targets(batch)
    teacher = head.at(teacher, index_BT)
    outputs, masked = vocabularies.common(student, teacher, own.constants)

    def token_loss(logits, targets):
      target, paired_N = targets
      z_q_NV, z_p_NV = logits
      log_q_NV = jax.nn.log_softmax(z_q_NV / self.temperature)
      kl_N = divergences.forward_kl(
        jax.nn.log_softmax(masked(z_p_NV) / self.temperature), log_q_NV
      )
      hard_N = divergences.cross_entropy(log_q_NV, target.id_N)
      if target.data_N is not None:  # Nobody is to imitate itself.
        hard_N *= target.data_N > 0
      mined_N = jnp.where(paired_N, kl_N, hard_N)
      ce_N, metrics = base.imitation(jax.nn.log_softmax(z_q_NV), target)
      loss_N = (1 - self.kd) * ce_N + self.kd * mined_N
      return loss_N, metrics | {
        'mined': mined_N,
        'paired': paired_N.astype(jnp.float32),
      }

    return head.weighted_sum(
      token_loss,
      outputs,
      (target, paired_BT),
      mask_BT / batch.totals['tokens'],
      chunk=self.head_chunk,
    )
