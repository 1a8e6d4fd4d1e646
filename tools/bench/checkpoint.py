"""What a checkpoint costs a run: training stands still, and disk.

  python -m tools.bench.checkpoint

The reverse-KL step of kd_step.py (42 M parameters and AdamW's moments, 504 MB)
is taken in turns with and without a save behind it, while nothing else is being
written, and while one is. As JSON: seconds of a step, of what `save` holds it
up, as a share of the step, of a step while a checkpoint is written behind it
(on a CPU both use the same cores), until it is on the disk, and of a restore
that verifies all of it.
"""

import argparse
import json
import shutil
import tempfile
import time

from tools.bench import kd_step, side_by_side


def measure(directory, rounds):
  import jax

  from gakd_jax.checkpoint import Checkpoints
  from gakd_jax.data.pipeline import Batch, Tokens

  models, state, train_step = kd_step.jax_parts(
    128, name='kld', divergence='reverse_kl'
  )
  ids_BT, mask_BT = kd_step.inputs(1)
  tokens = Tokens(ids_BT, ids_BT * 0 + 1, mask_BT)
  batch = jax.device_put(Batch(tokens, tokens))
  checkpoints = Checkpoints(directory, keep=1)
  times = {k: [] for k in ('step', 'save', 'step_while_saving', 'on_disk')}

  def timed(name, do):
    begin = time.perf_counter()
    do()
    times[name].append(time.perf_counter() - begin)

  def step():
    nonlocal state
    state, metrics = train_step(state, models, batch)
    jax.block_until_ready((state, metrics))

  step()
  for i in range(rounds):
    timed('step', step)
    begin = time.perf_counter()
    timed('save', lambda i=i: checkpoints.save(i, state, {}))
    timed('step_while_saving', step)
    checkpoints.wait()
    times['on_disk'].append(time.perf_counter() - begin)
    timed('step', step)
  times['restore'] = []
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state,
  )
  timed('restore', lambda: checkpoints.restore(lambda host: shapes))
  checkpoints.close()
  pairs = zip(times['save'], times['step'][::2], strict=True)
  return {
    'seconds': {k: side_by_side.spread(x) for k, x in times.items()},
    'ratios': {
      'save to step': side_by_side.spread(a / b for a, b in pairs),
    },
    'MB': sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  directory = tempfile.mkdtemp()
  try:
    print(json.dumps(measure(directory, args.rounds)))
  finally:
    shutil.rmtree(directory)


if __name__ == '__main__':
  main()
