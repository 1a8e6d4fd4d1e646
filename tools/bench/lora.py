"""One train step of adapters, beside the same step of all weights.

  python -m tools.bench.lora

Sizes of kd_step.py: student 4 layers x 256, teacher 8 x 512, V = 151936, 4 rows
of 256 tokens, fp32; `--objective=sft` leaves the teacher out. Adapters of rank
16 with dropout 0.1 on all projections. Their seconds and peak resident memory,
and the bytes of gradients and optimizer state, as ratios in JSON.

  python -m tools.bench.lora --quantize

compares adapters of a base in int8 and in nf4 with those of one in fp32, for a
student of 24 layers x 512 with remat.
"""

import argparse
import json

from tools.bench import kd_step, side_by_side

DEEP = {'width': 512, 'layers': 24, 'heads': 8, 'ff_width': 1536}
LORA = {'rank': 16, 'alpha': 32.0, 'dropout': 0.1}


def state_bytes(adapters):
  """Of gradients and AdamW's moments: three numbers a trained parameter."""
  import jax
  from flax import nnx

  from gakd_jax import models
  from gakd_jax.models import lora, transformer

  config = models.DecoderConfig(
    vocab_size=kd_step.V,
    kv_heads=2,
    head_dim=64,
    tied_head=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_length=kd_step.T,
    **kd_step.STUDENT,
  )

  def trained():
    model = models.Decoder(config, nnx.Rngs(0))
    if adapters is None:
      return transformer.split(model)[1]
    lora.attach(model, lora.LoRAConfig(**adapters), 0)
    return lora.partition(transformer.split(model)[1])[0]

  shapes = jax.eval_shape(trained)
  return 3 * sum(4 * x.size for x in jax.tree.leaves(shapes))


def main():
  def side(adapters, **model):
    settings = {'kld': {'kd': 1.0}, 'sft': {}}[args.objective]
    return lambda: kd_step.jax_step(
      1.0,
      128,
      adapters=adapters,
      **model,
      name=args.objective,
      **settings,
    )

  names = ('adapters', 'all', 'fp32', 'int8', 'nf4')
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--objective', choices=('sft', 'kld'), default='sft')
  parser.add_argument('--quantize', action='store_true')
  side_by_side.add_arguments(parser, names)
  args = parser.parse_args()
  sides = {'adapters': side(LORA), 'all': side(None)}
  if args.quantize:
    kinds = {'fp32': None, 'int8': 'int8', 'nf4': 'nf4'}
    sides = {
      name: side(LORA, quantize=kind, shape=DEEP, remat='blocks')
      for name, kind in kinds.items()
    }
    if results := side_by_side.run(args, sides):
      ratios = {
        f'{key}, {kind} to fp32': (key, kind, 'fp32')
        for kind in ('int8', 'nf4')
        for key in ('seconds', 'peak_gb')
      }
      print(json.dumps(side_by_side.summary(results, ratios)))
  elif results := side_by_side.run(args, sides):
    ratios = {
      'time, adapters to all': ('seconds', 'adapters', 'all'),
      'peak memory': ('peak_gb', 'adapters', 'all'),
    }
    found = side_by_side.summary(results, ratios)
    found['ratios']['gradients and optimizer state'] = state_bytes(
      LORA
    ) / state_bytes(None)
    print(json.dumps(found))


if __name__ == '__main__':
  main()
