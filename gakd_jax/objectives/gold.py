"""GOLD: distributions over spans of text that both tokenizers end alike.

(1 - kd) CE + kd L, L a mean over spans. A span of several tokens has the
distribution of its last, times the probability of those before (chain rule),
p(. | x y) p(y | x), which does not sum to 1. With `hybrid`, tokens of one
string in both vocabularies are compared by the generalised Jensen-Shannon
divergence (beta as in `kld`), the others by rank as in `uld`, weighted by the
share of the teacher's tokens that have such a partner, and 1 less that; without
it, all by rank. Hugging Face's "General Online Logit Distillation" (TRL's
GOLDTrainer; kd 1, beta 0.5): meant for text that the student writes.

Probabilities of single tokens, in products and in the divergence, are at least
1e-8. With one tokenizer each token is a span, and all are shared: it is jsd.

`reference=True` is TRL's mean, over the spans of a response, then over
responses. `merge='observed'` is its default way to join a span: the first
token's distribution *after* it was read, times what each later token has after
it was read itself. That is off by one, and here for comparison.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from gakd_jax.data import segments
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import base, divergences, head, pairs, vocabularies
from gakd_jax.settings import Count, Positive, Share

_FLOOR = math.log(1e-8)


@dataclasses.dataclass(frozen=True)
class GOLD(base.Objective):
  kd: Share = 1.0  # weight of all but cross-entropy, 0 to 1
  beta: Share = 0.5  # of the divergence; 0 is forward KL, 1 reverse KL
  temperature: Positive = 1.0
  hybrid: bool = True  # shared tokens by identity, not by rank
  top: Count = 1024  # probabilities compared one by one, by rank
  merge: Literal['bayesian', 'observed'] = 'bayesian'
  reference: bool = False  # averages as TRL does

  one_tokenizer = False
  teacher_over_students = True
  align = ('span',)

  def constants(self, models):
    return vocabularies.shared(models) if self.hybrid else {}

  def count(self, batch):
    _, _, (_, paired_BT) = self._spans(batch)
    documents = segments.is_last(batch.student.response_segments_BT)
    return super().count(batch) | {
      'spans': jnp.maximum(jnp.sum(paired_BT), 1),
      'sequences': jnp.maximum(jnp.sum(documents), 1),
    }

  def _spans(self, batch):
    """Spans of both sides, and where they meet."""
    s_BT, t_BR = pairs.spans(batch)
    if self.merge == 'bayesian':
      return s_BT, t_BR, pairs.ends(s_BT, t_BR)
    s_BT, t_BR = (jnp.roll(x, 1, axis=1) for x in (s_BT, t_BR))
    index_BT, paired_BT = pairs.begins(s_BT, t_BR)
    return s_BT, t_BR, (index_BT, paired_BT & batch.student.predicts_BT)

  def _others(self, outputs, tokens, spans_BT):
    """Log-probability of a span but for the one token that meets; [B, T]."""
    ids_BT, meets_BT = tokens.ids_BT, segments.positions(spans_BT) == 0
    if self.merge == 'bayesian':
      ids_BT, meets_BT = head.next_token(tokens)[0], segments.is_last(spans_BT)
    other_BT = (spans_BT > 0) & ~meets_BT
    log_p_BT = head.log_probs(
      outputs,
      ids_BT,
      other_BT,
      chunk=self.head_chunk,
      temperature=self.temperature,
    )
    log_p_BT = jnp.where(other_BT, jnp.maximum(log_p_BT, _FLOOR), 0)
    return segments.total(log_p_BT, spans_BT)

  def loss(self, student, teacher, batch, own, key):
    del key
    s_BT, t_BR, (index_BT, paired_BT) = self._spans(batch)
    s_others_BT = self._others(student, batch.student, s_BT)
    t_others_BR = self._others(teacher, batch.teacher, t_BR)
    # A number of each token that has a gradient: a model of width one.
    others = Outputs(s_others_BT[:, :, None], Head(jnp.ones((1, 1))))
    tokens = batch.totals['tokens']
    weight_BT = paired_BT * (tokens / batch.totals['spans'])
    if self.reference:
      response_BT = batch.student.response_segments_BT
      n_BT = segments.total(paired_BT.astype(jnp.float32), response_BT)
      scale = tokens / batch.totals['sequences']
      weight_BT = paired_BT * scale / jnp.maximum(n_BT, 1)
    target, mask_BT = base.targets(batch)
    outputs, distance = self._distance(
      student, head.at(teacher, index_BT), own.constants
    )

    def token_loss(logits, targets):
      target, weight_N, t_others_N = targets
      s_others_N1, *logits = logits
      gold_N = weight_N * distance(
        s_others_N1,
        t_others_N[:, None],
        *(z / self.temperature for z in logits),
      )
      ce_N, metrics = base.imitation(jax.nn.log_softmax(logits[0]), target)
      loss_N = (1 - self.kd) * ce_N + self.kd * gold_N
      return loss_N, metrics | {'gold': gold_N}

    t_others_BT = jnp.take_along_axis(t_others_BR, index_BT, axis=1)
    return head.weighted_sum(
      token_loss,
      (others, *outputs),
      (target, weight_BT, t_others_BT),
      mask_BT / tokens,
      chunk=self.head_chunk,
    )

  def _distance(self, student, teacher, constants):
    """Outputs of both, and L of a span, of `_others` and logits of both."""
    if not self.hybrid:
      return (student, teacher), self._by_rank
    outputs, shared_V = vocabularies.ordered(student, teacher, constants)
    return outputs, functools.partial(self._hybrid, shared_V)

  def _by_rank(self, q_others_N1, p_others_N1, z_q_NV, z_p_NU):
    return divergences.ranked_distance(
      jnp.exp(jax.nn.log_softmax(z_p_NU) + p_others_N1),
      jnp.exp(jax.nn.log_softmax(z_q_NV) + q_others_N1),
      self.top,
    )

  def _hybrid(self, shared_V, q_others_N1, p_others_N1, z_q_NV, z_p_NV, *rest):
    log_p_NV, rest = vocabularies.log_softmax(z_p_NV, rest, shared_V)
    log_p_NV += p_others_N1
    log_q_NV = jax.nn.log_softmax(z_q_NV) + q_others_N1
    loss_N = divergences.jsd(
      *(
        jnp.where(shared_V, jnp.maximum(x, _FLOOR), vocabularies.NEVER)
        for x in (log_p_NV, log_q_NV)
      ),
      self.beta,
    )
    n = jnp.sum(shared_V)
    for log_p_NO in rest:
      share = n / (n + log_p_NO.shape[1])
      by_rank_N = divergences.ranked_distance(
        jnp.exp(log_p_NO + p_others_N1),
        jnp.where(shared_V, 0, jnp.exp(log_q_NV)),
        self.top,
      )
      is_other = n < shared_V.size
      loss_N = share * loss_N + is_other * (1 - share) * by_rank_N
    return loss_N
