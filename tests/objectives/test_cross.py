"""What holds for every method where the two tokenizers differ.

One text of two rows, cut up in two ways, and what the host knows of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import objectives, sharding
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models import DecoderConfig
from gakd_jax.models.transformer import Head, Outputs
from gakd_jax.objectives import vocabularies

T, U, D, E, V, W = 10, 13, 6, 8, 30, 40

_SHORT = ('overlap', 'mined')  # The others take long to compile.
# id: arguments of `objectives.make`.
METHODS = {
  'uld': {'name': 'uld', 'top': 9},
  'overlap': {'name': 'overlap'},
  'mined': {'name': 'mined'},
  'dskd_cma': {'name': 'dskd_cma'},
  'dskd_v2': {'name': 'dskd_v2'},
  'gold': {'name': 'gold', 'kd': 0.7, 'top': 9},
  'alm': {'name': 'alm', 'sizes': (1, 2)},
  'multilevel_ot': {'name': 'multilevel_ot', 'top': 9},
  'mcw': {'name': 'mcw', 'top': 9},
  'mcw_semi_dual': {'name': 'mcw', 'top': 9, 'solver': 'semi_dual'},
  'xtoken': {'name': 'xtoken'},
  'xtoken_hybrid': {'name': 'xtoken', 'hybrid': True, 'top': 9},
}
ALL = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in _SHORT))
    for name in METHODS
  ],
)


def _tokens(starts, ends, length, vocab, seed):
  """Rows with a prompt up to `starts` and a response up to `ends`."""
  at_BT = np.broadcast_to(np.arange(length), (len(starts), length))
  starts_B1, ends_B1 = np.array([starts, ends])[:, :, None]
  ids_BT = np.random.default_rng(seed).integers(0, vocab, at_BT.shape, np.int32)
  return Tokens(
    ids_BT,
    (at_BT < ends_B1).astype(np.int32),
    (at_BT >= starts_B1) & (at_BT < ends_B1),
  )


def _padded(x, pad, value):
  more = ((0, 0), (0, pad)) + ((0, 0),) * (np.ndim(x) - 2)
  return np.pad(np.asarray(x), more, constant_values=value)


@functools.cache
def _batch():
  """Responses of 5 and 3 tokens to the student, 7 and 4 to the teacher."""
  student = _tokens([3, 4], [8, 7], T, V, seed=0)
  teacher = _tokens([4, 2], [11, 6], U, W, seed=1)
  spans = {
    'span_s': (
      T,
      [(3, 0), (4, 1), (5, 1), (6, 2), (7, 3)],
      [(4, 0), (5, 1), (6, 2)],
    ),
    'span_t': (
      U,
      [(4, 0), (5, 0), (6, 1), (7, 2), (8, 2), (9, 2), (10, 3)],
      [(2, 0), (3, 1), (4, 1), (5, 2)],
    ),
  }
  align = {}
  for key, (length, *rows) in spans.items():
    align[key] = np.full((2, length), -1, np.int32)
    for b, row in enumerate(rows):
      at, n = np.array(row).T
      align[key][b, at] = n
  # Of one span each, whose tokens cover it alone.
  align['pairs_t'] = np.full((2, T), -1, np.int32)
  align['pairs_t'][[0, 1, 1], [7, 4, 6]] = [10, 2, 5]
  align['dtw_t'] = np.full((2, T), -1, np.int32)
  align['dtw_t'][0, 2:7] = [3, 5, -1, 6, 9]
  align['dtw_t'][1, 3:6] = [1, 2, -1]
  align['path_s'] = np.array(
    [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, -1]], np.int32
  )
  align['path_t'] = np.array(
    [[0, 1, 3, 4, 6, 8, 9], [0, 0, 1, 2, 3, 4, -1]], np.int32
  )
  align['path_d'] = np.array(
    [[0, 2, 1, 4, 0, 6, 2], [2, 2, 0, 3, 4, 1, -1]], np.int32
  )
  return Batch(student, teacher, align)


def _models():
  rng = np.random.default_rng(2)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  return [
    Outputs(normal(2, t, d), Head(normal(v, d)), normal(v, d))
    for t, d, v in ((T, D, V), (U, E, W))
  ]


def _constants():
  """20 tokens of one string; others of the student are two pieces."""
  s_strings = [chr(97 + i) for i in range(20)]
  s_strings += [chr(97 + i) + chr(98 + i) for i in range(10)]
  t_strings = [chr(97 + i) for i in range(20)] + [str(i) for i in range(20)]
  t_strings = t_strings[::-1]
  constants = vocabularies.projection_of(
    s_strings, t_strings, [True] * V, V=V, U=W, decay=0.1
  )
  rng = np.random.default_rng(3)
  return constants | {
    'space_s': rng.random(V) < 0.4,
    'space_t': rng.random(W) < 0.4,
  }


@functools.cache
def _method(name, chunk):
  objective = objectives.make(**METHODS[name], head_chunk=chunk)
  shapes = [
    DecoderConfig(v, d, 0, 0, 0, 0, 0, False, 0, 0, 0)
    for v, d in ((V, D), (W, E))
  ]
  own = objective.init(jax.random.key(0), *shapes)
  constants = jax.tree.map(jnp.asarray, _constants())
  if name == 'mined':
    # Whatever is read, so that warping pairs teach.
    read_BT = np.take_along_axis(
      _batch().teacher.ids_BT, np.maximum(_batch().align['dtw_t'], 0), 1
    )
    nearest_U = np.arange(W, dtype=np.int32)[::-1] % V
    nearest_U[read_BT[0]] = _batch().student.ids_BT[0]
    constants |= vocabularies.nearest_of(nearest_U, V)
  return objective, own.replace(constants=constants, step=1)


@functools.cache
def _compiled(name, chunk=4):
  """(models, batch) -> (loss, metrics), gradients of the student's."""
  objective, own = _method(name, chunk)

  def value(student, teacher, batch, own):
    student, teacher = (
      x.replace(head=x.head.gathered()) for x in (student, teacher)
    )
    total, metrics = 0, {}
    for term in objective.terms().values():
      loss, new = term(student, teacher, batch, own, jax.random.key(0))
      total, metrics = total + loss, metrics | new
    return total, metrics

  f = jax.jit(jax.value_and_grad(value, has_aux=True, allow_int=True))

  def run(models, batch, totals=None, own=own):
    batch = batch.replace(totals=totals or objective.count(batch))
    values, d = f(*models, batch, own)
    return values, (d.hidden_BTD, d.head.weight_VD)

  return run


@functools.cache
def _usual(name):
  return _compiled(name)(_models(), _batch())


def _assert_close(got, want, rtol=2e-5, atol=2e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    got,
    want,
  )


@ALL
def test_all_terms_count_and_teach(name):
  (loss, metrics), gradients = _usual(name)
  assert np.isfinite(loss)
  assert all(x != 0 for k, x in metrics.items() if 't2s' not in k), metrics
  for d in gradients:
    assert np.isfinite(d).all()
    assert np.abs(d).max() > 1e-3


@ALL
def test_in_one_chunk_it_is_the_same(name):
  _assert_close(_compiled(name, 1000)(_models(), _batch()), _usual(name))


@ALL
def test_padding_does_not_matter(name):
  batch, models = _batch(), _models()
  wide = batch.replace(
    student=jax.tree.map(lambda x: _padded(x, 3, 0), batch.student),
    teacher=jax.tree.map(lambda x: _padded(x, 2, 0), batch.teacher),
    align={
      k: _padded(x, {'span_s': 3, 'dtw_t': 3, 'pairs_t': 3}.get(k, 2), -1)
      for k, x in batch.align.items()
    },
  )
  widened = [
    x.replace(hidden_BTD=_padded(x.hidden_BTD, pad, 7.0))
    for x, pad in zip(models, (3, 2), strict=True)
  ]
  (got, (d_hidden, d_head)), want = _compiled(name)(widened, wide), _usual(name)
  _assert_close((got, (d_hidden[:, :T], d_head)), want)
  np.testing.assert_array_equal(d_hidden[:, T:], 0)


@ALL
def test_rows_sum_to_the_whole(name):
  batch, models = _batch(), _models()
  objective, _ = _method(name, 4)
  totals = objective.count(batch)
  parts = []
  for b in range(2):
    # Another row that is none, so that shapes are the same.
    is_row = np.arange(2)[:, None] == b
    one = batch.replace(
      **{
        side: dataclasses.replace(
          getattr(batch, side),
          segments_BT=getattr(batch, side).segments_BT * is_row,
          mask_BT=getattr(batch, side).mask_BT & is_row,
        )
        for side in ('student', 'teacher')
      },
      align={k: np.where(is_row, x, -1) for k, x in batch.align.items()},
    )
    parts.append(_compiled(name)(models, one, totals))
  _assert_close(jax.tree.map(jnp.add, *parts), _usual(name))


@pytest.mark.slow
@ALL
def test_eight_devices_are_one(name):
  """Rows over four, vocabularies over two, heads gathered as a step does."""
  batch, models = jax.tree.map(
    lambda x: np.concatenate([x] * 2),
    (_batch(), [x.hidden_BTD for x in _models()]),
  )
  models = [
    x.replace(hidden_BTD=hidden)
    for x, hidden in zip(_models(), models, strict=True)
  ]
  objective, own = _method(name, 4)
  totals = objective.count(batch)
  want = _compiled(name)(models, batch, totals)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
  table = NamedSharding(mesh, P('tensor', 'fsdp'))
  with jax.set_mesh(mesh):
    placed = [
      Outputs(
        jax.device_put(x.hidden_BTD, rows),
        Head(jax.device_put(x.head.weight_VD, table)),
        jax.device_put(x.embedding_VD, table),
      )
      for x in models
    ]
    own = jax.device_put(own, NamedSharding(mesh, P()))
    got = _compiled(name)(placed, jax.device_put(batch, rows), totals, own)
  _assert_close(got, want, rtol=1e-4, atol=1e-5)
