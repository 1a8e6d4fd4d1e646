"""Models in and out: Hugging Face directories, and .gguf files.

  model = models.load('Qwen/Qwen3-0.6B', dtype='bfloat16')
  logits_BTV = model.logits(ids_BT)
  models.save(model, 'out')

`abstract` makes a model without weights, `init` one with random weights.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils

from gakd_jax import UserError, hosts, json_file, keys, sharding
from gakd_jax.models import (
  convert,
  families,
  gguf_files,
  hub,
  lora,
  peft,
  prompts,
  quantized,
  transformer,
  weight_files,
)
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
_CHAT_TEMPLATES = 'additional_chat_templates'  # a directory
# What is fetched from the hub, by what it is for.
_CONFIG = ('*config.json',)
_TOKENIZER = (*_CONFIG, *_COMPANIONS, 'additional_chat_templates/*')
_MODEL = (*_TOKENIZER, '*.safetensors', '*.safetensors.index.json')
# Of each tensor, `identity` reads so many pieces of so many bytes.
_PIECES, _PIECE = 16, 4096


def resolve(path, files=_MODEL):
  """The local directory of a path or hub id; hub ids are downloaded.

  A hub id is `org/name` or `org/name@revision`; of a run's directory it is the
  student that came out, and of a .gguf file what `gguf_files` makes of it.
  `files`: one or several patterns of what is needed.
  """
  if gguf_files.is_one(path):
    return gguf_files.directory(path)
  local = hub.directory(path)
  if local:
    is_run = (local / 'best').is_dir() and not any(local.glob('*.safetensors'))
    return local / 'best' if is_run else local
  return hub.fetch(str(path), (files,) if isinstance(files, str) else files)


def resolve_base(path, files=_MODEL):
  """`resolve`, and of an adapter the directory of the model it belongs on."""
  path = resolve(path, files)
  return resolve(peft.base_path(path), files) if peft.is_adapter(path) else path


def tokenizer_dir(path):
  """Where the tokenizer of a model or an adapter lies."""
  path = resolve(path, _TOKENIZER)
  has_its_own = any(file.is_file() for file in path.glob('tokenizer*'))
  return path if has_its_own else resolve_base(path, _TOKENIZER)


@functools.cache  # An export does not ask the hub.
def revision(path):
  """The commit that a hub id stands for, or its directory; of others, None."""
  origin = hub.origin(resolve(path, _CONFIG))
  return origin and origin[1]


def identity(path):
  """A text that differs between models of other weights, config or tokenizer.

  Of each tensor, its name, dtype and shape and 64 KB from all over it, so that
  it takes no time; other files whole. Moved or copied, a model stays what it
  is.
  """
  digest = hashlib.sha256()
  for part in dict.fromkeys((resolve(path), resolve_base(path))):
    files = {file for pattern in _MODEL for file in part.glob(pattern)}
    for file in sorted(f for f in files if f.is_file()):
      digest.update(f'{file.relative_to(part)}\n'.encode())
      if file.suffix == '.safetensors':
        for piece in _samples(file):
          digest.update(piece)
      elif file.name == peft.CONFIG:
        # Where its base lies is no part of it.
        rest = json_file.read(file) | {'base_model_name_or_path': ''}
        digest.update(json.dumps(rest, sort_keys=True).encode())
      else:
        digest.update(file.read_bytes())
  return digest.hexdigest()


def _samples(file):
  """What each tensor of a safetensors file is, and pieces of it, as bytes."""
  tensors = weight_files.tensors(file)
  with file.open('rb', buffering=0) as f:
    for name, tensor in sorted(tensors.items()):
      yield f'{name} {tensor.dtype} {list(tensor.shape)}\n'.encode()
      start, end = tensor.offset, tensor.offset + tensor.n_bytes
      for at in range(start, end, max(_PIECE, -(-(end - start) // _PIECES))):
        f.seek(at)
        yield f.read(min(_PIECE, end - at))


def read_config(path, **shape) -> DecoderConfig:
  """The `DecoderConfig` of a directory or hub id, whose weights stay there.

  `shape` replaces some of its fields, such as `width` or `layers`. Of weights
  that are here no more is looked at than whether a tied head is one.

  Raises:
    UserError: for what no config.json of the family can say.
  """
  path = resolve_base(path, '*config.json')
  hf = weight_files.read_config(path)
  config = families.config_from_hf(hf, path / 'config.json')
  if config.tied_head:
    family = families.FAMILIES[config.family]
    head = config.vocab_size, config.width
    tied = not weight_files.has_own_head(path, family, head)
    config = dataclasses.replace(config, tied_head=tied)
  layers = shape.get('layers', config.layers)
  # Of other layers, windows go on in the pattern of the first.
  windows = tuple(itertools.islice(itertools.cycle(config.windows), layers))
  windows = windows if any(windows) else ()
  try:
    config = dataclasses.replace(config, **{'windows': windows} | shape)
  except TypeError:
    known = [f.name for f in dataclasses.fields(DecoderConfig)]
    wrong = sorted(set(shape) - set(known))
    raise UserError(
      f'unknown model shape {", ".join(wrong)}; known are {", ".join(known)}'
    ) from None
  if shape:
    families.check(config, f'{path} with other {", ".join(sorted(shape))}')
  return config


def without_blocks(config):
  """What is left of a model whose hidden states are known: see `load`."""
  return dataclasses.replace(config, layers=0, windows=())


def abstract(
  config, source='', adapters=None, quantize=None, companions=''
) -> Decoder:
  """The model with shapes for parameters, at no cost in memory.

  `adapters` is a `lora.LoRAConfig`; for `quantize` see `load`, for directories
  `Decoder`.
  """

  def make():
    model = Decoder(config, nnx.Rngs(0), source, companions)
    _quantize(model, quantize)
    if adapters is not None:
      lora.attach(model, adapters, 0)
    return model

  return nnx.eval_shape(make)


def load(
  path, dtype=None, mesh=None, report=None, quantize=None, blocks=True
) -> Decoder:
  """Loads a Hugging Face directory (or hub id).

  Args:
    path: has config.json and one or several safetensors files; or an adapter
      as PEFT writes it, which is put on the base model that it names.
    dtype: of the weights, and so of the computation; None keeps that of each
      parameter, and computes in the widest of the projections.
    mesh: where to place them; None is one device.
    report: called with bytes as they are read.
    quantize: 'int8' or 'nf4' for projections in that (see `quantized`), each as
      soon as it is read; None keeps them as they are.
    blocks: False leaves them in the file: what is left has no layers, and the
      vocabulary head and embedding of the whole model.

  Raises:
    UserError: if the directory is not there, its architecture or a switch in
      it is not supported, or tensors do not match (some of them named).
  """
  base = resolve_base(path)
  config = read_config(base)
  if not blocks:
    config = without_blocks(config)
  definition, _ = transformer.split(
    abstract(config, base, quantize=quantize, companions=tokenizer_dir(path))
  )
  shapes = transformer.split(abstract(config, base))[1]
  params = convert.load_params(
    base, config, shapes, dtype, mesh, report, quantize
  )
  model = nnx.merge(definition, params)
  if blocks and peft.is_adapter(path := resolve(path)):
    peft.load_into(model, path, mesh and sharding.replicated(mesh))
  return model


def init(path, seed, dtype=None, mesh=None, quantize=None, **shape) -> Decoder:
  """Random weights: the architecture and tokenizer of a directory.

  `shape` replaces fields of its `DecoderConfig`; for the others see `load`.
  """
  config = read_config(path, **shape)
  directories = resolve_base(path), tokenizer_dir(path)
  definition, shapes = transformer.split(
    abstract(config, directories[0], None, quantize, directories[1])
  )

  def make():
    rngs = nnx.Rngs(keys.of(seed, 'student'))
    model = Decoder(config, rngs, *directories)
    _quantize(model, quantize)
    return transformer.cast(transformer.split(model)[1], dtype or jnp.float32)

  places = None if mesh is None else sharding.shardings(shapes, mesh)
  return nnx.merge(definition, jax.jit(make, out_shardings=places)())


def _quantize(model, kind):
  quantized.check(kind, 'quantize')
  if kind is not None:
    for linear in lora.projections(model).values():
      linear.quantize(kind)


def copy_companions(source, path):
  """Copies what a model needs beside weights and config.json: its tokenizer."""
  for file in Path(source).iterdir():
    if file.name == _CHAT_TEMPLATES and file.is_dir():
      shutil.copytree(file, Path(path) / file.name)
    is_companion = any(fnmatch.fnmatch(file.name, p) for p in _COMPANIONS)
    if is_companion and file.is_file() and file.suffix != '.py':
      shutil.copyfile(file, Path(path) / file.name)


def save(model, path, max_shard_bytes=5 * 10**9, report=None, describe=None):
  """Writes a directory that transformers loads unchanged.

  Weights keep their dtype, and config.json names that of the computation;
  tokenizer files come along (`Decoder`).
  Of a model with adapters these alone are written, as PEFT does.
  The directory appears whole or not at all: an earlier one stays until the
  new one is complete; before that `describe(directory)` may add to it. All that
  ends a turn by its tokenizer stands in generation_config.json. Of several
  processes all must call this; the first one writes, of each tensor what the
  others hold.

  Raises:
    UserError: if there is something else, nothing can be written there, or a
      weight is not finite.
  """
  path = Path(path).resolve()
  hosts.only_first(lambda: _check_replaceable(path))
  adapters = lora.adapters(model)
  linears = lora.projections(model).values()
  if not adapters and any(linear.is_quantized for linear in linears):
    raise UserError(
      f'{path}: a model whose projections are quantized cannot be saved; load '
      'it without `quantize`'
    )
  new, old = (path.with_name(path.name + end) for end in ('.tmp', '.old'))
  first = jax.process_index() == 0
  try:
    if first:
      for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
      with _writing(path):
        new.mkdir(parents=True)
    if not adapters:
      _save_whole(model, new, max_shard_bytes, report)
    elif first:
      peft.save(model, new)
    if first:
      if model.companions:
        copy_companions(model.companions, new)
      prompts.say_ends(new)
      if describe is not None:
        describe(new)
      if path.exists():
        path.rename(old)
      new.rename(path)
      shutil.rmtree(old, ignore_errors=True)
  except BaseException:
    if first:
      shutil.rmtree(new, ignore_errors=True)
    raise
  multihost_utils.sync_global_devices(f'saved {path}')


@contextlib.contextmanager
def _writing(path):
  try:
    yield
  except OSError as e:
    raise UserError(
      f'{path}: cannot be written ({e.strerror}); name another place'
    ) from None


def _check_replaceable(path):
  with _writing(path):
    is_model = path.is_dir() and any(path.glob('*.safetensors'))
    is_empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
  if not is_model and not is_empty:
    raise UserError(f'{path}: is not a model that could be replaced')


def _save_whole(model, path, max_shard_bytes, report):
  params = transformer.split(model)[1]
  convert.save_params(params, model.config, path, max_shard_bytes, report)
  if jax.process_index() == 0:
    write_config(model, path)


def write_config(model, path):
  """config.json of a model that is the whole of a directory's weights.

  Its dtype is that of the computation, whatever single parameters have.
  """
  file = Path(model.source) / 'config.json'
  source = json_file.read(file) if model.source and file.exists() else {}
  hf = families.config_to_hf(model.config, source)
  hf |= dict.fromkeys(('dtype', 'torch_dtype'), model.dtype.name)
  (Path(path) / 'config.json').write_text(json.dumps(hf, indent=2) + '\n')
