"""A .gguf file, as llama.cpp has it, made a Hugging Face directory.

Once: `directory` keeps what it made, and everything else reads that. Weights
keep their dtype; of quantized kinds they are float32, which holds exactly what
llama.cpp computes with.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gakd_jax import UserError
from gakd_jax.data import store
from gakd_jax.models import (
  convert,
  families,
  gguf_tokenizer,
  hf_config,
  layers,
  transformer,
  weight_files,
)

_VERSION = 2  # of what a directory is made like
_ARCHITECTURES = ('llama', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gpt2')
_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
_NEEDED = (
  *('embedding_length', 'block_count', 'feed_forward_length'),
  *('attention.head_count', 'context_length'),
)
_ROPE = 'rope_freqs.weight'  # what llama 3.1 multiplies its periods by
# Of all models that have such factors; the first of `hf_config.LLAMA3` differs.
_LLAMA3 = (1.0, 4.0, 8192)
# llama.cpp's names, and ours where all but GPT-2 have them.
_SIZES = {
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'attention.sliding_window': 'sliding_window',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'context_length': 'max_position_embeddings',
  'final_logit_softcapping': 'final_logit_softcapping',
  'rope.freq_base': 'rope_theta',
}
_GPT2_SIZES = {
  'embedding_length': 'n_embd',
  'block_count': 'n_layer',
  'feed_forward_length': 'n_inner',
  'attention.head_count': 'n_head',
  'attention.layer_norm_epsilon': 'layer_norm_epsilon',
  'context_length': 'n_positions',
}


def is_one(path):
  """Whether a model is named by such a file."""
  try:
    return Path(path).suffix == '.gguf' and Path(path).expanduser().is_file()
  except (OSError, RuntimeError):  # Too long; of a user that is not there.
    return False


def directory(file):
  """The Hugging Face directory of a file, which is made if it is not there.

  It lies in the user's cache; another size or time of the file is another one.

  Raises:
    UserError: if the file is none, or its model or tokenizer is not supported.
  """
  file = Path(file).expanduser().resolve()
  about = file.stat()
  key = [_VERSION, str(file), about.st_size, about.st_mtime_ns]
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
  path = store.default_root().with_name('gguf') / f'{file.stem}-{digest[:16]}'
  if path.is_dir():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f'{path.name}.lock'), 'w') as lock:
      # Of the processes of a machine, one makes it and the others wait.
      with contextlib.suppress(OSError):  # Where the file system has locks.
        fcntl.flock(lock, fcntl.LOCK_EX)
      if not path.is_dir():
        print(f'{file}: its Hugging Face directory is {path}', flush=True)
        new = path.with_name(f'{path.name}.tmp')
        shutil.rmtree(new, ignore_errors=True)
        write(file, new)
        new.rename(path)
  except OSError as e:
    raise UserError(
      f'{path}: cannot be written ({e.strerror or e}); set GAKD_JAX_CACHE to '
      'another place'
    ) from None
  return path


def write(file, path, dtype=None):
  """Writes the Hugging Face directory of a file; `dtype`: of all weights."""
  reader, library = _opened(file)
  path = Path(path)
  try:
    said = {name: field.contents() for name, field in reader.fields.items()}
    kind = said.get('general.architecture')
    tensors = {x.name: x for x in reader.tensors}
    config = _config(kind, said, tensors)
    where = _places(library, kind, config, tensors)
    kept = {_stored(x, dtype) for x in where.values() if len(x.shape) > 1}
    config['dtype'] = kept.pop() if len(kept) == 1 else 'float32'
    path.mkdir(parents=True)
    (path / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    gguf_tokenizer.write(said, path)
    _write_weights(library, kind, config, where, path, dtype)
  except BaseException as e:
    shutil.rmtree(path, ignore_errors=True)
    if isinstance(e, OSError) or not isinstance(e, Exception):
      raise
    what = str(e)
    if not isinstance(e, UserError):
      what = f'its metadata make no model ({type(e).__name__}: {e})'
    raise UserError(f'{file}: {" ".join(what.split())}') from e


def _opened(file):
  """A reader of the file, and the library that it is of."""
  try:
    import gguf  # Few need it.
  except ImportError:
    raise UserError(
      f'{file}: reading it takes the package gguf; pip install '
      "'gakd_jax[gguf]', or pip install gguf"
    ) from None
  try:
    reader = gguf.GGUFReader(file)
    if reader.endianess is not gguf.GGUFEndian.LITTLE:
      raise ValueError('big-endian')
    return reader, gguf
  except Exception as e:  # Its errors have no common class.
    reason = (str(e).splitlines() or [type(e).__name__])[0]
    raise UserError(
      f'{file}: not a readable .gguf file ({reason}); fetch it again'
    ) from e


def _config(kind, said, tensors):
  """config.json: what the file says, in the names of Hugging Face."""
  if kind not in _ARCHITECTURES:
    raise UserError(
      f'general.architecture {kind!r} is not supported; supported are '
      f'{", ".join(_ARCHITECTURES)}'
    )
  if (n := said.get('split.count', 1)) > 1:
    raise UserError(
      f'is one of {n} parts; join them with llama-gguf-split --merge'
    )
  sizes = _GPT2_SIZES if kind == 'gpt2' else _SIZES
  config = {'model_type': kind, 'tie_word_embeddings': True}
  for theirs, ours in sizes.items():
    value = said.get(f'{kind}.{theirs}')
    if value is not None:
      # The decimal that was rounded to a float32.
      is_real = isinstance(value, float)
      config[ours] = float(str(np.float32(value))) if is_real else value
  missing = [x for x in _NEEDED if f'{kind}.{x}' not in said]
  if missing:
    raise UserError(f'has no {kind}.{missing[0]}')
  if kind != 'gpt2':  # As llama.cpp.
    heads = config['num_attention_heads']
    config.setdefault('num_key_value_heads', heads)
    config.setdefault('head_dim', config['hidden_size'] // heads)
    rotary = said.get(f'{kind}.rope.dimension_count', config['head_dim'])
    if rotary != config['head_dim']:
      raise UserError(
        f'rope of {rotary} of {config["head_dim"]} dimensions is not supported'
      )
  embedding = tensors.get('token_embd.weight')
  if embedding is None:
    raise UserError('has no token_embd.weight; it is no language model')
  config['vocab_size'] = int(embedding.shape[1])
  config['tie_word_embeddings'] = 'output.weight' not in tensors
  scaling = said.get(f'{kind}.rope.scaling.type', 'linear')
  old = said.get(f'{kind}.rope.scale_linear', 1.0)
  factor = said.get(f'{kind}.rope.scaling.factor', old)
  if scaling != 'none' and (factor not in (0, 1) or scaling != 'linear'):
    raise UserError(f'rope scaling {scaling!r} by {factor} is not supported')
  if _ROPE in tensors:
    config['rope_scaling'] = _llama3(tensors[_ROPE].data, config)
  if kind == 'gemma2':  # As llama.cpp: only the model of 46 layers differs.
    n, heads = config['num_hidden_layers'], config['num_attention_heads']
    width = config['hidden_size'] // heads if n == 46 else config['head_dim']
    config['query_pre_attn_scalar'] = width
  for name, theirs in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding')):
    i = gguf_tokenizer.special_id(said, theirs)
    if i is not None:
      config[f'{name}_token_id'] = i
  decoder = families.config_from_hf(config, 'its metadata')
  return families.config_to_hf(decoder, config)


def _llama3(factor_N, config):
  """rope_scaling of which a file has the factors alone."""
  head_dim = config['head_dim']
  scaling = (float(np.max(factor_N)), *_LLAMA3)
  frequencies = [
    layers.rope_frequencies(head_dim, config['rope_theta'], x)
    for x in (None, scaling)
  ]
  if not np.allclose(frequencies[0] / frequencies[1], factor_N, rtol=1e-4):
    raise UserError(f'{_ROPE} are not those of llama 3.1; not supported')
  fields = zip(hf_config.LLAMA3, scaling, strict=True)
  return {'rope_type': 'llama3'} | dict(fields)


def _places(library, kind, config, tensors):
  """{Hugging Face's name of a tensor: the file's}; nothing is left over."""
  family = families.FAMILIES[kind]
  decoder = families.config_from_hf(config, 'config.json')
  n = decoder.layers
  names = library.get_tensor_name_map(library.MODEL_ARCH[kind.upper()], n)
  found = {}
  for ours, entry in family.names.items():
    if ours == 'head_weight' and decoder.tied_head:
      continue
    entry = entry if isinstance(entry, str) else entry.tensor
    for l in range(n if '{}' in entry else 1):
      name = entry.format(l)
      found[name] = names.get_name(name, ('.weight', '.bias'))
  missing = [x for x in found.values() if x not in tensors]
  extra = sorted(tensors.keys() - {*found.values(), _ROPE})
  for what, some in (('are missing', missing), ('are not expected', extra)):
    if some:
      raise UserError(
        f'{len(some)} tensors {what} in a {kind}: {", ".join(some[:3])}'
      )
  _check_shapes(family, decoder, found, tensors)
  return {ours: tensors[theirs] for ours, theirs in found.items()}


def _check_shapes(family, decoder, found, tensors):
  """Refuses tensors of other sizes than the metadata say."""
  model = nnx.eval_shape(lambda: transformer.Decoder(decoder, nnx.Rngs(0)))
  shapes = convert.flatten(transformer.split(model)[1])
  for name, x in shapes.items():
    entry = family.names[name]
    parts = 1 if isinstance(entry, str) else entry.of
    entry = entry if isinstance(entry, str) else entry.tensor
    shape = x.shape[1:] if '{}' in entry else x.shape
    theirs = tensors[found[entry.format(0)]]
    if math.prod(theirs.shape) != parts * math.prod(shape):
      raise UserError(
        f'{theirs.name} has {math.prod(theirs.shape)} numbers where its '
        f'metadata say {parts * math.prod(shape)}'
      )


def _write_weights(library, kind, config, where, path, dtype):
  """model.safetensors, a tensor at a time."""
  turned = {
    name
    for name in where
    if not families.FAMILIES[kind].transposed and _is_linear(name)
  }
  about = {}
  for name, x in where.items():
    stored = _stored(x, dtype)
    shape = [int(n) for n in x.shape]  # The file's last axis is its first.
    about[name] = stored, shape if name in turned else shape[::-1]
  heads = {
    'q_proj.weight': config.get('num_attention_heads'),
    'k_proj.weight': config.get('num_key_value_heads'),
  }
  with open(path / weight_files.WHOLE, 'wb') as f:
    f.write(weight_files.header(about))
    for name, tensor in where.items():
      x = _as_array(library, tensor)
      last = '.'.join(name.split('.')[-2:])
      if kind == 'llama' and last in heads:
        x = _halves(x, heads[last])
      elif kind in ('gemma', 'gemma2') and name.endswith('norm.weight'):
        x = x - np.asarray(1, x.dtype)  # Here norms count from 0.
      elif name in turned:
        x = x.T
      x = np.ascontiguousarray(x.astype(about[name][0], copy=False))
      weight_files.check_saved(x, name, path)
      f.write(x.reshape(-1).view(np.uint8))


def _stored(tensor, dtype):
  """The dtype that a tensor is written in; `dtype`: what is asked for."""
  return dtype or _DTYPES.get(tensor.tensor_type.name, 'float32')


def _is_linear(name):
  """Whether a tensor of GPT-2 is the weight of a linear layer."""
  return name.endswith('.weight') and '.c_' in name


def _as_array(library, tensor):
  shape = [int(n) for n in tensor.shape][::-1]
  kind = _DTYPES.get(tensor.tensor_type.name)
  if kind:
    return np.asarray(tensor.data).view(jnp.dtype(kind)).reshape(shape)
  try:
    found = library.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError:
    raise UserError(
      f'{tensor.name} is of kind {tensor.tensor_type.name}, which the package '
      'gguf does not read; take a file of another kind'
    ) from None
  return found.reshape(shape)


def _halves(x, heads):
  """Rotary pairs of rows, neighbours in llama.cpp, lie half a head apart."""
  pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)
