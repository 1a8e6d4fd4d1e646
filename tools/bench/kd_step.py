"""One train step, beside the same step of PyTorch and TRL.

  pip install -e '.[bench]'
  python -m tools.bench.kd_step --objective=reverse_kl

Student 4 layers x 256, teacher 8 x 512, V = 151936, 4 rows of 256 tokens,
fp32, AdamW, all rows response (`--response`: the share that is; the streamed
head computes nothing for prompts). `eager` is transformers' models with the
loss over full logits, `compile` the same by torch.compile, `gkd` TRL's
GKDTrainer (lmbda 0), `distillation` its DistillationTrainer, which goes through
the vocabulary in tiles. This project's student computes all but its products
with weights again in the backward pass (`remat='products'`), which is faster
than to keep what is stacked over layers. All begin with the same weights, and
their first losses are compared before their times. In the first round this
project's step is compiled, later ones find it in the cache, as later starts of
a run do: the peaks of memory differ by what the compiler took.
"""

import argparse
import json
import tempfile

from tools.bench import peers, side_by_side

V, B, T = 151936, 4, 256
STUDENT = {'width': 256, 'layers': 4, 'heads': 4, 'ff_width': 768}
TEACHER = {'width': 512, 'layers': 8, 'heads': 8, 'ff_width': 1536}
OBJECTIVES = {
  'reverse_kl': {'name': 'kld', 'kd': 1.0},
  'forward_kl': {'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0},
  'sft': {'name': 'sft'},
}


def inputs(response, rows=B):
  """Token ids [rows, T] and the response mask [rows, T]."""
  import numpy as np

  ids_BT = np.random.default_rng(0).integers(0, V, (rows, T)).astype(np.int32)
  first = max(1, round(T * (1 - response)))
  mask_BT = np.arange(T)[None, :].repeat(rows, 0) >= first
  return ids_BT, mask_BT


def decoder(shape, seed, vocab=V):
  """A random model, the same for a seed."""
  from flax import nnx

  from gakd_jax.models import Decoder, DecoderConfig

  config = DecoderConfig(
    vocab_size=vocab,
    kv_heads=2,
    head_dim=64,
    tied_head=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_length=T,
    **shape,
  )
  return Decoder(config, nnx.Rngs(seed))


def save_models(folder):
  """(student, teacher) of `jax_parts`, as directories."""
  from gakd_jax import models

  paths = f'{folder}/student', f'{folder}/teacher'
  models.save(decoder(STUDENT, 0), paths[0])
  models.save(decoder(TEACHER, 1), paths[1])
  return paths


def jax_parts(
  chunk,
  adapters=None,
  quantize=None,
  shape=STUDENT,
  remat='products',
  vocab=V,
  teacher_shape=TEACHER,
  teacher_vocab=None,
  **objective,
):
  """`Models`, a `TrainState` of the student, and the train step.

  adapters: settings of `LoRAConfig`, to train these alone; None: all weights.
  quantize: of the student's base, see `models.load`.
  shape, remat: of the student.
  vocab, teacher_vocab: how many ids each model has; None: the student's.
  """
  import jax

  from gakd_jax import binary, objectives, optim, step
  from gakd_jax.models import lora, pair

  binary.use_compilation_cache()  # as a run does

  student = decoder(shape, 0, vocab)
  if quantize is not None:
    for linear in lora.projections(student).values():
      linear.quantize(quantize)
  if adapters is not None:
    lora.attach(student, lora.LoRAConfig(**adapters), 0)
  teacher = None
  if objective['name'] != 'sft':
    teacher = decoder(teacher_shape, 1, teacher_vocab or vocab)
  models, params = pair.make(
    student,
    teacher,
    dtype='float32',
    remat=remat,
  )
  objective = objectives.make(head_chunk=chunk, **objective)
  schedule = optim.make_schedule(1e-4, 100)
  optimizer = optim.make(schedule, weight_decay=0.01, clip_norm=1.0)
  critic_optimizer = optim.make(schedule, weight_decay=0.01)
  own = objective.init(jax.random.key(2), *models.configs)
  train_step = step.make_train_step(
    objective, optimizer, schedule, critic_optimizer=critic_optimizer, seed=0
  )
  state = step.init_state(params, own, optimizer, critic_optimizer)
  return models, state, train_step


def jax_step(response, chunk, rows=B, **settings):
  """A function that takes one step of `jax_parts` and returns its loss."""
  import jax

  from gakd_jax.data.pipeline import Batch, Tokens

  models, state, train_step = jax_parts(chunk, **settings)
  ids_BT, mask_BT = inputs(response, rows)
  tokens = Tokens(ids_BT, ids_BT * 0 + 1, mask_BT)
  batch = jax.device_put(Batch(tokens, tokens))

  def take():
    nonlocal state
    state, metrics = train_step(state, models, batch)
    return float(metrics['loss'])

  return take


def main():
  def eager(compiled):
    paths = f'{args.models}/student', f'{args.models}/teacher'
    return peers.eager(*paths, *rows, args.objective, compiled)

  def trainer(make, **settings):
    made = make(f'{args.models}/student', f'{args.models}/teacher', **settings)
    return peers.on_given_text(made, *rows)

  names = ('jax', 'eager', 'compile', 'gkd', 'distillation')
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--objective', choices=OBJECTIVES, default='reverse_kl')
  parser.add_argument('--response', type=float, default=1.0)
  parser.add_argument('--chunk', type=int, default=256)
  parser.add_argument('--models', help=argparse.SUPPRESS)
  side_by_side.add_arguments(parser, names)
  args = parser.parse_args()
  rows = inputs(args.response)
  sides = {
    'jax': lambda: jax_step(
      args.response, args.chunk, **OBJECTIVES[args.objective]
    )
  }
  if side_by_side.installed('torch', 'transformers'):
    sides['eager'] = lambda: eager(False)
    sides['compile'] = lambda: eager(True)
  if args.objective == 'reverse_kl' and side_by_side.installed('trl'):
    sides['gkd'] = lambda: trainer(peers.gkd_trainer, lmbda=0.0)
    sides['distillation'] = lambda: trainer(peers.distillation_trainer)
  if args.side:
    side_by_side.run(args, sides)
    return
  with tempfile.TemporaryDirectory() as folder:
    save_models(folder)
    results = side_by_side.run(args, sides, f'--models={folder}')
  side_by_side.check_alike(results, rtol=1e-3)
  others = [side for side in sides if side != 'jax']
  ratios = {f'times faster than {x}': ('seconds', x, 'jax') for x in others}
  ratios |= {f'memory of {x}': ('peak_gb', 'jax', x) for x in others}
  tokens = int(rows[1].sum())
  print(json.dumps(side_by_side.summary(results, ratios, tokens)))


if __name__ == '__main__':
  main()
