"""One on-policy distillation step, beside that of TRL's GKDTrainer.

  pip install -e '.[bench]'
  python tools/bench/on_policy.py

The student writes a response to each of 4 prompts of 128 tokens, 128 tokens
drawn at T = 1 and no EOS, and learns from them by reverse KL. Models are those
of kd_step.py: student 4 layers x 256, teacher 8 x 512, V = 151936, fp32, AdamW.
TRL's side is its own `training_step` (lmbda 1, beta 1, KV cache, neither
gradient checkpointing nor bf16) and the optimizer that its trainer makes.
Seconds of a step, those of writing and of updating, peak resident memory and
ratios are printed as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench import kd_step, side_by_side

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


def trl_trainer(attention):
  """A `GKDTrainer`; attention: as transformers name it."""
  import datasets
  import tokenizers
  import transformers
  from trl.experimental.gkd import GKDConfig, GKDTrainer

  # No text is tokenized: prompts are ids.
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(
      tokenizers.models.WordLevel({'<pad>': 0, '<eos>': 1}, '<pad>')
    ),
    pad_token='<pad>',
    eos_token='<eos>',
  )
  student, teacher = (
    kd_step.torch_model(shape, seed, attn_implementation=attention)
    for seed, shape in enumerate((kd_step.STUDENT, kd_step.TEACHER))
  )
  trainer = GKDTrainer(
    student,
    teacher,
    GKDConfig(
      output_dir=tempfile.gettempdir(),  # to which nothing is written
      use_cpu=True,
      bf16=False,
      gradient_checkpointing=False,
      lmbda=1.0,
      beta=1.0,
      temperature=1.0,
      max_new_tokens=NEW,
      learning_rate=1e-4,
      weight_decay=0.01,
      report_to='none',
    ),
    train_dataset=datasets.Dataset.from_dict({'messages': ['unused']}),
    processing_class=tokenizer,
  )
  assert trainer.generation_config.use_cache
  trainer.generation_config.eos_token_id = None
  return trainer


def trl_step(attention):
  """The same by TRL."""
  import torch

  trainer = trl_trainer(attention)
  student, optimizer = trainer.model, trainer.create_optimizer()
  ids = torch.tensor(prompts(), dtype=torch.long)
  generate = trainer.generate_on_policy_outputs
  writing = 0.0

  def timed_generate(*args):
    nonlocal writing
    start = time.perf_counter()
    written = generate(*args)
    writing = time.perf_counter() - start
    assert (written[2] >= 0).sum() == B * NEW
    return written

  trainer.generate_on_policy_outputs = timed_generate

  def take():
    start = time.perf_counter()
    batch = {'prompts': ids, 'prompt_attention_mask': torch.ones_like(ids)}
    loss = trainer.training_step(student, batch, num_items_in_batch=B * NEW)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
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
  sides = {'jax': jax_step, 'trl': lambda: trl_step(args.attention)}
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--attention', default='sdpa', help="TRL's")
  side_by_side.add_arguments(parser, sides)
  args = parser.parse_args()
  if results := side_by_side.run(__file__, args, sides):
    summary = {
      'times_faster': side_by_side.ratio(results, 'seconds', 'trl', 'jax'),
      'memory_share': side_by_side.ratio(results, 'peak_gb', 'jax', 'trl'),
    }
    for side, measured in results.items():
      summary[side] = {
        part: statistics.median(x['result'][part] for x in measured)
        for part in ('writing', 'updating')
      }
    print(json.dumps(summary))


if __name__ == '__main__':
  main()
