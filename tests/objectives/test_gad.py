"""A critic of text, whose score is the student's reward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models, objectives
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models import DecoderConfig
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import gad

CRITIC = {'width': 8, 'layers': 1, 'heads': 2, 'ff_width': 16}
N = 3  # answers of the student to a prompt


def make(**settings):
  settings = {'warmup_steps': 0, 'critic': CRITIC} | settings
  return objectives.make('gad', **{'head_chunk': 4} | settings)


def batch_of(prompts, T, V, lengths=None, seed=0):
  """Groups of N answers and a real one, after prompts of two tokens."""
  rng = np.random.default_rng(seed)
  B = prompts * (N + 1)
  ids_BT = rng.integers(0, V, (B, T)).astype(np.int32)
  ids_BT[:, :2] = np.repeat(ids_BT[:: N + 1, :2], N + 1, axis=0)
  lengths = rng.integers(3, T + 1, B) if lengths is None else lengths
  at_T = np.arange(T)[None]
  is_text_BT = at_T < np.asarray(lengths)[:, None]
  tokens = Tokens(ids_BT, is_text_BT.astype(np.int32), is_text_BT & (at_T > 1))
  return Batch(
    tokens,
    tokens,
    rows_B=np.repeat(np.arange(prompts, dtype=np.int32), N + 1),
    written_B=np.arange(B) % (N + 1) < N,
    group=N + 1,
  )


def outputs_of(batch, D, V, seed):
  rng = np.random.default_rng(seed)
  shape = (*batch.student.ids_BT.shape, D)
  hidden_BTD = jnp.asarray(rng.standard_normal(shape, np.float32))
  return Outputs(
    hidden_BTD, Head(jnp.asarray(rng.standard_normal((V, D), np.float32)))
  )


def own_of(objective, V, step=0, seed=5):
  """Its critic, whose score is not zero."""
  config = DecoderConfig(
    **dict.fromkeys(('width', 'layers', 'heads', 'kv_heads', 'head_dim'), 8),
    vocab_size=V,
    ff_width=8,
    tied_head=True,
    rope_theta=1e4,
    norm_eps=1e-6,
    max_length=64,
  )
  own = objective.init(jax.random.key(seed), config, None)
  if own.critic:
    score_C = jax.random.normal(jax.random.key(7), own.critic['score'].shape)
    own = own.replace(critic=own.critic | {'score': score_C})
  return own.replace(step=jnp.asarray(step))


def log_probs(outputs, batch):
  """log-probabilities of each row's response, [B], by hand."""
  log_BTV = jax.nn.log_softmax(jax.vmap(outputs.head)(outputs.hidden_BTD))
  ids_BT = np.roll(batch.student.ids_BT, -1, axis=1)
  log_BT = np.take_along_axis(np.array(log_BTV), ids_BT[..., None], 2)[..., 0]
  return np.sum(log_BT, axis=1, where=np.array(batch.student.predicts_BT))


def counted(objective, batch):
  return batch.replace(totals=objective.count(batch))


def jitted(method, *args):
  return jax.jit(method)(*args, None)


@pytest.mark.parametrize('credit', ['answer', 'mean', 'token'])
def test_two_tokens_have_the_gradient_that_is_written_down(credit):
  """Answers of one token, of two: -A (1[y = 1] - q(1)) for its logit.

  Rewards are D*, the token's own as well; the three answers are 0, 1 and 1.
  """
  objective = make(oracle=True, credit=credit)
  batch = batch_of(1, 3, 2, lengths=[3] * (N + 1))
  ids_BT = batch.student.ids_BT
  ids_BT[:, 2] = [0, 1, 1, 0]
  batch = counted(objective, batch)
  q, p = 0.3, 0.8  # of token 1

  def outputs(of_one):
    hidden_BTD = jnp.full((N + 1, 3, 1), np.log(of_one / (1 - of_one)))
    return Outputs(hidden_BTD, Head(jnp.array([[0.0], [1.0]])))

  def loss(hidden_BTD):
    student = outputs(q).replace(hidden_BTD=hidden_BTD)
    return objective.reinforcement(
      student, outputs(p), batch, own_of(objective, 2), None
    )[0]

  reward_B = np.log([(1 - p) / (1 - q), p / q, p / q])
  advantage_B = (reward_B - reward_B.mean()) / (reward_B.std() + 1e-4)
  is_one_B = np.array([0, 1, 1])
  want_B = -advantage_B * (is_one_B - q) / 3
  got_BTD = jax.jit(jax.grad(loss))(outputs(q).hidden_BTD)
  np.testing.assert_allclose(got_BTD[:N, 1, 0], want_B, rtol=1e-5)
  others = np.array(got_BTD)
  others[:N, 1] = 0
  assert not others.any()


def test_text_of_an_older_student_is_clipped():
  """Of r A, the part beyond 1 +- clip gives no gradient; the rest gives r A."""
  objective = make(oracle=True, clip=0.2)
  batch = batch_of(1, 3, 2, lengths=[3] * (N + 1))
  batch.student.ids_BT[:, 2] = [0, 1, 1, 0]
  q, p = 0.3, 0.8  # of token 1
  log_q_B = np.log([1 - q, q, q, 1 - q])
  ratio_B = np.array([0.7, 1.1, 1.5, 1.0])
  old_BT = np.zeros((N + 1, 3), np.float32)
  old_BT[:, 1] = log_q_B - np.log(ratio_B)
  batch = counted(objective, batch.replace(old_log_BT=old_BT))

  def outputs(of_one):
    hidden_BTD = jnp.full((N + 1, 3, 1), np.log(of_one / (1 - of_one)))
    return Outputs(hidden_BTD, Head(jnp.array([[0.0], [1.0]])))

  def loss(hidden_BTD):
    student = outputs(q).replace(hidden_BTD=hidden_BTD)
    return objective.reinforcement(
      student, outputs(p), batch, own_of(objective, 2), None
    )

  reward_B = np.log([(1 - p) / (1 - q), p / q, p / q])
  advantage_B = (reward_B - reward_B.mean()) / (reward_B.std() + 1e-4)
  assert advantage_B[0] < 0 < advantage_B[1]
  # The first is already less likely than it should become, the third more.
  counts_B = np.array([0, 1, 0])
  is_one_B = np.array([0, 1, 1])
  want_B = -counts_B * ratio_B[:N] * advantage_B * (is_one_B - q) / 3
  got_BTD, metrics = jax.jit(jax.grad(loss, has_aux=True))(
    outputs(q).hidden_BTD
  )
  np.testing.assert_allclose(got_BTD[:N, 1, 0], want_B, rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(metrics['clipped'], 2 / 3, rtol=1e-6)
  clipped_B = np.clip(ratio_B[:N], 0.8, 1.2)
  value = np.minimum(ratio_B[:N] * advantage_B, clipped_B * advantage_B)
  np.testing.assert_allclose(metrics['generator'], -value.mean(), rtol=1e-4)


@pytest.mark.slow
def test_what_was_not_written_has_no_ratio():
  """However unlikely the data's text is to the student: no gradient is NaN."""
  V, objective = 11, make(head_chunk=64)
  batch = batch_of(2, 6, V)
  old_BT = np.where(batch.written_B[:, None], -2.0, -1e3).astype(np.float32)
  batch = counted(objective, batch.replace(old_log_BT=old_BT))
  student = outputs_of(batch, 5, V, seed=1)

  def loss(student):
    own = own_of(objective, V)
    return objective.reinforcement(student, None, batch, own, None)[0]

  found = jax.jit(jax.grad(loss))(student)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
  assert np.abs(found.hidden_BTD).max() > 0


def test_what_a_teacher_cannot_read_whole_is_worth_the_least_of_its_group():
  V, objective = 11, make(oracle=True)
  batch = batch_of(2, 6, V, lengths=[6] * 2 * (N + 1))
  student, teacher = (outputs_of(batch, 5, V, seed) for seed in (1, 2))
  own = own_of(objective, V)

  def rewards(lost):
    spans_BT = np.zeros(batch.student.ids_BT.shape, np.int32)
    spans_BT[:, :2] = -1  # of the prompt, which is of no response
    for b, t in lost:
      spans_BT[b, t] = -1
    found = batch.replace(align={'span_s': spans_BT})
    _, metrics = jitted(
      objective.reinforcement, student, teacher, counted(objective, found), own
    )
    return metrics['reward'], metrics['unread']

  ratio_B = log_probs(teacher, batch) - log_probs(student, batch)
  ratio_Bm = ratio_B.reshape(2, N + 1)[:, :N]
  mean, unread = rewards([])
  np.testing.assert_allclose(mean, ratio_Bm.mean(), rtol=1e-5)
  assert unread == 0
  # One of the first group; a row of the data does not matter.
  mean, unread = rewards([(1, 4), (N, 5)])
  want_Bm = ratio_Bm.copy()
  want_Bm[0, 1] = min(ratio_Bm[0, 0], ratio_Bm[0, 2])
  np.testing.assert_allclose(mean, want_Bm.mean(), rtol=1e-5)
  np.testing.assert_allclose(unread, 1 / (2 * N), rtol=1e-6)
  # All of a group: none is better than another.
  mean, _ = rewards([(b, 3) for b in range(N)])
  np.testing.assert_allclose(mean, ratio_Bm[1].mean() / 2, rtol=1e-5)


@pytest.mark.slow
def test_a_critic_can_come_from_a_model_with_its_embedding(tiny_model_dir):
  path = tiny_model_dir()
  source = nnx.to_pure_dict(nnx.state(models.load(path, dtype='float32')))
  objective = make(critic={'init_from': str(path)})
  rows = len(source['embedding'])
  for V in (rows - 4, rows + 4):
    config = dataclasses.replace(models.read_config(path), vocab_size=V)
    critic = objective.init(jax.random.key(0), config, None).critic
    assert len(critic['projection']) == V
    both = min(V, rows)
    np.testing.assert_array_equal(
      critic['projection'][:both], source['embedding'][:both]
    )
    jax.tree.map(
      np.testing.assert_array_equal, critic['blocks'], source['blocks']
    )


def test_the_oracle_is_the_exact_ratio_of_both_models():
  V = 11
  objective = make(oracle=True)
  batch = counted(objective, batch_of(4, 7, V))
  student, teacher = (outputs_of(batch, 5, V, seed) for seed in (1, 2))
  _, metrics = jitted(
    objective.reinforcement, student, teacher, batch, own_of(objective, V)
  )
  ratio_B = log_probs(teacher, batch) - log_probs(student, batch)
  want = ratio_B[batch.written_B].mean()
  np.testing.assert_allclose(metrics['reward'], want, rtol=1e-5)


@pytest.mark.slow
def test_the_mean_of_a_token_says_nothing_of_length():
  """Of one text said once, twice and three times, no answer is the better."""
  V = 5
  batch = batch_of(1, 8, V, lengths=[4, 6, 8, 8])
  batch.student.ids_BT[:] = [[1, 2] * 4] * (N + 1)
  hidden_BTD = jnp.tile(jnp.eye(2), (N + 1, 4, 1))  # by what a token follows
  heads = [np.random.default_rng(i).normal(size=(V, 2)) for i in (1, 2)]
  student, teacher = (Outputs(hidden_BTD, Head(jnp.float32(h))) for h in heads)

  def gain(credit):
    objective = make(oracle=True, credit=credit)
    full = counted(objective, batch)
    g_BTD = jax.grad(
      lambda x: objective.reinforcement(
        student.replace(hidden_BTD=x), teacher, full, own_of(objective, V), None
      )[0]
    )(hidden_BTD)
    return np.abs(g_BTD).max()

  assert gain('mean') < 1e-3 < 1e-2 < gain('answer')


def test_tokens_are_normalised_over_those_of_their_group():
  random = np.random.default_rng(0)
  reward_BT = random.normal(size=(6, 5)).astype(np.float32)
  is_there_BT = random.random((6, 5)) < 0.6
  is_there_BT[2] = is_there_BT[5] = False  # those of the data
  got_BT = gad.advantages_of_tokens(reward_BT, is_there_BT, 3)
  for rows in (slice(3), slice(3, 6)):
    there = is_there_BT[rows]
    of_group = reward_BT[rows][there]
    want = (of_group - of_group.mean()) / (of_group.std() + 1e-4)
    np.testing.assert_allclose(got_BT[rows][there], want, rtol=1e-4)
  nothing = gad.advantages_of_tokens(reward_BT, np.zeros_like(is_there_BT), 3)
  assert np.isfinite(nothing).all()


def test_credit_by_token_goes_to_the_token():
  """Of answers that differ in their last token, that alone tells them apart."""
  V = 4
  batch = batch_of(1, 4, V, lengths=[4] * (N + 1))
  batch.student.ids_BT[:] = [[1, 2, 3, 0], [1, 2, 3, 1], [1, 2, 3, 2], [0] * 4]
  batch = counted(make(oracle=True), batch)
  student, teacher = (outputs_of(batch, 5, V, seed) for seed in (1, 2))
  # One text before the last token, so one hidden state.
  student, teacher = (
    x.replace(hidden_BTD=jnp.broadcast_to(x.hidden_BTD[:1], x.hidden_BTD.shape))
    for x in (student, teacher)
  )

  def spread(credit):
    objective = make(oracle=True, credit=credit)
    own = own_of(objective, V)
    g_BTD = jax.grad(
      lambda x: objective.reinforcement(
        student.replace(hidden_BTD=x), teacher, batch, own, None
      )[0]
    )(student.hidden_BTD)[:N]
    return np.abs(g_BTD - g_BTD[:1]).max(axis=(0, 2))

  _, agreed, last, _ = spread('token')
  assert agreed < 1e-6 < 1e-2 < last
  _, agreed, last, _ = spread('answer')
  assert min(agreed, last) > 1e-2


def test_a_group_that_is_not_there_does_not_count():
  V, objective = 11, make()
  batch = batch_of(4, 7, V)
  lacking = batch.replace(
    rows_B=np.where(batch.rows_B == 2, -1, batch.rows_B),
    student=jax.tree.map(
      lambda x: np.where(batch.rows_B[:, None] == 2, np.zeros_like(x), x),
      batch.student,
    ),
    written_B=batch.written_B & (batch.rows_B != 2),
  )
  kept = np.flatnonzero(batch.rows_B != 2)
  fewer = jax.tree.map(lambda x: x[kept], batch)
  student, own = outputs_of(batch, 5, V, 1), own_of(objective, V)
  found = []
  for given, hidden_BTD in (
    (lacking, student.hidden_BTD),
    (fewer, student.hidden_BTD[kept]),
  ):
    outputs = student.replace(hidden_BTD=hidden_BTD)
    for method in (objective.reinforcement, objective.critic_loss):
      found.append(
        jitted(method, outputs, None, counted(objective, given), own)
      )
  for got, want in zip(found[:2], found[2:], strict=True):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, want
    )


def test_advantages_are_of_a_group_alone():
  reward_Bm = jnp.array([[1.0, 2.0, 3.0], [10.0, 10.0, 10.0]])
  found = gad.advantages(reward_Bm, 4).reshape(2, 4)
  want = 1 / np.std([1, 2, 3])
  np.testing.assert_allclose(found[0], [-want, 0, want, 0], rtol=1e-3)
  assert not found[1].any()


def test_a_critic_learns_which_answer_is_real():
  """Real ones are of low ids; by what stands in the answer alone."""
  V, objective = 20, make()
  batch = batch_of(8, 7, V, seed=3)
  ids_BT = batch.student.ids_BT
  ids_BT[N :: N + 1, 2:] %= 10
  ids_BT[batch.written_B, 2:] = 10 + ids_BT[batch.written_B, 2:] % 10
  batch = counted(objective, batch)
  student = outputs_of(batch, 5, V, 1)
  own = own_of(objective, V)

  @jax.jit
  @jax.value_and_grad
  def loss(critic):
    own_ = own.replace(critic=critic)
    return objective.critic_loss(student, None, batch, own_, None)[0]

  critic = own.critic
  for _ in range(60):
    _, grads = loss(critic)
    critic = jax.tree.map(lambda x, d: x - 0.3 * d, critic, grads)
  found, metrics = jitted(
    objective.critic_loss, student, None, batch, own.replace(critic=critic)
  )
  assert found < 0.1
  assert metrics['accuracy'] == 1
  # And says so to the student: all of its answers are as bad, by now.
  scores = jax.jit(objective.scores, static_argnums=2)
  score_Bn = scores(critic, batch, jnp.float32).reshape(-1, N + 1)
  assert np.all(score_Bn[:, -1:] > score_Bn[:, :-1])


def test_a_fresh_critic_has_no_opinion():
  V, objective = 11, make()
  batch = counted(objective, batch_of(4, 7, V))
  student = outputs_of(batch, 5, V, 1)
  own = own_of(objective, V)
  fresh = own.critic | {'score': jnp.zeros(8)}
  own = own.replace(critic=fresh)
  loss, metrics = jitted(objective.reinforcement, student, None, batch, own)
  assert loss == 0
  assert metrics['reward'] == 0
  loss, metrics = jitted(objective.critic_loss, student, None, batch, own)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert metrics['accuracy'] == 0.5


@pytest.mark.parametrize('on', ['data', 'written'])
@pytest.mark.parametrize('kd', [0.0, 0.4])
def test_the_likelihood_is_that_of_kld_on_rows_of_one_kind(kd, on):
  V = 11
  objective = make(kd=kd, on=on)
  batch = counted(objective, batch_of(4, 7, V))
  student, teacher = (outputs_of(batch, 5, V, seed) for seed in (1, 2))
  got, metrics = jitted(
    objective.imitation, student, teacher, batch, own_of(objective, V)
  )

  def alone(kd, is_row_B):
    rows = np.flatnonzero(is_row_B)
    part = jax.tree.map(
      lambda x: x[rows], batch.replace(totals={}, written_B=None)
    )
    part = dataclasses.replace(part, group=1)
    method = objectives.make('kld', kd=kd, head_chunk=4)
    both = (
      x.replace(hidden_BTD=x.hidden_BTD[rows]) for x in (student, teacher)
    )
    return jitted(method.loss, *both, counted(method, part), None)[0]

  ce = alone(0.0, ~batch.written_B)
  is_on_B = batch.written_B if on == 'written' else ~batch.written_B
  want = (1 - kd) * ce + kd * alone(1.0, is_on_B)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(metrics['ce'], ce, rtol=1e-5)


def test_in_the_warm_up_the_student_descends_the_likelihood_alone():
  V = 11
  objective = make(warmup_steps=3, likelihood=0.5, g=2.0)
  batch = counted(objective, batch_of(4, 7, V))
  student = outputs_of(batch, 5, V, 1)
  found = {}
  for step in (2, 3):
    own = own_of(objective, V, step=step)
    found[step] = [
      jitted(term, student, None, batch, own)[0]
      for term in objective.terms().values()
    ]
  assert found[2][1] == 0 != found[3][1]
  np.testing.assert_allclose(found[3][0], 0.5 * found[2][0], rtol=1e-6)
