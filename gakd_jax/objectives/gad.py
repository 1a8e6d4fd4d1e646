"""GAD: a critic of text, whose score is the student's reward.

Generative adversarial distillation (arXiv 2511.10643). For each prompt there
is a real answer, that of the data, and there are n of the student
(`config.rollout`: writer='student', samples=n, beside=True). Real is what the
data says: a teacher's answers (`python -m gakd_jax.generate --dataset`, or
those of an API: no logits are asked), or gold ones.

  critic   -log sigmoid(D(x, real) - D(x, y)), Bradley-Terry over all pairs
  student  w L + g L_G, w being 1 in the warm-up and `likelihood` after it, L
           (1 - kd) CE + kd D(p, q), and L_G the mean over the tokens that it
           wrote of -min(r A, clip(r, 1 - eps, 1 + eps) A),
           r = q(token) / q_old(token), q_old being the student that wrote it,
           A = (D(x, y) - mean) / (std + 1e-4) over the n answers to a prompt:
           the policy gradient of GRPO (arXiv 2402.03300), but a token's weight
           is the same in all answers, and there is no KL to a reference model.
           For text of the step's own student r is 1, and the gradient that of
           -A log q(token); with `config.rollout.every`=k a student's text
           serves k steps

L is over the real answers, as `kld` has it; `on='written'` takes the divergence
over the student's. D reads prompt and answer, and its score stands at the last
token. The critic is updated first; up to `warmup_steps` the student descends L
alone.

`oracle=True` puts D* = log p(y|x) - log q(y|x) in the critic's place: what a
critic that tells the teacher's text from the student's comes to when it has
learned all. It takes a teacher's logits, of whatever tokens the teacher reads
the text in; an answer that it cannot read whole (bytes that are no text, a
special token, more tokens than there is room for) has the least reward of those
to the same prompt. With `credit='token'` A is that of each token, whose reward
is its own log p - log q, over all tokens of the n answers: D* is their sum, for
which with credit='answer' every token of the answer stands. A sum is nearest to
0 where there is little to add up; `credit='mean'` divides it by the tokens.

With kd=0 and likelihood=0 the text of the data is imitated in the warm-up, and
only the critic teaches from there on.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import UserError, flops, models, sharding
from gakd_jax.data import segments
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import critic as critic_lib
from gakd_jax.objectives import adversarial, base, head, kld, sft
from gakd_jax.settings import Count, Natural, NotNegative, Positive, Share

# Of `rollout.Student`, what else would not be the student that is rewarded.
_WHOLE = {
  'share': 1.0,
  'begin': 0.0,
  'end': 1.0,
  'prefix': None,
  'temperature': 1.0,
  'top_k': 0,
  'top_p': 1.0,
}


@dataclasses.dataclass(frozen=True)
class GAD(base.Objective):
  kd: Share = 0.0  # weight of the divergence against cross-entropy, 0 to 1
  divergence: kld.Divergence = 'reverse_kl'
  on: Literal['data', 'written'] = 'data'  # whose text the divergence is of
  likelihood: NotNegative = 1.0  # weight of L after the warm-up
  g: NotNegative = 1.0  # weight of L_G; 0: no critic, the ablation
  clip: Positive = 0.2  # eps
  oracle: bool = False  # D* in the critic's place
  # Whose reward D* is: an answer's, its mean over tokens, or each token's.
  credit: Literal['answer', 'mean', 'token'] = 'answer'
  warmup_epochs: NotNegative = 0.5  # in which L_G is 0
  warmup_steps: Natural | None = None  # instead of warmup_epochs
  critic_steps: Count = 1  # updates of the critic in one step
  critic: dict = dataclasses.field(default_factory=dict)  # config.critic

  # Log-probabilities of what was written are computed again for their gradient.
  more_head_passes = 1, 0
  asks_old = True

  def __post_init__(self):
    critic_lib.check(self.critic)

  @property
  def needs_teacher(self):
    return self.kd > 0 or self.oracle

  @property
  def one_tokenizer(self):
    return self.kd > 0 or not self.oracle or self.credit == 'token'

  @property
  def align(self):
    return ('span',) if self.oracle else ()  # What was read, and what was not.

  @property
  def takes(self):
    return kld.KLD(divergence=self.divergence).takes

  @property
  def asks_of_data(self):
    return self.on == 'data' and not self.oracle

  def check(self, config):
    c = config.rollout
    if c.writer != 'student' or not c.get('beside') or c.get('samples', 1) < 2:
      raise UserError(
        'config.objective: gad compares several answers of the student to a '
        "prompt with that of the data; set config.rollout to {'writer': "
        "'student', 'samples': 4, 'beside': True}"
      )
    for name, all_of_it in _WHOLE.items():
      if c.get(name, all_of_it) != all_of_it:
        raise UserError(
          f'config.rollout.{name}={c[name]}: gad learns from whole answers, '
          'drawn from all of the student, in every step; leave it (a '
          'likelihood alone is what warmup_steps is for)'
        )
    if self.credit != 'answer' and not self.oracle:
      raise UserError(
        f'config.objective: credit={self.credit!r} takes D*, which is a sum '
        'over tokens; a critic scores whole answers: set oracle=True, or '
        "credit='answer'"
      )
    path = self.critic.get('init_from')
    if path and self.g and not self.oracle:
      paths = map(models.tokenizer_dir, (config.student.path, path))
      if not tokenizer_lib.are_same(*map(tokenizer_lib.load, paths)):
        raise UserError(
          f'config.critic.init_from: {path} has another tokenizer than the '
          'student, whose ids the critic reads; name a model with the same'
        )

  def for_run(self, steps_per_epoch, total_steps):
    return adversarial.with_warmup(self, steps_per_epoch, total_steps)

  def shapes(self, student, teacher):
    return jax.eval_shape(lambda: self._fresh(student, jax.random.key(0)))

  def init(self, key, student, teacher, mesh=None):
    fresh = functools.partial(self._fresh, student)
    return adversarial.start(fresh, self.critic, key, mesh, reads_ids=True)

  def _fresh(self, student, key):
    if self.g == 0 or self.oracle:
      return base.Own()
    config = critic_lib.config_of(self.critic, student.vocab_size)
    return base.Own(critic=critic_lib.init(config, key, 'ids'))

  def count(self, batch):
    first_B = batch.rows_B[:: batch.group]
    groups = jnp.maximum(jnp.sum(first_B >= 0), 1)
    return super().count(batch) | {'groups': groups}

  def terms(self):
    if self.g == 0:
      return {'imitation': self.imitation}
    return {'imitation': self.imitation, 'generator': self.reinforcement}

  def imitation(self, student, teacher, batch, own, key):
    """L, times its weight."""
    kd = self.kd if self.on == 'data' else 0.0
    loss, metrics = self._likelihood(kd, student, teacher, batch, 'data')
    if self.kd != kd:
      more, found = self._likelihood(1.0, student, teacher, batch, 'written')
      loss = (1 - self.kd) * loss + self.kd * more
      metrics |= {self.divergence: found[self.divergence]}
    is_warm = self.g > 0 and own.step >= self.warmup_steps
    return jnp.where(is_warm, self.likelihood, 1.0) * loss, metrics

  def flops(self, student, teacher, own, rows, length, microbatches):
    """An update of the critic takes a forward pass and its gradient, a reward a
    forward pass; over all rows.
    """
    parts = super().flops(student, teacher, own, rows, length, microbatches)
    if not own.critic:
      return parts if self.g else {}
    config = critic_lib.config_of(self.critic, student.vocab_size)
    trunk = 2 * flops.block_weights(own.critic)
    trunk += flops.attention(config, length)
    passes = 3 * self.critic_steps + 1
    return parts | {'critic': rows * length * passes * trunk}

  def _likelihood(self, kd, student, teacher, batch, whose):
    """(1 - kd) CE + kd D over one kind of rows."""
    rows = slice(-1, None) if whose == 'data' else slice(None, -1)

    def take(x):
      x = x.reshape(-1, batch.group, *x.shape[1:])[:, rows]
      return x.reshape(-1, *x.shape[2:])

    student, teacher = (
      x and x.replace(hidden_BTD=take(x.hidden_BTD)) for x in (student, teacher)
    )
    part = jax.tree.map(take, batch.replace(totals={}, written_B=None))
    part = part.replace(totals={'tokens': batch.totals[whose]}, group=1)
    method = sft.SFT(head_chunk=self.head_chunk)
    if kd:
      method = kld.KLD(
        kd=kd, divergence=self.divergence, head_chunk=self.head_chunk
      )
    return method.loss(student, teacher, part, None, None)

  def reinforcement(self, student, teacher, batch, own, key):
    """g L_G, from the end of the warm-up on."""
    del key
    is_new_B = batch.written_B
    log_q_BT, is_new_BT = self._log_probs(student, batch.student, is_new_B)
    advantage_BT, metrics = self._advantages(
      log_q_BT, is_new_BT, student, teacher, batch, own
    )
    old_BT = batch.old_log_BT
    if old_BT is None:
      old_BT = jax.lax.stop_gradient(log_q_BT)
    # Of what was not written, r is 1: else it could be infinite.
    ratio_BT = jnp.exp(jnp.where(is_new_BT, log_q_BT - old_BT, 0.0))
    near_BT = jnp.clip(ratio_BT, 1 - self.clip, 1 + self.clip)
    gain_BT = ratio_BT * advantage_BT
    least_BT = jnp.minimum(gain_BT, near_BT * advantage_BT)
    n = batch.totals['written']
    loss = -jnp.sum(least_BT, where=is_new_BT) / n
    metrics |= {
      'generator': loss,
      'clipped': jnp.sum(least_BT < gain_BT, where=is_new_BT) / n,
    }
    weight = jnp.where(own.step >= self.warmup_steps, self.g, 0.0)
    return weight * loss, metrics

  def _advantages(self, log_q_BT, is_new_BT, student, teacher, batch, own):
    """A of each token, [B, T] or [B, 1], and what rewards are."""
    if not self.oracle:
      score_B = self.scores(own.critic, batch, student.hidden_BTD.dtype)
      reward_Bm = jax.lax.stop_gradient(_written(score_B, batch))
      metrics = {'reward': _mean(reward_Bm, batch)}
      return advantages(reward_Bm, batch.group)[:, None], metrics
    log_p_BU, _ = self._log_probs(teacher, batch.teacher, batch.written_B)
    reward_B = jnp.sum(log_p_BU, axis=1) - jnp.sum(log_q_BT, axis=1)
    if self.credit == 'mean':
      reward_B /= jnp.maximum(jnp.sum(is_new_BT, axis=1), 1)
    reward_Bm, metrics = _written(jax.lax.stop_gradient(reward_B), batch), {}
    if 'span_s' in batch.align:
      lost_BT = (batch.align['span_s'] < 0) & batch.student.mask_BT
      is_lost_B = jnp.any(lost_BT, axis=1) & batch.written_B
      is_lost_Bm = _written(is_lost_B, batch)
      reward_Bm = with_the_least(reward_Bm, is_lost_Bm)
      metrics = {'unread': _mean(is_lost_Bm, batch)}
    metrics |= {'reward': _mean(reward_Bm, batch)}
    if self.credit == 'token':
      reward_BT = jax.lax.stop_gradient(log_p_BU - log_q_BT)
      return advantages_of_tokens(reward_BT, is_new_BT, batch.group), metrics
    return advantages(reward_Bm, batch.group)[:, None], metrics

  def _log_probs(self, outputs, tokens, is_row_B):
    """log-probabilities of the responses of some rows, [B, T], and where."""
    ids_BT, mask_BT = head.next_token(tokens)
    mask_BT &= is_row_B[:, None]
    log_BT = head.log_probs(outputs, ids_BT, mask_BT, chunk=self.head_chunk)
    return log_BT, mask_BT

  def critic_loss(self, student, teacher, batch, own, key):
    del teacher, key
    score_B = self.scores(own.critic, batch, student.hidden_BTD.dtype)
    real_B1 = score_B.reshape(-1, batch.group)[:, -1:]
    score_Bm = _written(score_B, batch)
    margin_Bm = real_B1 - score_Bm
    loss = _mean(jax.nn.softplus(-margin_Bm), batch)
    return loss, {
      'loss': loss,
      # Of a pair, which one is real? A tie is half right.
      'accuracy': _mean(0.5 + 0.5 * jnp.sign(margin_Bm), batch),
      'margin': _mean(margin_Bm, batch),
      'score_real': _mean(real_B1, batch),
      'score_student': _mean(score_Bm, batch),
    }

  def scores(self, critic, batch, dtype):
    """D of each row's prompt and answer, [B] in fp32."""
    tokens = batch.student
    config = critic_lib.config_of(self.critic, critic['projection'].shape[0])
    model = nnx.merge(
      critic_lib.definition(config),
      jax.tree.map(lambda x: x.astype(dtype), critic),
    )
    x_BTC = sharding.look_up(critic['projection'], tokens.ids_BT, dtype)
    if config.scaled_embedding:
      x_BTC *= jnp.asarray(config.width**0.5, dtype)
    remat = 'blocks' if self.critic.get('init_from') else 'none'  # Its size.
    score_BT = model(x_BTC, tokens.segments_BT, remat)
    is_last_BT = segments.is_last(tokens.segments_BT)
    return jnp.sum(score_BT, axis=1, where=is_last_BT)


def with_the_least(reward_Bm, is_lost_Bm):
  """Rewards, of some answers the least of the others in their group; or 0."""
  least_B1 = jnp.min(
    reward_Bm, axis=1, keepdims=True, where=~is_lost_Bm, initial=jnp.inf
  )
  least_B1 = jnp.where(jnp.isinf(least_B1), 0, least_B1)
  return jnp.where(is_lost_Bm, least_B1, reward_Bm)


def advantages(reward_Bm, group):
  """Normalised rewards of each group, and 0 for its row of the data; [B].

  By the deviation of these rewards themselves, with n and not n - 1, so that
  two answers have -1 and 1 (0.71 with n - 1, as some codes have it).
  """
  mean_B1 = jnp.mean(reward_Bm, axis=1, keepdims=True)
  std_B1 = jnp.std(reward_Bm, axis=1, keepdims=True)
  advantage_Bm = (reward_Bm - mean_B1) / (std_B1 + 1e-4)
  more = group - reward_Bm.shape[1]
  return jnp.pad(advantage_Bm, ((0, 0), (0, more))).reshape(-1)


def advantages_of_tokens(reward_BT, is_there_BT, group):
  """Rewards of tokens, normalised over those of each group that are there."""
  shape = reward_BT.shape
  reward_GN, is_there_GN = (
    x.reshape(-1, group * shape[1]) for x in (reward_BT, is_there_BT)
  )
  where = {'axis': 1, 'keepdims': True, 'where': is_there_GN}
  n_G1 = jnp.maximum(jnp.sum(is_there_GN, axis=1, keepdims=True), 1)
  away_GN = reward_GN - jnp.sum(reward_GN, **where) / n_G1
  std_G1 = jnp.sqrt(jnp.sum(away_GN**2, **where) / n_G1)
  return (away_GN / (std_G1 + 1e-4)).reshape(shape)


def _written(x_B, batch):
  """Of each group, what is of the student's answers."""
  return x_B.reshape(-1, batch.group)[:, :-1]


def _mean(x_Bm, batch):
  """Over answers, and prompts that are there."""
  is_there_B1 = (batch.rows_B >= 0)[:: batch.group, None]
  x_B1 = jnp.mean(x_Bm, axis=1, keepdims=True)
  return jnp.sum(x_B1, where=is_there_B1) / batch.totals['groups']
