"""Attention in plain JAX: all scores at once, and in blocks of queries.

  python -m tools.bench.attention

Forward and backward, 4 rows, 8 heads of 64, 2 of keys, fp32. Printed as JSON:
seconds of both forms, taken in turns (median), and their ratio; `--decoder`
instead the compiler's count of temporary memory, in MB, of the gradient of a
decoder (4 layers x 256, one row), without and with recomputed layers.
"""

import argparse
import json
import time

from tools.bench import side_by_side

FORMS = 'xla', 'chunked'


def seconds(T, rounds):
  import jax
  import jax.numpy as jnp

  from gakd_jax.models import attention

  keys = jax.random.split(jax.random.key(0), 3)
  q_k_v = [
    jax.random.normal(key, (4, T, heads, 64))
    for key, heads in zip(keys, (8, 2, 2), strict=True)
  ]

  def gradient(form):
    context = attention.Context(
      rope=None, segments_BT=jnp.ones((4, T), int), backend=form
    )

    def total(q_k_v):
      return jnp.sum(attention.attention(*q_k_v, context, 0.125) ** 2)

    return jax.jit(jax.grad(total))

  taken = {form: [] for form in FORMS}
  steps = {form: gradient(form) for form in FORMS}
  for _ in range(1 + rounds):
    for form, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(q_k_v))
      taken[form].append(time.perf_counter() - start)
  pairs = zip(*(x[1:] for x in taken.values()), strict=True)
  return {form: side_by_side.spread(x[1:]) for form, x in taken.items()} | {
    'chunked to xla': side_by_side.spread(b / a for a, b in pairs)
  }


def megabytes(T, form, remat):
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from gakd_jax.models import Decoder, DecoderConfig, blocks

  config = DecoderConfig(
    vocab_size=256,
    width=256,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=32,
    ff_width=768,
    tied_head=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_length=T,
  )
  model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))

  def total(stack, x_BTD):
    ones_BT = jnp.ones(x_BTD.shape[:2], int)
    y_BTD = blocks.run(config, stack, x_BTD, ones_BT, remat, backend=form)
    return jnp.sum(y_BTD**2)

  x_BTD = jax.ShapeDtypeStruct((1, T, config.width), jnp.float32)
  definition, params = nnx.split(model.blocks)
  gradient = jax.grad(lambda p, x: total(nnx.merge(definition, p), x))
  compiled = jax.jit(gradient).lower(params, x_BTD).compile()
  return round(compiled.memory_analysis().temp_size_in_bytes / 1e6)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--lengths', default='256,512,1024,2048')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--decoder', action='store_true')
  args = parser.parse_args()
  table = {}
  for T in map(int, args.lengths.split(',')):
    table[T] = (
      {
        f'{form}{", remat" if remat == "blocks" else ""}': megabytes(
          T, form, remat
        )
        for remat in ('none', 'blocks')
        for form in FORMS
      }
      if args.decoder
      else seconds(T, args.rounds)
    )
    print(T, table[T], flush=True)
  print(json.dumps({'lengths': table}))


if __name__ == '__main__':
  main()
