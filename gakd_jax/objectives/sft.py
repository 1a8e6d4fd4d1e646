"""Supervised fine-tuning: the cross-entropy of the response, -log q(y)."""

import dataclasses

import jax

from gakd_jax import UserError
from gakd_jax.objectives import base


@dataclasses.dataclass(frozen=True)
class SFT(base.Objective):
  needs_teacher = False

  def check(self, config):
    if config.rollout.writer in ('student', 'speculative'):
      raise UserError(
        'config.objective: sft learns nothing from what the student writes; '
        "name a method with a teacher, or set config.rollout.writer='dataset'"
      )

  def loss(self, student, teacher, batch, own, key):
    del teacher, own, key
    return self.token_mean(_token_loss, (student,), batch)


def _token_loss(logits, target):
  return base.imitation(jax.nn.log_softmax(logits[0]), target)
