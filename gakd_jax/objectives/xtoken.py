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

import jax
import jax.numpy as jnp

from gakd_jax.objectives import base, divergences, head, pairs, vocabularies


@dataclasses.dataclass(frozen=True)
class XToken(base.Objective):
  kd: float = 0.5  # weight of all but cross-entropy, 0 to 1
  temperature: float = 1.0
  hybrid: bool = False  # H-KL
  decay: float = 0.1  # of the weights of pieces
  top: int = 1024  # probabilities compared one by one, by rank

  one_tokenizer = False
  align = ('span',)

  def __post_init__(self):
    super().__post_init__()
    self.check_within(0, 1, 'kd', 'decay')
    self.check_positive('temperature', 'top')

  def constants(self, models):
    return vocabularies.projection(models, self.decay)

  def count(self, batch):
    _, paired_BT = pairs.ends(*pairs.spans(batch))
    return super().count(batch) | {'spans': jnp.maximum(jnp.sum(paired_BT), 1)}

  def loss(self, student, teacher, batch, own, key):
    del key
    s_BT, t_BU = pairs.spans(batch)
    index_BT, paired_BT = pairs.ends(s_BT, t_BU)
    target, mask_BT = base.targets(batch)
    tokens = batch.totals['tokens']
    span = student
    if 'span_s' in batch.align:
      span = pairs.span_means(student, s_BT)
      teacher = pairs.span_means(teacher, t_BU)
    (span, teacher), distance = self._distance(span, teacher, own.constants)

    def token_loss(logits, targets):
      target, weight_N = targets
      z_N, z_q_NV, z_p_NU = logits
      distance_N = weight_N * distance(
        z_p_NU / self.temperature, z_q_NV / self.temperature
      )
      distance_N *= self.temperature**2
      ce_N, metrics = base.imitation(jax.nn.log_softmax(z_N), target)
      loss_N = (1 - self.kd) * ce_N + self.kd * distance_N
      return loss_N, metrics | {'xtoken': distance_N}

    return head.weighted_sum(
      token_loss,
      (student, span, head.at(teacher, index_BT)),
      (target, paired_BT * (tokens / batch.totals['spans'])),
      mask_BT / tokens,
      chunk=self.head_chunk,
    )

  def _distance(self, student, teacher, constants):
    """Outputs of both, and L of a span of their logits."""
    if 'teacher_id_V' not in constants:
      return head.shared(
        (student, teacher)
      ), lambda z_p, z_q: divergences.forward_kl(
        jax.nn.log_softmax(z_p), jax.nn.log_softmax(z_q)
      )
    if self.hybrid:
      outputs, shared_V = vocabularies.ordered(student, teacher, constants)
      return outputs, lambda z_p, z_q: self._by_pairs(z_p, z_q, shared_V)
    return (student, teacher), lambda z_p, z_q: _projected(z_p, z_q, constants)

  def _by_pairs(self, z_p_NU, z_q_NV, shared_V):
    V = shared_V.size
    z_p_NV = jnp.where(shared_V, z_p_NU[:, :V], vocabularies.NEVER)
    log_p_NU = jax.nn.log_softmax(
      jnp.concatenate([z_p_NV, z_p_NU[:, V:]], axis=1)
    )
    log_q_NV = jax.nn.log_softmax(z_q_NV)
    of_pairs_N = divergences.forward_kl(
      log_p_NU[:, :V], jnp.where(shared_V, log_q_NV, vocabularies.NEVER)
    )
    others_NV = jnp.where(shared_V, 0, jnp.exp(log_q_NV))
    others_NR = jnp.exp(log_p_NU[:, V:])
    return of_pairs_N + divergences.ranked_distance(
      others_NR, others_NV, self.top
    )


def _projected(z_p_NU, z_q_NV, constants):
  """KL(p, q W) over what W reaches."""
  reached_U = constants['reached']
  U = reached_U.size
  # Rows of tokens: a whole row is added to another, not element to element.
  q_VN = jax.nn.softmax(z_q_NV).T
  parts_PN = q_VN[constants['piece_s']] * constants['piece_weight'][:, None]
  q_UN = jnp.zeros((U, z_q_NV.shape[0])).at[constants['piece_t']].add(parts_PN)
  log_q_NU = jnp.log(jnp.maximum(q_UN.T, 1e-30))
  log_p_NU = jax.nn.log_softmax(
    jnp.where(reached_U, z_p_NU[:, :U], vocabularies.NEVER)
  )
  return divergences.forward_kl(
    log_p_NU, jnp.where(reached_U, log_q_NU, vocabularies.NEVER)
  )
