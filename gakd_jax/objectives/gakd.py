"""GAKD: reverse KL, and a critic of whole sequences that the student deceives.

Student: (1 - kd) CE + kd rkl_scale RKL + g L_G. A critic D reads, at every
response position, the next-token distribution of the teacher (d_t) or of the
student (d_s) on the same text, and scores the sequence (`models/critic.py`):

  kind  critic descends                         L_G
  rgan  softplus(d_s - d_t) + gamma/2 (R1+R2)   softplus(d_t - d_s)
  gan   softplus(-d_t) + softplus(d_s)          softplus(-d_s)
  wgan  d_s - d_t + gamma (|dD/dz| - 1)^2       -d_s

rgan is relativistic (arXiv 1807.00734) with the zero-centred penalties of R3GAN
(arXiv 2501.05441): R1 and R2 are |dD/dz|^2 at the teacher's and the student's
input, summed over positions and vocabulary. wgan is WGAN-GP (arXiv 1704.00028),
its penalty at a z_t + (1 - a) z_s, a uniform on [0, 1) for each document. The
norm over the vocabulary is exact at the critic's width: with G = W'W and
gradient u at W z, |dD/dz|^2 = u' G u. (z is what the critic reads: with
input='probs', these are the probabilities, in penalties and mixtures as well.)

The critic is updated first; L_G uses the updated one. Both use one forward pass
of student and teacher; with several microbatches the student runs once more.

`reference=True` is what GAKD's authors ran, where that differs: raw logits in;
prompt and padding read as well, and the score taken at the last position (rows
of one length, then: `config.data.buckets`, and no packing);
penalties without a gradient (they change the logged loss alone); the critic's
loss times 1000, its update after every microbatch; 1e-9 inside the logarithms
of RKL. Their trunk is a pretrained model: `config.critic.init_from`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import UserError, log
from gakd_jax.data import segments
from gakd_jax.models import critic as critic_lib
from gakd_jax.objectives import adversarial, base, divergences, head
from gakd_jax.settings import Count, Natural, NotNegative, Share


@dataclasses.dataclass(frozen=True)
class GAKD(base.Objective):
  kind: Literal[*adversarial.VARIANTS] = 'rgan'
  kd: Share = 0.5  # weight of reverse KL against cross-entropy, 0 to 1
  rkl_scale: NotNegative = 1.0  # multiplies reverse KL once more
  g: NotNegative = 0.1  # weight of L_G; 0: no critic, the ablation
  gamma: NotNegative = 10.0  # weight of the penalty; 0: none
  # What the critic reads: log_probs (None), logits, probs.
  input: Literal[*critic_lib.INPUTS] | None = None
  # How positions make a sequence's score: mean (None), last.
  pooling: Literal['mean', 'last'] | None = None
  warmup_epochs: NotNegative = 1.0  # in which the critic learns alone: L_G is 0
  warmup_steps: Natural | None = None  # instead of warmup_epochs
  critic_steps: Count = 1  # updates of the critic in one step
  reference: bool = False  # as the authors ran it
  critic: dict = dataclasses.field(default_factory=dict)  # config.critic

  def __post_init__(self):
    for name in ('input', 'pooling'):
      value = getattr(self, name)
      if self.reference and value is not None:
        raise UserError(
          f'config.objective: reference=True has its own {name}; leave out '
          f'{name}={value!r}'
        )
    critic_lib.check(self.critic)

  @property
  def reads(self):
    """What the critic reads."""
    return self.input or ('logits' if self.reference else 'log_probs')

  @property
  def critic_by_microbatch(self):
    return self.reference

  @property
  def reads_prompts(self):
    return self.reference

  def check(self, config):
    if self.reference and config.data.packing:
      raise UserError(
        'config.data.packing: reference=True reads rows whole, one document '
        'each; set it to False'
      )

  def for_run(self, steps_per_epoch, total_steps):
    return adversarial.with_warmup(self, steps_per_epoch, total_steps)

  def shapes(self, student, teacher):
    return jax.eval_shape(
      lambda: self._fresh(student, teacher, jax.random.key(0))
    )

  def init(self, key, student, teacher, mesh=None):
    fresh = functools.partial(self._fresh, student, teacher)
    return adversarial.start(fresh, self.critic, key, mesh)

  def _fresh(self, student, teacher, key):
    if self.g == 0:
      return base.Own()
    config = self.critic_config(student, teacher)
    return base.Own(critic=critic_lib.init(config, key, self.reads))

  def critic_config(self, student, teacher):
    V = min(student.vocab_size, teacher.vocab_size)
    return critic_lib.config_of(self.critic, V)

  def count(self, batch):
    ends_BT = segments.is_last(batch.student.response_segments_BT)
    sequences = jnp.maximum(jnp.sum(ends_BT), 1)
    return super().count(batch) | {'sequences': sequences}

  def terms(self):
    if self.g == 0:
      return {'imitation': self.imitation}
    return {'imitation': self.imitation, 'generator': self.deception}

  def imitation(self, student, teacher, batch, own, key):
    """(1 - kd) CE + kd rkl_scale RKL."""
    del own, key
    return self.mean_over_ids(self._id_loss, (student, teacher), batch)

  def deception(self, student, teacher, batch, own, key):
    """g L_G, from the end of the warm-up on."""
    del key
    x_t, x_s, score, is_last_BT = self._pair(
      own.critic, student, teacher, batch
    )
    loss_BT = adversarial.VARIANTS[self.kind].generator(score(x_t), score(x_s))
    loss = jnp.sum(loss_BT, where=is_last_BT) / batch.totals['sequences']
    weight = jnp.where(own.step >= self.warmup_steps, self.g, 0.0)
    return weight * loss, {'generator': loss}

  def critic_loss(self, student, teacher, batch, own, key):
    x_t, x_s, score, is_last_BT = self._pair(
      own.critic, student, teacher, batch
    )
    w_VC = critic_lib.weight(
      own.critic['projection'],
      self.reads,
      student.hidden_BTD.dtype,
      student.head.valid,
    )
    gram_CC = w_VC.T @ w_VC

    def read(x_BTC):
      """Scores, and |dD/dz|^2 of each sequence."""

      def total(x_BTC):
        d_BT = score(x_BTC)
        return jnp.sum(d_BT, where=is_last_BT), d_BT

      # Sequences are independent: the gradient of the sum is that of each.
      u_BTC, d_BT = jax.grad(total, has_aux=True)(x_BTC)
      u_BTC = critic_lib.at_least_fp32(u_BTC)
      norm_BT = jnp.sum((u_BTC @ gram_CC) * u_BTC, axis=-1)
      return d_BT, segments.total(norm_BT, self._segments(batch))

    # Both at once: half as many operations to compile and to start.
    (d_t_BT, d_s_BT), (norm_t_BT, norm_s_BT) = jax.vmap(read)(
      jnp.stack([x_t, x_s])
    )
    variant = adversarial.VARIANTS[self.kind]
    a_BT1 = adversarial.mixtures(key, self._segments(batch))
    penalty_BT = self.gamma * variant.penalty(
      read, x_t, x_s, norm_t_BT, norm_s_BT, a_BT1
    )

    def mean(x_BT):
      return jnp.sum(x_BT, where=is_last_BT) / batch.totals['sequences']

    loss, penalty = mean(variant.critic(d_t_BT, d_s_BT)), mean(penalty_BT)
    metrics = {
      'loss': loss + penalty,
      'penalty': penalty,
      # Of a pair, which one is the teacher? A tie is half right.
      'accuracy': mean(0.5 + 0.5 * jnp.sign(d_t_BT - d_s_BT)),
      'margin': mean(d_t_BT - d_s_BT),
      'score_teacher': mean(d_t_BT),
      'score_student': mean(d_s_BT),
      'histogram_teacher': _histogram(d_t_BT, is_last_BT),
      'histogram_student': _histogram(d_s_BT, is_last_BT),
    }
    if self.reference:
      return 1000 * (loss + jax.lax.stop_gradient(penalty)), metrics
    return loss + penalty, metrics

  def flops(self, student, teacher, own, rows, length, microbatches):
    if not own.critic:
      return {}
    return {
      'critic': adversarial.operations(
        self, (student, teacher), own.critic, rows, length, microbatches
      )
    }

  def _id_loss(self, log_probs, target):
    log_q_NV, log_p_NV = log_probs
    ce_N, metrics = base.imitation(log_q_NV, target)
    if self.reference:
      q_NV, p_NV = jnp.exp(log_q_NV), jnp.exp(log_p_NV)
      rkl_N = jnp.sum(
        q_NV * (jnp.log(q_NV + 1e-9) - jnp.log(p_NV + 1e-9)), axis=-1
      )
    else:
      rkl_N = divergences.reverse_kl(log_p_NV, log_q_NV)
    loss_N = (1 - self.kd) * ce_N + self.kd * self.rkl_scale * rkl_N
    return loss_N, metrics | {'reverse_kl': rkl_N}

  def _pair(self, critic, student, teacher, batch):
    """What the critic reads of each, and how.

    Returns:
      W z of teacher and student, [B, T, C]; `score`, which maps such an input
      to the scores of sequences; where to look at them.
    """
    segments_BT = self._segments(batch)
    dtype = student.hidden_BTD.dtype
    w_VC = critic_lib.weight(
      critic['projection'], self.reads, dtype, student.head.valid
    )
    model = nnx.merge(
      critic_lib.definition(critic_lib.config_of(self.critic, w_VC.shape[0])),
      jax.tree.map(lambda x: x.astype(dtype), critic),
    )
    pooling = self.pooling or ('last' if self.reference else 'mean')
    remat = 'blocks' if self.critic.get('init_from') else 'none'  # Its size.

    def score(x_BTC):
      return critic_lib.sequence_score(
        model(x_BTC, segments_BT, remat), segments_BT, pooling
      )

    x_t_BTC, x_s_BTC = (
      self._input(outputs, w_VC, segments_BT > 0)
      for outputs in (teacher, student)
    )
    return x_t_BTC, x_s_BTC, score, segments.is_last(segments_BT)

  def _segments(self, batch):
    """Which positions make a sequence: 1, 2, ... for each, 0 for no one's."""
    tokens = batch.student
    if not self.reference:
      return tokens.response_segments_BT
    has_response_B1 = jnp.any(tokens.mask_BT, axis=1, keepdims=True)
    return jnp.broadcast_to(has_response_B1, tokens.ids_BT.shape).astype(int)

  def _input(self, outputs, w_VC, mask_BT):
    """W z of every token; W p for 'probs'."""
    outputs = outputs.replace(head=outputs.head.first(w_VC.shape[0]))
    if self.is_linear(outputs.head.cap):
      return critic_lib.project(outputs, w_VC)
    read = jax.nn.softmax if self.reads == 'probs' else lambda z_NV: z_NV
    dtype = outputs.hidden_BTD.dtype
    return head.token_map(
      lambda z_NV, _, w_VC: (read(z_NV) @ w_VC).astype(dtype),
      outputs,
      (),
      w_VC,
      mask_BT,
      chunk=self.head_chunk,
    )

  def is_linear(self, head_cap):
    """Whether what the critic reads is linear in the hidden states."""
    return self.reads != 'probs' and not head_cap


def _histogram(d_BT, where_BT):
  """Counts of scores over `log.HISTOGRAM_EDGES`."""
  edges = jnp.asarray(log.HISTOGRAM_EDGES[1:-1], jnp.float32)
  counts = jnp.zeros(edges.size + 1)
  return counts.at[jnp.searchsorted(edges, d_BT)].add(
    where_BT.astype(counts.dtype)
  )
