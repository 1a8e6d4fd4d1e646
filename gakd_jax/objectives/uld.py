"""ULD: probabilities are compared by their rank, whatever token has them.

ce CE + weight sum_r |q_(r) - p_(r)|, (r) the rank by probability, the smaller
vocabulary filled up with zeros: the cost of transport between two vocabularies
of which nothing is known (arXiv 2402.12030, eq. 6: ce 1, weight 1.5). The n-th
token of one response is compared with the n-th of the other, wherever these
are in the text. Both terms are means over the student's response tokens, a
token beyond the teacher's last counting 0: what DSKD's authors run (ce 0.5,
weight 0.5), and those of MCW-KD (ce 1, weight the rate).

`reference=True` is the first authors' code: the mean of the pairs of each
response, then over responses, short ones counting as much as long ones.
The cost of a sort of both vocabularies is saved, see `ranked_distance`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gakd_jax.data import segments
from gakd_jax.objectives import base, divergences, head, pairs
from gakd_jax.settings import Count, NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class ULD(base.Objective):
  ce: NotNegative = 1.0  # weight of cross-entropy
  weight: NotNegative = 1.5  # weight of the distance
  temperature: Positive = 1.0  # of both models in the distance
  top: Count = 1024  # probabilities compared one by one
  reference: bool = False  # as the first authors ran it

  one_tokenizer = False

  def count(self, batch):
    documents = segments.is_last(batch.student.response_segments_BT)
    return super().count(batch) | {
      'sequences': jnp.maximum(jnp.sum(documents), 1)
    }

  def loss(self, student, teacher, batch, own, key):
    del own, key
    index_BT, paired_BT = pairs.by_rank(batch.student, batch.teacher)
    target, mask_BT = base.targets(batch)
    weight_BT = paired_BT.astype(jnp.float32)
    if self.reference:
      response_BT = batch.student.response_segments_BT
      n_BT = segments.total(weight_BT, response_BT)
      scale = batch.totals['tokens'] / batch.totals['sequences']
      weight_BT *= scale / jnp.maximum(n_BT, 1)
    return head.weighted_sum(
      self._token_loss,
      (student, head.at(teacher, index_BT)),
      (target, weight_BT),
      mask_BT / batch.totals['tokens'],
      chunk=self.head_chunk,
    )

  def _token_loss(self, logits, targets):
    target, weight_N = targets
    q_NV, p_NU = (jax.nn.softmax(z / self.temperature) for z in logits)
    uld_N = weight_N * divergences.ranked_distance(p_NU, q_NV, self.top)
    ce_N, metrics = base.imitation(jax.nn.log_softmax(logits[0]), target)
    loss_N = self.ce * ce_N + self.weight * uld_N
    return loss_N, metrics | {'uld': uld_N}
