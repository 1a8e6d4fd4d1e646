"""The train step: one update by hand, and all the ways that must equal it."""

import contextlib
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gakd_jax import hlo, keys, models, objectives, optim, sharding, step
from gakd_jax.data import pipeline
from gakd_jax.models import pair, transformer

B, T, D, V = 8, 12, 16, 100
CHUNK = 10
CONFIG = models.DecoderConfig(
  vocab_size=V,
  width=D,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  ff_width=24,
  tied_head=True,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=T,
)
# eps: where gradients are rounding errors, Adam with 1e-8 would make steps of
# the full learning rate of them.
OPTIMIZER = {'eps': 1e-4, 'weight_decay': 0.1, 'clip_norm': 0.5}
RATE = 1e-2
_CRITIC_OPTIMIZER = optim.make(lambda _: RATE, eps=1e-4)

DEFINITION, _SHAPES = transformer.split(models.abstract(CONFIG))

METHODS = {
  'kld': {'kd': 0.75},
  'gakd': {
    'kd': 0.75,
    'g': 0.5,
    'warmup_steps': 1,
    'critic': {'width': 8, 'layers': 1, 'heads': 2, 'ff_width': 12},
  },
}
# Who wrote which row of each batch: both, the student alone, the data alone.
WRITTEN = (np.arange(B) % 3 == 0, np.ones(B, bool), np.zeros(B, bool))


def _objective(method):
  settings = METHODS | {'distillm2': {'beta': 0.3}}
  return objectives.make(method, head_chunk=CHUNK, **settings[method])


def _params(seed, shapes=_SHAPES):
  """Weights with which distributions have a few nats less than uniform."""
  rng = np.random.default_rng(seed)

  def random(path, x):
    if sharding.path_name(path).endswith('scale'):
      return jnp.ones(x.shape)
    return jnp.asarray(0.4 * rng.standard_normal(x.shape, np.float32))

  return jax.tree_util.tree_map_with_path(random, shapes)


def _documents(seed, lengths):
  """(prompt, response) of random ids for each pair of lengths."""
  rng = np.random.default_rng(seed)
  return [
    tuple(rng.integers(0, V, n, np.int32) for n in pair) for pair in lengths
  ]


def _batch(bins):
  tokens = pipeline.collate(bins, T, pad_id=0)
  return pipeline.Batch(student=tokens, teacher=tokens)


def _batches(steps=3, written=False):
  """Rows of 0 to 10 response tokens; those of microbatches differ, too."""
  lengths = [(2, 10), (1, 9), (4, 0), (3, 1), (2, 8), (6, 2), (5, 3), (11, 1)]
  documents = [_documents(seed, lengths) for seed in range(steps)]
  batches = [_batch([[d] for d in bins]) for bins in documents]
  if written:
    pairs = zip(batches, WRITTEN, strict=False)
    batches = [batch.replace(written_B=x) for batch, x in pairs]
  return batches


def _step_of(method, microbatches=1, places=None):
  schedule = optim.make_schedule(RATE, 10, schedule='linear')
  return step.make_train_step(
    _objective(method),
    optim.make(schedule, **OPTIMIZER),
    schedule,
    critic_optimizer=_CRITIC_OPTIMIZER,
    seed=0,
    microbatches=microbatches,
    out_shardings=places,
  )


@functools.cache
def _trace(
  method='kld',
  microbatches=1,
  mesh=None,
  dtype='float32',
  remat='none',
  written=False,
):
  """The traced step of a variant, with its first state, models and mesh."""
  mesh = sharding.make_mesh(**dict(mesh)) if mesh else None
  objective = _objective(method)
  own = objective.init(jax.random.key(0), CONFIG, CONFIG)
  own = own.replace(critic=_params(2, own.critic))
  optimizer = optim.make(lambda _: RATE, **OPTIMIZER)
  state = step.init_state(_params(0), own, optimizer, _CRITIC_OPTIMIZER)
  frozen = {'teacher': _params(1)}
  with _on(mesh):
    places = None
    if mesh:
      places = sharding.shardings(state, mesh), sharding.replicated(mesh)
      state = jax.device_put(state, places[0])
      frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh))
    train_step = _step_of(method, microbatches, places)
    batch = _put(_batches(written=written)[0], mesh)
    both = pair.Models(
      DEFINITION, DEFINITION, CONFIG, CONFIG, frozen, jnp.dtype(dtype), remat
    )
    return train_step.trace(state, both, batch), state, both, mesh


def _on(mesh):
  return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def _put(batch, mesh):
  return sharding.put_batch(batch, mesh) if mesh else batch


@functools.cache
def _compile(**variant):
  traced, state, both, mesh = _trace(**variant)
  with _on(mesh):
    compiled = traced.lower().compile()

  def run(state, batch):
    return compiled(state, both, _put(batch, mesh))

  return compiled, run, state


@functools.cache
def _run(written=False, **variant):
  """Parameters, metrics and critic after each of three steps."""
  if written:
    variant['written'] = True
  _, run, state = _compile(**variant)
  state = jax.tree.map(jnp.copy, state)  # which the step donates
  results = []
  for batch in _batches(written=written):
    state, metrics = run(state, batch)
    results.append(jax.device_get((state.params, metrics, state.critic)))
  return results


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['frozen'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _Numbers:
  """Models of one number each: all of their hidden states."""

  frozen: dict
  head_name = 'none'

  def alone(self):
    return _Numbers({})

  def heads(self, params):
    return None, None

  def student_hidden(self, params, batch, key):
    return params['w'] * jnp.ones((*batch.student.ids_BT.shape, 1))

  def teacher_hidden(self, batch):
    if not self.frozen:
      return None
    return self.student_hidden(self.frozen['teacher'], batch, None)

  def pair(self, params, heads, hiddens):
    return tuple(
      x if x is None else transformer.Outputs(x, None) for x in hiddens
    )


def _descend(objective, w, critic=None, **settings):
  """The step by plain gradient descent of rate 1, and its first state."""
  sgd = optax.sgd(1.0)
  train_step = step.make_train_step(
    objective, sgd, lambda _: 1.0, critic_optimizer=sgd, **settings
  )
  own = objectives.base.Own(critic=critic or {})
  return train_step, step.init_state({'w': jnp.float32(w)}, own, sgd, sgd)


class _Alone(objectives.base.Objective):
  """Of loss(student's hidden states, batch, key, step) alone."""

  needs_teacher = False

  def __init__(self, loss):
    object.__setattr__(self, 'function', loss)

  def loss(self, student, teacher, batch, own, key):
    assert teacher is None
    return self.function(student.hidden_BTD, batch, key, own.step)


def _assert_close(got, want, atol):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol),
    got,
    want,
  )


def test_a_step_is_that_of_optax_on_full_logits():
  params, t_params = _params(0), _params(1)
  batch = _batches()[0].student
  ids_BT, segments_BT = batch.ids_BT, batch.segments_BT

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    log_q, log_p = (
      jax.nn.log_softmax(nnx.merge(DEFINITION, p).logits(ids_BT, segments_BT))
      for p in (params, t_params)
    )
    b, t = np.nonzero(batch.mask_BT)
    log_q_NV, log_p_NV = log_q[b, t - 1], log_p[b, t - 1]
    ce = -jnp.sum(log_q_NV[np.arange(b.size), ids_BT[b, t]])
    kl = jnp.sum(jnp.exp(log_q_NV) * (log_q_NV - log_p_NV))
    n = b.size
    return (0.25 * ce + 0.75 * kl) / n, (ce / n, kl / n)

  @jax.jit
  def by_hand(params):
    (value, (ce, kl)), grads = loss(params)
    norm = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)) ** 0.5
    clipped = jax.tree.map(lambda g: g * 0.5 / norm, grads)
    decays = jax.tree_util.tree_map_with_path(
      lambda path, _: 'norm' not in str(path), params
    )
    adam = optax.adamw(RATE, eps=1e-4, weight_decay=0.1, mask=decays)
    updates, _ = adam.update(clipped, adam.init(params), params)
    metrics = {'loss': value, 'ce': ce, 'reverse_kl': kl, 'grad_norm': norm}
    return optax.apply_updates(params, updates), metrics

  want, want_metrics = by_hand(params)
  assert want_metrics['grad_norm'] > 0.5  # so that clipping does something
  got, metrics, _ = _run()[0]
  _assert_close(got['student'], want, atol=1e-6)
  want_metrics |= {'learning_rate': RATE, 'tokens': 34}
  metrics = dict(metrics)
  skipped = [metrics.pop(k) for k in [*metrics] if k.startswith('skipped')]
  assert not any(skipped)
  _assert_close(metrics, want_metrics, atol=0)


def test_steps_count_and_learn():
  state, results = _compile()[2], _run()
  assert int(state.step) == 0
  rates = [metrics['learning_rate'] for _, metrics, _ in results]
  np.testing.assert_allclose(rates, [RATE, 0.9 * RATE, 0.8 * RATE], rtol=1e-6)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), results[-1][0], results[0][0]
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
  ('variant', 'atol'),
  [
    ({'microbatches': 2, 'remat': 'blocks'}, 1e-6),
    ({'microbatches': 4}, 1e-6),
    ({'mesh': (('data', 2), ('fsdp', 2), ('tensor', 2))}, 1e-5),
    *(
      pytest.param(variant, 1e-5, marks=pytest.mark.slow)
      for variant in (
        {'mesh': (('data', 8),)},
        {'mesh': (('data', 1), ('tensor', 8))},
        {'mesh': (('data', 1), ('fsdp', 4)), 'microbatches': 2},
      )
    ),
  ],
  ids=str,
)
def test_nothing_changes_with(variant, atol):
  for got, want in zip(_run(**variant), _run(), strict=True):
    _assert_close(got, want, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('variant', 'atol'),
  [
    ({'microbatches': 4}, 1e-5),
    ({'mesh': (('data', 2), ('fsdp', 2), ('tensor', 2))}, 3e-5),
  ],
  ids=str,
)
def test_nothing_changes_with_a_critic_and(variant, atol):
  """Second derivatives lose a digit or two to the order of sums."""
  for got, want in zip(
    _run(method='gakd', **variant), _run(method='gakd'), strict=True
  ):
    assert want[1]['critic/penalty'] > 1e-3
    _assert_close(got[0], want[0], atol=atol)
    _assert_close(got[2], want[2], atol=atol)
    for name, value in want[1].items():
      np.testing.assert_allclose(
        got[1][name], value, rtol=1e-3, atol=atol, err_msg=name
      )


def _kl(log_a_NV, log_b_NV):
  return jnp.sum(jnp.exp(log_a_NV) * (log_a_NV - log_b_NV), axis=1)


def _mean(x_N, where_N):
  """0 of none."""
  return jnp.sum(x_N * where_N) / jnp.maximum(jnp.sum(where_N), 1)


def _kld_by_hand(log_p_NV, log_q_NV, ce_N, written_N):
  ce = _mean(ce_N, ~written_N)
  kl = jnp.mean(_kl(log_q_NV, log_p_NV))
  return 0.25 * ce + 0.75 * kl, {'ce': ce, 'reverse_kl': kl}


def _distillm2_by_hand(log_p_NV, log_q_NV, ce_N, written_N):
  def mix(a_NV, b_NV):
    return jnp.log(0.1 * jnp.exp(a_NV) + 0.9 * jnp.exp(b_NV))

  forward = _mean(_kl(log_p_NV, mix(log_p_NV, log_q_NV)), ~written_N)
  reverse = _mean(_kl(log_q_NV, mix(log_q_NV, log_p_NV)), written_N)
  ce = _mean(ce_N, ~written_N)
  metrics = {'ce': ce, 'skew_forward': forward, 'skew_reverse': reverse}
  return 0.7 * forward + 0.3 * reverse, metrics


@pytest.mark.parametrize(
  ('method', 'by_hand'),
  [
    ('kld', _kld_by_hand),
    pytest.param('distillm2', _distillm2_by_hand, marks=pytest.mark.slow),
  ],
)
def test_who_wrote_a_row_decides_what_it_counts_for(method, by_hand):
  """Each mean is over its own tokens, in a batch of both, and of one alone.

  The text is given: nothing flows through how it came about.
  """

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def value(params, ids_BT, segments_BT, rows_N, places_N, written_N):
    log_q_NV, log_p_NV = (
      jax.nn.log_softmax(nnx.merge(DEFINITION, p).logits(ids_BT, segments_BT))[
        rows_N, places_N - 1
      ]
      for p in (params, _params(1))
    )
    n = jnp.arange(rows_N.size)
    ce_N = -log_q_NV[n, ids_BT[rows_N, places_N]]
    loss, metrics = by_hand(log_p_NV, log_q_NV, ce_N, written_N)
    entropy_N = -jnp.sum(jnp.exp(log_q_NV) * log_q_NV, axis=1)
    return loss, metrics | {'entropy': _mean(entropy_N, written_N)}

  params = _params(0)
  steps = _run(method=method, written=True)
  for (new, metrics, _), batch in zip(
    steps, _batches(written=True), strict=True
  ):
    tokens = batch.student
    at = np.nonzero(tokens.mask_BT)
    (loss, want), grads = value(
      params, tokens.ids_BT, tokens.segments_BT, *at, batch.written_B[at[0]]
    )
    want |= {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
    totals = _objective(method).count(batch)
    assert min(totals[name] for name in ('data', 'written')) >= 1
    _assert_close({k: metrics[k] for k in want}, want, atol=1e-6)
    assert want['grad_norm'] > 1e-3
    params = new['student']
  ce, entropy = ([m[k] for _, m, _ in steps] for k in ('ce', 'entropy'))
  assert ce[1] == entropy[2] == 0, 'nobody to imitate, nobody who wrote'
  assert min(ce[0], ce[2], entropy[0], entropy[1]) > 1


@pytest.mark.parametrize(
  'method', ['kld', pytest.param('distillm2', marks=pytest.mark.slow)]
)
def test_microbatches_do_not_change_what_a_row_counts_for(method):
  """They hold other shares of what was written than the whole batch."""
  variant = {'method': method, 'written': True}
  for got, want in zip(
    _run(microbatches=4, **variant), _run(**variant), strict=True
  ):
    _assert_close(got, want, atol=1e-6)


@pytest.mark.slow
def test_a_critic_reads_every_row_whoever_wrote_it():
  got, want = _run(method='gakd', written=True), _run(method='gakd')
  for (_, metrics, critic), (_, plain, _) in zip(got, want, strict=True):
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(critic))
    assert np.isfinite(metrics['loss'])
    assert metrics.keys() - plain.keys() == {'entropy'}
  _assert_close(got[0][2], want[0][2], atol=1e-6)
  assert got[1][1]['ce'] == 0


def test_remat_recomputes():
  plain, some, all_of_it = (
    str(_trace(remat=remat)[0].jaxpr).count('dot_general')
    for remat in ('none', 'products', 'blocks')
  )
  assert plain < some < all_of_it


def test_rows_are_dealt_out_so_that_each_device_keeps_its_own():
  """Microbatch i of M has rows i, i + M, ...: seen by what each one sums."""

  def loss(hidden_BTD, batch, key, step):
    del key, step
    first_B = batch.student.ids_BT[:, 0]
    total = jnp.sum(hidden_BTD[:, 0, 0] * first_B)
    return total / batch.totals['tokens'], {'product': jnp.prod(first_B)}

  ids_BT = np.array([[1], [2], [3], [5], [7], [11], [13], [17]], np.int32)
  tokens = pipeline.Tokens(ids_BT, np.ones_like(ids_BT), ids_BT > 0)
  train_step, state = _descend(_Alone(loss), 1.0, seed=0, microbatches=4)
  batch = pipeline.Batch(tokens, tokens)
  state, metrics = train_step(state, _Numbers({}), batch)
  assert metrics['product'] == 1 * 7 + 2 * 11 + 3 * 13 + 5 * 17
  moved = 1 - state.params['student']['w']
  np.testing.assert_allclose(moved, ids_BT.sum() / 8)


@pytest.mark.parametrize('microbatches', [1, 4])
@pytest.mark.parametrize('by_microbatch', [False, True])
def test_the_student_meets_the_updated_critic(microbatches, by_microbatch):
  """The critic w loses a share of 1 a step; the student's gradient is w."""

  class Fake(objectives.base.Objective):
    critic_steps = 2
    critic_by_microbatch = by_microbatch

    def loss(self, student, teacher, batch, own, key):
      share = batch.student.ids_BT.shape[0] / B
      return own.critic['w'] * jnp.mean(student.hidden_BTD) * share, {}

    def critic_loss(self, student, teacher, batch, own, key):
      share, w = student.hidden_BTD.shape[0] / B, own.critic['w']
      # Both sides are here, and neither gets a gradient.
      seen = jnp.mean(student.hidden_BTD) + jnp.mean(teacher.hidden_BTD)
      return w * seen * share, {'w': w * share}

  train_step, state = _descend(
    Fake(),
    1.0,
    critic={'w': jnp.float32(9.0)},
    seed=0,
    microbatches=microbatches,
  )
  models_now = _Numbers({'teacher': {'w': jnp.float32(0.5)}})
  state, metrics = train_step(state, models_now, _batches(1)[0])
  np.testing.assert_allclose(state.critic['w'], 9.0 - 2 * 1.5)
  moved = 1.0 - state.params['student']['w']
  if by_microbatch:  # Each one's student meets what it has left of the critic.
    after = 9.0 - 3.0 * np.arange(1, microbatches + 1) / microbatches
    np.testing.assert_allclose(moved, after.mean())
  else:
    np.testing.assert_allclose(moved, 6.0)
    np.testing.assert_allclose(metrics['critic/w'], 9.0)


@pytest.mark.parametrize('microbatches', [1, 4])
def test_terms_are_summed_and_compared(microbatches):
  """Gradients of the hidden states by two terms: a, and -a where t is even."""

  class Two(objectives.base.Objective):
    needs_teacher = False

    def terms(self):
      return {'first': self.first, 'second': self.second}

    def first(self, student, teacher, batch, own, key):
      return 2 * jnp.sum(student.hidden_BTD), {'seen': own.memory['seen']}

    def second(self, student, teacher, batch, own, key):
      return -jnp.sum(student.hidden_BTD[:, ::2]), {}

    def remember(self, own, metrics):
      return {'seen': own.memory['seen'] + metrics['tokens']}

  train_step, state = _descend(Two(), 1.0, seed=0, microbatches=microbatches)
  state = state.replace(memory={'seen': jnp.zeros((), jnp.int32)})
  batch = _batches(1)[0]
  state, metrics = train_step(state, _Numbers({}), batch)
  n = B * T
  np.testing.assert_allclose(1 - state.params['student']['w'], 2 * n - n / 2)
  want = {
    'loss': 2 * n - n / 2,
    'hidden_grad_first': 2 * n**0.5,
    'hidden_grad_second': (n / 2) ** 0.5,
    'hidden_grad_cosine': -(0.5**0.5),
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
  # What the method remembers is what it saw before, and goes on.
  assert metrics['seen'] == 0
  assert state.memory['seen'] == batch.student.mask_BT.sum()


@pytest.mark.slow
def test_cached_hidden_states_stand_in_for_the_teacher():
  _, state, both, _ = _trace()
  batch = _batches()[0]
  cached = batch.replace(
    cached={'teacher_hidden': both.teacher_hidden(batch)},
    teacher=jax.tree.map(np.zeros_like, batch.teacher),
  )
  train_step = _step_of('kld')
  got, want = (
    train_step(jax.tree.map(jnp.copy, state), both, b) for b in (cached, batch)
  )
  _assert_close(got, want, atol=1e-6)


def _pairs(distance, steps):
  """Metrics of steps in which the student stays where it is.

  At distance 0 it is the teacher. The critic starts fresh and learns.
  """
  state, both = _trace(method='gakd')[1:3]
  run = _compile(method='gakd')[1]
  own = _objective('gakd').init(jax.random.key(0), CONFIG, CONFIG)
  state = jax.tree.map(jnp.copy, state.replace(critic=own.critic))
  student = jax.tree.map(
    lambda t, s: t + distance * (s - t), both.frozen['teacher'], _params(0)
  )
  for batch in _batches(steps):
    state = state.replace(
      step=jnp.int32(5),  # after the warm-up
      params={'student': jax.tree.map(jnp.copy, student), 'extra': {}},
    )
    state, metrics = run(state, batch)
    yield metrics


@pytest.mark.slow
def test_without_a_difference_a_critic_is_at_chance_and_pushes_nobody():
  same, different = (next(_pairs(d, 1)) for d in (0.0, 1.0))
  assert same['critic/accuracy'] == 0.5
  assert same['critic/margin'] == 0
  # The updated critic has learned from rounding errors only.
  assert same['hidden_grad_generator'] < 1e-5
  assert different['hidden_grad_generator'] > 1e-3


@pytest.mark.slow
def test_a_critic_tells_an_untrained_student_and_hardly_a_good_one():
  """Accuracy on new text, after 40 updates against a student that stays."""
  far, near, same = (
    np.mean([m['critic/accuracy'] for m in list(_pairs(d, 60))[40:]])
    for d in (1.0, 0.03, 0.0)
  )
  assert far > 0.9
  assert far > near > same
  assert abs(same - 0.5) < 0.1


@pytest.mark.parametrize(
  'method', ['kld', pytest.param('gakd', marks=pytest.mark.slow)]
)
def test_a_batch_without_responses_moves_nothing(method):
  """No moments, no weights that decay: only the number of the step."""
  documents = _documents(0, [(6, 0)] * B)
  _, run, state = _compile(method=method)
  state, _ = run(jax.tree.map(jnp.copy, state), _batches()[0])
  before = jax.device_get(state)
  state, metrics = run(state, _batch([[d] for d in documents]))
  assert metrics['loss'] == metrics['grad_norm'] == metrics['tokens'] == 0
  assert metrics['skipped'] == metrics['skipped/no_text'] == 1
  assert all(np.all(np.isfinite(x)) for x in metrics.values())
  assert (state.step, before.step) == (2, 1)
  state = state.replace(step=before.step, skips=before.skips)
  jax.tree.map(np.testing.assert_array_equal, state, before)


def _take(before, taken, move, metrics, *_):
  """In the place of `skips.take_or_leave`: any step is taken."""
  params, opt_state = move(before.params, before.opt_state)
  taken = taken.replace(params=params, opt_state=opt_state)
  return taken.replace(step=before.step + 1), metrics


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_what_skips_steps_changes_no_bit_of_a_good_one(
  method, monkeypatch, whole_compiler
):
  _, state, both, _ = _trace(method=method)
  batch = _batches()[0]

  def take():
    # Not what others have compiled of it, for whom less is optimised.
    return _step_of(method)(jax.tree.map(jnp.copy, state), both, batch)

  got = take()
  monkeypatch.setattr(step.skips, 'take_or_leave', _take)
  want = take()
  jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
  assert got[1].keys() - want[1].keys() == {
    k for k in got[1] if k.startswith('skipped')
  }
  jax.tree.map(
    np.testing.assert_array_equal, {k: got[1][k] for k in want[1]}, want[1]
  )


@pytest.mark.slow
def test_what_skips_steps_sends_numbers_between_devices_and_no_array(
  monkeypatch,
):
  variant = {'mesh': (('data', 2), ('fsdp', 2), ('tensor', 2))}
  guarded, _, state = _compile(**variant)
  _, _, both, mesh = _trace(**variant)
  monkeypatch.setattr(step.skips, 'take_or_leave', _take)
  with _on(mesh):
    places = sharding.shardings(state, mesh), sharding.replicated(mesh)
    batch = _put(_batches()[0], mesh)
    plain = _step_of('kld', places=places).lower(state, both, batch).compile()
  sent, usual = (
    sum(t.sent for t in hlo.transfers(x.as_text())) for x in (guarded, plain)
  )
  # A truth for each of a few dozen arrays.
  assert usual < sent < usual + 100 < 1.01 * usual


def test_packed_rows_equal_separate_rows():
  """Three documents in a row: in loss, and in the moments of the gradient."""
  documents = _documents(5, [(2, 3), (3, 1), (1, 2), (5, 6)])
  empty = [[]] * (B - 4)
  separate = [*([d] for d in documents), *empty]
  packed = [documents[:3], documents[3:], [], [], *empty]
  _, run, state = _compile()
  got, want = (
    run(jax.tree.map(jnp.copy, state), _batch(bins))
    for bins in (packed, separate)
  )
  assert got[1]['tokens'] == 12
  _assert_close(got, want, atol=1e-6)


def test_bf16_computes_beside_fp32_master_weights():
  """What bf16 costs: 8 bits of each activation, none of the parameters."""
  (params, metrics, _), (want_params, want, _) = (
    _run(dtype='bfloat16')[0],
    _run()[0],
  )
  for name in ('loss', 'ce', 'reverse_kl', 'grad_norm'):
    assert metrics[name] == pytest.approx(want[name], rel=0.02)
    assert metrics[name] != want[name]
  for x, y in zip(*map(jax.tree.leaves, (params, want_params)), strict=True):
    assert x.dtype == np.float32
    # Adam's steps are as large as the rate, whatever the size of a gradient.
    assert 0 < np.abs(x - y).mean() < 0.2 * RATE
  for x in jax.tree.leaves(_compile(dtype='bfloat16')[2].opt_state):
    assert x.dtype in (np.float32, np.int32)


def test_the_state_is_donated_and_the_teacher_is_not():
  both = _trace()[2]
  _, run, state = _compile()
  state = jax.tree.map(jnp.copy, state)
  run(state, _batches()[0])
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  teacher = both.frozen['teacher']
  jax.tree.map(np.testing.assert_array_equal, teacher, _params(1))


def test_the_same_state_gives_the_same_result_bit_for_bit():
  _, run, state = _compile()
  a, b = (run(jax.tree.map(jnp.copy, state), _batches()[0]) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_randomness_comes_from_seed_step_and_microbatch_alone():
  def loss(hidden_BTD, batch, key, step):
    del batch
    noise = jax.random.normal(key)
    return jnp.mean(hidden_BTD) * noise, {'noise': noise}

  def draws(seed, microbatches=1):
    train_step, state = _descend(
      _Alone(loss), 1.0, seed=seed, microbatches=microbatches
    )
    for _ in range(3):
      state, metrics = train_step(state, _Numbers({}), _batches(1)[0])
      yield float(metrics['noise'])

  def key(seed, at, i):
    root = jax.random.fold_in(keys.of(seed, 'step'), at)
    return jax.random.fold_in(jax.random.split(root, 3)[0], i)

  for seed, microbatches in [(3, 1), (4, 1), (3, 2)]:
    want = [
      sum(jax.random.normal(key(seed, at, i)) for i in range(microbatches))
      for at in range(3)
    ]
    np.testing.assert_allclose(list(draws(seed, microbatches)), want, rtol=1e-6)
    assert len({float(x) for x in want}) == 3


@pytest.mark.parametrize(
  'method',
  [pytest.param(x, marks=[pytest.mark.slow] * (x == 'gakd')) for x in METHODS],
)
def test_no_array_has_the_size_of_logits(method):
  text = _compile(method=method)[0].as_text()
  dims = re.findall(r'\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]', text)
  shapes = {tuple(map(int, d.split(','))) for d in dims}
  assert (V, D) in shapes
  assert (CHUNK, V) in shapes
  with_vocabulary = [s for s in shapes if V in s]
  assert max(map(math.prod, with_vocabulary)) == V * D
  assert max(map(math.prod, shapes)) < B * T * V


@pytest.mark.parametrize(
  'microbatches', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_dropout_and_the_critic_draw_for_themselves(microbatches):
  """Each microbatch, and each update of the critic, something else."""

  class Noisy(_Numbers):
    def student_hidden(self, params, batch, key):
      hidden_BTD = super().student_hidden(params, batch, key)
      return hidden_BTD * (1 if key is None else jax.random.normal(key))

  jax.tree_util.register_dataclass(Noisy, ['frozen'], [])

  class Fake(objectives.base.Objective):
    critic_steps = 2

    def loss(self, student, teacher, batch, own, key):
      return jnp.mean(student.hidden_BTD), {}

    def critic_loss(self, student, teacher, batch, own, key):
      return own.critic['w'] * jax.random.normal(key), {}

  train_step, state = _descend(
    Fake(), 1.0, {'w': jnp.float32(9.0)}, seed=3, microbatches=microbatches
  )
  models_now = Noisy({'teacher': {'w': jnp.float32(0.5)}})
  state, _ = train_step(state, models_now, _batches(1)[0])
  _, critic_key, dropout_key = jax.random.split(
    jax.random.fold_in(keys.of(3, 'step'), 0), 3
  )

  if microbatches == 1:
    critic_key = jax.random.fold_in(critic_key, 0)

  def draws(key):
    return [
      float(jax.random.normal(jax.random.fold_in(key, i)))
      for i in range(microbatches)
    ]

  np.testing.assert_allclose(
    1 - state.params['student']['w'], sum(draws(dropout_key)), rtol=1e-5
  )
  updates = [sum(draws(key)) for key in jax.random.split(critic_key)]
  np.testing.assert_allclose(9 - state.critic['w'], sum(updates), rtol=1e-5)
