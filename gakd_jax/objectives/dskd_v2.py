"""DSKDv2: as DSKD, where both models agree on the text; projectors from heads.

(1 - kd) CE + kd (t2s CE + t2s KD + s2t KD), of arXiv 2504.11426, at exact pairs
(both models have read the same text and go on with the same token; without
attention): the teacher's hidden states go through the student's head (t2s),
trained to give what the *teacher* finds likeliest; the student follows with D
where it does. The student's hidden states go through the teacher's head (s2t),
with D(teacher, s2t).

With W_s and W_t the rows of the heads of tokens that both have, t2s starts from
the least squares of W_s P = W_t, which comes nearest to the teacher's logits,
and learns; s2t is the least squares of W_t P = W_s, at every step anew. With
`pinv=False` both are affine maps without offset that learn from random ones.

What a teacher finds likeliest has no target where the student lacks the token;
tokens are matched by what they spell (the authors' by name, whereby words of
SentencePiece have none). t2s CE and s2t KD are means over pairs, t2s KD its sum
over agreeing pairs divided by all. `reference=True` leaves out of s2t what has
no target, and divides, as the authors do, by the pairs with one, but t2s KD by
those that agree, of a microbatch. `agreement=False` has t2s KD wherever there
is a target.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax.objectives import (
  base,
  divergences,
  head,
  kld,
  pairs,
  projectors,
  vocabularies,
)
from gakd_jax.settings import Positive, Share


@dataclasses.dataclass(frozen=True)
class DSKDv2(base.Objective):
  divergence: kld.Divergence = 'forward_kl'  # D, of `kld.DIVERGENCES`
  kd: Share = 0.5  # weight of all but the student's cross-entropy, 0 to 1
  temperature: Positive = 2.0
  pinv: bool = True  # projectors from heads
  agreement: bool = True  # D only where t2s finds what the teacher does
  reference: bool = False  # divides as the authors do

  one_tokenizer = False
  align = ('pairs',)
  more_head_passes = 2, 2  # t2s and s2t, and back to their inputs

  def constants(self, models):
    return vocabularies.shared(models)

  def init(self, key, student, teacher, mesh=None):
    D, E = student.width, teacher.width
    sizes = {'t2s': (E, D)}
    if not self.pinv:
      sizes['s2t'] = D, E
    own = projectors.init(key, sizes, mesh, bias=False)
    if not self.pinv:
      return own
    # The inverse of W_t'W_t, which `begin` finds.
    return own.replace(memory={'inverse_EE': jnp.eye(E)})

  def begin(self, own, models, params):
    if not self.pinv:
      return own
    w_s, w_t = _shared_rows(
      models.student(params).head,
      models.teacher().head,
      models.frozen.get('constants', {}),
    )
    t2s_DE = _inverse(_gram(w_s, w_s)) @ np.float64(_gram(w_s, w_t))
    extra = {'t2s': {'kernel': jnp.asarray(t2s_DE.T, jnp.float32)}}
    inverse_EE = jnp.asarray(_inverse(_gram(w_t, w_t)), jnp.float32)
    return own.replace(extra=extra, memory={'inverse_EE': inverse_EE})

  def count(self, batch):
    n = jnp.sum(pairs.exact(batch)[1])
    return super().count(batch) | {'pairs': jnp.maximum(n, 1)}

  def flops(self, student, teacher, own, rows, length, microbatches):
    more = super().flops(student, teacher, own, rows, length, microbatches)
    if not self.pinv:
      return more
    product = 2 * student.vocab_size * student.width * teacher.width
    return more | {'product of heads': microbatches * product}

  def loss(self, student, teacher, batch, own, key):
    del key
    index_BT, paired_BT = pairs.exact(batch)
    target, mask_BT = base.targets(batch)
    teacher = head.at(teacher, index_BT)
    outputs = (
      student,
      self._through_students_head(student, teacher, own),
      teacher,
      self._through_teachers_head(student, teacher, own),
    )
    s_id_U = own.constants.get('student_id_U')

    def sums(token_loss):
      return head.weighted_sum(
        token_loss,
        outputs,
        (target, paired_BT),
        mask_BT.astype(jnp.float32),
        chunk=self.head_chunk,
      )

    def found(logits, paired_N):
      """What the teacher finds likeliest, whether that is one, and a hit."""
      id_N = jnp.argmax(logits[2], axis=-1)
      if s_id_U is not None:
        # As a gather, it would mix what a device has with what all have.
        is_it_NU = jnp.arange(s_id_U.size)[None] == id_N[:, None]
        id_N = jnp.max(jnp.where(is_it_NU, s_id_U[None], -1), axis=1)
      has_N = paired_N & (id_N >= 0)
      return id_N, has_N, has_N & (jnp.argmax(logits[1], axis=-1) == id_N)

    def numbers(logits, targets):
      _, has_N, hit_N = (
        x.astype(jnp.float32) for x in found(logits, targets[1])
      )
      return jnp.zeros_like(has_N), {'targets': has_N, 'hits': hit_N}

    n, n_pairs = batch.totals['tokens'], batch.totals['pairs']
    n_targets = n_hits = n_pairs
    if self.reference:
      # Counted of these rows; of several microbatches, each has its share.
      share = jnp.sum(mask_BT) / n
      counts = jax.lax.stop_gradient(sums(numbers)[1])
      counts = {k: x / jnp.maximum(share, 1e-9) for k, x in counts.items()}
      n_targets = jnp.maximum(counts['targets'], 1)
      n_hits = (
        jnp.maximum(counts['hits'], 1e-3) if self.agreement else n_targets
      )

    def token_loss(logits, targets):
      target, paired_N = targets
      id_N, has_N, hit_N = found(logits, paired_N)
      log_q_NV, log_t2s_NV, log_p_NU, log_s2t_NU = (
        jax.nn.log_softmax(z / self.temperature) for z in logits
      )
      divergence = kld.divergence_of(self.divergence)
      t2s_ce_N = has_N * divergences.cross_entropy(
        jax.nn.log_softmax(logits[1]), id_N
      )
      t2s_N = (hit_N if self.agreement else has_N) * divergence(
        jax.lax.stop_gradient(log_t2s_NV), log_q_NV
      )
      s2t_N = (has_N if self.reference else paired_N) * divergence(
        log_p_NU, log_s2t_NU
      )
      ce_N, metrics = base.imitation(jax.nn.log_softmax(logits[0]), target)
      terms = {
        't2s_ce': t2s_ce_N / n_targets,
        't2s': t2s_N / n_hits,
        's2t': s2t_N / n_targets,
      }
      metrics = {name: x / n for name, x in metrics.items()}
      loss_N = (1 - self.kd) * ce_N / n + self.kd * sum(terms.values())
      agree_N = hit_N / n_pairs
      return loss_N, metrics | terms | {'t2s_accuracy': agree_N}

    return sums(token_loss)

  def _through_students_head(self, student, teacher, own):
    """t2s [B, T, D]; the head learns nothing from it."""
    hidden_BTD = projectors.apply(own.extra['t2s'], teacher.hidden_BTD)
    frozen = jax.tree.map(jax.lax.stop_gradient, student.head)
    return student.replace(hidden_BTD=hidden_BTD, head=frozen)

  def _through_teachers_head(self, student, teacher, own):
    """s2t [B, T, E]."""
    if not self.pinv:
      hidden_BTE = projectors.apply(own.extra['s2t'], student.hidden_BTD)
      return teacher.replace(hidden_BTD=hidden_BTE)
    w_s, w_t = jax.lax.stop_gradient(
      _shared_rows(student.head, teacher.head, own.constants)
    )
    kernel_DE = _gram(w_s, w_t) @ own.memory['inverse_EE']
    hidden_BTE = student.hidden_BTD @ kernel_DE.astype(student.hidden_BTD.dtype)
    return teacher.replace(hidden_BTD=hidden_BTE)


def _shared_rows(student, teacher, constants):
  """W_s and W_t: rows of two heads that are of the same token.

  Zeros where the student's token is none of the teacher's.
  """
  w_s, w_t = student.weight_VD, teacher.weight_VD
  t_id_V = constants.get('teacher_id_V')
  if t_id_V is None:
    V = min(
      valid or len(w)
      for valid, w in ((student.valid, w_s), (teacher.valid, w_t))
    )
    return w_s[:V], w_t[:V]
  is_shared_V1 = (t_id_V >= 0)[:, None]
  return is_shared_V1 * w_s, is_shared_V1 * w_t[jnp.maximum(t_id_V, 0)]


@jax.jit
def _gram(w_VD, w_VE):
  """W'W in fp32, [D, E]."""
  return jnp.einsum(
    'vd,ve->de',
    w_VD,
    w_VE,
    precision='highest',
    preferred_element_type=jnp.float32,
  )


def _inverse(gram_DD):
  return np.linalg.pinv(np.float64(gram_DD), hermitian=True)
