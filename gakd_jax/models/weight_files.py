"""The files of a model's weights: which they are, and what lies where.

Also what is wrong with them, in one line.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from gakd_jax import UserError, json_file

WHOLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
# What adapters may be in beside these.
OTHER_DTYPES = {
  'F64': 'float64',
  'F8_E4M3': 'float8_e4m3fn',
  'F8_E5M2': 'float8_e5m2',
}
_BLOCK = 2**17  # numbers that are in the cache when they are looked at twice
# Buffers that old checkpoints saved though they are computed.
_IGNORED = ('rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')
# Of GPTQ and AWQ, compressed-tensors and fp8, and bitsandbytes.
_OF_QUANTIZED = (
  *('.qweight', '.qzeros', '.scales', '.g_idx'),
  *('_scale', '_scale_inv', '_packed'),
  *('.absmax', '.quant_map', '.SCB', '__nf4', '__fp4'),
)
_QUANTIZED = ('I8', 'U8', 'F8_E4M3', 'F8_E5M2')


def read_config(path):
  """The parsed config.json of a directory."""
  return json_file.read(
    path / 'config.json',
    missing='not found; a model is a Hugging Face directory',
  )


def _weight_files(path):
  """Those that transformers reads: model.safetensors, else all of the index."""
  index = json_file.read(path / INDEX) if (path / INDEX).exists() else None
  if (path / WHOLE).exists():
    return [path / WHOLE]
  if index is not None:
    return _indexed(path, index)
  others = [f.name for f in path.glob('*.safetensors') if f.is_file()]
  if others:
    raise UserError(
      f'{path}: has neither {WHOLE} nor {INDEX}, which names the files of '
      f'weights; {_some(sorted(others))} alone is not known to be all of them'
    )
  raise UserError(
    f'{path}: no *.safetensors file; convert other formats with '
    'transformers: save_pretrained(..., safe_serialization=True)'
  )


def _is_name(x):
  """Whether it can be the name of a file or a tensor, in a line about it."""
  return isinstance(x, str) and x.isprintable() and 0 < len(x) <= 255


def _indexed(path, index):
  """The files that a directory's index names."""
  weight_map = index.get('weight_map')
  names = weight_map.values() if isinstance(weight_map, dict) else ()
  if not names or not all(map(_is_name, names)):
    raise UserError(
      f'{path / INDEX}: weight_map must be an object that names a file for '
      'each tensor'
    )
  for name in sorted(set(names)):
    # A link is followed: the hub's own files are links.
    if name.startswith('/') or '..' in Path(name).parts:
      raise UserError(f'{path / INDEX}: {name!r} is not in its directory')
    if not (path / name).is_file():
      raise UserError(
        f'{path / name}: missing, but named in {INDEX}; fetch it again'
      )
  return [path / name for name in sorted(set(names))]


class Tensor(NamedTuple):
  """Where a tensor lies in a file."""

  file: Path
  name: str
  offset: int  # in bytes
  n_bytes: int
  dtype: str  # as the file names it
  shape: tuple

  def mapped(self):
    """The tensor, on disk. Mapped each time: what stays so stays in memory."""
    dtype = jnp.dtype((DTYPES | OTHER_DTYPES)[self.dtype])
    return np.memmap(self.file, dtype, 'r', self.offset, self.shape)

  def check_finite(self, x):
    """Refuses what was read of the tensor, and converted, if it has no value.

    x: a contiguous array of floats; its dtype may hold less than the file's.
    """
    if not is_finite(x):
      raise UserError(
        f'{self.file}: {self.name} has values that are not finite in '
        f'{x.dtype}: a training diverged, or the file is damaged; take other '
        'weights, or a wider dtype'
      )


def check_saved(x, name, path):
  """Refuses to write a tensor, a contiguous array, that nobody can use."""
  if not is_finite(x):
    raise UserError(
      f'{path}: is not written, as {name} would have values that are not '
      f'finite in {x.dtype}; go back to a checkpoint from before that'
    )


def is_finite(x):
  """Whether a contiguous array of floats has neither NaN nor infinity.

  By their bits, whose exponent is then the largest: for bfloat16 ten times as
  fast as numpy's isfinite.
  """
  size = x.dtype.itemsize
  infinity = int(np.array(np.inf, x.dtype).view(f'u{size}'))
  minus_infinity = infinity + 2 ** (8 * size - 1)
  bits = x.reshape(-1).view(f'u{size}')
  for i in range(0, len(bits), _BLOCK):
    block = bits[i : i + _BLOCK]
    # Of both signs, NaN is above.
    if block.view(f'i{size}').max() >= infinity:
      return False
    if block.max() >= minus_infinity:
      return False
  return True


def tensors(file):
  """{name: `Tensor`} of a safetensors file.

  Raises:
    UserError: if it is none. The library looks at the header, whose size is
      bounded, and at where tensors lie: all in the file, each in a place of its
      own that is as large as dtype and shape say.
  """
  try:
    if not file.is_file():  # A pipe would be waited for.
      raise UserError(f'{file}: not a readable safetensors file (not a file)')
    with safetensors.safe_open(file, framework='numpy'):
      pass
    with file.open('rb') as f:
      size = int.from_bytes(f.read(8), 'little')
      header = json.loads(f.read(size))
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(
      f'{file}: not a readable safetensors file ({e}); fetch it again'
    ) from e
  header.pop('__metadata__', None)
  found = {}
  for name, x in header.items():
    if not _is_name(name):
      raise UserError(f'{file}: {json_file.shown(name)} is no name of a tensor')
    start, end = x['data_offsets']
    found[name] = Tensor(
      file, name, 8 + size + start, end - start, x['dtype'], tuple(x['shape'])
    )
  return found


def header(tensors):
  """What comes before the data of a safetensors file, as bytes.

  tensors: {name: (dtype, shape)} in the order of the data, which is written
    one by one; the library itself wants all of it at once.
  """
  stored = {name: theirs for theirs, name in DTYPES.items()}
  content, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, (dtype, shape) in tensors.items():
    start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
    content[name] = {
      'dtype': stored[dtype],
      'shape': list(shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(content).encode()
  text += b' ' * (-len(text) % 8)  # keeps the data aligned
  return len(text).to_bytes(8, 'little') + text


def contents(path, family):
  """{name: `Tensor`} of a directory's weights.

  Models that were saved without their head have names without the prefix.
  """
  there = {}
  for file in _weight_files(path):
    found = tensors(file)
    if twice := sorted(there.keys() & found.keys()):
      raise UserError(
        f'{file}: {twice[0]} is in {there[twice[0]].file.name} too; one is of '
        'another model: fetch all files again'
      )
    there |= found
  last = family.names['final_norm/scale'].removeprefix(family.prefix)
  head = family.names['head_weight']
  prefix = family.prefix if last in there else ''
  return {
    name if name == head else prefix + name: there[name]
    for name in sorted(there)
  }


def has_own_head(path, family, shape):
  """Whether a directory's head is not its embedding; both are of `shape`.

  transformers ties no weights that differ, whatever config.json says. False
  where there are no weights.
  """
  if not any((path / name).exists() for name in (WHOLE, INDEX)):
    return False
  found = contents(path, family)
  both = [found.get(family.names[n]) for n in ('head_weight', 'embedding')]
  if None in both:
    return False
  a, b = both
  if {a.shape, b.shape} != {shape} or not {a.dtype, b.dtype} <= DTYPES.keys():
    return True  # `check` says what is wrong.
  return _differ(a, b, a.file.stat().st_mtime_ns, b.file.stat().st_mtime_ns)


@functools.lru_cache  # A config is read many times, and these may be gigabytes.
def _differ(a, b, *changed):
  del changed
  rows = max(1, 2**22 // a.shape[1])
  a, b = a.mapped(), b.mapped()
  return any(
    np.any(a[i : i + rows] != b[i : i + rows]) for i in range(0, len(a), rows)
  )


def _some(problems, of=3):
  """The first of them, and how many more there are."""
  more = [f'and {len(problems) - of} more'] if len(problems) > of else []
  return ', '.join([*problems[:of], *more])


def check(expected, found, family, path):
  """One error: what is missing, extra, misshapen or quantized, some of each."""
  both = [(n, found[n], s) for n, s in expected.items() if n in found]
  kinds = (
    [f'{n} is missing' for n in expected if n not in found],
    [
      f'{n} is not expected'
      for n in found
      if n not in expected and not n.endswith(_IGNORED)
    ],
    [
      f'{n} has shape {list(x.shape)}, expected {list(shape)}'
      for n, x, shape in both
      if x.shape != shape
    ],
    [
      f'{n} is stored as {x.dtype}, not as one of {", ".join(DTYPES)}'
      for n, x, _ in both
      if x.dtype not in DTYPES
    ],
  )
  problems = '; '.join(_some(kind) for kind in kinds if kind)
  if problems:
    hint = _hint(found, family)
    raise UserError(
      f'{path}: tensors do not match config.json: {problems}{hint}'
    )


def _hint(found, family):
  """What tensors are likely to be that do not match."""
  for n, x in found.items():
    if n.endswith(_OF_QUANTIZED) or x.dtype in _QUANTIZED:
      return (
        f'; {n} ({x.dtype}) is of quantized weights, which are not read: take '
        'the model that they were made from, or dequantize them with '
        'transformers'
      )
  embedding = family.names['embedding'].removeprefix(family.prefix)
  for n in found:
    prefix = n.removesuffix(embedding)
    if prefix not in (n, family.prefix) and prefix.endswith('.'):
      return (
        f'; names begin with {prefix!r} instead of {family.prefix!r}: rename '
        'the tensors, or save the inner model alone'
      )
  return ''
