"""Supervised fine-tuning: the cross-entropy of the response, -log q(y)."""

import dataclasses

import jax

from gakd_jax.objectives import base, divergences


@dataclasses.dataclass(frozen=True)
class SFT(base.Objective):
  needs_teacher = False

  def loss(self, student, teacher, batch, own, key):
    del teacher, own, key
    return self.token_mean(_token_loss, (student,), batch)


def _token_loss(logits, targets_N):
  log_q_NV = jax.nn.log_softmax(logits[0])
  ce_N = divergences.cross_entropy(log_q_NV, targets_N)
  return ce_N, {'ce': ce_N}
