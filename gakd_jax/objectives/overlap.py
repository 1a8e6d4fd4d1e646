"""Distillation over the tokens that both vocabularies have, where they agree.

(1 - kd) CE + kd D(p, q): D is a divergence of `kld`, p and q the teacher's and
the student's distribution *given that a shared token follows*, compared where
both models have read the same text and go on with the same token (exact pairs).
The means are those over response tokens, and over pairs. Logits are divided by
the temperature in D, which is not multiplied by its square. There are neither
projectors nor attention.

What it does not see is a word that is one token to the teacher and several to
the student; with one tokenizer nothing is unseen, and it is `kld` with
`scale_by_t2=False`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gakd_jax.objectives import base, head, kld, pairs, vocabularies
from gakd_jax.settings import Positive, Share


@dataclasses.dataclass(frozen=True)
class Overlap(base.Objective):
  divergence: kld.Divergence = 'forward_kl'  # of `kld.DIVERGENCES`
  kd: Share = 0.5  # weight of the divergence, 0 to 1
  temperature: Positive = 1.0

  one_tokenizer = False
  teacher_over_students = True
  align = ('pairs',)

  def constants(self, models):
    return vocabularies.shared(models)

  def count(self, batch):
    n = jnp.sum(pairs.exact(batch)[1])
    return super().count(batch) | {'pairs': jnp.maximum(n, 1)}

  def loss(self, student, teacher, batch, own, key):
    del key
    index_BT, paired_BT = pairs.exact(batch)
    target, mask_BT = base.targets(batch)
    teacher = head.at(teacher, index_BT)
    outputs, masked = vocabularies.common(student, teacher, own.constants)

    def token_loss(logits, targets):
      target, weight_N = targets
      log_q_NV, log_p_NV = (
        jax.nn.log_softmax(masked(z) / self.temperature) for z in logits
      )
      divergence_N = weight_N * kld.divergence_of(self.divergence)(
        log_p_NV, log_q_NV
      )
      ce_N, metrics = base.imitation(jax.nn.log_softmax(logits[0]), target)
      loss_N = (1 - self.kd) * ce_N + self.kd * divergence_N
      return loss_N, metrics | {self.divergence: divergence_N}

    weight = batch.totals['tokens'] / batch.totals['pairs']
    return head.weighted_sum(
      token_loss,
      outputs,
      (target, paired_BT * weight),
      mask_BT / batch.totals['tokens'],
      chunk=self.head_chunk,
    )
