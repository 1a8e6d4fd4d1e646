"""Speculative KD's rollouts beside those of the student alone.

  python -m tools.bench.speculative

Student 4 layers x 256, teacher 8 x 512 (8 times the weights of its blocks),
V = 151936, fp32, sampled at temperature 1. Every draft is accepted (rank < V),
so that both write the same text: `share` is tokens a second of both models
over those of the student alone; the rest is the teacher's reading, its head
and the rule. `--rows` prompts of `--prompt` tokens, `--new` tokens each.
"""

import argparse
import json

from tools.bench import kd_step, on_policy, side_by_side


def rollout(writer, args):
  """A function that writes once, and returns a checksum of the text."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from gakd_jax import rollout as rollout_lib

  models, state, _ = kd_step.jax_parts(128, name='kld')
  params = state.params['student']
  # No token ends a response.
  ends = rollout_lib.Ends(eos_ids=(kd_step.V,), pad_id=0, vocab=kd_step.V)
  settings = {'max_new_tokens': args.new, 'ends': ends}
  if writer == 'speculative':
    settings |= {'gamma': args.gamma, 'k': args.k or kd_step.V}
  writer = rollout_lib.WRITERS[writer](**settings)
  ids_BT = np.random.default_rng(0).integers(
    0, kd_step.V, (args.rows, args.prompt), np.int32
  )
  batch = jax.device_put(on_policy.unwritten(ids_BT, args.new))
  key = jax.random.key(0)

  def take():
    tokens, _ = writer.sample(models, params, batch, key)
    written = jnp.sum(tokens.mask_BT)
    assert int(written) == args.rows * args.new
    return int(jnp.sum(tokens.ids_BT))

  return take


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rows', type=int, default=4)
  parser.add_argument('--prompt', type=int, default=128)
  parser.add_argument('--new', type=int, default=128)
  parser.add_argument('--gamma', type=int, default=5)
  parser.add_argument('--k', type=int, help='accepted ranks; all if left out')
  sides = {
    'student': lambda: rollout('student', args),
    'speculative': lambda: rollout('speculative', args),
  }
  side_by_side.add_arguments(parser, sides)
  args = parser.parse_args()
  if results := side_by_side.run(args, sides):
    tokens = args.rows * args.new
    share = {'share': ('seconds', 'student', 'speculative')}
    print(json.dumps(side_by_side.summary(results, share, tokens)))


if __name__ == '__main__':
  main()
