"""Train steps of methods for two tokenizers, beside forward KL with one.

  python -m tools.bench.cross

Models of kd_step.py, V = 151936 against the teacher's 50257 ids, or the other
way round with `--swap` (forward KL: 151936), rows of 512 tokens, fp32, AdamW.
Ids, alignments and maps of vocabularies are drawn: of the smaller vocabulary
nine in ten have a partner, of a row's tokens seven. All steps are compiled in
one process and then taken in turns. MB are the compiler's count of temporary
memory; also with twice the chunk, and with rows twice as long.
"""

import argparse
import json
import time

from tools.bench import kd_step, side_by_side

LARGE, SMALL, T = kd_step.V, 50257, 512
BASELINE = 'forward_kl'
METHODS = {
  'uld': {},
  'overlap': {},
  'mined': {},
  'dskd_cma': {},
  'dskd_v2': {},
  'gold': {},
  'alm': {},
  'multilevel_ot': {},
  'xtoken': {},
  'mcw': {},
  'mcw_semi_dual': {'name': 'mcw', 'solver': 'semi_dual'},
  'mcw_reference': {'name': 'mcw', 'reference': True},
}


def constants(name, V, U):
  """What a method reads of two vocabularies, of the student and the teacher."""
  import numpy as np

  from gakd_jax.objectives import vocabularies

  rng = np.random.default_rng(0)
  n = round(0.9 * min(V, U))
  t_ids, s_ids = rng.permutation(U)[:n], rng.permutation(V)[:n]
  if name == 'mined':
    s_id_U = rng.integers(0, V, U).astype(np.int32)
    s_id_U[t_ids] = s_ids
    return vocabularies.nearest_of(s_id_U, V)
  if name == 'xtoken':
    return projection(s_ids, t_ids, V, U)
  spaces = {
    f'space_{side}': rng.random(n) < 0.4 for side, n in (('s', V), ('t', U))
  }
  return vocabularies.shared_of(s_ids, t_ids, V, U) | spaces


def projection(s_ids, t_ids, V, U):
  """Constants of X-Token: ids without a partner are two of the teacher's."""
  import numpy as np

  from gakd_jax.objectives import vocabularies

  others = np.setdiff1d(np.arange(V), s_ids)
  pieces = np.random.default_rng(0).integers(0, U, (len(others), 2))
  weight_P = np.repeat([1.0, 0.9, 0.1], [len(s_ids), *[len(others)] * 2])
  t_P = np.concatenate([t_ids, pieces.T.ravel()])
  s_P = np.concatenate([s_ids, others, others])
  order = np.argsort(s_P, kind='stable')
  return vocabularies.shared_of(s_ids, t_ids, V, U) | {
    'piece_s': s_P[order].astype(np.int32),
    'piece_t': t_P[order].astype(np.int32),
    'piece_weight': weight_P[order].astype(np.float32),
    'reached': np.ones(U, bool),
  }


def aligned_batch(rows, length, vocabs):
  """A `Batch` of whole responses, each side in pieces of a token or more."""
  import jax
  import numpy as np

  from gakd_jax.data.pipeline import Batch, Tokens

  rng = np.random.default_rng(0)
  shape = rows, length
  mask_BT = np.broadcast_to(np.arange(length) > 0, shape)
  student, teacher = (
    Tokens(
      rng.integers(0, n, shape).astype(np.int32),
      np.ones(shape, np.int32),
      mask_BT,
    )
    for n in vocabs
  )
  spans = [
    np.cumsum(rng.random(shape) < 0.9, axis=1, dtype=np.int32) for _ in range(2)
  ]
  # Those that both have; the others' text is cut off.
  last_B1 = np.minimum(*(x[:, -1:] for x in spans)) - 1
  span_s, span_t = (np.where((x > 0) & (x <= last_B1), x, -1) for x in spans)
  pairs_t = np.stack([*map(_single, span_s, span_t)])
  dtw_t = np.roll(np.where(pairs_t > 0, pairs_t - 1, -1), -1, axis=1)
  dtw_t[:, -1] = -1
  align = {
    'span_s': span_s,
    'span_t': span_t,
    'pairs_t': pairs_t,
    'dtw_t': dtw_t,
    **paths(rng, shape),
  }
  return jax.device_put(Batch(student, teacher, align=align))


def paths(rng, shape):
  """Cells of two warping paths a row, a quarter of them no diagonal steps."""
  import numpy as np

  rows, length = shape
  cells = {name: np.full((rows, 4 * length), -1, np.int32) for name in 'std'}
  for name, found_BC in cells.items():
    drawn = rng.random((rows, 2, length)) < (0.5 if name == 'd' else 0.875)
    drawn = drawn if name == 'd' else np.cumsum(drawn, axis=2) - drawn[..., :1]
    found_BC[:, : 2 * length] = drawn.reshape(rows, -1)
  return {f'path_{name}': found_BC for name, found_BC in cells.items()}


def _single(s_T, t_T):
  """The teacher's token of each that is a piece alone on both sides; -1."""
  import numpy as np

  (s_span, s_at, s_n), (t_span, t_at, t_n) = (
    np.unique(x, return_index=True, return_counts=True) for x in (s_T, t_T)
  )
  _, i, j = np.intersect1d(s_span, t_span, return_indices=True)
  alone = (s_n[i] == 1) & (t_n[j] == 1) & (s_span[i] >= 0)
  found_T = np.full(len(s_T), -1, np.int32)
  found_T[s_at[i[alone]]] = t_at[j[alone]]
  return found_T


def compiled(side, vocabs, rows, length, chunk):
  """The compiled step, its state, models and batch."""
  import dataclasses

  import jax

  settings = {'name': side} | METHODS.get(side, {})
  if side == BASELINE:
    settings = {'name': 'kld', 'divergence': side}
    vocabs = LARGE, LARGE
  models, state, train_step = kd_step.jax_parts(
    chunk, vocab=vocabs[0], teacher_vocab=vocabs[1], **settings
  )
  if side != BASELINE:
    made = jax.device_put(constants(side, *vocabs))
    models = dataclasses.replace(
      models, frozen=models.frozen | {'constants': made}
    )
  batch = aligned_batch(rows, length, vocabs)
  step = train_step.lower(state, models, batch).compile()
  return step, state, models, batch


def temporary_mb(step):
  return round(step.memory_analysis().temp_size_in_bytes / 1e6)


def in_turns(sides, vocabs, args):
  """{side: seconds, ratio, loss, memory} of all steps."""
  runs = {
    side: list(compiled(side, vocabs, args.rows, T, args.chunk))
    for side in sides
  }
  seconds, losses = {side: [] for side in sides}, {}
  for _ in range(1 + args.rounds):
    for side, (step, state, models, batch) in runs.items():
      start = time.perf_counter()
      runs[side][1], metrics = step(state, models, batch)
      losses[side] = float(metrics['loss'])
      seconds[side].append(time.perf_counter() - start)
  found = {}
  for side, (step, *_) in runs.items():
    pairs = zip(seconds[side][1:], seconds[BASELINE][1:], strict=True)
    found[side] = {
      'seconds': side_by_side.spread(seconds[side][1:]),
      'times forward KL': side_by_side.spread(a / b for a, b in pairs),
      'MB': temporary_mb(step),
      'loss': losses[side],
    }
  return found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--methods', default=','.join(METHODS))
  parser.add_argument('--swap', action='store_true')
  parser.add_argument('--rows', type=int, default=2)
  parser.add_argument('--chunk', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  sides = BASELINE, *args.methods.split(',')
  vocabs = (SMALL, LARGE) if args.swap else (LARGE, SMALL)
  table = in_turns(sides, vocabs, args)
  for side in sides:
    table[side] |= {
      name: temporary_mb(compiled(side, vocabs, args.rows, *size)[0])
      for name, size in (
        ('MB, twice the chunk', (T, 2 * args.chunk)),
        ('MB, twice the length', (2 * T, args.chunk)),
      )
    }
  print(json.dumps({'steps': table}))


if __name__ == '__main__':
  main()
