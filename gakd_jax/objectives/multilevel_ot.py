"""MultiLevelOT: the likeliest tokens of a response, by rank, at three levels.

CE + weight (L1 + 0.1 KL + 0.1 OT), of arXiv 2412.14528. Logits are divided by
their standard deviation over the vocabulary (+ 1e-4); of the probabilities of
each model, those of its `top` ids are kept that are likeliest in the whole
response, in that order: p and q, the k-th with the k-th.

  L1  sum_k |p_k - q_k|, the n-th token of one response with that of the other
  KL  sum_k p_k log(p_k / q_k), with all that is left as one more outcome
  OT  transport between the tokens of the two responses, at the cost
      |p_m - q_n|_1, with entropy 0.1 and 20 iterations of Sinkhorn, less half
      of that of each response to itself: 0 where they agree

L1 and KL are means over the student's response tokens, OT over responses.

`reference=True` is the code that was released (weight 1.5): ids are ranked by
the sum over the whole (micro)batch; KL is the cross-entropy of softmax(q)
against softmax(p), probabilities taken for logits and the sides exchanged, over
as many positions of each response as the longest has; OT is between
softmax(p / 2) and softmax(q / 2) of as many, 10 iterations, with the gradient
through them, divided by 1000; L1 is a mean within, then over responses. KL is
then log 50, whatever the models are, and OT nothing; identical models cost 0.6.

A row holds one response: no packing.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gakd_jax import UserError
from gakd_jax.objectives import base, divergences, head, ot, vocabularies
from gakd_jax.settings import Count, NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class MultiLevelOT(base.Objective):
  weight: NotNegative = 0.15  # of all but cross-entropy
  ot: NotNegative = 0.1  # weight of transport among these
  top: Count = 50  # ids that are compared
  temperature: Positive = 1.0
  reference: bool = False  # as it was released

  one_tokenizer = False
  more_head_passes = 5, 1  # ranks; what is ranked, there and back

  def check(self, config):
    if config.data.packing:
      raise UserError(
        'config.data.packing: multilevel_ot ranks tokens within a row, one '
        'response each; set it to False'
      )

  def count(self, batch):
    s_B, t_B = (
      jnp.sum(x.predicts_BT, axis=1) for x in (batch.student, batch.teacher)
    )
    return super().count(batch) | {
      'sequences': jnp.maximum(jnp.sum((s_B > 0) & (t_B > 0)), 1),
      'longest': jnp.maximum(jnp.max(jnp.maximum(s_B, t_B)), 1),
    }

  def loss(self, student, teacher, batch, own, key):
    del own, key
    ce, metrics = self.mean_over_ids(_imitation, (student,), batch)
    length = max(batch.student.ids_BT.shape[1], batch.teacher.ids_BT.shape[1])
    # In one common width, zeros on ids that only one has.
    (q_BLK, is_q_BL), (p_BLK, is_p_BL) = (
      self._likeliest(outputs, tokens, length)
      for outputs, tokens in (
        (student, batch.student),
        (teacher, batch.teacher),
      )
    )
    terms = self._released if self.reference else self._terms
    levels = terms(p_BLK, q_BLK, is_p_BL, is_q_BL, batch.totals)
    l1, kl, transport = levels
    loss = ce + self.weight * (l1 + 0.1 * kl + self.ot * transport)
    return loss, metrics | {'l1': l1, 'kl': kl, 'transport': transport}

  def _likeliest(self, outputs, tokens, length):
    """Probabilities [B, L, K] of a response from its start on, and its mask."""
    mask_BT = tokens.predicts_BT
    settings = {'chunk': self.head_chunk}

    def probabilities(z_NV):
      return jax.nn.softmax(_normed(z_NV) / self.temperature)

    sums_BV = head.row_sums(probabilities, outputs, mask_BT, **settings)
    if self.reference:
      sums_BV = jnp.broadcast_to(sums_BV.sum(0, keepdims=True), sums_BV.shape)
    K = min(self.top, sums_BV.shape[1])
    ids_BK = jax.lax.top_k(sums_BV, K)[1]

    def at_ids(z_NV, ids_NK, _):
      return jnp.take_along_axis(probabilities(z_NV), ids_NK, axis=1)

    x_BTK = head.token_map(
      at_ids,
      outputs,
      jnp.broadcast_to(ids_BK[:, None], (*mask_BT.shape, K)),
      (),
      mask_BT,
      **settings,
    )
    x_BTK = jnp.pad(x_BTK, ((0, 0), (0, 0), (0, self.top - K)))
    first_BL = jnp.argsort(~mask_BT, axis=1, stable=True)
    x_BLK = jnp.take_along_axis(x_BTK, first_BL[:, :, None], axis=1)
    more = ((0, 0), (0, length - mask_BT.shape[1]))
    is_BL = jnp.arange(length)[None] < jnp.sum(mask_BT, axis=1, keepdims=True)
    return jnp.pad(x_BLK, (*more, (0, 0))), is_BL

  def _terms(self, p_BLK, q_BLK, is_p_BL, is_q_BL, totals):
    both_BL = is_p_BL & is_q_BL

    def mean(x_BL):
      return jnp.sum(x_BL, where=both_BL) / totals['tokens']

    def log(x):
      return jnp.log(jnp.maximum(x, 1e-30))

    rest_p_BL, rest_q_BL = (
      jnp.maximum(1 - jnp.sum(x, axis=2), 0) for x in (p_BLK, q_BLK)
    )
    kl_BL = jnp.sum(p_BLK * (log(p_BLK) - log(q_BLK)), axis=2)
    kl_BL += rest_p_BL * (log(rest_p_BL) - log(rest_q_BL))
    a_BL, b_BL = ot.uniform(is_p_BL), ot.uniform(is_q_BL)

    def transport(x_BLK, y_BLK, a_BL, b_BL):
      return ot.entropic(
        ot.l1(x_BLK, y_BLK), a_BL, b_BL, epsilon=0.1, iterations=20
      )[0]

    ot_B = transport(p_BLK, q_BLK, a_BL, b_BL) - 0.5 * (
      transport(p_BLK, p_BLK, a_BL, a_BL) + transport(q_BLK, q_BLK, b_BL, b_BL)
    )
    return (
      mean(jnp.sum(divergences.absolute(p_BLK - q_BLK), axis=2)),
      mean(kl_BL),
      jnp.sum(ot_B, where=both_BL.any(axis=1)) / totals['sequences'],
    )

  def _released(self, p_BLK, q_BLK, is_p_BL, is_q_BL, totals):
    both_BL = is_p_BL & is_q_BL
    l1_BL = jnp.sum(jnp.abs(p_BLK - q_BLK), axis=2) * both_BL
    l1_B = jnp.sum(l1_BL, axis=1) / jnp.maximum(jnp.sum(both_BL, axis=1), 1)
    used_BL = jnp.broadcast_to(
      jnp.arange(both_BL.shape[1])[None] < totals['longest'], both_BL.shape
    )
    used_BL &= both_BL.any(axis=1, keepdims=True)
    log_BL = -jnp.sum(jax.nn.softmax(q_BLK) * jax.nn.log_softmax(p_BLK), axis=2)
    n = totals['sequences']
    cost_BLL = ot.l1(jax.nn.softmax(p_BLK / 2), jax.nn.softmax(q_BLK / 2))
    mass_BL = ot.uniform(used_BL)
    ot_B, _ = ot.unrolled(
      cost_BLL, mass_BL, mass_BL, epsilon=0.1, iterations=10
    )
    return (
      jnp.sum(l1_B) / n,
      jnp.sum(log_BL, where=used_BL) / (n * totals['longest']),
      0.001 * totals['longest'] * jnp.sum(ot_B),
    )


def _imitation(log_probs, target):
  return base.imitation(*log_probs, target)


def _normed(z_NV):
  """Logits over their standard deviation, of those that can be."""
  is_NV = z_NV > vocabularies.NEVER / 2
  n_N1 = jnp.sum(is_NV, axis=1, keepdims=True)
  mean_N1 = jnp.sum(z_NV, axis=1, keepdims=True, where=is_NV) / n_N1
  square_N1 = jnp.sum(
    jnp.where(is_NV, z_NV - mean_N1, 0) ** 2, axis=1, keepdims=True
  )
  # Where all are equal, as where nothing counts, the root has no gradient.
  deviation_N1 = jnp.sqrt(jnp.maximum(square_N1 / (n_N1 - 1), 1e-12))
  return jnp.where(is_NV, z_NV / (deviation_N1 + 1e-4), z_NV)
