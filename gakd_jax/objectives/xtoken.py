"""X-Token: the student's distribution, spelt in the teacher's tokens.

(1 - kd) CE + kd T^2 L, L a mean over spans of text that both tokenizers end
alike ("X-Token: projection-guided cross-tokenizer knowledge distillation",
arXiv 2605.21699). W says for every token of the student what the teacher makes
it of: the token of one string, else its pieces, of weights that fall by `decay`
from one to the next and sum to 1.

  P-KL  KL(p, q W), p among the tokens that W reaches: nothing is compared by
        rank, and a number that is one token here and digits there is taught by
        its first digit, instead of being pushed down
  H-KL  (`hybrid`) pairs of tokens, those of one string and then, of what is
        left, a token and its first piece: sum p log(p / q) over pairs, and the
        others by rank as in `uld`

The distribution of a span is the geometric mean of its tokens', renormalised:
the softmax of their mean logits. From the published description, which leaves
open: `decay`; the pieces (here the longest from the left); and whether the mean
is taken before the projection (here) or after. The authors scale L in every
step to the size of CE; here kd is a weight. With one tokenizer it is forward
KL.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gakd_jax.objectives import base, divergences, head, pairs, vocabularies
from gakd_jax.settings import Count, Positive, Share


@dataclasses.dataclass(frozen=True)
class XToken(base.Objective):
  kd: Share = 0.5  # weight of all but cross-entropy, 0 to 1
  temperature: Positive = 1.0
  hybrid: bool = False  # H-KL
  decay: Share = 0.1  # of the weights of pieces
  top: Count = 1024  # probabilities compared one by one, by rank

  one_tokenizer = False
  align = ('span',)
  more_head_passes = 3, 0  # of spans

  def constants(self, models):
    return vocabularies.projection(models, self.decay)

  def count(self, batch):
    _, paired_BT = pairs.ends(*pairs.spans(batch))
    return super().count(batch) | {'spans': jnp.maximum(jnp.sum(paired_BT), 1)}

  def loss(self, student, teacher, batch, own, key):
    del key
    s_BT, t_BR = pairs.spans(batch)
    index_BT, paired_BT = pairs.ends(s_BT, t_BR)
    target, mask_BT = base.targets(batch)
    tokens = batch.totals['tokens']
    span = student
    if 'span_s' in batch.align:
      span = pairs.span_means(student, s_BT)
      teacher = pairs.span_means(teacher, t_BR)
    outputs, distance = self._distance(
      span, head.at(teacher, index_BT), own.constants
    )

    def token_loss(logits, targets):
      target, weight_N = targets
      z_NV, *others = logits
      distance_N = distance(*(z / self.temperature for z in others))
      distance_N *= weight_N * self.temperature**2
      ce_N, metrics = base.imitation(jax.nn.log_softmax(z_NV), target)
      loss_N = (1 - self.kd) * ce_N + self.kd * distance_N
      return loss_N, metrics | {'xtoken': distance_N}

    return head.weighted_sum(
      token_loss,
      (student, *outputs),
      (target, paired_BT * (tokens / batch.totals['spans'])),
      mask_BT / tokens,
      chunk=self.head_chunk,
    )

  def _distance(self, student, teacher, constants):
    """Outputs of both, and L of a span of their logits, the student's first."""
    if 'teacher_id_V' not in constants:
      return head.shared(
        (student, teacher)
      ), lambda z_q_NV, z_p_NV: divergences.forward_kl(
        jax.nn.log_softmax(z_p_NV), jax.nn.log_softmax(z_q_NV)
      )
    if self.hybrid:
      outputs, shared_V = vocabularies.ordered(student, teacher, constants)
      return outputs, functools.partial(self._by_pairs, shared_V)
    return (student, teacher), functools.partial(_projected, constants)

  def _by_pairs(self, shared_V, z_q_NV, z_p_NV, *rest):
    log_p_NV, rest = vocabularies.log_softmax(z_p_NV, rest, shared_V)
    log_q_NV = jax.nn.log_softmax(z_q_NV)
    loss_N = divergences.forward_kl(
      log_p_NV, jnp.where(shared_V, log_q_NV, vocabularies.NEVER)
    )
    others_NV = jnp.where(shared_V, 0, jnp.exp(log_q_NV))
    for log_p_NO in rest:
      loss_N += divergences.ranked_distance(
        jnp.exp(log_p_NO), others_NV, self.top
      )
    return loss_N


def _projected(constants, z_q_NV, z_p_NU):
  """KL(p, q W) over what W reaches."""
  reached_U = constants['reached']  # [U], as the head has rows.
  # Rows of tokens: a whole row is added to another, not element to element.
  q_VN = jax.nn.softmax(z_q_NV).T
  parts_PN = q_VN[constants['piece_s']] * constants['piece_weight'][:, None]
  q_UN = jnp.zeros(z_p_NU.T.shape).at[constants['piece_t']].add(parts_PN)
  log_q_NU = jnp.log(jnp.maximum(q_UN.T, 1e-30))
  log_p_NU = jax.nn.log_softmax(
    jnp.where(reached_U, z_p_NU, vocabularies.NEVER)
  )
  return divergences.forward_kl(
    log_p_NU, jnp.where(reached_U, log_q_NU, vocabularies.NEVER)
  )
