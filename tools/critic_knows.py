"""What a critic knows that a KL does not: a part of docs/critic_study.md.

  python -m tools.critic_knows --start=runs/critic_study_ladder/sft-seed0/best

The quickstart's teacher, and a student that stays as it is (`--start`) while a
critic learns to tell its text from the teacher's, which is the best case for a
critic: the one is taken that is best on answers of the teacher that were kept
from it. Then, on prompts that neither has seen:

  scores  of answers that the student writes, D of each is regressed, within
          prompts and over all, on what can be computed of the answer: sums over
          its tokens of KL(p || q) and KL(q || p), D* = log p(y) - log q(y), its
          length, and how much of it is right. R^2 is of answers that the
          regression has not seen
  steps   of one size along the gradient of KL(q || p), exact at each token of
          the student's text; of the policy gradient with D* and with D; of
          what is left of these when the first is taken out; and in a direction
          drawn at random. What each step does is measured on the student's new
          text. `cosine of halves` is of gradients of other prompts: how much of
          a direction is no noise
  frozen  the policy gradient with D, for many steps while D stays as it is:
          does the student learn what the teacher says, or what this critic
          likes?
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
from gakd_jax.data import encoding, sources
from gakd_jax.objectives import base
from tools import synthetic

SAMPLES = 4
SIZES = (0.1, 0.3)  # of steps, in Euclidean lengths of parameters
HELD_OUT = 200  # answers of the teacher that the critic does not learn
EVERY = 100  # steps between its evaluations
FROZEN_RATE, FROZEN_EVERY = 3e-4, 50


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
  run = build.build(c, workdir, jax.sharding.get_mesh())
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


def trained(args):
  """A student and its critic, and [(step, accuracy, held-out accuracy)]."""
  lines = Path(args.text, 'answers.jsonl').read_text().splitlines()
  parts = {'text': lines[:-HELD_OUT], 'held_out': lines[-HELD_OUT:]}
  args.workdir.mkdir(parents=True, exist_ok=True)
  files = {name: args.workdir / f'{name}.jsonl' for name in parts}
  for name, part in parts.items():
    files[name].write_text('\n'.join(part) + '\n')
  run, batches, _ = made(args.start, str(files['held_out']), 1, args.workdir)
  n = HELD_OUT // run.config.train.batch_size
  unseen = [next(batches) for _ in range(n)]
  run, batches, training = made(
    args.start, str(files['text']), args.steps, args.workdir
  )
  state = training.init()
  unseen = [
    written(run, state.params['student'], host, 30_000 + i)
    for i, host in enumerate(unseen)
  ]
  scored = jax.jit(functools.partial(run.objective.scores, dtype='float32'))
  found, curve, best = [], [], (-1, None)
  for step in range(1, args.steps + 1):
    params = state.params['student']
    batch = written(run, params, next(batches), step).replace(totals={})
    state, metrics = training.step(state, run.models, batch)
    found.append(float(metrics['critic/accuracy']))
    if step % EVERY == 0 or step == args.steps:
      score_Bn = np.concatenate(
        [scored(state.critic, x).reshape(-1, SAMPLES + 1) for x in unseen]
      )
      right = np.mean(score_Bn[:, -1:] > score_Bn[:, :-1])
      curve.append((step, np.mean(found[-EVERY:]), right))
      print(
        'critic, step {}: accuracy {:.3f}, held out {:.3f}'.format(*curve[-1])
      )
      if right > best[0]:
        best = right, jax.tree.map(jnp.copy, state.critic)
  return state.params['student'], best[1], curve


def knowing(objective):
  """A function: what is known of each answer of a batch, {name: [B]}."""
  numbers = jax.jit(functools.partial(_numbers, objective))

  def known(run, params, critic, batch, rows):
    found = numbers(run.models, params, critic, batch)
    return found | {'accuracy': accuracy(run, batch, rows)}

  return known


def accuracy(run, batch, rows):
  """The percentage of each answer that is right, [B]; see synthetic.check."""
  found = []
  for ids_T, mask_T, i in zip(
    *map(np.asarray, (batch.student.ids_BT, batch.student.mask_BT)),
    np.asarray(batch.rows_B),
    strict=True,
  ):
    ids = ids_T[mask_T][:-1]
    text = encoding.decode(run.models.tokenizer, ids.tolist())
    found.append(100 * synthetic.check(rows[run.texts.places[i]], text))
  return np.array(found)


def _numbers(objective, models, params, critic, batch):
  """Sums over the tokens of each answer, and its score."""
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
  """{direction: of the student's parameters, of each batch}."""
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
    found[name] = some
  return found


def mean(trees):
  return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def cosine(a, b):
  return float(
    optax.tree.vdot(a, b) / (optax.tree.norm(a) * optax.tree.norm(b))
  )


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


def stacked(found):
  """{name: [prompts, samples]} of what is known of several batches."""
  return {
    name: np.concatenate(
      [np.asarray(x[name]).reshape(-1, SAMPLES + 1)[:, :-1] for x in found]
    )
    for name in found[0]
  }


def measured(run, known, params, critic, held_out, rows, first):
  """What the student's new text is worth: means, and standard errors."""
  texts = (
    written(run, params, host, first + i) for i, host in enumerate(held_out)
  )
  found = stacked([known(run, params, critic, x, rows) for x in texts])
  return {
    name: (float(x.mean()), float(x.mean(1).std() / len(x) ** 0.5))
    for name, x in found.items()
  } | {'of prompts': {k: x.mean(1).tolist() for k, x in found.items()}}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--start', required=True)
  parser.add_argument('--text', default='runs/critic_study_ladder/teacher')
  parser.add_argument('--workdir', default='runs/critic_knows', type=Path)
  parser.add_argument('--steps', default=600, type=int)
  parser.add_argument('--prompts', default=480, type=int)
  parser.add_argument('--frozen', default=300, type=int, help='steps')
  args = parser.parse_args()
  with jax.set_mesh(sharding.make_mesh()):
    study(args)


def study(args):
  """Writes <workdir>/found.json."""
  params, critic, curve = trained(args)
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
  found = stacked([known(run, params, critic, x, rows) for x in some])
  result = {'critic': curve, 'R^2': {}}
  names = ('KL(p,q)', 'KL(q,p)', 'D*', 'length', 'accuracy')
  for of in (*((x,) for x in names), names[:2], names):
    result['R^2'][' + '.join(of)] = regression(found, of)
  print(json.dumps(result['R^2'], indent=1))
  by_batch = gradients(run, params, critic, some[: n // 2])
  directions = {k: mean(x) for k, x in by_batch.items()}
  result['cosine with KL'] = {
    k: cosine(x, directions['KL']) for k, x in directions.items()
  }
  halves = [{k: mean(x[i::2]) for k, x in by_batch.items()} for i in range(2)]
  for part in (directions, *halves):
    for name in ('D*', 'D'):
      part[f'{name} without KL'] = without(part[name], part['KL'])
  result['cosine of halves'] = {
    k: cosine(x, halves[1][k]) for k, x in halves[0].items()
  }
  directions['random'] = optax.tree.random_like(jax.random.key(0), params)
  lengths = {k: float(optax.tree.norm(x)) for k, x in directions.items()}
  for name in ('cosine with KL', 'cosine of halves'):
    print(name, json.dumps(result[name], indent=1))
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
  result['frozen'] = {}
  for step, moved in frozen(
    run, params, critic, held_out[: n // 2], args.frozen
  ):
    result['frozen'][step] = there = measure(moved)
    print_step(f'D frozen, {step} steps', there, start)
  (args.workdir / 'found.json').write_text(json.dumps(result, indent=1))


def frozen(run, params, critic, batches, steps):
  """Yields (step, parameters) under a reward that does not learn."""
  objective = dataclasses.replace(run.objective, warmup_steps=0)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(FROZEN_RATE)
  )

  @jax.jit
  def update(params, moments, batch):
    own = base.Own(critic=critic, step=jnp.asarray(1))

    def loss(params):
      outputs = run.models.outputs(params, batch)
      return objective.reinforcement(*outputs, batch, own, None)[0]

    gradients = jax.grad(loss)(params)
    updates, moments = optimizer.update(gradients, moments)
    return optax.apply_updates(params, updates), moments

  moments = optimizer.init(params)
  for step in range(1, steps + 1):
    host = batches[step % len(batches)]
    batch = written(run, params, host, 40_000 + step)
    params, moments = update(params, moments, batch)
    if step % FROZEN_EVERY == 0 or step == steps:
      yield step, params


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
