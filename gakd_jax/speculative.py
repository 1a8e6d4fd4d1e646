"""Speculative knowledge distillation: the student drafts, the teacher corrects.

SKD (arXiv 2410.11325, Algorithm 1). The student writes `gamma` tokens on, the
teacher reads them in one pass; the first that its rule does not accept is
replaced by a token that the teacher draws, and what follows it is dropped. If
all are accepted, the student goes on: the teacher adds none. So the text does
not depend on gamma, but for near ties, which rounding may decide otherwise.

Each row is at its own place, and each model has a cache of its own; what was
dropped is overwritten when other tokens are read at its positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

from gakd_jax import keys, sampling
from gakd_jax.models import decoding
from gakd_jax.sampler import Sampler


def _p_of(token_N, logits_NV):
  """log p(token); [N]."""
  log_p_NV = jax.nn.log_softmax(logits_NV)
  return jnp.take_along_axis(log_p_NV, token_N[:, None], axis=1)[:, 0]


# A rule of acceptance has
#   accepts(token_N, z_NV, p_NV, q_NV, u_N): whether drafts stay, bool [N];
#   replacement(p_BV, q_BV): the logits that a token is drawn from instead.
# z are the teacher's logits, p and q those that teacher and student draw from;
# u is uniform on [0, 1).


@dataclasses.dataclass(frozen=True)
class Rank:
  """Among the teacher's k most likely tokens, whatever its temperature.

  With k = V the student writes all; with k = 1 a token is the teacher's argmax
  or its draw.
  """

  k: int = 25

  def accepts(self, token_N, z_NV, p_NV, q_NV, u_N):
    del p_NV, q_NV, u_N
    own_N1 = jnp.take_along_axis(z_NV, token_N[:, None], axis=1)
    return jnp.sum(z_NV > own_N1, axis=1) < self.k

  def replacement(self, p_BV, q_BV):
    del q_BV
    return p_BV


@dataclasses.dataclass(frozen=True)
class Probability:
  """At least `alpha` likely to the teacher, at temperature 1."""

  alpha: float = 0.05

  def accepts(self, token_N, z_NV, p_NV, q_NV, u_N):
    del p_NV, q_NV, u_N
    return _p_of(token_N, z_NV) >= jnp.log(self.alpha)

  def replacement(self, p_BV, q_BV):
    del q_BV
    return p_BV


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The text is drawn from (1 - g) q + g p, exactly.

  Speculative sampling (arXiv 2211.17192) of that mixture from drafts of q: a
  token stays with probability min(1, (1 - g) + g p/q), and the residual that
  replaces it is proportional to max(p - q, 0), whatever g is.
  """

  g: float = 0.5

  def accepts(self, token_N, z_NV, p_NV, q_NV, u_N):
    del z_NV
    ratio_N = jnp.exp(_p_of(token_N, p_NV) - _p_of(token_N, q_NV))
    return u_N < (1 - self.g) + self.g * ratio_N

  def replacement(self, p_BV, q_BV):
    p_BV, q_BV = jax.nn.softmax(p_BV), jax.nn.softmax(q_BV)
    more_BV = jnp.maximum(p_BV - q_BV, 0)
    # Nothing is left where rounding alone kept the two apart.
    is_left_B1 = jnp.any(more_BV > 0, axis=1, keepdims=True)
    return jnp.log(jnp.where(is_left_B1, more_BV, p_BV))


@struct.dataclass
class Trace:
  """What the teacher did to each row.

  by_teacher_BS: which tokens are its own. blocks_B: how often it read.
  judged_BJ, kept_BJ: of the drafts at each place of a block, how many it came
  to judge, and how many of these stayed.
  """

  by_teacher_BS: jax.Array
  blocks_B: jax.Array
  judged_BJ: jax.Array
  kept_BJ: jax.Array


@dataclasses.dataclass(frozen=True)
class Drafting:
  """Settings; hashable, so a static argument of a jit."""

  student: Sampler
  teacher: Sampler
  rule: Rank | Probability | Mixture
  gamma: int
  max_new_tokens: int
  eos_ids: tuple


def decode_batch(models, prompt_BT, length_B, key_B, settings, mesh=None):
  """Responses that both models write; to be called under a jit.

  Args:
    models: `Decoder`s of `decoding.unstack`, student and teacher, of one
      vocabulary.
    prompt_BT, length_B, key_B, mesh: see `sampling.decode_batch`.
    settings: `Drafting`.

  Returns:
    ids_BS and end_B as of `sampling.decode_batch`, and the `Trace`.
  """
  decode = functools.partial(_decode_rows, settings=settings)
  decode = sampling.on_own_rows(decode, mesh)
  return decode(models, prompt_BT, length_B, key_B)


def _decode_rows(models, prompt_BT, length_B, key_B, settings, any_row):
  state = sampling.start(prompt_BT, length_B, settings.max_new_tokens)
  readers = [
    decoding.prefill(model, prompt_BT, state.ids_BS.shape[1])
    for model in models
  ]
  state, trace = write(readers, state, key_B, settings, any_row)
  return state.ids_BS, state.end_B, trace


def write(readers, state, key_B, settings, any_row=jnp.any):
  """`state` written to its end by the readers of student and teacher."""
  B, S = state.ids_BS.shape
  none_BJ = jnp.zeros((B, settings.gamma), jnp.int32)
  trace = Trace(jnp.zeros((B, S), bool), none_BJ[:, 0], none_BJ, none_BJ)

  def write_block(carry):
    state, trace, (student, teacher) = carry
    drafted, s_hidden_BJD, student = _draft(student, state, key_B, settings)
    t_hidden_BJD, teacher = _read_block(teacher, state, drafted, settings.gamma)
    state, trace = _correct(
      (student.model.head, teacher.model.head),
      (s_hidden_BJD, t_hidden_BJD),
      state,
      drafted,
      trace,
      key_B,
      settings,
      any_row,
    )
    return state, trace, [student, teacher]

  state, trace, _ = jax.lax.while_loop(
    lambda carry: any_row(~carry[0].done_B),
    write_block,
    (state, trace, readers),
  )
  return state, trace


def _draft(student, state, key_B, settings):
  """The state with up to gamma tokens more, and the hidden states before."""

  def write_token(carry, _):
    state, student = carry
    hidden_BD, student = sampling.read_last(student, state)
    logits_BV = student.model.head(hidden_BD)
    token_B = sampling.draw(settings.student, logits_BV, state, key_B)
    state = sampling.append(
      state, token_B, settings.max_new_tokens, settings.eos_ids
    )
    return (state, student), hidden_BD

  (state, student), hidden_JBD = jax.lax.scan(
    write_token, (state, student), length=settings.gamma
  )
  return state, hidden_JBD.swapaxes(0, 1), student


def _read_block(teacher, state, drafted, gamma):
  """Hidden states [B, gamma, D] before each draft, in one pass."""
  position_BJ = (
    jnp.maximum(state.end_B[:, None] - 1, 0) + jnp.arange(gamma)[None]
  )
  # Past the end of what was drafted, whatever stands there: never judged, and
  # overwritten by what will.
  ids_BJ = jnp.take_along_axis(
    drafted.ids_BS,
    jnp.minimum(position_BJ, drafted.ids_BS.shape[1] - 1),
    axis=1,
  )
  return teacher.read(ids_BJ, position_BJ)


def _correct(heads, hiddens, state, drafted, trace, key_B, settings, any_row):
  """The state with what the teacher lets stand and its own token; the trace."""
  B, J = trace.judged_BJ.shape
  S = state.ids_BS.shape[1]
  start_B, n_B = state.end_B, drafted.end_B - state.end_B
  place_BJ = start_B[:, None] + jnp.arange(J)[None]
  token_BJ = jnp.take_along_axis(
    drafted.ids_BS, jnp.minimum(place_BJ, S - 1), axis=1
  )

  def logits(hiddens_):
    q, z = (head(h) for head, h in zip(heads, hiddens_, strict=True))
    # A vocabulary of one tokenizer may be padded differently.
    V = min(q.shape[1], z.shape[1])
    z = settings.teacher.valid(z[:, :V])
    return (
      z,
      settings.teacher.filter(z),
      settings.student.filter(q[:, :V]),
    )

  keeps_BJ = settings.rule.accepts(
    token_BJ.reshape(-1),
    *logits([h.reshape(B * J, -1) for h in hiddens]),
    _uniform(key_B, place_BJ - state.start_B[:, None]).reshape(-1),
  ).reshape(B, J)
  is_draft_BJ = jnp.arange(J)[None] < n_B[:, None]
  kept_BJ = jnp.cumprod(is_draft_BJ & keeps_BJ, axis=1).astype(bool)
  kept_B = jnp.sum(kept_BJ, axis=1)
  is_wrong_B = kept_B < n_B
  state = drafted.replace(end_B=start_B + kept_B, done_B=~is_wrong_B)

  def correct(state):
    at_B11 = jnp.minimum(kept_B, J - 1)[:, None, None]
    _, p_BV, q_BV = logits(
      [jnp.take_along_axis(h, at_B11, axis=1)[:, 0] for h in hiddens]
    )
    i_B = state.end_B - state.start_B
    row_keys = _keys(key_B, keys.TEACHER, i_B)
    logits_BV = settings.rule.replacement(p_BV, q_BV)
    token_B = settings.teacher.draw(logits_BV, row_keys)
    return sampling.append(
      state, token_B, settings.max_new_tokens, settings.eos_ids
    )

  # A good student needs it seldom, and pays for its teacher's draw only then.
  corrected = jax.lax.cond(
    any_row(is_wrong_B), correct, lambda state: state, state
  )
  judged_BJ = is_draft_BJ & jnp.pad(
    kept_BJ[:, :-1], ((0, 0), (1, 0)), constant_values=True
  )
  trace = Trace(
    trace.by_teacher_BS.at[
      jnp.arange(B), jnp.where(is_wrong_B, state.end_B, S)
    ].set(True, mode='drop'),
    trace.blocks_B + (n_B > 0),
    trace.judged_BJ + judged_BJ,
    trace.kept_BJ + kept_BJ,
  )
  done_B = jnp.where(is_wrong_B, corrected.done_B, drafted.done_B)
  return corrected.replace(done_B=done_B), trace


def _keys(key_B, consumer, i_B):
  """Of response token i of each row, for one consumer."""

  def fold(key, i):
    return jax.random.fold_in(jax.random.fold_in(key, consumer), i)

  return jax.vmap(fold)(key_B, i_B)


def _uniform(key_B, i_BJ):
  """A number for each draft, whichever block it is in; [B, J]."""

  def draw(key, i_J):
    key_J = jax.vmap(functools.partial(jax.random.fold_in, key))(i_J)
    return jax.vmap(jax.random.uniform)(key_J)

  key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, keys.ACCEPTANCE)
  return jax.vmap(draw)(key_B, i_BJ)
