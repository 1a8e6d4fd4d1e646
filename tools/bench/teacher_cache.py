"""A step that reads what is kept of its teacher, beside one whose teacher runs.

  python -m tools.bench.teacher_cache
  python -m tools.bench.teacher_cache --objective=forward_kl
  python -m tools.bench.teacher_cache --scale=2 --rounds=1  # 14 GB of memory

Qwen3-8B and 0.6B with widths divided by `--scale`, by default a quarter:
teacher 36 layers x 1024, student 28 x 256, V = 37984 (with 2, twice these
numbers but layers); 4 rows of 256 tokens, fp32, AdamW. The
products of a student that narrow are far from their speed, so the smaller the
models are, the less a kept teacher is seen to save. The others read each batch
from files, as every epoch does once they are there: its last hidden states, its
64 most likely ids, or 64 draws (forward KL). Of live and hidden, first losses
are compared before times. All have the teacher in memory, which a run that
finds all of it kept has not. `--remat` is the student's.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from gakd_jax.models import blocks
from tools.bench import kd_step, side_by_side

B, T = 4, 256
# {field: of scale 1}, but heads: those of 64 numbers.
STUDENT = {'width': 1024, 'layers': 28, 'heads': 16, 'ff_width': 3072}
TEACHER = {'width': 4096, 'layers': 36, 'heads': 64, 'ff_width': 12288}
_V, _CHUNK = 151936, 128
_BATCHES, _KNOWN = 8, 64  # Different batches, in turns; ids a token.


def scaled(shape, scale):
  return {k: n if k == 'layers' else n // scale for k, n in shape.items()}


def step(objective, kind, remat, scale):
  """A function that takes one step, on the next batch, and returns its loss."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from gakd_jax.data import kept, pipeline
  from gakd_jax.data import texts as texts_lib
  from gakd_jax.models.transformer import Outputs
  from gakd_jax.objectives import few

  V = _V // scale
  models, state, train_step = kd_step.jax_parts(
    _CHUNK,
    shape=scaled(STUDENT, scale),
    teacher_shape=scaled(TEACHER, scale),
    vocab=V,
    remat=remat,
    **kd_step.OBJECTIVES[objective],
  )
  ids = np.random.default_rng(0).integers(0, V, (B * _BATCHES, T))
  texts = texts_lib.of([(row[:1], row[1:]) for row in ids.astype(np.int32)])
  settings = {'batch_size': B, 'max_length': T, 'buckets': (T,), 'pad_id': 0}
  batches = pipeline.batches(texts, **settings)

  @jax.jit
  def ask(both, batch):
    hidden_BTE = both.teacher_hidden(batch)
    if kind == 'hidden':
      return {'hidden': hidden_BTE}
    key_B = jax.random.split(jax.random.key(0), B)
    head, wanted_BT = both.teacher_head(), jnp.ones((B, T), bool)
    return few.ask(
      *(kind, _KNOWN, Outputs(hidden_BTE, head), wanted_BT),
      temperature=1.0,
      chunk=_CHUNK,
      key_B=key_B,
    )

  if kind != 'live':
    folder = Path(tempfile.mkdtemp())
    shards = []
    for n, batch in enumerate(itertools.islice(batches, _BATCHES)):
      said = {
        k: np.asarray(x).reshape(-1, *x.shape[2:])
        for k, x in ask(models, batch).items()
      }
      said = kept.ragged(**said) if kind == 'sampled' else said
      shards.append(kept.load(folder, n, lambda said=said: said))
    draws = _KNOWN if kind == 'sampled' else None
    cached = kept.Kept(shards, np.full(len(texts), T), B, draws)
    batches = pipeline.batches(texts, cached=cached, **settings)

  def take():
    nonlocal state
    state, metrics = train_step(state, models, jax.device_put(next(batches)))
    return float(metrics['loss'])

  return take


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  objectives = [name for name in kd_step.OBJECTIVES if name != 'sft']
  parser.add_argument('--objective', choices=objectives, default='reverse_kl')
  parser.add_argument('--remat', choices=blocks.REMAT, default='products')
  kinds = ['live', 'hidden', 'top_k', 'sampled']
  parser.add_argument('--scale', type=int, default=4)
  side_by_side.add_arguments(parser, kinds)
  args = parser.parse_args()
  if args.objective != 'forward_kl':
    kinds.remove('sampled')
  sides = {
    k: lambda k=k: step(args.objective, k, args.remat, args.scale)
    for k in kinds
  }
  if results := side_by_side.run(args, sides):
    exact = {k: results[k] for k in ('live', 'hidden')}
    side_by_side.check_alike(exact, rtol=1e-5)
    ratios = {
      f'times faster than live, {k}': ('seconds', 'live', k) for k in kinds[1:]
    }
    ratios |= {f'memory, {k}': ('peak_gb', k, 'live') for k in kinds[1:]}
    tokens = B * (T - 1)
    print(json.dumps(side_by_side.summary(results, ratios, tokens)))


if __name__ == '__main__':
  main()
