"""Weights between Hugging Face safetensors and parameter trees.

Reading goes tensor by tensor, and of each tensor only the part that a device
of this process holds, straight to its dtype and its shard: host memory never
has a second copy of the model.
"""

import contextlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from gakd_jax import UserError, sharding
from gakd_jax.models import families

INDEX = 'model.safetensors.index.json'
# Buffers that old checkpoints saved though they are computed.
IGNORED = ('rotary_emb.inv_freq',)


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


def _tensors(name, shape, hf_name):
  """The Hugging Face tensors of one parameter: [(name, shape)]."""
  stacked = '{}' in hf_name
  inner = shape[1:] if stacked else shape
  if name.endswith('kernel'):
    inner = inner[::-1]
  layers = range(shape[0]) if stacked else [0]
  return [(hf_name.format(l), tuple(inner)) for l in layers]


def _weight_files(path):
  if (path / INDEX).exists():
    index = json.loads((path / INDEX).read_text())
    files = [path / f for f in sorted(set(index['weight_map'].values()))]
  else:
    files = sorted(path.glob('*.safetensors'))
  if not files:
    raise UserError(
      f'{path}: no *.safetensors file; convert other formats with '
      'transformers: save_pretrained(..., safe_serialization=True)'
    )
  for file in files:
    if not file.exists():
      raise UserError(f'{file}: missing, but named in {INDEX}')
  return files


def _check(expected, found, optional, path):
  """One error that lists every missing, extra and wrongly shaped tensor."""
  problems = [f'{n} is missing' for n in expected if n not in found]
  problems += [
    f'{n} is not expected'
    for n in found
    if n not in expected and n not in optional and not n.endswith(IGNORED)
  ]
  problems += [
    f'{n} has shape {list(found[n])}, expected {list(shape)}'
    for n, shape in expected.items()
    if n in found and found[n] != shape
  ]
  if problems:
    raise UserError(
      f'{path}: tensors do not match config.json: ' + '; '.join(problems)
    )


def _reader(handles, where, name, shape, hf_name, dtype):
  """A callback for `jax.make_array_from_callback`: index -> that part."""

  def read_one(tensor, index):
    view = handles[where[tensor]].get_slice(tensor)
    if name.endswith('kernel'):
      return view[index[::-1]].T
    return view[tuple(index)]

  def read(index):
    if '{}' not in hf_name:
      return read_one(hf_name, index).astype(dtype)
    layers = range(*index[0].indices(shape[0]))
    inner = index[1:]
    sizes = [
      len(range(*i.indices(n))) for i, n in zip(inner, shape[1:], strict=True)
    ]
    out = np.empty((len(layers), *sizes), dtype)
    for row, l in zip(out, layers, strict=True):
      row[...] = read_one(hf_name.format(l), inner)
    return out

  return read


def load_params(path, config, abstract, dtype=None, mesh=None, report=None):
  """Reads a directory's safetensors into a parameter tree.

  Args:
    path: the directory.
    config: its `DecoderConfig`.
    abstract: the parameter tree with shapes as leaves.
    dtype: of the result; None keeps what the file holds.
    mesh: places parameters by `sharding.RULES`; None is one device.
    report: called with the bytes of each parameter read, for a progress bar.

  Raises:
    UserError: naming all tensors that are missing, extra or of wrong shape.
  """
  names = families.FAMILIES[config.family].names
  shapes = {name: x.shape for name, x in flatten(abstract).items()}
  with contextlib.ExitStack() as stack:
    handles, where = [], {}
    for file in _weight_files(path):
      try:
        handle = safetensors.safe_open(file, framework='numpy')
      except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f'{file}: not a readable safetensors file ({e})') from e
      handles.append(stack.enter_context(handle))
      where |= dict.fromkeys(handle.keys(), len(handles) - 1)
    slices = {t: handles[i].get_slice(t) for t, i in where.items()}
    found = {t: tuple(s.get_shape()) for t, s in slices.items()}
    expected = dict(
      tensor
      for name, shape in shapes.items()
      for tensor in _tensors(name, shape, names[name])
    )
    # A tied model may carry its head all the same.
    _check(expected, found, {names['head_weight']}, path)
    flat = {}
    for name, shape in shapes.items():
      first = _tensors(name, shape, names[name])[0][0]
      stored = slices[first][(slice(0, 1),) * len(found[first])].dtype
      leaf_dtype = jnp.dtype(dtype or stored)
      abstract_leaf = jax.ShapeDtypeStruct(shape, leaf_dtype)
      if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      else:
        place = sharding.shardings({name: abstract_leaf}, mesh)[name]
      flat[name] = jax.make_array_from_callback(
        shape,
        place,
        _reader(handles, where, name, shape, names[name], leaf_dtype),
      )
      if report:
        report(flat[name].nbytes)
  return unflatten(flat)


def save_params(params, config, path, max_shard_bytes=5 * 10**9, report=None):
  """Writes a parameter tree as safetensors, in files like transformers'.

  One file up to `max_shard_bytes`, else several with an index. The tensors of
  one file at a time are copied.
  """
  names = families.FAMILIES[config.family].names
  shards, size = [[]], 0
  for name, leaf in flatten(params).items():
    tensors = _tensors(name, leaf.shape, names[name])
    for l, (tensor, shape) in enumerate(tensors):
      n_bytes = math.prod(shape) * leaf.dtype.itemsize
      if shards[-1] and size + n_bytes > max_shard_bytes:
        shards.append([])
        size = 0
      shards[-1].append((tensor, name, leaf, l))
      size += n_bytes

  def value(name, leaf, l):
    x = np.asarray(leaf[l] if '{}' in names[name] else leaf)
    return np.ascontiguousarray(x.T if name.endswith('kernel') else x)

  weight_map, total = {}, 0
  for i, shard in enumerate(shards):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    data = {tensor: value(name, leaf, l) for tensor, name, leaf, l in shard}
    safetensors.numpy.save_file(data, path / file, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(data, file)
    n_bytes = sum(x.nbytes for x in data.values())
    total += n_bytes
    if report:
      report(n_bytes)
  if len(shards) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2))


def read_json(file):
  """A parsed JSON file, or one line that says what is wrong with it."""
  try:
    return json.loads(Path(file).read_text())
  except FileNotFoundError:
    raise UserError(
      f'{file}: not found; a model is a Hugging Face directory'
    ) from None
  except ValueError as e:
    raise UserError(f'{file}: not valid JSON ({e})') from None
