"""Meshes, global batches, and the table that places parameters."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, sharding


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({}, (8, 1, 1)),
    ({'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
    ({'data': 1, 'fsdp': -1, 'tensor': 4}, (1, 2, 4)),
    ({'data': 4, 'fsdp': 1, 'tensor': 2}, (4, 1, 2)),
  ],
)
def test_a_mesh_has_all_devices(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert tuple(mesh.shape.items()) == tuple(
    zip(('data', 'fsdp', 'tensor'), shape, strict=True)
  )
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 16},
    {'data': -1, 'fsdp': 3},
    {'data': -1, 'fsdp': 16},
    {'data': -1, 'fsdp': -1},
    {'data': 0, 'fsdp': 8},
    {'data': -1, 'fsdp': 0},
    {'data': -2, 'fsdp': -4},
    {'data': -1, 'fsdp': -8},
  ],
  ids=str,
)
def test_a_mesh_that_does_not_fit_says_how_many_devices_there_are(sizes):
  with pytest.raises(UserError, match=r'config\.mesh: .* 8 devices'):
    sharding.make_mesh(**sizes)


def test_a_smaller_mesh_has_the_first_devices():
  mesh = sharding.make_mesh(data=1, fsdp=3)
  assert mesh.devices.flatten().tolist() == jax.devices()[:3]


def test_the_table_also_places_optimizer_moments():
  shape = jax.ShapeDtypeStruct((2, 16, 32), np.float32)
  tree = {'mu': {'blocks': {'mlp': {'up': {'kernel': shape}}}}, 'other': shape}
  placed = sharding.shardings(tree, sharding.make_mesh(2, 2, 2))
  kernel = placed['mu']['blocks']['mlp']['up']['kernel']
  assert kernel.spec == P(None, 'fsdp', 'tensor')
  assert placed['other'].spec == P()


def test_a_batch_is_split_over_data_and_fsdp_and_repeats_are_sent_once():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  ids_BT = np.arange(24, dtype=np.int32).reshape(8, 3)
  batch = {'student': {'ids': ids_BT}, 'teacher': {'ids': ids_BT}}
  batch['other'] = ids_BT.copy()
  put = sharding.put_batch(batch, mesh)
  assert put['student']['ids'] is put['teacher']['ids']
  assert put['student']['ids'] is not put['other']
  global_BT = put['student']['ids']
  np.testing.assert_array_equal(global_BT, ids_BT)
  assert global_BT.sharding.spec == P(('data', 'fsdp'))
  rows = {s.index[0].start for s in global_BT.addressable_shards}
  assert rows == {0, 2, 4, 6}


@pytest.mark.parametrize(
  ('owner', 'rows'),
  [
    # data 2, fsdp 2, tensor 2: each host has a part of the batch,
    ([[[0, 0], [0, 0]], [[1, 1], [1, 1]]], {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}),
    # or two have the same, and others share another,
    ([[[0, 1], [0, 1]], [[2, 3], [2, 3]]], {0: [0, 1, 2, 3], 3: [4, 5, 6, 7]}),
    # or parts that are no neighbours.
    ([[[0, 0], [1, 1]], [[0, 0], [1, 1]]], {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}),
  ],
)
def test_rows_go_where_the_devices_of_their_part_are(monkeypatch, owner, rows):
  device = types.SimpleNamespace
  mesh = types.SimpleNamespace(
    devices=np.vectorize(lambda i: device(process_index=i))(np.array(owner)),
    shape={'data': 2, 'fsdp': 2, 'tensor': 2},
  )
  for process, expected in rows.items():
    monkeypatch.setattr(jax, 'process_index', lambda p=process: p)
    assert sharding.own_rows(8, mesh).tolist() == expected


def test_rows_come_back_in_the_order_in_which_they_went():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  ids_BT = np.arange(24, dtype=np.int32).reshape(8, 3)
  put = sharding.put_batch(ids_BT, mesh)
  np.testing.assert_array_equal(sharding.local_rows(put), ids_BT)


class Rows:
  """A leaf that becomes a new numpy array each time it is asked."""

  def __init__(self, value):
    self.value = value

  def __array__(self, dtype=None, copy=None):
    return np.full(8, self.value)


def test_leaves_whose_arrays_are_temporary_are_kept_apart():
  put = sharding.put_batch([Rows(i) for i in range(30)], sharding.make_mesh())
  assert [x[0].item() for x in put] == list(range(30))


def test_batch_sizes_must_divide():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  sharding.check_batch_size(16, 8, mesh)
  with pytest.raises(UserError, match=r'batch_size=12 is not a multiple of'):
    sharding.check_batch_size(12, 8, mesh)
  with pytest.raises(UserError, match=r'6 rows .* 4 devices'):
    sharding.check_batch_size(12, 6, mesh)


def test_rows_are_tied_to_the_axes_that_are_free_and_divide():
  x_BD, odd_BD = np.ones((8, 6)), np.ones((6, 6))
  assert sharding.by_rows(x_BD) is x_BD  # without a mesh
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
    tie = jax.jit(sharding.by_rows)
    assert tie(x_BD).sharding.spec == P(('data', 'fsdp'))
    assert tie(odd_BD).sharding.is_fully_replicated
    for axes in ({'data'}, {'data', 'fsdp'}):
      inside = jax.jit(
        jax.shard_map(
          lambda x: 2 * sharding.by_rows(x),
          in_specs=P(tuple(axes)),
          out_specs=P(tuple(axes)),
          axis_names=axes,
        )
      )
      np.testing.assert_array_equal(inside(x_BD), 2 * x_BD)


def test_a_look_up_leaves_the_table_where_it_is():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  table_VD = np.arange(80.0).reshape(10, 8)
  ids_BT = np.arange(24).reshape(8, 3) % 10
  np.testing.assert_array_equal(
    sharding.look_up(table_VD, ids_BT, np.float32), table_VD[ids_BT]
  )
  with jax.set_mesh(mesh):
    args = (
      jax.device_put(table_VD, NamedSharding(mesh, P(None, 'fsdp'))),
      sharding.put_batch(ids_BT, mesh),
    )
    look_up = jax.jit(sharding.look_up, static_argnums=2)
    compiled = look_up.lower(*args, np.float32).compile()
    found_BTD = compiled(*args)
  np.testing.assert_array_equal(found_BTD, table_VD[ids_BT])
  assert found_BTD.sharding.spec == P(('data', 'fsdp'))
  assert '[10,8]' not in compiled.as_text()
