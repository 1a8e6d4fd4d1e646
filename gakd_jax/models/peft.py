"""Adapters in and out, as directories of the PEFT library.

adapter_config.json names the base model and the projections, and
adapter_model.safetensors has `<projection>.lora_A.weight` of [rank, in] and
`lora_B.weight` of [out, rank] for each layer.

GPT-2 keeps queries, keys and values in one projection. Three adapters of rank
r are written as one of rank 3r, with the Bs as blocks: the same function. It
is read as three that share an A.
"""

import json
import re
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from gakd_jax import UserError
from gakd_jax.models import convert, families, lora
from gakd_jax.models.tensor_names import Part

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
# What changes the function and is not computed here.
_REFUSED = {
  'use_dora': False,
  'bias': 'none',
  'modules_to_save': None,
  'layers_to_transform': None,
  'layer_replication': None,
  'lora_bias': False,
  'target_parameters': None,
}


def is_adapter(path):
  return (Path(path) / CONFIG).exists()


def base_path(path):
  """What an adapter's directory says that it belongs on."""
  base = convert.read_json(Path(path) / CONFIG).get('base_model_name_or_path')
  if not base:
    raise UserError(
      f'{Path(path) / CONFIG}: base_model_name_or_path is missing; name the '
      'model that the adapter belongs on'
    )
  return base


def load_into(model, path, place=None):
  """Puts the adapters of a directory on a model, in place, in fp32.

  Raises:
    UserError: for tensors that the model has no place for, or an option of
      PEFT that is not computed here.
  """
  file = Path(path) / CONFIG
  settings = convert.read_json(file)
  for name, value in _REFUSED.items():
    if (settings.get(name) or value) != value:
      raise UserError(
        f'{file}: {name}={settings[name]!r} is not supported (expected '
        f'{value!r})'
      )
  file = Path(path) / WEIGHTS
  with convert.open_safetensors(file) as tensors:
    found = {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}
  names = families.FAMILIES[model.config.family].names
  used = set()
  for i, (name, linear) in enumerate(lora.projections(model).items()):
    where = _module(names[f'blocks/{name}/kernel'])
    keys_a, keys_b = (
      [
        f'{_PREFIX}{where.tensor.format(l)}.lora_{side}.weight'
        for l in range(model.config.layers)
      ]
      for side in 'AB'
    )
    if found.keys().isdisjoint(keys_a + keys_b):
      continue
    used.update(keys_a, keys_b)
    if missing := used - found.keys():
      raise UserError(f'{file}: no tensor {", ".join(sorted(missing))}')
    a, b = (
      np.stack([np.asarray(found[key], np.float32).T for key in keys])
      for keys in (keys_a, keys_b)
    )
    n_in, n_out = linear.kernel.shape[-2:]
    if a.shape[1] != n_in or b.shape[2] != n_out * where.of:
      raise UserError(
        f'{file}: {keys_a[0]} and its B are for a projection of {a.shape[1]} '
        f'to {b.shape[2]}, and the base has {n_in} to {n_out * where.of}'
      )
    b = b[..., where.index * n_out : (where.index + 1) * n_out]
    linear.lora = lora.LoRA(
      *jax.device_put((a, b), place),
      _scale(settings, where.tensor, a.shape[-1]),
      settings.get('lora_dropout', 0.0),
      i,
    )
  if extra := found.keys() - used or (not used and {'none at all'}):
    raise UserError(
      f'{file}: adapters of what the base does not have: '
      f'{", ".join(sorted(extra))}'
    )


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
    ranks[tensor] = whole, first.scale * whole
  r, alpha = min(ranks.values())
  other = {_suffix(t): v for t, v in ranks.items() if v != (r, alpha)}
  settings = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': str(Path(model.source).absolute()),
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


def _scale(settings, tensor, rank):
  name = tensor.format(0)

  def of(pattern, default):
    for key, value in (settings.get(pattern) or {}).items():
      if re.match(rf'(.*\.)?({key})$', name):
        return value
    return default

  alpha = of('alpha_pattern', settings.get('lora_alpha', 8))
  return alpha / (rank**0.5 if settings.get('use_rslora') else rank)
