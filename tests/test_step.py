"""The train step: one update by hand, and all the ways that must equal it."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gakd_jax import models, objectives, optim, sharding, step
from gakd_jax.data import pipeline
from gakd_jax.models import transformer

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

DEFINITION, _SHAPES = transformer.split(models.abstract(CONFIG))


def _params(seed):
  """Weights with which distributions have a few nats less than uniform."""
  rng = np.random.default_rng(seed)

  def random(path, x):
    if sharding.path_name(path).endswith('scale'):
      return jnp.ones(x.shape)
    return jnp.asarray(0.4 * rng.standard_normal(x.shape, np.float32))

  return jax.tree_util.tree_map_with_path(random, _SHAPES)


def _documents(seed, lengths):
  """(prompt, response) of random ids for each pair of lengths."""
  rng = np.random.default_rng(seed)
  return [
    tuple(rng.integers(0, V, n, np.int32) for n in pair) for pair in lengths
  ]


def _batch(bins):
  tokens = pipeline.collate(bins, T, pad_id=0)
  return pipeline.Batch(student=tokens, teacher=tokens, align={})


def _batches(steps=3):
  """Rows of 0 to 10 response tokens; those of microbatches differ, too."""
  lengths = [(2, 10), (1, 9), (4, 0), (3, 1), (2, 8), (6, 2), (5, 3), (11, 1)]
  documents = [_documents(seed, lengths) for seed in range(steps)]
  return [_batch([[d] for d in bins]) for bins in documents]


@functools.cache
def _trace(microbatches=1, mesh=None, dtype='float32', remat=False):
  """The traced step of a variant, with its first state, and its mesh."""
  mesh = sharding.make_mesh(**dict(mesh)) if mesh else None
  objective = objectives.make('kld', kd=0.75, head_chunk=CHUNK)
  schedule = optim.make_schedule(RATE, 10, schedule='linear')
  optimizer = optim.make(schedule, **OPTIMIZER)
  state = step.init_state(_params(0), optimizer)
  frozen = {'teacher': _params(1)}
  with _on(mesh):
    places = None
    if mesh:
      places = step.state_shardings(state, mesh)
      state = jax.device_put(state, places[0])
      frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh))
    train_step = step.make_train_step(
      step.Models(DEFINITION, DEFINITION, dtype, remat),
      objective,
      optimizer,
      schedule,
      seed=0,
      microbatches=microbatches,
      out_shardings=places,
    )
    batch = _put(_batches()[0], mesh)
    return train_step.trace(state, frozen, batch), state, frozen, mesh


def _on(mesh):
  return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def _put(batch, mesh):
  return sharding.put_batch(batch, mesh) if mesh else batch


@functools.cache
def _compile(**variant):
  traced, state, frozen, mesh = _trace(**variant)
  with _on(mesh):
    compiled = traced.lower().compile()

  def run(state, batch):
    return compiled(state, frozen, _put(batch, mesh))

  return compiled, run, state


@functools.cache
def _run(**variant):
  """Parameters and metrics after each of three steps."""
  _, run, state = _compile(**variant)
  state = jax.tree.map(jnp.copy, state)  # which the step donates
  results = []
  for batch in _batches():
    state, metrics = run(state, batch)
    results.append(jax.device_get((state.params, metrics)))
  return results


class _NoModels:
  """The student's outputs are its parameters; there is no teacher."""

  def student_outputs(self, params, batch):
    return params

  def teacher_outputs(self, frozen, batch):
    return None


def _simple_step(loss, **settings):
  """The step of loss(student, batch, rng, step), by plain gradient descent."""

  class Simple(objectives.base.Objective):
    def loss(self, student, teacher, batch, extra, critic, rng, step):
      return loss(student, batch, rng, step)

  optimizer = optax.sgd(1.0)
  train_step = step.make_train_step(
    _NoModels(), Simple(), optimizer, lambda _: 1.0, **settings
  )
  return train_step, step.init_state(jnp.ones(()), optimizer)


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
  got, metrics = _run()[0]
  _assert_close(got['student'], want, atol=1e-6)
  want_metrics |= {'learning_rate': RATE, 'tokens': 34}
  _assert_close(metrics, want_metrics, atol=0)


def test_steps_count_and_learn():
  state, results = _compile()[2], _run()
  assert int(state.step) == 0
  rates = [metrics['learning_rate'] for _, metrics in results]
  np.testing.assert_allclose(rates, [RATE, 0.9 * RATE, 0.8 * RATE], rtol=1e-6)
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), results[-1][0], results[0][0]
  )
  assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(
  ('variant', 'atol'),
  [
    ({'microbatches': 2, 'remat': True}, 1e-6),
    ({'microbatches': 4}, 1e-6),
    ({'mesh': (('data', 8),)}, 1e-5),
    ({'mesh': (('data', 2), ('fsdp', 2), ('tensor', 2))}, 1e-5),
  ],
  ids=str,
)
def test_nothing_changes_with(variant, atol):
  for got, want in zip(_run(**variant), _run(), strict=True):
    _assert_close(got, want, atol=atol)


def test_remat_recomputes():
  plain, remade = (
    str(_trace(**kwargs)[0].jaxpr).count('dot_general')
    for kwargs in ({}, {'remat': True})
  )
  assert remade > plain


def test_rows_are_dealt_out_so_that_each_device_keeps_its_own():
  """Microbatch i of M has rows i, i + M, ...: seen by what each one sums."""

  def loss(student, batch, rng, step):
    del rng, step
    first_B = batch.student.ids_BT[:, 0]
    total = student * jnp.sum(first_B)
    return total / batch.num_tokens, {'product': jnp.prod(first_B)}

  ids_BT = np.array([[1], [2], [3], [5], [7], [11], [13], [17]], np.int32)
  tokens = pipeline.Tokens(ids_BT, np.ones_like(ids_BT), ids_BT > 0)
  train_step, state = _simple_step(loss, seed=0, microbatches=4)
  state, metrics = train_step(state, {}, pipeline.Batch(tokens, tokens, {}))
  assert metrics['product'] == 1 * 7 + 2 * 11 + 3 * 13 + 5 * 17
  np.testing.assert_allclose(state.params['student'], 1 - ids_BT.sum() / 8)


def test_a_batch_without_responses_moves_nothing_but_decay():
  documents = _documents(0, [(6, 0)] * B)
  _, run, state = _compile()
  before = jax.device_get(state.params)
  state, metrics = run(
    jax.tree.map(jnp.copy, state), _batch([[d] for d in documents])
  )
  assert metrics['loss'] == metrics['grad_norm'] == metrics['tokens'] == 0
  want = jax.tree_util.tree_map_with_path(
    lambda path, x: x * (1 if 'norm' in str(path) else 1 - RATE * 0.1), before
  )
  _assert_close(state.params, want, atol=1e-7)


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
  (params, metrics), (want_params, want) = _run(dtype='bfloat16')[0], _run()[0]
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
  traced_frozen = _trace()[2]
  _, run, state = _compile()
  state = jax.tree.map(jnp.copy, state)
  run(state, _batches()[0])
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  jax.tree.map(
    np.testing.assert_array_equal, traced_frozen['teacher'], _params(1)
  )


def test_the_same_state_gives_the_same_result_bit_for_bit():
  _, run, state = _compile()
  a, b = (run(jax.tree.map(jnp.copy, state), _batches()[0]) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_randomness_comes_from_seed_step_and_microbatch_alone():
  def loss(student, batch, rng, step):
    del batch
    noise = jax.random.normal(rng)
    return student * noise, {'noise': noise, 'step': step}

  def draws(seed, microbatches=1):
    train_step, state = _simple_step(loss, seed=seed, microbatches=microbatches)
    for _ in range(3):
      state, metrics = train_step(state, {}, _batches(1)[0])
      yield float(metrics['noise'])

  def key(seed, at, i):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), at), i)

  for seed, microbatches in [(3, 1), (4, 1), (3, 2)]:
    want = [
      sum(jax.random.normal(key(seed, at, i)) for i in range(microbatches))
      for at in range(3)
    ]
    np.testing.assert_allclose(list(draws(seed, microbatches)), want, rtol=1e-6)
    assert len({float(x) for x in want}) == 3


def test_no_array_has_the_size_of_logits():
  text = _compile()[0].as_text()
  dims = re.findall(r'\b(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]', text)
  shapes = {tuple(map(int, d.split(','))) for d in dims}
  assert (V, D) in shapes
  assert (CHUNK, V) in shapes
  with_vocabulary = [s for s in shapes if V in s]
  assert max(map(math.prod, with_vocabulary)) == V * D
  assert max(map(math.prod, shapes)) < B * T * V
