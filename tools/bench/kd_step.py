"""One reverse-KL train step, beside the same step in PyTorch.

  pip install -e '.[parity]'
  python tools/bench/kd_step.py

Student 4 layers x 256, teacher 8 x 512, V = 151936, 4 rows of 256 tokens,
fp32, AdamW. The PyTorch side is transformers' models and the reverse KL over
full logits, in eager mode. Each runs in a process of its own, in turns, so
that a machine that drifts favours neither; the median of their ratios and the
peak resident memory of each are printed as JSON. `--response` is the share of
each row that is response: 1 is the worst case for the streamed head, which
computes nothing for prompts.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

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


def jax_step(response, chunk):
  """A function that takes one step and returns its loss."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from gakd_jax import objectives, optim, step
  from gakd_jax.data.pipeline import Batch, Tokens
  from gakd_jax.models import Decoder, DecoderConfig, transformer

  def model(shape, seed):
    config = DecoderConfig(
      vocab_size=V,
      kv_heads=2,
      head_dim=64,
      tied_head=True,
      rope_theta=1e6,
      norm_eps=1e-6,
      max_length=T,
      **shape,
    )
    return transformer.split(Decoder(config, nnx.Rngs(seed)))

  student, params = model(STUDENT, 0)
  teacher, t_params = model(TEACHER, 1)
  objective = objectives.make('kld', kd=1.0, head_chunk=chunk)
  schedule = optim.make_schedule(1e-4, 100)
  optimizer = optim.make(schedule, weight_decay=0.01, clip_norm=1.0)
  models = step.Models(student, teacher, jnp.float32)
  train_step = step.make_train_step(
    models, objective, optimizer, schedule, seed=0
  )
  state = step.init_state(params, optimizer)
  ids_BT, mask_BT = inputs(response)
  tokens = Tokens(ids_BT, ids_BT * 0 + 1, mask_BT)
  batch = jax.device_put(Batch(tokens, tokens, {}))

  def take():
    nonlocal state
    state, metrics = train_step(state, {'teacher': t_params}, batch)
    return float(metrics['loss'])

  return take


def torch_step(response):
  """The same in PyTorch."""
  import torch
  import transformers

  def model(shape, seed):
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
    )
    return transformers.Qwen3ForCausalLM(config)

  student, teacher = model(STUDENT, 0).train(), model(TEACHER, 1).eval()
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


def measure(side, response, chunk, steps):
  """One process: seconds of each step after a first, and peak memory."""
  take = jax_step(response, chunk) if side == 'jax' else torch_step(response)
  take()
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    loss = take()
    seconds.append(time.perf_counter() - start)
  peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  return {
    'seconds': statistics.median(seconds),
    'peak_gb': peak_gb,
    'loss': loss,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--side', choices=['jax', 'torch'])
  parser.add_argument('--response', type=float, default=1.0)
  parser.add_argument('--chunk', type=int, default=128)
  parser.add_argument('--steps', type=int, default=3)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  if args.side:
    print(json.dumps(measure(args.side, args.response, args.chunk, args.steps)))
    return
  sides = {'jax': [], 'torch': []}
  for _ in range(args.rounds):
    for side, results in sides.items():
      command = [sys.executable, __file__, *sys.argv[1:], f'--side={side}']
      done = subprocess.run(
        command, capture_output=True, text=True, check=False
      )
      if done.returncode:
        sys.exit(f'{side}: {done.stderr}')
      results.append(json.loads(done.stdout.splitlines()[-1]))
      print(side, done.stdout.splitlines()[-1], flush=True)
  pairs = list(zip(sides['jax'], sides['torch'], strict=True))
  print(
    json.dumps(
      {
        'times_faster': statistics.median(
          t['seconds'] / j['seconds'] for j, t in pairs
        ),
        'memory_share': statistics.median(
          j['peak_gb'] / t['peak_gb'] for j, t in pairs
        ),
      }
    )
  )


if __name__ == '__main__':
  main()
