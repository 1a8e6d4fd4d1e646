"""What a critic knows that a KL does not: a part of docs/critic_study.md.

  python -m tools.critic_knows --start=runs/critic_ladder/sft-seed0/best

The quickstart's teacher, and a student that stays as it is (`--start`) while a
critic learns to tell its text from the teacher's: until nothing changes, which
is the best case for a critic. Then, on prompts that neither has seen:

  scores  of answers that the student writes, D of each is regressed, within
          prompts and over all, on what can be computed of the answer: sums over
          its tokens of KL(p || q) and KL(q || p), D* = log p(y) - log q(y), and
          its length. R^2 is of answers that the regression has not seen
  steps   of one size along the gradient of KL(q || p), exact at each token of
          the student's text; of the policy gradient with D* and with D; and of
          what is left of these when the first is taken out. What each step does
          is measured on the student's new text
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import quickstart as q
from gakd_jax import build, inputs, keys, sharding
from gakd_jax import training as training_lib
from gakd_jax.data import sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.objectives import base
from tools import synthetic

SAMPLES = 4
SIZES = (0.03, 0.1, 0.3)  # of steps, in Euclidean lengths of parameters


def config(start, data, steps):
  c = q.student(data, steps, seed=0, start=start)
  q.writes(c, writer='student', samples=SAMPLES, beside=True)
  c.objective = {'name': 'gad', 'warmup_steps': max(0, steps - 1)}
  c.critic_optimizer.learning_rate = 1e-3
  c.optimizer.learning_rate, c.optimizer.end = 1e-12, 0.0  # It stays.
  c.evals = {}
  return c


def made(start, data, steps, workdir):
  """The `build.Run` of a config, its batches and its `Training`."""
  c = config(start, data, steps)
  mesh = sharding.make_mesh(**c.mesh)
  jax.set_mesh(mesh)
  run = build.build(c, workdir, mesh)
  batches = inputs.training_batches(run)
  return run, batches, training_lib.make(run, batches.steps_per_epoch, steps)


def written(run, params, host, step):
  """A batch with the student's answers, beside the data's."""
  key = keys.of(run.config.seed, 'writer')
  ((batch, _),) = run.writer.write(
    *(run.models, params, [host], run.mesh),
    key=key,
    step=step,
    progress=0.0,
  )
  return batch.replace(totals=run.objective.count(batch))


def trained(run, batches, training, steps):
  state = training.init()
  found = []
  for step in range(1, steps + 1):
    params = state.params['student']
    batch = written(run, params, next(batches), step).replace(totals={})
    state, metrics = training.step(state, run.models, batch)
    found.append(float(metrics['critic/accuracy']))
    if step % 50 == 0:
      print(f'critic, step {step}: accuracy {np.mean(found[-50:]):.3f}')
  return state


def knowing(objective):
  """A function of (models, params, critic, batch); see `_known`."""
  return jax.jit(functools.partial(_known, objective))


def _known(objective, models, params, critic, batch):
  """{name: [B]} of each answer, sums over its tokens."""
  outputs = models.outputs(params, batch)
  log_q, log_p = (
    jax.nn.log_softmax(jax.vmap(x.head)(x.hidden_BTD)) for x in outputs
  )
  target, mask_BT = base.targets(batch)

  def total(x_BT):
    return jnp.sum(x_BT, axis=1, where=mask_BT)

  def of_token(log_BTV):
    ids_BT1 = target.id_N[..., None]
    return jnp.take_along_axis(log_BTV, ids_BT1, axis=2)[..., 0]

  return {
    'D': objective.scores(critic, batch, models.dtype),
    'D*': total(of_token(log_p) - of_token(log_q)),
    'KL(p,q)': total(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)),
    'KL(q,p)': total(jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)),
    'length': total(jnp.ones(mask_BT.shape)),
  }


def gradients(run, params, critic, batches):
  """{direction: of the student's parameters}, means over batches."""
  exact = dataclasses.replace(
    run.objective, kd=1.0, on='written', divergence='reverse_kl', g=0.0
  )
  ours = dataclasses.replace(run.objective, warmup_steps=0)
  oracle = dataclasses.replace(ours, oracle=True)

  def gradient(objective, term, params, batch):
    own = base.Own(critic=critic, step=jnp.asarray(1))
    batch = batch.replace(totals=objective.count(batch))

    def loss(params):
      outputs = run.models.outputs(params, batch)
      return getattr(objective, term)(*outputs, batch, own, None)[0]

    return jax.grad(loss)(params)

  found = {}
  for name, objective, term in (
    ('KL', exact, 'imitation'),
    ('D*', oracle, 'reinforcement'),
    ('D', ours, 'reinforcement'),
  ):
    of_batch = jax.jit(functools.partial(gradient, objective, term))
    some = [of_batch(params, batch) for batch in batches]
    found[name] = jax.tree.map(lambda *x: sum(x) / len(x), *some)
  for name in ('D*', 'D'):
    found[f'{name} without KL'] = without(found[name], found['KL'])
  return found


def without(a, b):
  """What is left of a when its part along b is taken out."""
  share = optax.tree.vdot(a, b) / optax.tree.vdot(b, b)
  return jax.tree.map(lambda x, y: x - share * y, a, b)


def regression(rows, names):
  """R^2 of D on some numbers: fitted on half of the prompts, on the others."""
  x_MN = np.stack([rows[name] for name in names], axis=-1)
  y_M = rows['D']
  found = {}
  for where, center in (('over all', False), ('within prompts', True)):
    x, y = x_MN, y_M
    if center:
      x = x - x.mean(axis=1, keepdims=True)
      y = y - y.mean(axis=1, keepdims=True)
    half = len(y) // 2
    parts = [
      (x[part].reshape(-1, len(names)), y[part].reshape(-1))
      for part in (slice(half), slice(half, None))
    ]
    (a, b), (c, d) = [(np.c_[u, np.ones(len(u))], v) for u, v in parts]
    weights = np.linalg.lstsq(a, b, rcond=None)[0]
    found[where] = 1 - np.sum((d - c @ weights) ** 2) / np.sum(
      (d - d.mean()) ** 2
    )
  return found


def stacked(found, group):
  """{name: [prompts, samples]} of `known` of several batches."""
  names = found[0]
  return {
    name: np.concatenate(
      [np.asarray(x[name]).reshape(-1, group)[:, :-1] for x in found]
    )
    for name in names
  }


def measured(run, known, params, critic, held_out, rows, first):
  """What the student's new text is worth: means, and standard errors."""
  found, right = [], []
  tokenizer = run.models.tokenizer
  for i, host in enumerate(held_out):
    batch = written(run, params, host, first + i)
    found.append(known(run.models, params, critic, batch))
    ids_BT, mask_BT = (
      np.asarray(x) for x in (batch.student.ids_BT, batch.student.mask_BT)
    )
    for b, place in enumerate(np.asarray(batch.rows_B)):
      if b % batch.group < SAMPLES:
        ids = ids_BT[b][mask_BT[b]]
        text = tokenizer_lib.decode(tokenizer, ids[:-1].tolist())
        right.append(100 * synthetic.check(rows[place], text))
  found = stacked(found, SAMPLES + 1)
  found['accuracy'] = np.array(right).reshape(-1, SAMPLES)
  return {
    name: (float(x.mean()), float(x.mean(1).std() / len(x) ** 0.5))
    for name, x in found.items()
  } | {'of prompts': {k: x.mean(1).tolist() for k, x in found.items()}}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--start', required=True)
  parser.add_argument('--text', default='runs/critic_ladder/teacher')
  parser.add_argument('--workdir', default='runs/critic_knows', type=Path)
  parser.add_argument('--steps', default=600, type=int)
  parser.add_argument('--prompts', default=480, type=int)
  args = parser.parse_args()
  text = f'{args.text}/answers.jsonl'
  run, batches, training = made(args.start, text, args.steps, args.workdir)
  state = trained(run, batches, training, args.steps)
  params, critic = state.params['student'], state.critic
  # Prompts of the test split, which neither has seen.
  spec = f'python:tools.synthetic:gradable:test:{args.prompts}'
  rows, _ = sources.load(spec)
  run, batches, _ = made(args.start, spec, 1, args.workdir)
  known = knowing(run.objective)
  n = args.prompts // run.config.train.batch_size
  held_out = [next(batches) for _ in range(n)]
  some = [
    written(run, params, host, 10_000 + i) for i, host in enumerate(held_out)
  ]
  found = stacked(
    [known(run.models, params, critic, x) for x in some],
    SAMPLES + 1,
  )
  result = {'R^2': {}}
  names = ('KL(p,q)', 'KL(q,p)', 'D*', 'length')
  for of in (*((x,) for x in names), names[:2], names):
    result['R^2'][' + '.join(of)] = regression(found, of)
  print(json.dumps(result['R^2'], indent=1))
  directions = gradients(run, params, critic, some[: n // 2])
  lengths = {k: float(optax.tree.norm(x)) for k, x in directions.items()}
  result['cosine with KL'] = {
    k: float(optax.tree.vdot(x, directions['KL']))
    / (lengths[k] * lengths['KL'])
    for k, x in directions.items()
  }
  print(json.dumps(result['cosine with KL'], indent=1))
  # Of the other half of the prompts, with draws that are the same for all.
  others = held_out[n // 2 :]
  measure = functools.partial(
    measured,
    run,
    known,
    critic=critic,
    held_out=others,
    rows=rows,
    first=20_000,
  )
  start = measure(params)
  result['steps'] = {'none': start}
  print_step('none', start, start)
  for name, d in directions.items():
    for size in SIZES:
      moved = jax.tree.map(
        lambda x, g, k=name, s=size: x - s / lengths[k] * g, params, d
      )
      result['steps'][f'{name}, {size}'] = there = measure(moved)
      print_step(f'{name}, {size}', there, start)
  args.workdir.mkdir(parents=True, exist_ok=True)
  (args.workdir / 'found.json').write_text(json.dumps(result, indent=1))


def print_step(name, there, start):
  """Differences from the start, paired by prompt."""
  texts = []
  for key in ('KL(q,p)', 'D*', 'D', 'accuracy', 'length'):
    d = np.subtract(there['of prompts'][key], start['of prompts'][key])
    error = d.std() / len(d) ** 0.5
    texts.append(f'{key} {there[key][0]:.3f} ({d.mean():+.3f} +- {error:.3f})')
  print(f'{name}: {"; ".join(texts)}', flush=True)


if __name__ == '__main__':
  main()
