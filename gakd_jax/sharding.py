"""The device mesh, where parameters lie on it, and global batches.

Axes: `data` replicates parameters and splits the batch, `fsdp` splits both,
`tensor` splits heads, feed-forward and vocabulary. The compiler finds the rest
(`AxisType.Auto`), but for what it finds badly: activations stay split by rows,
embeddings are looked up where they lie, a vocabulary head is gathered once
(here), and its loop over chunks and decoding run on each device's own rows
(`objectives/head.py`, `sampling.py`).
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError

BATCH_AXES = ('data', 'fsdp')

# The first pattern found in a parameter's path says how its last dimensions
# are split (a leading L of stacked layers is never split). Optimizer moments
# have the path of their parameter, so the table places them too.
RULES = (
  (r'(embedding|head_weight|projection)$', ('tensor', 'fsdp')),
  (r'(query|key|value|gate|up)/kernel(_scale)?$', ('fsdp', 'tensor')),
  (r'(out|down)/kernel(_scale)?$', ('tensor', 'fsdp')),
)


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
  """A mesh of the first data x fsdp x tensor devices, of all that there are.

  One size may be -1: whatever is left. Several hosts use all their devices, and
  others that are given are used all (`targets`).
  """
  sizes = [data, fsdp, tensor]
  needs_all = -1 in sizes or jax.process_count() > 1 or devices is not None
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  if sizes.count(-1) == 1 and 0 not in sizes:
    sizes[sizes.index(-1)] = n // math.prod(s for s in sizes if s != -1)
  size = math.prod(sizes)
  if min(sizes) < 1 or size > n or (size < n and needs_all):
    raise UserError(
      f'config.mesh: data={data}, fsdp={fsdp}, tensor={tensor} does not fit '
      f'{n} devices; their product must be {n}, and one of them may be -1'
    )
  return jax.make_mesh(
    tuple(sizes),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
    devices=devices[:size],
  )


def path_name(path):
  """'blocks/mlp/up/kernel' for a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _spec(name, shape, mesh):
  """The table's answer, without the axes that do not divide a dimension."""
  for pattern, axes in RULES:
    if re.search(pattern, name):
      axes = (None,) * (len(shape) - len(axes)) + axes
      return P(
        *(
          axis if axis and size % mesh.shape[axis] == 0 else None
          for axis, size in zip(axes, shape, strict=True)
        )
      )
  return P()


def shardings(tree, mesh):
  """A `NamedSharding` for each leaf (array or abstract shape) of a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, _spec(path_name(path), x.shape, mesh)),
    tree,
  )


def abstract(tree, mesh):
  """Shapes that know their place: what `jax.jit` compiles for, unallocated."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    shardings(tree, mesh),
  )


def replicated(mesh):
  return NamedSharding(mesh, P())


def batch_ways(mesh):
  """Into how many parts a mesh splits a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def ways(axis):
  """Into how many parts an axis of the mesh in force splits; 1 without."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape[axis]


def copies(x_VD):
  """A whole copy of a vocabulary head on each device that splits rows.

  [R, V, D], or None where nothing splits rows. The gradient of copies is summed
  over these devices, straight into the place of `x_VD`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or batch_ways(mesh) == 1:
    return None
  vocabulary, width = _spec('head_weight', x_VD.shape, mesh)

  def local(x_VD):
    if width and mesh.shape[width] > 1:
      x_VD = jax.lax.all_gather(x_VD, width, axis=1, tiled=True)
    return x_VD[None]

  # Over `tensor` as well, which would else be gathered with it: the compiler
  # does not split what it did not make.
  return jax.shard_map(
    local,
    in_specs=P(vocabulary, width),
    out_specs=P(BATCH_AXES, vocabulary),
    axis_names={*BATCH_AXES, *filter(None, [vocabulary])},
    check_vma=False,
  )(x_VD)


def tie(x, *spec):
  """Splits the first dimensions of an array over axes of the mesh in force.

  Not over those that do not divide a dimension, or that `jax.shard_map` has
  split already; nothing without a mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  places = [tuple(a for a in axes if a in mesh.auto_axes) for axes in spec]
  for i, axes in enumerate(places):
    if x.shape[i] % math.prod(mesh.shape[axis] for axis in axes):
      places[i] = ()
  return jax.lax.with_sharding_constraint(x, P(*places)) if any(places) else x


def by_rows(x):
  """Ties the rows of an array to the batch axes.

  Under `fsdp`, the compiler would else split activations by width, as the
  parameters are, and bring the rows of all devices together in every layer.
  """
  return tie(x, BATCH_AXES)


def look_up(table_VD, ids_BT, dtype):
  """Rows of a table that `RULES` split over `tensor` and `fsdp`, `by_rows`.

  Each device looks up its columns of what all along `fsdp` need, and they
  exchange columns for rows; the table stays where it is, and its gradient. That
  is summed in the table's dtype, whatever the `dtype` of the result.
  """
  x_BTD = table_VD[ids_BT].astype(dtype)
  return by_rows(tie(x_BTD, ('data',), (), ('fsdp',)))


def check_batch_size(batch_size, microbatch_size, mesh):
  """Refuses a batch that does not divide over microbatches and the mesh."""
  ways = batch_ways(mesh)
  if batch_size % microbatch_size:
    raise UserError(
      f'config.train.batch_size={batch_size} is not a multiple of '
      f'microbatch_size={microbatch_size}; change one of them'
    )
  if microbatch_size % ways:
    raise UserError(
      f'config.train: {microbatch_size} rows a (micro)batch do not divide over '
      f'{ways} devices (data x fsdp); use a multiple of {ways} or another mesh'
    )


def _own_parts(mesh):
  """Which of the `batch_ways` parts of a batch this process's devices hold.

  Where `tensor` crosses hosts, several processes hold the same.
  """
  me = jax.process_index()
  devices = mesh.devices.reshape(batch_ways(mesh), -1)
  return [
    i
    for i, some in enumerate(devices)
    if any(d.process_index == me for d in some)
  ]


def own_rows(size, mesh):
  """Which rows of a global batch of so many this process reads: indices."""
  rows = np.arange(size).reshape(batch_ways(mesh), -1)
  return rows[_own_parts(mesh)].reshape(-1)


def put_batch(batch, mesh):
  """Host rows -> global arrays split over the batch axes.

  Every process passes its `own_rows`. An array that occurs twice in the batch
  is sent once.
  """
  sharding = NamedSharding(mesh, P(BATCH_AXES))
  parts = {part: i for i, part in enumerate(_own_parts(mesh))}
  sent = {}

  def send(x):
    n = len(x) // len(parts)  # rows of a part

    def of_device(index):
      i = parts[(index[0].start or 0) // n] if n else 0
      return x[i * n : (i + 1) * n]

    shape = (n * batch_ways(mesh), *x.shape[1:])
    return jax.make_array_from_callback(shape, sharding, of_device)

  def put(x):
    # The id of the leaf, which lives as long as the batch.
    if id(x) not in sent:
      sent[id(x)] = send(np.asarray(x))
    return sent[id(x)]

  return jax.tree.map(put, batch)


def put_whole(tree, place):
  """What all processes have alike, as arrays at a place of theirs all."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, place, x.__getitem__), tree
  )


def local_rows(x):
  """This process's `own_rows` of an array that `put_batch` placed, as numpy."""
  parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([np.asarray(parts[i]) for i in sorted(parts)])
