"""Supervised fine-tuning: the cross-entropy of the response, -log q(y)."""

import dataclasses

import jax

from gakd_jax.objectives import base, divergences, head


@dataclasses.dataclass(frozen=True)
class SFT(base.Objective):
  needs_teacher = False

  def loss(self, student, teacher, batch, own, key):
    del teacher, own, key
    targets_BT, mask_BT = head.next_token(batch.student)
    return head.weighted_sum(
      _token_loss,
      (student,),
      targets_BT,
      mask_BT / batch.totals['tokens'],
      chunk=self.head_chunk,
    )


def _token_loss(logits, targets_N):
  log_q_NV = jax.nn.log_softmax(logits[0])
  ce_N = divergences.cross_entropy(log_q_NV, targets_N)
  return ce_N, {'ce': ce_N}
