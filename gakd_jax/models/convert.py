"""Weights between Hugging Face safetensors and parameter trees.

Reading goes tensor by tensor, and of each tensor only the part that a device
of this process holds, straight to its dtype and its shard: host memory never
has a second copy of the model.
"""

import concurrent.futures
import dataclasses
import json
import math
import mmap
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gakd_jax import sharding
from gakd_jax.models import families, quantized, weight_files
from gakd_jax.models.tensor_names import Part
from gakd_jax.models.weight_files import INDEX

_PIECES = 8  # of a tensor, to be read at once


def flatten(params):
  """Nested dicts -> {'blocks/mlp/up/kernel': leaf}."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def unflatten(flat):
  """The inverse of `flatten`."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


@dataclasses.dataclass(frozen=True)
class _Stored:
  """Where a parameter of one layer lies: a tensor, or an equal part of it."""

  tensor: str
  shape: tuple  # of the whole tensor
  transposed: bool
  offset: int  # along our last axis
  of: int  # parts

  def index(self, index):
    """The index into the tensor that `index` into the parameter is."""
    *first, last = index
    start, stop, _ = last.indices(self._ours[-1] // self.of)
    shifted = slice(self.offset + start, self.offset + stop)
    index = (*first, shifted)
    return index[::-1] if self.transposed else index

  @property
  def _ours(self):
    return self.shape[::-1] if self.transposed else self.shape


def _stored(family, name, shape):
  """A `_Stored` for each layer of a parameter; one, if it is not stacked."""
  entry = family.names[name]
  if isinstance(entry, str):
    entry = Part(entry, 0, 1)
  stacked = '{}' in entry.tensor
  *rest, last = shape[1:] if stacked else shape
  transposed = family.transposed and name.endswith('kernel')
  whole = (*rest, last * entry.of)
  return [
    _Stored(
      entry.tensor.format(l),
      whole[::-1] if transposed else whole,
      transposed,
      entry.index * last,
      entry.of,
    )
    for l in (range(shape[0]) if stacked else [0])
  ]


def _reader(found, shape, stored, dtype):
  """A callback for `jax.make_array_from_callback`: index -> that part."""

  def read_into(out, where, index):
    tensor = found[where.tensor]
    x = tensor.mapped()[where.index(index)]
    with np.errstate(over='ignore'):  # What does not fit is infinite.
      _copy(out, x.T if where.transposed else x)
    tensor.check_finite(out)

  def read(index):
    sizes = [
      len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)
    ]
    out = _aligned(sizes, dtype)
    if len(index) == len(stored[0].shape):  # not stacked: by rows
      start, stop, _ = index[0].indices(shape[0])
      rows = -(-(stop - start) // _PIECES)
      pieces = []
      for i in range(start, stop, rows):
        end = min(i + rows, stop)
        part = out[i - start : end - start]
        pieces.append((part, stored[0], (slice(i, end), *index[1:])))
    else:
      layers = zip(out, stored[index[0]], strict=True)
      pieces = [(part, where, index[1:]) for part, where in layers]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      list(pool.map(lambda piece: read_into(*piece), pieces))
    return out

  return read


def _aligned(shape, dtype):
  """An empty array that jax takes as it is on a CPU, instead of a copy.

  Of the system's own pages, which are aligned: numpy would ask for huge ones,
  and where memory is in pieces the system takes seconds to make some.
  """
  n = math.prod(shape)
  size = max(1, n * jnp.dtype(dtype).itemsize)
  pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(pages, dtype, n).reshape(shape)


def _copy(out, x):
  """out[...] = x; fast for matrices of which one is transposed.

  In 16 columns at a time, else nearly every number of a large matrix would
  miss the cache; and as integers, which numpy copies faster than bfloat16.
  """
  if out.dtype == x.dtype:
    bits = f'u{out.dtype.itemsize}'
    out, x = out.view(bits), x.view(bits)
  step = 16 if out.ndim == 2 and not x.flags.c_contiguous else out.shape[-1]
  for i in range(0, out.shape[-1], step):
    out[..., i : i + step] = x[..., i : i + step]


def load_params(
  path, config, abstract, dtype=None, mesh=None, report=None, quantize=None
):
  """Reads a directory's safetensors into a parameter tree.

  Args:
    path: the directory.
    config: its `DecoderConfig`.
    abstract: the parameter tree with shapes as leaves.
    dtype: of the result; None keeps what the file holds, and where layers of
      one parameter differ, the narrowest that holds them all.
    mesh: places parameters by `sharding.RULES`; None is one device.
    report: called with the bytes of each parameter read, for a progress bar.
    quantize: None or one of `quantized.KINDS`, for kernels: these become two
      parameters, on which `abstract` has no say.

  Raises:
    UserError: naming tensors that are missing, extra or of wrong shape, or one
      with NaN or infinity in what this process reads.
  """
  family = families.FAMILIES[config.family]
  shapes = {name: x.shape for name, x in flatten(abstract).items()}
  where = {name: _stored(family, name, s) for name, s in shapes.items()}
  found = weight_files.contents(path, family)
  if config.tied_head:
    # Either name is that of both.
    head = found.pop(family.names['head_weight'], None)
    if head:
      found.setdefault(family.names['embedding'], head)
  expected = {s.tensor: s.shape for parts in where.values() for s in parts}
  if not config.layers:  # Those of the file are left there.
    found = {name: x for name, x in found.items() if name in expected}
  weight_files.check(expected, found, family, path)
  flat = {}
  # The largest first, while there is room for it twice.
  for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
    shape = shapes[name]
    if not math.prod(shape):  # Of what there is, the dtype is the embedding's.
      there = found[family.names['embedding']].dtype
      flat[name] = jnp.zeros(shape, dtype or weight_files.DTYPES[there])
      continue
    stored = {
      weight_files.DTYPES[found[part.tensor].dtype] for part in where[name]
    }
    leaf_dtype = jnp.dtype(dtype or jnp.result_type(*stored))
    leaf = {name: jax.ShapeDtypeStruct(shape, leaf_dtype)}
    read = _reader(found, shape, where[name], leaf_dtype)
    place = _places(leaf, mesh)[name]
    flat[name] = jax.make_array_from_callback(shape, place, read)
    if report:
      report(flat[name].nbytes)
    if quantize and name.endswith('kernel'):
      flat |= _quantized(name, flat.pop(name), mesh, quantize)
  return unflatten(flat)


def _places(flat, mesh):
  """Where parameters belong."""
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return dict.fromkeys(flat, place)
  return sharding.shardings(flat, mesh)


def _quantized(name, kernel, mesh, kind):
  """{name: integers, and name of their scales: these}, when they are there.

  The kernel is then gone before the next one is read.
  """
  kernel, scale = quantized.quantize(kernel, kind)
  flat = {name: kernel, f'{name}_scale': scale}
  return jax.block_until_ready(jax.device_put(flat, _places(flat, mesh)))


def save_params(params, config, path, max_shard_bytes=5 * 10**9, report=None):
  """Writes a parameter tree as safetensors, in files like transformers'.

  One file up to `max_shard_bytes`, else several with an index. One tensor at
  a time is copied; of several processes, all take part and the first writes.

  Raises:
    UserError: naming a tensor with NaN or infinity, which is not written.
  """
  first = jax.process_index() == 0
  family = families.FAMILIES[config.family]
  members = {}  # tensor -> where it and its parts lie, and what they are
  for name, leaf in flatten(params).items():
    stored = _stored(family, name, leaf.shape)
    stacked = len(leaf.shape) > len(stored[0].shape)
    for l, part in enumerate(stored):
      index = (l,) if stacked else ()
      members.setdefault(part.tensor, []).append((part, leaf, index))

  shards, size = [{}], 0
  for tensor, parts in members.items():
    part, leaf, _ = parts[0]
    n_bytes = math.prod(part.shape) * leaf.dtype.itemsize
    if shards[-1] and size + n_bytes > max_shard_bytes:
      shards.append({})
      size = 0
    shards[-1][tensor] = parts, leaf.dtype.name, part.shape
    size += n_bytes

  weight_map, total = {}, 0
  for i, shard in enumerate(shards):
    file = weight_files.WHOLE
    if len(shards) > 1:
      file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    with open(path / file if first else os.devnull, 'wb') as f:
      f.write(weight_files.header({name: x for name, (_, *x) in shard.items()}))
      for tensor, (parts, *_) in shard.items():
        x = _joined(parts)
        weight_files.check_saved(x, tensor, path)
        # As bytes: numpy's buffers do not know bfloat16.
        f.write(x.reshape(-1).view(np.uint8))
        total += x.nbytes
        if report:
          report(x.nbytes)
    weight_map |= dict.fromkeys(shard, file)
  if len(shards) > 1 and first:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2))


def _joined(parts):
  """The tensor that parts make, on the host."""
  parts = sorted(parts, key=lambda part: part[0].offset)
  arrays = [_on_host(leaf[index]) for _, leaf, index in parts]
  x = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
  if not parts[0][0].transposed:
    return np.ascontiguousarray(x)
  out = np.empty(x.shape[::-1], x.dtype)
  _copy(out, x.T)
  return out


def _on_host(x):
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
