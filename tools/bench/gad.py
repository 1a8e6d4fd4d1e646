"""A step of GAD, beside cross-entropy and on-policy reverse KL.

  python -m tools.bench.gad

The quickstart's pair and data (V = 768), 8 prompts a step. `ce` is SFT on the
data's answers. The others have four answers of the student to each prompt
written first, and learn from these and the data's: `critic` as GAD does,
`oracle` with D* in the critic's place, `exact` by half cross-entropy, half
reverse KL on what was written. The student is fresh, and most of its answers
run to the limit of 72 tokens; seconds are with writing.
"""

import argparse
import json
import tempfile

from tools.bench import side_by_side

PROMPTS, SAMPLES, ROWS = 8, 4, 600
OBJECTIVES = {
  'ce': {'name': 'sft'},
  'critic': {'name': 'gad', 'g': 0.2},
  'oracle': {'name': 'gad', 'g': 0.2, 'oracle': True},
  'exact': {
    'name': 'gad',
    'g': 0.0,
    'kd': 0.5,
    'on': 'written',
    'divergence': 'reverse_kl',
  },
}


def config(objective):
  from configs import quickstart as q

  c = q.sft(seed=0)
  c.objective = OBJECTIVES[objective]
  if objective == 'ce':
    c.data.packing = False
    c.data.max_length = c.data.max_prompt_length + q.NEW_TOKENS
    c.data.buckets = (c.data.max_length,)
  else:
    c.objective.warmup_steps = 0
    q.writes(c, writer='student', samples=SAMPLES, beside=True)
    c.data.buckets = (c.data.max_prompt_length,)
  c.train.batch_size = PROMPTS
  c.evals = {}
  return c


def step(objective):
  """A function that takes one step, on the next batch, and returns its loss."""
  import jax

  from gakd_jax import build, inputs, keys, sharding
  from gakd_jax import training as training_lib

  c = config(objective)
  mesh = sharding.make_mesh(**c.mesh)
  jax.set_mesh(mesh)
  run = build.build(c, tempfile.mkdtemp(), mesh)
  batches = inputs.training_batches(run)
  training = training_lib.make(run, batches.steps_per_epoch, ROWS // PROMPTS)
  state, now = training.init(), 0

  def take():
    nonlocal state, now
    now += 1
    ((batch, _),) = run.writer.write(
      *(run.models, state.params['student'], [next(batches)], mesh),
      key=keys.of(c.seed, 'writer'),
      step=now,
      progress=0.0,
    )
    state, metrics = training.step(state, run.models, batch)
    return float(metrics['loss'])

  return take


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  side_by_side.add_arguments(parser, OBJECTIVES)
  parser.set_defaults(steps=30)
  args = parser.parse_args()
  sides = {name: lambda name=name: step(name) for name in OBJECTIVES}
  if results := side_by_side.run(args, sides):
    ratios = {
      f'time of cross-entropy, {name}': ('seconds', name, 'ce')
      for name in OBJECTIVES
      if name != 'ce'
    }
    of_exact = "time of exact KL on the student's text, critic"
    ratios[of_exact] = ('seconds', 'critic', 'exact')
    print(json.dumps(side_by_side.summary(results, ratios)))


if __name__ == '__main__':
  main()
