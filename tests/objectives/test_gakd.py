"""GAKD: the critic's algebra against full logits, and what an update does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import UserError, log, models, objectives, sharding
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models import critic as critic_lib
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import head
from gakd_jax.objectives.base import Own

B, T, C, V = 3, 10, 8, 40
WIDTHS = {'student': 6, 'teacher': 12}
CRITIC = {'width': C, 'layers': 1, 'heads': 2, 'ff_width': 16}
KINDS = pytest.mark.parametrize('kind', ['rgan', 'gan', 'wgan'])
INPUTS = pytest.mark.parametrize('input', ['log_probs', 'logits', 'probs'])


N_RESPONSE = 4
ENDS = ((0, T - 1), (1, 6))  # row, last position that predicts the response


def _batch():
  """Responses of 4 tokens, at the end and in the middle; the last has none."""
  at_BT = np.broadcast_to(np.arange(T), (B, T))
  start_B1, end_B1 = np.array([[6, 3, 9], [T, 7, 9]])[:, :, None]
  mask_BT = (at_BT >= start_B1) & (at_BT < end_B1)
  tokens = Tokens(
    np.random.default_rng(0).integers(0, V, (B, T), np.int32),
    (at_BT < end_B1).astype(np.int32),
    mask_BT,
  )
  return Batch(tokens, tokens, totals={'tokens': 8.0, 'sequences': 2.0})


def _outputs(name, seed=0, rows=V, dtype=np.float32):
  rng = np.random.default_rng([seed, *name.encode()])
  D = WIDTHS[name]
  hidden_BTD, weight_VD = (
    jnp.asarray(rng.standard_normal(shape), dtype)
    for shape in ((B, T, D), (rows, D))
  )
  return Outputs(hidden_BTD, Head(weight_VD))


@functools.cache
def _objective(**settings):
  return objectives.make(
    'gakd', critic=CRITIC, head_chunk=7, warmup_steps=0, **settings
  )


def _shape():
  """All that the critic asks of a model's shape."""
  return models.DecoderConfig(V, 0, 0, 0, 0, 0, 0, True, 0, 0, 0)


@functools.cache
def _critic(dtype):
  """Weights at which scores differ by a few units."""
  params = _objective().init(jax.random.key(0), _shape(), _shape()).critic
  rng = np.random.default_rng(0)

  def random(path, x):
    mean = float(sharding.path_name(path).endswith('scale'))
    return jnp.asarray(mean + 0.5 * rng.standard_normal(x.shape), dtype)

  return jax.tree_util.tree_map_with_path(random, params)


def _direct_scores(critic, objective, z_BTV, batch):
  """D of full logits: [B], 0 without a response.

  Responses are cut out and scored as whole sequences of their own.
  """
  if objective.reads == 'log_probs':
    x_BTV = jax.nn.log_softmax(z_BTV)
    # W is as it is, so the input is centred.
    x_BTV -= jnp.mean(x_BTV, axis=-1, keepdims=True)
  else:
    x_BTV = z_BTV if objective.reads == 'logits' else jax.nn.softmax(z_BTV)
  model = nnx.merge(
    critic_lib.definition(critic_lib.config_of(objective.critic, V)), critic
  )
  d_B = jnp.zeros(B, x_BTV.dtype)
  x_2TV = jnp.stack([x_BTV[b, t - N_RESPONSE : t] for b, t in ENDS])
  score_2T = model(
    x_2TV @ critic['projection'], jnp.ones((2, N_RESPONSE), jnp.int32)
  )
  d_2 = score_2T[:, -1] if objective.pooling == 'last' else score_2T.mean(1)
  return d_B.at[jnp.array([b for b, _ in ENDS])].set(d_2)


def _direct_loss(critic, objective, z_t, z_s, batch, a_B11):
  """The critic's loss, its penalty by differentiating in V dimensions."""

  def scores(z_BTV):
    return _direct_scores(critic, objective, z_BTV, batch)

  def norms(z_BTV):
    gradient = jax.grad(lambda z: jnp.sum(scores(z)))(z_BTV)
    return jnp.sum(gradient**2, axis=(1, 2))

  d_t, d_s = scores(z_t), scores(z_s)
  has_B = jnp.asarray(batch.student.mask_BT.any(axis=1))
  if objective.kind == 'rgan':
    loss = jax.nn.softplus(-(d_t - d_s)) + 10 / 2 * (norms(z_t) + norms(z_s))
  elif objective.kind == 'gan':
    loss = -jnp.log(jax.nn.sigmoid(d_t)) - jnp.log(1 - jax.nn.sigmoid(d_s))
  else:
    mixed_B = norms(a_B11 * z_t + (1 - a_B11) * z_s)
    loss = d_s - d_t + 10 * (jnp.sqrt(jnp.where(has_B, mixed_B, 1.0)) - 1) ** 2
  return jnp.sum(jnp.where(has_B, loss, 0)) / 2


def _both_ways(objective, critic, dtype):
  """(loss, critic's gradient) as computed, and from full logits."""
  batch, key = _batch(), jax.random.key(1)
  student, teacher = (
    _outputs(name, dtype=dtype) for name in ('student', 'teacher')
  )
  z_t, z_s = (
    jnp.einsum('btd,vd->btv', o.hidden_BTD, o.head.weight_VD)
    for o in (teacher, student)
  )
  # Of each row's only document.
  a_B11 = jax.random.uniform(key, (B, T + 1), dtype)[:, 1, None, None]

  @jax.jit
  def both(critic):
    ours = jax.value_and_grad(
      lambda c: objective.critic_loss(
        student, teacher, batch, Own(critic=c), key
      )[0]
    )
    direct = jax.value_and_grad(
      lambda c: _direct_loss(c, objective, z_t, z_s, batch, a_B11)
    )
    return ours(critic), direct(critic)

  return both(critic)


@KINDS
@pytest.mark.parametrize(
  'pooling', ['mean', pytest.param('last', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  'input', ['log_probs', pytest.param('logits', marks=pytest.mark.slow)]
)
def test_the_gram_matrix_gives_the_penalty_of_v_dimensions(
  kind, pooling, input, monkeypatch
):
  """Value and second-order gradient, in float64 with a trunk that has it."""

  def trunk(self, x_BTC, segments_BT, remat='none'):
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    past_BTS = same_BTS & jnp.tril(jnp.ones((1, *same_BTS.shape[1:]), bool))
    h_BTC = jnp.tanh(past_BTS.astype(x_BTC.dtype) @ x_BTC)
    return h_BTC @ self.score[...]

  monkeypatch.setattr(critic_lib.Critic, '__call__', trunk)
  with jax.enable_x64(True):
    objective = _objective(kind=kind, input=input, pooling=pooling)
    (got, d_got), (want, d_want) = _both_ways(
      objective, _critic(np.float64), np.float64
    )
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-10)
    for name in ('projection', 'score'):
      for a, b in zip(
        *(jax.tree.leaves(d[name]) for d in (d_got, d_want)), strict=True
      ):
        assert np.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def _in_chunks(function, outputs, w_VC, mask_BT):
  """function(logits) W of each token."""
  outputs = outputs.replace(head=outputs.head.first(len(w_VC)))
  return head.token_map(
    lambda z_NV, _, w_VC: function(z_NV) @ w_VC,
    outputs,
    (),
    w_VC,
    mask_BT,
    chunk=4,
  )


@INPUTS
def test_both_paths_are_the_direct_product(input):
  """(E W) once, W z in chunks, and W z of full logits; teacher has more rows."""
  batch = _batch()
  outputs = _outputs('teacher', rows=V + 5)
  projection_VC = _critic(np.float32)['projection']
  w_VC = critic_lib.weight(projection_VC, input, np.float32)
  z_BTV = jnp.einsum('btd,vd->btv', outputs.hidden_BTD, outputs.head.weight_VD)
  z_BTV = z_BTV[..., :V]
  mask_BT = batch.student.predicts_BT
  function = jax.nn.softmax if input == 'probs' else lambda z: z
  want = jnp.where(mask_BT[..., None], function(z_BTV) @ w_VC, 0)
  chunked = _in_chunks(function, outputs, w_VC, mask_BT)
  np.testing.assert_allclose(chunked, want, rtol=1e-5, atol=1e-5)
  if input != 'probs':
    cut = outputs.replace(head=outputs.head.first(V))
    got = critic_lib.project(cut, w_VC)
    got = jnp.where(mask_BT[..., None], got, 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, chunked, rtol=1e-5, atol=1e-5)


def test_chunks_have_the_gradient_of_full_logits():
  batch, outputs = _batch(), _outputs('student')
  w_VC = _critic(np.float32)['projection']
  mask_BT = batch.student.predicts_BT

  def chunked(outputs, w_VC):
    x_BTC = _in_chunks(jax.nn.softmax, outputs, w_VC, mask_BT)
    return jnp.sum(jnp.sin(x_BTC))

  def direct(outputs, w_VC):
    z_BTV = jnp.einsum(
      'btd,vd->btv', outputs.hidden_BTD, outputs.head.weight_VD
    )
    x_BTC = jnp.where(mask_BT[..., None], jax.nn.softmax(z_BTV) @ w_VC, 0)
    return jnp.sum(jnp.sin(x_BTC))

  got, want = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(outputs, w_VC)
    for f in (chunked, direct)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got,
    want,
  )


def test_chunks_are_the_same_on_eight_devices():
  """Rows over data and fsdp, the vocabulary over tensor; gradients, too."""
  rng = np.random.default_rng(0)
  h_BTD, e_VD, w_VC = (
    jnp.asarray(rng.standard_normal(shape, np.float32))
    for shape in ((8, T, 6), (V, 6), (V, C))
  )
  mask_BT = jnp.asarray(rng.random((8, T)) < 0.6)

  def f(h_BTD, e_VD, w_VC):
    outputs = Outputs(h_BTD, Head(e_VD))
    x_BTC = _in_chunks(jax.nn.softmax, outputs, w_VC, mask_BT)
    return jnp.sum(jnp.sin(x_BTC))

  run = jax.value_and_grad(f, argnums=(0, 1, 2))
  want = jax.jit(run)(h_BTD, e_VD, w_VC)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    rows, vocabulary = (
      jax.NamedSharding(mesh, jax.P(axes))
      for axes in (sharding.BATCH_AXES, 'tensor')
    )
    got = jax.jit(run)(
      jax.device_put(h_BTD, rows),
      jax.device_put(e_VD, vocabulary),
      jax.device_put(w_VC, vocabulary),
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got,
    want,
  )


def test_logits_are_made_where_they_must_be(monkeypatch):
  """Of what is not linear in hidden states; else E'W stands for them."""
  taken = []
  monkeypatch.setattr(head, 'token_map', lambda *a, **k: taken.append('chunks'))
  monkeypatch.setattr(critic_lib, 'project', lambda *a: taken.append('head'))

  def of(cap=None, **settings):
    outputs = Outputs(jnp.zeros((1, T, 6)), Head(jnp.zeros((V, 6)), cap))
    _objective(**settings)._input(outputs, jnp.zeros((V, C)), None)

  of()
  of(input='logits')
  of(input='probs')
  of(cap=30.0)
  assert taken == ['head', 'head', 'chunks', 'chunks']


def test_the_critic_reads_logits_that_are_capped():
  student = _outputs('student')
  w_VC = jnp.asarray(np.random.default_rng(0).standard_normal((V, C)))
  got = _objective(input='logits')._input(
    student.replace(head=Head(student.head.weight_VD, 0.5)),
    w_VC,
    jnp.ones(student.hidden_BTD.shape[:2], bool),
  )
  z_BTV = jnp.einsum('btd,vd->btv', student.hidden_BTD, student.head.weight_VD)
  assert jnp.abs(z_BTV).max() > 0.5
  np.testing.assert_allclose(
    got, 0.5 * jnp.tanh(z_BTV / 0.5) @ w_VC, rtol=1e-4, atol=1e-5
  )


def test_log_probs_do_not_see_a_shift_of_logits():
  """Logits do: what softmax ignores, a critic could exploit."""
  student, teacher = _outputs('student'), _outputs('teacher')
  shifted = student.replace(
    head=Head(student.head.weight_VD + jnp.arange(6.0)[None, :])
  )
  for input, same in (('log_probs', True), ('logits', False)):
    objective = _objective(input=input)
    a, b = (
      objective._pair(_critic(np.float32), s, teacher, _batch())[1]
      for s in (student, shifted)
    )
    assert np.allclose(a, b, atol=1e-4) == same


@KINDS
def test_a_student_like_its_teacher_is_at_chance(kind):
  """Nothing to tell apart; for the relativistic critic, nothing to learn."""
  objective = _objective(kind=kind, gamma=0.0)
  teacher = _outputs('teacher')
  critic, key = _critic(np.float32), jax.random.key(0)

  @jax.jit
  def run(student, teacher):
    def loss(critic):
      own = Own(critic=critic)
      return objective.critic_loss(student, teacher, _batch(), own, key)

    d_critic, metrics = jax.grad(loss, has_aux=True)(critic)
    _, of_loss = objective.imitation(student, teacher, _batch(), Own(), key)
    return metrics, d_critic, of_loss

  metrics, d_critic, of_loss = run(teacher, teacher)
  assert metrics['accuracy'] == 0.5
  assert metrics['margin'] == 0
  np.testing.assert_array_equal(
    metrics['histogram_teacher'], metrics['histogram_student']
  )
  np.testing.assert_allclose(of_loss['reverse_kl'], 0, atol=1e-6)
  if kind == 'rgan':
    np.testing.assert_allclose(metrics['loss'], np.log(2), rtol=1e-5)
    for g in jax.tree.leaves(d_critic):
      np.testing.assert_allclose(g, 0, atol=1e-5)


def test_diagnostics_are_those_of_the_scores():
  objective, critic = _objective(), _critic(np.float32)
  student, teacher, batch = _outputs('student'), _outputs('teacher'), _batch()
  _, metrics = jax.jit(objective.critic_loss)(
    student, teacher, batch, Own(critic=critic), jax.random.key(0)
  )
  rows = [b for b, _ in ENDS]
  d_t, d_s = (
    np.asarray(
      _direct_scores(
        critic,
        objective,
        jnp.einsum('btd,vd->btv', o.hidden_BTD, o.head.weight_VD),
        batch,
      )
    )[rows]
    for o in (teacher, student)
  )
  want = {
    'score_teacher': d_t.mean(),
    'score_student': d_s.mean(),
    'margin': (d_t - d_s).mean(),
    'accuracy': (d_t > d_s).mean(),
    'loss': metrics['penalty'] + np.log1p(np.exp(d_s - d_t)).mean(),
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5)
  for name, d in (('teacher', d_t), ('student', d_s)):
    counts, _ = np.histogram(d, log.HISTOGRAM_EDGES)
    np.testing.assert_array_equal(metrics[f'histogram_{name}'], counts)


def test_the_generators_term_is_that_of_full_logits():
  objective, critic = _objective(g=0.3, rkl_scale=2.0), _critic(np.float32)
  teacher, batch, key = _outputs('teacher'), _batch(), jax.random.key(0)
  own = Own(critic=critic, step=5)

  def ours(student):
    return objective.deception(student, teacher, batch, own, key)

  def by_hand(student):
    z_t, z_s = (
      jnp.einsum('btd,vd->btv', o.hidden_BTD, o.head.weight_VD)
      for o in (teacher, student)
    )
    d_t, d_s = (_direct_scores(critic, objective, z, batch) for z in (z_t, z_s))
    rows = jnp.array([b for b, _ in ENDS])
    generator = jnp.mean(jax.nn.softplus(d_t - d_s)[rows])
    return 0.3 * generator, generator

  student = _outputs('student')
  ((got, metrics), d_got), ((want, generator), d_want) = (
    jax.jit(jax.value_and_grad(f, has_aux=True))(student)
    for f in (ours, by_hand)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(metrics['generator'], generator, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    d_got,
    d_want,
  )


def test_the_generator_waits_for_the_warm_up():
  student, teacher, batch = _outputs('student'), _outputs('teacher'), _batch()
  objective = objectives.make('gakd', critic=CRITIC, warmup_epochs=1.5)
  objective = objective.for_run(steps_per_epoch=4, total_steps=100)
  assert objective.warmup_steps == 6
  own, key = Own(critic=_critic(np.float32)), jax.random.key(0)

  @jax.jit
  def loss(step):
    now = own.replace(step=step)
    return objective.deception(student, teacher, batch, now, key)[0]

  losses = [loss(step) for step in (0, 5, 6)]
  assert losses[:2] == [0, 0]
  assert losses[2] > 1e-3
  with pytest.raises(
    UserError, match='warms up for 6 steps, and the run has 6'
  ):
    objective.for_run(steps_per_epoch=4, total_steps=6)
  fixed = dataclasses.replace(objective, warmup_steps=3)
  assert fixed.for_run(steps_per_epoch=4, total_steps=9).warmup_steps == 3


def test_without_g_there_is_no_critic():
  shape = _shape()
  objective = objectives.make('gakd', g=0.0, critic=CRITIC)
  assert objective.init(jax.random.key(0), shape, shape) == Own()
  assert list(objective.terms()) == ['imitation']


def test_reference_mode_reads_whole_rows_of_logits():
  objective = objectives.make(
    'gakd', critic=CRITIC, reference=True, warmup_steps=0
  )
  assert objective.reads == 'logits'
  assert objective.critic_by_microbatch
  critic, batch = _critic(np.float32), _batch()
  student, teacher = _outputs('student'), _outputs('teacher')
  key = jax.random.key(0)

  def loss(critic):
    return objective.critic_loss(
      student, teacher, batch, Own(critic=critic), key
    )

  (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    critic
  )
  model = nnx.merge(
    critic_lib.definition(critic_lib.config_of(objective.critic, V)), critic
  )
  z_t, z_s = (
    jnp.einsum('btd,vd->btv', o.hidden_BTD, o.head.weight_VD)
    for o in (teacher, student)
  )

  def scores(projection, z_BTV):
    return model(z_BTV @ projection, jnp.ones((B, T), jnp.int32))[:, -1]

  def pair_loss(projection):
    d_t, d_s = scores(projection, z_t), scores(projection, z_s)
    has_B = batch.student.mask_BT.any(axis=1)
    return jnp.sum(jax.nn.softplus(d_s - d_t), where=has_B) / 2

  # The penalty is in the loss, and not in the update.
  want, d_want = jax.jit(jax.value_and_grad(pair_loss))(critic['projection'])
  np.testing.assert_allclose(
    value, 1000 * (want + metrics['penalty']), rtol=1e-4
  )
  assert metrics['penalty'] > 1e-3
  np.testing.assert_allclose(
    gradient['projection'], 1000 * d_want, rtol=1e-3, atol=1e-2
  )


@pytest.mark.slow
def test_the_trunk_can_come_from_a_model(tiny_model_dir):
  path = tiny_model_dir()
  objective = objectives.make('gakd', critic={'init_from': str(path)})
  critic = objective.init(jax.random.key(0), _shape(), _shape()).critic
  source = nnx.to_pure_dict(nnx.state(models.load(path, dtype='float32')))
  for name in ('blocks', 'final_norm'):
    jax.tree.map(np.testing.assert_array_equal, critic[name], source[name])
  width = models.read_config(path).width
  assert critic['projection'].shape == (V, width)
  objective = dataclasses.replace(objective, warmup_steps=0)
  loss, _ = jax.jit(objective.critic_loss)(
    _outputs('student'),
    _outputs('teacher'),
    _batch(),
    Own(critic=critic),
    jax.random.key(0),
  )
  assert np.isfinite(loss)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'kind': 'lsgan'}, "kind='lsgan': .*expected one of rgan, gan, wgan"),
    ({'input': 'prob'}, "input='prob': .*one of log_probs, logits, probs"),
    ({'pooling': 'max'}, "pooling='max': expected one of mean, last"),
    ({'kd': 1.5}, 'kd=1.5: expected a number'),
    ({'g': -0.1}, 'g=-0.1: expected a number .0 or more'),
    ({'critic_steps': 0}, 'critic_steps=0: expected a whole number .1 or more'),
    (
      {'warmup_steps': -1},
      'warmup_steps=-1: expected a whole number .0 or more',
    ),
    (
      {'reference': True, 'input': 'probs'},
      "reference=True has its own input; leave out input='probs'",
    ),
    ({'critic': {'width': 10}}, 'config.critic: width=10 is not a multiple'),
    ({'critic': {'heads': 0}}, 'config.critic: heads=0 must be 1 or more'),
    ({'critic': {'depth': 2}}, "config.critic: no setting 'depth'; known are"),
    ({'critic': {'init_from': 'no/such/model'}}, 'no such directory'),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    objectives.make('gakd', **settings)


def test_the_terms_of_imitation_have_their_weights():
  objective = _objective(kd=0.7, rkl_scale=2.0)
  loss, metrics = objective.imitation(
    _outputs('student'), _outputs('teacher'), _batch(), Own(), None
  )
  want = 0.3 * metrics['ce'] + 0.7 * 2.0 * metrics['reverse_kl']
  np.testing.assert_allclose(loss, want, rtol=1e-5)
