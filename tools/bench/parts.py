"""Where the time of a train step goes: what each part takes, and could.

  python -m tools.bench.parts

The parts of a reverse-KL step (kd_step.py), each compiled alone, beside a
floor and the gap to it, measured / floor. The floor is a part's operations at
the rate of a large product of matrices on the same machine, and for the
optimizer the bytes of parameters, moments and gradient that have to be read and
written, at the rate of adding two large arrays. The floor of a backward pass is
twice that of its forward pass.
"""

import argparse
import json
import statistics
import time

from tools.bench import kd_step

_ADAM_PASSES = 7  # reads gradient, parameter, both moments; writes the latter


def seconds(f, *args, times=5):
  import jax

  jax.block_until_ready(f(*args))
  found = []
  for _ in range(times):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    found.append(time.perf_counter() - start)
  return statistics.median(found)


def rates():
  """Operations a second of a product, bytes a second of a sum of arrays."""
  import jax
  import jax.numpy as jnp

  n = 2048
  square = jnp.ones((n, n))
  product = 2 * n**3 / seconds(jax.jit(jnp.matmul), square, square)
  long = jnp.ones(1 << 26)
  return product, 3 * long.nbytes / seconds(jax.jit(jnp.add), long, long)


def measure(chunk):
  import jax
  import jax.numpy as jnp
  import optax

  from gakd_jax import flops, objectives, optim
  from gakd_jax.data.pipeline import Batch, Tokens
  from gakd_jax.objectives.base import Own

  settings = kd_step.OBJECTIVES['reverse_kl']
  models, state, train_step = kd_step.jax_parts(chunk, **settings)
  objective = objectives.make(head_chunk=chunk, **settings)
  ids_BT, mask_BT = kd_step.inputs(response=1.0)
  tokens = Tokens(ids_BT, ids_BT * 0 + 1, mask_BT)
  batch = jax.device_put(Batch(tokens, tokens))
  counted = batch.replace(totals=objective.count(batch))
  params = state.params['student']

  def student(params):
    return models.student_hidden(params, batch)

  def both(params):
    hidden_BTD, pull_back = jax.vjp(student, params)
    return pull_back(hidden_BTD)

  def loss(hidden_BTD, weight_VD, teacher):
    s, t = models.pair(params, models.heads(params), (hidden_BTD, teacher))
    s = s.replace(head=s.head.replace(weight_VD=weight_VD))
    return objective.loss(s, t, counted, Own(), None)[0]

  optimizer = optim.make(lambda _: 1e-4, weight_decay=0.01, clip_norm=1.0)

  def move(params, opt_state, grads):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  before = rates()
  hiddens = jax.jit(student)(params), jax.jit(models.teacher_hidden)(batch)
  of_loss = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  grads = jax.tree.map(jnp.ones_like, params)
  took = {
    'teacher forward': seconds(jax.jit(models.teacher_hidden), batch),
    'student forward and backward': seconds(jax.jit(both), params),
    'heads and loss': seconds(
      of_loss, hiddens[0], params['embedding'], hiddens[1]
    ),
    'optimizer': seconds(jax.jit(move), params, optimizer.init(params), grads),
  }

  # Machines drift: before and after.
  product, memory = (
    statistics.mean(x) for x in zip(before, rates(), strict=True)
  )
  rows, length = ids_BT.shape
  count = flops.of_step(
    objective, models, params, Own(), rows=rows, length=length
  )
  n_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  floors = {
    'teacher forward': count['teacher forward'] / product,
    'student forward and backward': (
      count['student forward'] + count['student backward']
    )
    / product,
    'heads and loss': (count['student head'] + count['teacher head']) / product,
    'optimizer': _ADAM_PASSES * n_bytes / memory,
  }

  def whole():
    nonlocal state
    state, _ = train_step(state, models, batch)
    return state.step

  took['whole step'] = seconds(whole)
  floors['whole step'] = sum(floors.values())
  return {
    'GFLOP/s of a product': product / 1e9,
    'GB/s of a sum': memory / 1e9,
    'parts': {
      name: {
        'floor, s': floors[name],
        'measured, s': took[name],
        'gap, times': took[name] / floors[name],
      }
      for name in took
    },
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--chunk', type=int, default=256)
  print(json.dumps(measure(parser.parse_args().chunk)))


if __name__ == '__main__':
  main()
