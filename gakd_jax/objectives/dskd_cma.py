"""DSKD: hidden states of each model, through the head of the other.

(1 - kd) CE + kd (t2s CE + t2s KD + s2t KD), of arXiv 2406.17328: what the
teacher sees is projected into the student's space and goes through the
student's head (t2s), which is thereby trained to predict the text; the student
follows it with D where it does predict the next token. The student's hidden
states go through the teacher's head (s2t), with KL(teacher, s2t).

Positions meet by attention across the models (CMA, eq. 9 to 12): with e_x and
e_y the embeddings of a token that is read and of the next, and sd(.) the
standard deviation,

  Q = P_q [e_x ; e_y] of the student    K = [e_x ; e_y] / sd of the teacher
  V_t = P_t2s (h / sd + e_y / sd)       V_s = P_s2t h
  t2s = softmax(Q K' / sqrt(2E)) V_t    s2t = softmax(K Q' / sqrt(2E)) V_s

among response tokens of one document. Neither head nor embedding learns from
it. Logits are divided by the temperature in D, those of t2s by the teacher's as
well; all terms are divided by the student's tokens.

sd is one number for a document's response tokens. `reference=True` takes it
over the whole (micro)batch, prompt and padding included, as the authors do:
results then change with buckets and batch size. `attention=False` is DSKD for
one tokenizer: position by position, D everywhere.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gakd_jax import sharding
from gakd_jax.data import segments
from gakd_jax.objectives import (
  base,
  divergences,
  head,
  kld,
  projectors,
  vocabularies,
)
from gakd_jax.settings import Positive, Share


@dataclasses.dataclass(frozen=True)
class DSKD(base.Objective):
  divergence: kld.Divergence = 'forward_kl'  # D, of `kld.DIVERGENCES`
  kd: Share = 0.5  # weight of all but the student's cross-entropy, 0 to 1
  temperature: Positive = 2.0
  teacher_temperature: Positive = 1.0  # of t2s, beside the other
  attention: bool = True  # False: one tokenizer, position by position
  reference: bool = False  # as the authors ran it

  more_head_passes = 2, 2  # t2s and s2t, and back to their inputs

  @property
  def one_tokenizer(self):
    return not self.attention

  @property
  def reads_prompts(self):
    return self.reference  # The deviation of all that there is.

  def init(self, key, student, teacher, mesh=None):
    D, E = student.width, teacher.width
    sizes = {'t2s': (E, D), 's2t': (D, E)}
    if self.attention:
      sizes['query'] = 2 * D, 2 * E
    return projectors.init(key, sizes, mesh)

  def loss(self, student, teacher, batch, own, key):
    del key
    t2s, s2t, meets_BT, meets_BR = self.exchanged(
      student, teacher, batch, own.extra
    )
    target, mask_BT = base.targets(batch)
    n = batch.totals['tokens']
    to_student, metrics = head.weighted_sum(
      self._in_students_space,
      (student, t2s),
      (target, meets_BT),
      mask_BT / n,
      chunk=self.head_chunk,
    )
    to_teacher, more = head.weighted_sum(
      self._in_teachers_space,
      (teacher, s2t),
      (),
      (batch.teacher.predicts_BT & meets_BR) / n,
      chunk=self.head_chunk,
    )
    return to_student + self.kd * to_teacher, metrics | more

  def _in_students_space(self, logits, targets):
    target, meets_N = targets
    z_q_NV, z_p_NV = logits
    log_p_NV = jax.nn.log_softmax(z_p_NV)
    t2s_ce_N = meets_N * divergences.cross_entropy(log_p_NV, target.id_N)
    is_hit_N = meets_N * (jnp.argmax(z_p_NV, axis=-1) == target.id_N)
    scale = self.temperature
    if self.attention:
      scale *= self.teacher_temperature
    t2s_N = kld.divergence_of(self.divergence)(
      jax.nn.log_softmax(jax.lax.stop_gradient(z_p_NV) / scale),
      jax.nn.log_softmax(z_q_NV / self.temperature),
    )
    t2s_N *= is_hit_N if self.attention else meets_N
    ce_N, metrics = base.imitation(jax.nn.log_softmax(z_q_NV), target)
    loss_N = (1 - self.kd) * ce_N + self.kd * (t2s_ce_N + t2s_N)
    return loss_N, metrics | {
      't2s_ce': t2s_ce_N,
      't2s': t2s_N,
      't2s_accuracy': is_hit_N.astype(jnp.float32),
    }

  def _in_teachers_space(self, logits, _):
    s2t_N = divergences.forward_kl(
      *(jax.nn.log_softmax(z_NU / self.temperature) for z_NU in logits)
    )
    return s2t_N, {'s2t': s2t_N}

  def exchanged(self, student, teacher, batch, extra):
    """`Outputs` t2s [B, T, D] and s2t [B, R, E], and where there is one."""
    h_s, h_t = student.hidden_BTD, teacher.hidden_BTD
    if self.attention:
      s_BT, t_BR = (
        x.response_segments_BT for x in (batch.student, batch.teacher)
      )
      meet_BTR = (s_BT[:, :, None] == t_BR[:, None]) & (s_BT > 0)[:, :, None]
      query, key, value = self._queries(student, teacher, batch, extra)
      score_BTR = jnp.einsum(
        'btk,brk->btr', query, key, preferred_element_type=jnp.float32
      )
      score_BTR *= query.shape[-1] ** -0.5
      score_BTR = jnp.where(meet_BTR, score_BTR, vocabularies.NEVER)
      to_s_BTR = jax.nn.softmax(score_BTR, axis=2).astype(value.dtype)
      to_t_BTR = jax.nn.softmax(score_BTR, axis=1).astype(h_s.dtype)
      h_t = jnp.einsum('btr,brd->btd', to_s_BTR, value)
      h_s = jnp.einsum(
        'btr,bte->bre', to_t_BTR, projectors.apply(extra['s2t'], h_s)
      )
      meets = meet_BTR.any(axis=2), meet_BTR.any(axis=1)
    else:
      h_t = projectors.apply(extra['t2s'], h_t)
      h_s = projectors.apply(extra['s2t'], h_s)
      meets = [x.predicts_BT for x in (batch.student, batch.teacher)]
    t2s = student.replace(
      hidden_BTD=h_t, head=jax.tree.map(jax.lax.stop_gradient, student.head)
    )
    return t2s, teacher.replace(hidden_BTD=h_s), *meets

  def _queries(self, student, teacher, batch, extra):
    """Q [B, T, 2E]; K [B, R, 2E] and V_t [B, R, D], of what counts."""
    dtype = student.hidden_BTD.dtype
    read = jnp.concatenate(_embedded(student, batch.student, dtype), axis=-1)
    t_x, t_y = _embedded(teacher, batch.teacher, dtype)

    def normed(x_BRE):
      return x_BRE / self._deviation(x_BRE, batch.teacher).astype(dtype)

    value = projectors.apply(
      extra['t2s'], normed(teacher.hidden_BTD) + normed(t_y)
    )
    key = normed(jnp.concatenate([t_x, t_y], axis=-1))
    return projectors.apply(extra['query'], read), key, value

  def _deviation(self, x_BRE, tokens):
    """That of each position's document, [B, R, 1]; or [1, 1, 1]."""
    x_BRE = x_BRE.astype(jnp.float32)
    if self.reference:
      # Inputs of the authors' models are without a text's last token.
      return jnp.std(x_BRE[:, :-1], ddof=1, keepdims=True)
    segments_BR = tokens.response_segments_BT
    counts_BR = (segments_BR > 0).astype(jnp.float32) * x_BRE.shape[-1]

    def total(x_BR):
      return segments.total(x_BR, segments_BR)

    n_BR = jnp.maximum(total(counts_BR), 2)
    mean_BR = total(jnp.sum(x_BRE, axis=-1)) / n_BR
    square_BR = total(jnp.sum((x_BRE - mean_BR[:, :, None]) ** 2, axis=-1))
    deviation_BR = jnp.sqrt(square_BR / (n_BR - 1))
    return jnp.where(segments_BR > 0, deviation_BR, 1)[:, :, None]


def _embedded(outputs, tokens, dtype):
  """Of what is read and what is next, [B, T, D]; id 0 where none counts."""
  ids_BT, counts_BT = head.next_token(tokens)
  table_VD = jax.lax.stop_gradient(outputs.embedding_VD)
  return [
    sharding.look_up(table_VD, jnp.where(counts_BT, x, 0), dtype)
    for x in (tokens.ids_BT, ids_BT)
  ]
