"""Models in and out: Hugging Face directories.

  model = models.load('Qwen/Qwen3-0.6B', dtype='bfloat16')
  logits_BTV = model.logits(ids_BT)
  models.save(model, 'out')

`abstract` makes a model without weights, `init` one with random weights.
"""

import dataclasses
import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
from flax import nnx

from gakd_jax import UserError, sharding
from gakd_jax.models import convert, families, transformer
from gakd_jax.models.transformer import Decoder, DecoderConfig

__all__ = ['Decoder', 'abstract', 'init', 'load', 'read_config', 'save']

# What makes a directory usable beside its weights and config.json.
_COMPANIONS = (
  'tokenizer*',
  'vocab*',
  'merges.txt',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template*',
  'generation_config.json',
  '*.model',
)


def resolve(path, files=None):
  """The local directory of a path or hub id; hub ids are downloaded.

  `files`: a pattern of those that are needed; None: all of them.
  """
  local = Path(path).expanduser()
  if local.is_dir():
    return local
  looks_like_hub = str(path).count('/') == 1 and not str(path).startswith('.')
  if looks_like_hub and not local.parent.exists():
    try:
      return Path(
        huggingface_hub.snapshot_download(str(path), allow_patterns=files)
      )
    except Exception as e:  # The hub's errors have no common base.
      raise UserError(
        f'model {path}: no such directory, and the hub could not provide it '
        f'({type(e).__name__}); check the name or give a local path'
      ) from e
  raise UserError(
    f'model {path}: no such directory; give a Hugging Face directory or hub id'
  )


def read_config(path, **shape) -> DecoderConfig:
  """The `DecoderConfig` of a directory or hub id, whose weights stay there.

  `shape` replaces some of its fields, such as `width` or `layers`.
  """
  file = resolve(path, 'config.json') / 'config.json'
  config = families.config_from_hf(convert.read_json(file), file)
  try:
    return dataclasses.replace(config, **shape)
  except TypeError:
    known = [f.name for f in dataclasses.fields(DecoderConfig)]
    wrong = sorted(set(shape) - set(known))
    raise UserError(
      f'unknown model shape {", ".join(wrong)}; known are {", ".join(known)}'
    ) from None


def abstract(config, source='') -> Decoder:
  """The model with shapes for parameters, at no cost in memory."""
  return nnx.eval_shape(
    lambda: Decoder(config, nnx.Rngs(0), source=str(source))
  )


def load(path, dtype=None, mesh=None, report=None) -> Decoder:
  """Loads a Hugging Face directory (or hub id).

  Args:
    path: has config.json and one or several safetensors files.
    dtype: of the weights, and so of the computation; None keeps the file's.
    mesh: where to place them; None is one device.
    report: called with bytes as they are read.

  Raises:
    UserError: if the directory is not there, its architecture or a switch in
      it is not supported, or tensors do not match (all of them listed).
  """
  path = resolve(path)
  config = read_config(path)
  definition, shapes = transformer.split(abstract(config, path))
  params = convert.load_params(path, config, shapes, dtype, mesh, report)
  return nnx.merge(definition, params)


def init(path, seed, dtype=None, mesh=None, **shape) -> Decoder:
  """Random weights: the architecture and tokenizer of a directory.

  `shape` replaces fields of its `DecoderConfig`.
  """
  path = resolve(path)
  config = read_config(path, **shape)
  definition, shapes = transformer.split(abstract(config, path))

  def make():
    model = Decoder(config, nnx.Rngs(seed), source=str(path))
    params = transformer.split(model)[1]
    return jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)

  places = None if mesh is None else sharding.shardings(shapes, mesh)
  return nnx.merge(definition, jax.jit(make, out_shardings=places)())


def copy_companions(source, path):
  """Copies what a model needs beside weights and config.json: its tokenizer."""
  for file in Path(source).iterdir():
    if any(fnmatch.fnmatch(file.name, p) for p in _COMPANIONS):
      shutil.copyfile(file, Path(path) / file.name)


def save(model, path, max_shard_bytes=5 * 10**9, report=None):
  """Writes a directory that transformers loads unchanged.

  Weights keep their dtype; tokenizer files of the model's source come along.
  The directory appears whole or not at all: an earlier one stays until the
  new one is complete.
  """
  path = Path(path).resolve()
  is_model = path.is_dir() and any(path.glob('*.safetensors'))
  if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_model):
    raise UserError(f'{path}: is not a model that could be replaced')
  config = model.config
  params = transformer.split(model)[1]
  dtype = convert.flatten(params)['embedding'].dtype.name
  hf = families.FAMILIES[config.family].to_hf(config)
  source = Path(model.source) if model.source else None
  if source and (source / 'config.json').exists():
    # Fields that say nothing of the shape (token ids, say) are kept.
    hf = convert.read_json(source / 'config.json') | hf
  hf |= {'dtype': dtype, 'torch_dtype': dtype}

  new, old = (path.with_name(path.name + end) for end in ('.tmp', '.old'))
  for left_over in (new, old):
    shutil.rmtree(left_over, ignore_errors=True)
  new.mkdir(parents=True)
  convert.save_params(params, config, new, max_shard_bytes, report)
  (new / 'config.json').write_text(json.dumps(hf, indent=2) + '\n')
  if source:
    copy_companions(source, new)
  if path.exists():
    path.rename(old)
  new.rename(path)
  shutil.rmtree(old, ignore_errors=True)
