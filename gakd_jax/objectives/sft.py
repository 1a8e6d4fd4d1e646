"""Supervised fine-tuning: the cross-entropy of the response, -log q(y)."""

import dataclasses

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
    return self.mean_over_ids(_id_loss, (student,), batch)


def _id_loss(log_probs, target):
  return base.imitation(*log_probs, target)
