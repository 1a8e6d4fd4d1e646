"""One reverse-KL train step, beside the same step in PyTorch.

  pip install -e '.[parity]'
  python tools/bench/kd_step.py

Student 4 layers x 256, teacher 8 x 512, V = 151936, 4 rows of 256 tokens,
fp32, AdamW. The PyTorch side is transformers' models and the reverse KL over
full logits, in eager mode. Their seconds, peak resident memory and ratios are
printed as JSON. `--response` is the share of each row that is response: 1 is
the worst case for the streamed head, which computes nothing for prompts.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench import side_by_side

V, B, T = 151936, 4, 256
STUDENT = {'width': 256, 'layers': 4, 'heads': 4, 'ff_width': 768}
TEACHER = {'width': 512, 'layers': 8, 'heads': 8, 'ff_width': 1536}


def inputs(response):
  """Token ids [B, T] and the response mask [B, T]."""
  import numpy as np

  ids_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
  first = max(1, round(T * (1 - response)))
  mask_BT = np.arange(T)[None, :].repeat(B, 0) >= first
  return ids_BT, mask_BT


def jax_parts(
  chunk,
  adapters=None,
  quantize=None,
  shape=STUDENT,
  remat=False,
  vocab=V,
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
  from flax import nnx

  from gakd_jax import objectives, optim, step
  from gakd_jax.models import Decoder, DecoderConfig, lora, pair

  def model(shape, seed, vocab, adapters=None, quantize=None):
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
    decoder = Decoder(config, nnx.Rngs(seed))
    if quantize is not None:
      for linear in lora.projections(decoder).values():
        linear.quantize(quantize)
    if adapters is not None:
      lora.attach(decoder, lora.LoRAConfig(**adapters), seed)
    return decoder

  models, params = pair.make(
    model(shape, 0, vocab, adapters, quantize),
    model(TEACHER, 1, teacher_vocab or vocab),
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


def jax_step(response, chunk, **settings):
  """A function that takes one step of `jax_parts` and returns its loss."""
  import jax

  from gakd_jax.data.pipeline import Batch, Tokens

  models, state, train_step = jax_parts(chunk, **settings)
  ids_BT, mask_BT = inputs(response)
  tokens = Tokens(ids_BT, ids_BT * 0 + 1, mask_BT)
  batch = jax.device_put(Batch(tokens, tokens))

  def take():
    nonlocal state
    state, metrics = train_step(state, models, batch)
    return float(metrics['loss'])

  return take


def torch_model(shape, seed, **settings):
  """Random weights; settings are those of its config."""
  import torch
  import transformers

  torch.manual_seed(seed)
  config = transformers.Qwen3Config(
    vocab_size=V,
    hidden_size=shape['width'],
    num_hidden_layers=shape['layers'],
    num_attention_heads=shape['heads'],
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=shape['ff_width'],
    tie_word_embeddings=True,
    max_position_embeddings=T,
    **settings,
  )
  return transformers.Qwen3ForCausalLM(config)


def torch_step(response):
  """The same in PyTorch."""
  import torch

  student = torch_model(STUDENT, 0).train()
  teacher = torch_model(TEACHER, 1).eval()
  optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.01)
  ids_BT, mask_BT = inputs(response)
  ids = torch.tensor(ids_BT, dtype=torch.long)
  mask = torch.tensor(mask_BT[:, 1:])

  def take():
    with torch.no_grad():
      log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
    log_q = student(ids).logits[:, :-1].log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    loss = (kl * mask).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return take


def main():
  sides = {
    'jax': lambda: jax_step(args.response, args.chunk, name='kld', kd=1.0),
    'torch': lambda: torch_step(args.response),
  }
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--response', type=float, default=1.0)
  parser.add_argument('--chunk', type=int, default=128)
  side_by_side.add_arguments(parser, sides)
  args = parser.parse_args()
  if results := side_by_side.run(__file__, args, sides):
    ratio = side_by_side.ratio
    print(
      json.dumps(
        {
          'times_faster': ratio(results, 'seconds', 'torch', 'jax'),
          'memory_share': ratio(results, 'peak_gb', 'jax', 'torch'),
        }
      )
    )


if __name__ == '__main__':
  main()
