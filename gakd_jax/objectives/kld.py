"""Distillation by a divergence between next-token distributions.

(1 - kd) CE + kd D(teacher, student), averaged over response tokens, D a row of
`DIVERGENCES` (Hinton et al. 2015, arXiv 1503.02531; MiniLLM's and GAKD's
recipes: kd 0.5), CE only over those that the data wrote. Logits of both models
are divided by the temperature in D, and D is multiplied by its square if
`scale_by_t2`, which keeps the size of its gradient; CE is of the untempered
student. On text that the student writes in the run (`config.rollout`) it is GKD
(arXiv 2306.13649: share 0.5, jsd), ImitKD (arXiv 2009.07253: share 0.5,
forward_kl) or on-policy distillation with reverse KL, each with kd 1.

Distributions are compared over the token ids that both vocabularies have. Of a
teacher that is known by few numbers a token (`few`), D is over the K + 1
outcomes of its top k, or forward KL is estimated from ids that it drew. Where a
data file has nothing of it but the text (`data.logprobs`), D is cross-entropy.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gakd_jax.objectives import base, divergences, few
from gakd_jax.settings import NotNegative, Positive, Share

# name: the function, and its settings.
DIVERGENCES = {
  'forward_kl': (divergences.forward_kl, ()),
  'reverse_kl': (divergences.reverse_kl, ()),
  'jsd': (divergences.jsd, ('beta',)),
  'skew_forward': (divergences.skew_forward, ('alpha',)),
  'skew_reverse': (divergences.skew_reverse, ('alpha',)),
  'entropy_gated': (divergences.entropy_gated, ('threshold',)),
  'tvd': (divergences.total_variation, ()),
  'adaptive': (divergences.adaptive_kl, ()),
}
# Those that are no sum over the vocabulary of what is known of one id.
_WHOLE = ('entropy_gated', 'adaptive')

Divergence = Literal[*DIVERGENCES]


def divergence_of(name):
  """The function of `divergences`; it has defaults for its settings."""
  return DIVERGENCES[name][0]


@dataclasses.dataclass(frozen=True)
class KLD(base.Objective):
  divergence: Divergence = 'reverse_kl'
  kd: Share = 0.5  # weight of the divergence, 0 to 1
  temperature: Positive = 1.0
  scale_by_t2: bool = True
  beta: Share = 0.5  # of jsd; 0 is forward KL, 1 reverse KL
  alpha: Share = 0.1  # of skew_forward and skew_reverse
  threshold: NotNegative = 0.8  # of entropy_gated, nats of the teacher

  @property
  def takes(self):
    return few.KINDS if self.divergence == 'forward_kl' else ('top_k',)

  def loss(self, student, teacher, batch, own, key):
    del own, key
    if batch.known:
      return self.token_mean(self._known_loss, (student,), batch)
    if self.temperature == 1 and self.divergence not in _WHOLE:
      return self.mean_over_ids(self._id_loss, (student, teacher), batch)
    return self.token_mean(self._token_loss, (student, teacher), batch)

  def _known_loss(self, logits, target):
    """Of a teacher that is known by `few` numbers a token."""
    tempered_NV = logits[0] / self.temperature
    if 'share' in target.known:
      divergence_N = few.forward_kl(tempered_NV, target.known)
    else:
      divergence_N = self._divergence(*few.outcomes(tempered_NV, target.known))
    log_q_NV = jax.nn.log_softmax(logits[0])
    if 'is_known' in target.known:
      # Of a text alone, all mass is on it: its KL is the cross-entropy.
      ce_N = divergences.cross_entropy(log_q_NV, target.id_N)
      divergence_N = jnp.where(target.known['is_known'], divergence_N, ce_N)
    return self._mixed(divergence_N, log_q_NV, target)

  def _token_loss(self, logits, target):
    log_q_NV, log_p_NV = (
      jax.nn.log_softmax(z / self.temperature) for z in logits
    )
    divergence_N = self._divergence(log_p_NV, log_q_NV)
    return self._mixed(divergence_N, jax.nn.log_softmax(logits[0]), target)

  def _id_loss(self, log_probs, target):
    log_q_NV, log_p_NV = log_probs
    divergence_N = self._divergence(log_p_NV, log_q_NV)
    return self._mixed(divergence_N, log_q_NV, target)

  def _divergence(self, log_p_NV, log_q_NV):
    function, settings = DIVERGENCES[self.divergence]
    return function(
      log_p_NV, log_q_NV, **{name: getattr(self, name) for name in settings}
    )

  def _mixed(self, divergence_N, log_q_NV, target):
    """(1 - kd) CE + kd D, D of the tempered distributions."""
    if self.scale_by_t2:
      divergence_N *= self.temperature**2
    ce_N, metrics = base.imitation(log_q_NV, target)
    loss_N = (1 - self.kd) * ce_N + self.kd * divergence_N
    return loss_N, metrics | {self.divergence: divergence_N}
