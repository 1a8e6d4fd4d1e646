"""A step that reads its teacher's hidden states, beside one whose teacher runs.

  python -m tools.bench.teacher_cache

Qwen3-8B and 0.6B at a quarter of their widths: teacher 36 layers x 1024,
student 28 x 256, V = 37984; 4 rows of 256 tokens, fp32, AdamW. `cached` reads
each batch from files, as every epoch does once they are there. First losses are
compared before times.
"""

import argparse
import json
import tempfile

from tools.bench import kd_step, side_by_side

V, B, T = 37984, 4, 256
STUDENT = {'width': 256, 'layers': 28, 'heads': 4, 'ff_width': 768}
TEACHER = {'width': 1024, 'layers': 36, 'heads': 16, 'ff_width': 3072}
_BATCHES = 8  # Different ones, in turns.


def step(objective, is_cached):
  """A function that takes one step, on the next batch, and returns its loss."""
  import itertools

  import jax
  import numpy as np

  from gakd_jax import teacher_cache
  from gakd_jax.data import pipeline
  from gakd_jax.data import texts as texts_lib

  models, state, train_step = kd_step.jax_parts(
    128,
    shape=STUDENT,
    teacher_shape=TEACHER,
    vocab=V,
    **kd_step.OBJECTIVES[objective],
  )
  ids = np.random.default_rng(0).integers(0, V, (B * _BATCHES, T))
  texts = texts_lib.of([(row[:1], row[1:]) for row in ids.astype(np.int32)])
  settings = {'batch_size': B, 'max_length': T, 'buckets': (T,), 'pad_id': 0}
  batches = pipeline.batches(texts, **settings)
  if is_cached:
    read = jax.jit(lambda both, batch: both.teacher_hidden(batch))
    folder = tempfile.mkdtemp()
    shards = []
    for n, batch in enumerate(itertools.islice(batches, _BATCHES)):
      hidden_BTE = np.asarray(read(models, batch))
      np.save(f'{folder}/{n}.npy', hidden_BTE.reshape(-1, TEACHER['width']))
      shards.append(np.load(f'{folder}/{n}.npy', mmap_mode='r'))
    starts = np.arange(len(texts)) % B * T
    lengths = np.full(len(texts), T)
    cache = teacher_cache.Cache(shards, starts, lengths, B)
    batches = pipeline.batches(texts, cached=cache, **settings)

  def take():
    nonlocal state
    state, metrics = train_step(state, models, jax.device_put(next(batches)))
    return float(metrics['loss'])

  return take


def main():
  sides = {
    'live': lambda: step(args.objective, False),
    'cached': lambda: step(args.objective, True),
  }
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  kinds = [name for name in kd_step.OBJECTIVES if name != 'sft']
  parser.add_argument('--objective', choices=kinds, default='reverse_kl')
  side_by_side.add_arguments(parser, sides)
  args = parser.parse_args()
  if results := side_by_side.run(args, sides):
    side_by_side.check_alike(results, rtol=1e-5)
    ratios = {
      'times faster than a live teacher': ('seconds', 'live', 'cached'),
      'memory': ('peak_gb', 'cached', 'live'),
    }
    tokens = B * (T - 1)
    print(json.dumps(side_by_side.summary(results, ratios, tokens)))


if __name__ == '__main__':
  main()
