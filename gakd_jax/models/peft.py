"""Adapters in and out, as directories of the PEFT library.

adapter_config.json names the base model and the projections, and
adapter_model.safetensors has `<projection>.lora_A.weight` of [rank, in] and
`lora_B.weight` of [out, rank] for each layer. What the first says is computed
as PEFT does, or refused (`peft_settings`).

Layers are stacked here. Where they differ, a smaller rank is filled up with
zeros, a layer without an adapter is all zeros, and a smaller scale is in B.

GPT-2 keeps queries, keys and values in one projection. Three adapters of rank
r are written as one of rank 3r, with the Bs as blocks: the same function. It
is read as three again where its Bs are such blocks, else as three that share an
A.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gakd_jax import UserError, json_file
from gakd_jax.models import (
  convert,
  families,
  hub,
  lora,
  peft_settings,
  transformer,
  weight_files,
)
from gakd_jax.models.tensor_names import Part

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_DTYPES = weight_files.DTYPES | weight_files.OTHER_DTYPES


class _Adapter(NamedTuple):
  """Of one projection of one layer."""

  a: np.ndarray  # [in, rank]
  b: np.ndarray  # [rank, out]
  scale: float


def is_adapter(path):
  return (Path(path) / CONFIG).exists()


def base_path(path):
  """What an adapter's directory says that it belongs on."""
  return peft_settings.base(_settings(path), Path(path) / CONFIG)


def load_into(model, path, place=None):
  """Puts the adapters of a directory on a model, in place, in fp32.

  Raises:
    UserError: for an option of PEFT that is not computed here, and for tensors
      that are not those that the options and the model ask for.
  """
  settings = _settings(path)
  file = Path(path) / WEIGHTS
  found = _tensors(file)
  names = families.FAMILIES[model.config.family].names
  used = set()
  for i, (name, linear) in enumerate(lora.projections(model).items()):
    where = _module(names[f'blocks/{name}/kernel'])
    n_in, n_out = linear.kernel.shape[-2:]
    shape = n_in, n_out * where.of
    modules = [where.tensor.format(l) for l in range(model.config.layers)]
    adapters = [
      _adapter(found, settings, module, shape, file)
      if peft_settings.is_target(settings, module, l)
      else None
      for l, module in enumerate(modules)
    ]
    if not any(adapters):
      continue
    pairs = zip(modules, adapters, strict=True)
    used.update(*(_keys(module) for module, adapter in pairs if adapter))
    a, b, scale, uneven = _stacked(adapters)
    ranks = _ranks(b, where)
    a = a[..., ranks]
    b = b[:, ranks, where.index * n_out : (where.index + 1) * n_out]
    if not a.shape[-1]:
      continue
    linear.lora = lora.LoRA(
      *jax.device_put((a, b), place),
      scale,
      settings['lora_dropout'],
      i,
      uneven,
    )
  extra = [n for n in found.keys() - used if not _is_copy(model, n, found[n])]
  if extra or not used:
    raise UserError(
      f'{file}: neither the base nor target_modules has a place for '
      f'{_listed(extra) or "any tensor of it"}'
    )


def _settings(path):
  """What is computed of an adapter's options, all of which are checked."""
  file = Path(path) / CONFIG
  return peft_settings.check(json_file.read(file), file)


def _tensors(file):
  """{name: `weight_files.Tensor`} of floats."""
  if not file.exists():
    raise UserError(
      f'{file}: not found; with peft, write it from adapter_model.bin: '
      'PeftModel.from_pretrained(base, adapter).save_pretrained(directory)'
    )
  found = weight_files.tensors(file)
  for name, tensor in found.items():
    if tensor.dtype not in _DTYPES:
      raise UserError(
        f'{file}: {name} is stored as {tensor.dtype}, not as one of '
        f'{", ".join(_DTYPES)}'
      )
  return found


def _keys(module):
  """The names of a module's A and B."""
  return [f'{_PREFIX}{module}.lora_{side}.weight' for side in 'AB']


def _adapter(found, settings, module, shape, file):
  """The `_Adapter` that tensors hold for a module of shape [in, out]."""
  rank, scale = peft_settings.rank_and_scale(settings, module)
  n_in, n_out = shape
  pair = []
  for key, expected in zip(
    _keys(module), ((rank, n_in), (n_out, rank)), strict=True
  ):
    if key not in found:
      raise UserError(f'{file}: no tensor {key}, which {CONFIG} asks for')
    tensor = found[key]
    if tensor.shape != expected:
      raise UserError(
        f'{file}: {key} has shape {list(tensor.shape)}, expected '
        f'{list(expected)}: rank {rank} by {CONFIG}, {n_in} to {n_out} by the '
        'base'
      )
    with np.errstate(over='ignore'):  # What does not fit is infinite.
      x = tensor.mapped().astype(np.float32)
    tensor.check_finite(x)
    pair.append(x.T)
  return _Adapter(*pair, scale)


def _stacked(adapters):
  """(A of [L, in, rank], B of [L, rank, out], scale, whether layers differ)."""
  there = [adapter for adapter in adapters if adapter]
  rank = max(adapter.a.shape[1] for adapter in there)
  scale = max(adapter.scale for adapter in there)
  a = np.zeros((len(adapters), len(there[0].a), rank), np.float32)
  b = np.zeros((len(adapters), rank, there[0].b.shape[1]), np.float32)
  for l, adapter in enumerate(adapters):
    if adapter:
      own = adapter.a.shape[1]
      a[l, :, :own] = adapter.a
      b[l, :own] = adapter.b * np.float32(adapter.scale / scale)
  kinds = {adapter and (adapter.a.shape, adapter.scale) for adapter in adapters}
  return a, b, scale, len(kinds) > 1


def _ranks(b, where):
  """Of an adapter of several projections, the ranks that one of them uses.

  All, unless B [L, rank, out] has a block for each, as `save` writes it.
  """
  used = np.stack([x.any((0, 2)) for x in np.split(b, where.of, axis=-1)])
  are_blocks = where.of > 1 and used.any() and used.sum(0).max() == 1
  return used[where.index] if are_blocks else slice(None)


def _is_copy(model, name, x):
  """Whether a tensor is the base's own embedding, which PEFT writes, too."""
  names = families.FAMILIES[model.config.family].names
  params = convert.flatten(transformer.split(model)[1])
  for ours in ('embedding', 'head_weight'):
    if name == _PREFIX + names[ours]:
      base = params.get(ours, params['embedding'])  # A tied head is that.
      if x.shape != base.shape:
        return False
      x = x.mapped().astype(base.dtype)
      return bool(jnp.array_equal(jax.device_put(x, base.sharding), base))
  return False


def _listed(names, most=4):
  """The first of some names, and how many more there are."""
  names = sorted(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more


def save(model, path):
  """Writes the adapters of a model to a directory that exists.

  A base whose projections are its tensors gets exactly what PEFT would write.
  """
  family = families.FAMILIES[model.config.family]
  tensors, modules, ranks = {}, {}, {}
  for name, adapter in lora.adapters(model).items():
    where = _module(family.names[f'blocks/{name}/kernel'])
    modules.setdefault(where.tensor, []).append((where, adapter))
  for tensor, parts in modules.items():
    _, first = parts[0]
    rank, n_out = first.b.shape[1:]
    whole, of = rank * len(parts), parts[0][0].of
    a = np.concatenate([np.asarray(x.a[...]) for _, x in parts], axis=-1)
    b = np.zeros((len(a), whole, n_out * of), np.float32)
    for i, (where, adapter) in enumerate(parts):
      columns = slice(where.index * n_out, (where.index + 1) * n_out)
      b[:, i * rank : (i + 1) * rank, columns] = adapter.b[...]
    for l in range(len(a)):
      key = f'{_PREFIX}{tensor.format(l)}.lora_'
      tensors[key + 'A.weight'] = np.ascontiguousarray(a[l].T, np.float32)
      tensors[key + 'B.weight'] = np.ascontiguousarray(b[l].T)
      for side in 'AB':
        name = f'{key}{side}.weight'
        weight_files.check_saved(tensors[name], name, path)
    ranks[tensor] = whole, first.scale * whole
  r, alpha = min(ranks.values())
  other = {_suffix(t): v for t, v in ranks.items() if v != (r, alpha)}
  source = Path(model.source).absolute()
  base, revision = hub.origin(source) or (str(source), None)
  settings = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'revision': revision,
    'target_modules': sorted(map(_suffix, ranks)),
    'r': r,
    'lora_alpha': alpha,
    'rank_pattern': {name: r for name, (r, _) in other.items()},
    'alpha_pattern': {name: alpha for name, (_, alpha) in other.items()},
    'lora_dropout': next(iter(lora.adapters(model).values())).dropout,
    'fan_in_fan_out': not family.transposed,
    'bias': 'none',
    'inference_mode': True,
  }
  path = Path(path)
  (path / CONFIG).write_text(json.dumps(settings, indent=2) + '\n')
  safetensors.numpy.save_file(
    tensors, path / WEIGHTS, metadata={'format': 'pt'}
  )


def _module(entry):
  """The projection that a tensor of the name table is the weight of."""
  entry = entry if isinstance(entry, Part) else Part(entry, 0, 1)
  return entry._replace(tensor=entry.tensor.removesuffix('.weight'))


def _suffix(tensor):
  """self_attn.q_proj: enough to tell it from all others."""
  return tensor.rpartition('.{}.')[2]
