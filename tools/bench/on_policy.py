"""One on-policy distillation step, beside those of TRL's two trainers.

  pip install -e '.[bench]'
  python -m tools.bench.on_policy

The student writes a response to each of 4 prompts of 128 tokens, 128 tokens
drawn at T = 1 and no EOS, and learns from them by reverse KL. Models are those
of kd_step.py: student 4 layers x 256, teacher 8 x 512, V = 151936, fp32, AdamW.
`gkd` is the `training_step` of TRL's GKDTrainer (lmbda 1, beta 1, KV cache,
neither gradient checkpointing nor bf16) and the optimizer that it makes;
`distillation` that of its DistillationTrainer (beta 1, without vLLM), which has
no logits of all tokens at a time.
"""

import argparse
import json
import tempfile
import time

from tools.bench import kd_step, peers, side_by_side

V, B, T = kd_step.V, kd_step.B, kd_step.T
NEW = 128
PROMPT = T - NEW


def prompts():
  """Token ids [B, PROMPT]."""
  return kd_step.inputs(response=NEW / T)[0][:, :PROMPT]


def unwritten(ids_BT, new):
  """A `Batch` of prompts, with room for `new` tokens after each."""
  import numpy as np

  from gakd_jax.data.pipeline import Batch, Tokens

  is_prompt_BT = np.pad(np.ones_like(ids_BT), ((0, 0), (0, new)))
  ids_BT = np.pad(ids_BT, ((0, 0), (0, new)))
  tokens = Tokens(ids_BT, is_prompt_BT, is_prompt_BT < 0)
  return Batch(tokens, tokens, rows_B=np.arange(len(ids_BT), dtype=np.int32))


def jax_step():
  """A function that takes one step; -> its loss, and seconds by part."""
  import jax

  from gakd_jax import rollout, sharding

  models, state, train_step = kd_step.jax_parts(128, name='kld', kd=1.0)
  # No token ends a response.
  ends = rollout.Ends(eos_ids=(V,), pad_id=0, vocab=V)
  writer = rollout.Student(max_new_tokens=NEW, ends=ends)
  mesh = sharding.make_mesh()
  jax.set_mesh(mesh)
  # Where a step puts them: else the second one compiles anew.
  models, state = jax.device_put((models, state), sharding.replicated(mesh))
  settings = {'key': jax.random.key(0), 'progress': 0.0}
  now = 0

  def take():
    nonlocal state, now
    start = time.perf_counter()
    now += 1
    ((batch, _),) = writer.write(
      models,
      state.params['student'],
      [unwritten(prompts(), NEW)],
      mesh,
      step=now,
      **settings,
    )
    jax.block_until_ready(batch)
    written = time.perf_counter()
    state, metrics = train_step(state, models, batch)
    loss = float(metrics['loss'])
    assert metrics['tokens'] == B * NEW
    return {
      'writing': written - start,
      'updating': time.perf_counter() - written,
      'loss': loss,
    }

  return take


def gkd_step(student, teacher, attention):
  """The same by TRL."""
  import torch

  trainer = peers.gkd_trainer(
    student, teacher, attention, lmbda=1.0, max_new_tokens=NEW
  )
  assert trainer.generation_config.use_cache
  optimizer = trainer.create_optimizer()
  trainer.generation_config.eos_token_id = None
  ids = torch.tensor(prompts(), dtype=torch.long)
  batch = {'prompts': ids, 'prompt_attention_mask': torch.ones_like(ids)}
  return trl_step(
    trainer,
    optimizer,
    batch,
    'generate_on_policy_outputs',
    lambda written: (written[2] >= 0).sum(),
  )


def distillation_step(student, teacher):
  """The same by TRL's other trainer."""
  trainer = peers.distillation_trainer(
    student, teacher, max_completion_length=NEW
  )
  trainer.current_gradient_accumulation_steps = 1
  optimizer = trainer.create_optimizer()
  # No token ends a response.
  trainer.eos_token_ids = [V]
  trainer.generation_config.eos_token_id = None
  trainer.generation_kwargs['eos_token_id'] = None
  trainer._tokenize_prompts = lambda _: (prompts().tolist(), None, {})
  return trl_step(
    trainer,
    optimizer,
    [{'prompt': ''}] * B,
    '_generate_single_turn',
    lambda written: sum(map(len, written)),
  )


def trl_step(trainer, optimizer, batch, writer, count):
  """A function that takes a trainer's step; as `jax_step`'s.

  writer: the name of the method that writes; count: what it returns -> tokens.
  """
  import torch

  write, writing = getattr(trainer, writer), 0.0

  def timed_write(*args, **kwargs):
    nonlocal writing
    start = time.perf_counter()
    written = write(*args, **kwargs)
    writing = time.perf_counter() - start
    assert count(written) == B * NEW
    return written

  setattr(trainer, writer, timed_write)

  def take():
    start = time.perf_counter()
    loss = trainer.training_step(
      trainer.model, batch, num_items_in_batch=B * NEW
    )
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.item()
    return {
      'writing': writing,
      'updating': time.perf_counter() - start - writing,
      'loss': loss,
    }

  return take


def main():
  names = 'jax', 'gkd', 'distillation'
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--attention', default='sdpa', help="TRL's")
  parser.add_argument('--models', help=argparse.SUPPRESS)
  side_by_side.add_arguments(parser, names)
  args = parser.parse_args()
  sides = {'jax': jax_step}
  if side_by_side.installed('torch', 'trl'):
    paths = f'{args.models}/student', f'{args.models}/teacher'
    sides['gkd'] = lambda: gkd_step(*paths, args.attention)
    sides['distillation'] = lambda: distillation_step(*paths)
  if args.side:
    side_by_side.run(args, sides)
    return
  with tempfile.TemporaryDirectory() as folder:
    kd_step.save_models(folder)
    results = side_by_side.run(args, sides, f'--models={folder}')
  parts = 'writing', 'updating'
  for measured in results.values():
    for x in measured:
      x |= {part: x['result'][part] for part in parts}
  ratios = {}
  for other in sides:
    if other != 'jax':
      ratios |= {
        f'times faster than {other}': ('seconds', other, 'jax'),
        f'in writing, than {other}': ('writing', other, 'jax'),
        f'in updating, than {other}': ('updating', other, 'jax'),
        f'memory of {other}': ('peak_gb', 'jax', other),
      }
  keys = 'seconds', *parts, 'peak_gb'
  found = side_by_side.summary(results, ratios, B * NEW, keys)
  print(json.dumps(found))


if __name__ == '__main__':
  main()
