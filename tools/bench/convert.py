"""Conversion of a checkpoint, beside reading and copying the same file.

  python -m tools.bench.convert

Qwen3-0.6B's shape with random weights in bf16 (1.2 GB). `read` has safetensors
read the file into arrays; `load` is `models.load`: the same, stacked and
transposed. `copy` reads the file and writes it to the disk; `to_flax` converts
it to an Orbax checkpoint, and `to_hf` that one back. Each runs in a process of
its own, in turns; memory is the peak above the interpreter with its imports.

  python -m tools.bench.convert --large --rounds=1

converts Qwen3-8B's shape there and back (16.4 GB in four files: 50 GB of disk).
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench import side_by_side

CONFIG = {
  'architectures': ['Qwen3ForCausalLM'],
  'model_type': 'qwen3',
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'num_hidden_layers': 28,
  'num_attention_heads': 16,
  'num_key_value_heads': 8,
  'head_dim': 128,
  'vocab_size': 151936,
  'tie_word_embeddings': True,
  'rope_theta': 1e6,
  'dtype': 'bfloat16',
}
LARGE = {
  'hidden_size': 4096,
  'intermediate_size': 12288,
  'num_hidden_layers': 36,
  'num_attention_heads': 32,
  'tie_word_embeddings': False,
}
FILE = 'model.safetensors'


def make(path, **changes):
  """Writes a random checkpoint of the shape, in a small part of its memory."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from gakd_jax import models
  from gakd_jax.models import families, transformer

  config = families.config_from_hf(CONFIG | changes, path)
  definition, shapes = transformer.split(models.abstract(config))
  # Parameters are windows of one block: each layer is another, and all differ.
  step = 1009
  size = config.layers * step + max(
    math.prod(x.shape[-2:]) for x in jax.tree.leaves(shapes)
  )
  block = np.random.default_rng(0).standard_normal(2**20, np.float32)
  block = np.resize(block.astype(jnp.bfloat16), size)

  def weights(x):
    strides = [2 * math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    if x.ndim > 2 or x.shape[0] == config.layers:  # stacked
      strides[0] = 2 * step
    return np.lib.stride_tricks.as_strided(
      block, x.shape, strides, writeable=False
    )

  model = nnx.merge(definition, jax.tree.map(weights, shapes))
  models.save(model, path)


def read(source, scratch):
  import safetensors.numpy

  return safetensors.numpy.load_file(source / 'hf' / FILE)


def load(source, scratch):
  import jax

  from gakd_jax import models
  from gakd_jax.models import transformer

  params = transformer.split(models.load(source / 'hf'))[1]
  return jax.block_until_ready(params)


def copy(source, scratch):
  with (source / 'hf' / FILE).open('rb') as a, (scratch / 'x').open('wb') as b:
    while chunk := a.read(2**24):
      b.write(chunk)
    os.fsync(b.fileno())  # as Orbax does


def to_flax(source, scratch):
  from tools import convert_weights

  convert_weights.to_flax(source / 'hf', scratch / 'x')


def to_hf(source, scratch):
  from tools import convert_weights

  convert_weights.to_hf(source / 'flax', scratch / 'x')


SIDES = {f.__name__: f for f in (read, load, copy, to_flax, to_hf)}


def peak_bytes():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side, source):
  """Seconds, and peak memory above that after all imports, in bytes."""
  import jax
  import safetensors.numpy

  from gakd_jax import models
  from tools import convert_weights

  del safetensors, models, convert_weights
  jax.config.update('jax_platforms', 'cpu')
  jax.block_until_ready(jax.numpy.zeros(1))
  baseline = peak_bytes()
  scratch = Path(tempfile.mkdtemp(dir=source))
  start = time.perf_counter()
  SIDES[side](source, scratch)
  seconds = time.perf_counter() - start
  shutil.rmtree(scratch)
  return {'seconds': seconds, 'peak': peak_bytes() - baseline}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--side', choices=SIDES)
  parser.add_argument('--make', type=Path, help='write the files there')
  parser.add_argument('--source', type=Path, help='where the files are')
  parser.add_argument('--large', action='store_true')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  if args.make:
    make(args.make / 'hf', **(LARGE if args.large else {}))
    to_flax(args.make, args.make)
    (args.make / 'x').rename(args.make / 'flax')
    return
  if args.side:
    print(json.dumps(measure(args.side, args.source)))
    return
  with tempfile.TemporaryDirectory() as source:
    source = Path(source)
    # In a process of its own: one that starts others passes its peak on.
    command = [sys.executable, '-m', 'tools.bench.convert', f'--make={source}']
    command += ['--large'] if args.large else []
    subprocess.run(command, check=True)
    files = (source / 'hf').glob('*.safetensors')
    size = sum(file.stat().st_size for file in files)
    sys.argv.append(f'--source={source}')
    # The others are of a single file.
    sides = ('to_flax', 'to_hf') if args.large else SIDES
    results = side_by_side.run(args, sides)
  pairs = [('load', 'read')]
  pairs += [(x, y) for x in ('to_flax', 'to_hf') for y in ('read', 'copy')]
  ratios = {f'{a} / {b}': ('seconds', a, b) for a, b in pairs}
  for measured in results.values():
    for x in measured:
      x['peak / size'] = x['peak'] / size
  keys = 'seconds', 'peak / size'
  print(json.dumps(side_by_side.summary(results, ratios, keys=keys)))


if __name__ == '__main__':
  main()
