"""Greedy decoding, beside transformers' `generate` with the same weights.

  pip install -e '.[parity]'
  python -m tools.bench.generate

A random Qwen3 of 6 layers x 384 (6 heads of 64, 2 of keys and values, 1152 of
feed-forward, tied head), fp32, saved once and loaded by both; 32 prompts of 64
tokens, 128 new tokens each, no EOS, with all cores. Seconds are of a whole
batch; the tokens of both must be the same.

Of a token's time at V = 1024, products with weights are 60 %, at the speed of
large ones, and attention 30 %; at V = 151936 the head is 75 %, at that speed.
What made it no faster: projections fused, keys with the slots of a token
together (twice the time of attention), other ways of writing into the cache
(all of it is 2 %), and sums instead of attention's products: they run on all
cores, 5 % of a token, but with one query a head they take 20 times as long.

`--uneven`: 256 such prompts whose responses have lengths as instruction data
has them (log-normal, median 60, at most 512), by a batch of 32 that is refilled
and by one that waits for its longest response.

`--samples`: 32 new tokens, four times to each of 64 prompts of 256 tokens, by a
batch of 32 that reads a prompt once for all its samples, and for each.

`--padding` measures nothing of time: it prints which share of prompt slots is
padding, for prompt lengths as instruction data has them.
"""

import argparse
import json
import tempfile
import zlib

import numpy as np

from tools.bench import side_by_side

B, PROMPT, NEW = 32, 64, 128
SAMPLES, SHORT = 4, 32
UNEVEN, LONGEST = 256, 512
VOCABULARIES = (1024, 151936)


def save_model(vocab_size, path):
  from flax import nnx

  from gakd_jax import models

  config = models.DecoderConfig(
    vocab_size=vocab_size,
    width=384,
    layers=6,
    heads=6,
    kv_heads=2,
    head_dim=64,
    ff_width=1152,
    tied_head=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_length=PROMPT + LONGEST,
  )
  models.save(models.Decoder(config, nnx.Rngs(0)), path)


def prompts(vocab_size):
  return np.random.default_rng(0).integers(0, vocab_size, (B, PROMPT))


def digest(tokens):
  """A number that tells responses apart."""
  return zlib.crc32(np.asarray(tokens, np.int32).tobytes())


def jax_side(path):
  from gakd_jax import models, streaming
  from gakd_jax.models import decoding

  model = decoding.unstack(models.load(path))
  ids = prompts(model.config.vocab_size).tolist()
  return lambda: digest(
    streaming.generate(
      model, ids, max_new_tokens=NEW, temperature=0, batch_size=B
    )
  )


def uneven_side(path, groups):
  """groups: into how many a batch is divided; 1: it is refilled as a whole."""
  import dataclasses

  import jax.numpy as jnp

  from gakd_jax import grouping, models, sampler, streaming
  from gakd_jax.models import decoding

  model = decoding.unstack(models.load(path))
  rng = np.random.default_rng(0)
  ids = rng.integers(1, model.config.vocab_size, (UNEVEN, PROMPT))
  ids[:, 0] = np.arange(UNEVEN)
  lengths = np.exp(rng.normal(np.log(60), 1.0, UNEVEN)).clip(1, LONGEST)
  lengths = tuple(lengths.astype(int).tolist())

  @dataclasses.dataclass(frozen=True)
  class OfLengths(sampler.Sampler):
    """Says 0, the EOS, where the response to prompt i is to end; i its id 0."""

    def filter(self, logits_BV, ids_BS, length_B):
      wanted_B = jnp.array(lengths)[ids_BS[:, 0]]
      ends_B1 = (length_B - PROMPT + 1 >= wanted_B)[:, None]
      is_end_V = jnp.arange(logits_BV.shape[1]) == 0
      return jnp.where(ends_B1 == is_end_V, logits_BV, -jnp.inf)

  streaming.Sampler = OfLengths
  grouping._GROUPS = groups
  settings = {'max_new_tokens': LONGEST, 'eos_ids': (0,), 'batch_size': B}

  def take():
    found = streaming.generate(
      model, ids.tolist(), temperature=0, keep_end=True, **settings
    )
    assert tuple(map(len, found)) == lengths
    return digest([i for response in found for i in response])

  return take


def samples_side(path, shared):
  from gakd_jax import grouping, models, streaming
  from gakd_jax.models import decoding

  model = decoding.unstack(models.load(path))
  rng = np.random.default_rng(0)
  ids = rng.integers(0, model.config.vocab_size, (2 * B, 4 * PROMPT))
  ids = np.repeat(ids, SAMPLES, axis=0).tolist()
  if not shared:
    grouping._first = lambda prompts: range(len(prompts))

  def take():
    found = streaming.generate(model, ids, max_new_tokens=SHORT, batch_size=B)
    assert len(set(map(tuple, found))) == len(ids)
    return digest(found)

  return take


def torch_side(path):
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
  ids = torch.tensor(prompts(model.config.vocab_size))
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0

  @torch.inference_mode()
  def take():
    output = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=NEW,
      do_sample=False,
      use_cache=True,
    )
    return digest(output[:, PROMPT:])

  return take


def padding():
  """The share of padding, by batch size, of prompts of log-normal length."""
  from gakd_jax import grouping

  # Medians and spreads of instruction data with a template around them: short
  # questions, and one in four with a passage to read.
  rng = np.random.default_rng(0)
  passage = rng.random(2000) < 0.25
  mean = np.where(passage, np.log(250), np.log(30))
  lengths = 40 + np.exp(rng.normal(mean, 0.6)).astype(int)
  prompts = [[0] * n for n in np.minimum(lengths, 512)]
  return {n: grouping.padding(prompts, n) for n in (8, 32, 128)}


def main():
  sides = {
    'jax': lambda: jax_side(args.model),
    'torch': lambda: torch_side(args.model),
    'refilled': lambda: uneven_side(args.model, groups=4),
    'waiting': lambda: uneven_side(args.model, groups=1),
    'once': lambda: samples_side(args.model, shared=True),
    'each': lambda: samples_side(args.model, shared=False),
  }
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--vocab', type=int, nargs='*', default=VOCABULARIES)
  parser.add_argument('--padding', action='store_true')
  parser.add_argument('--uneven', action='store_true')
  parser.add_argument('--samples', action='store_true')
  parser.add_argument('--model', help=argparse.SUPPRESS)
  side_by_side.add_arguments(parser, sides)
  args = parser.parse_args()
  if args.padding:
    print(json.dumps(padding()))
    return
  if args.side:
    side_by_side.run(args, sides)
    return
  first, second, tokens = 'jax', 'torch', B * NEW
  if args.uneven:
    first, second, tokens = 'refilled', 'waiting', None
  if args.samples:
    first, second, tokens = 'once', 'each', 2 * B * SAMPLES * SHORT
  sides = {name: sides[name] for name in (first, second)}
  found = {}
  for vocab_size in args.vocab:
    with tempfile.TemporaryDirectory() as path:
      save_model(vocab_size, f'{path}/model')
      results = side_by_side.run(args, sides, f'--model={path}/model')
    side_by_side.check_alike(results, rtol=0)
    faster = {'times faster': ('seconds', second, first)}
    one = side_by_side.summary(results, faster, tokens)
    found |= {f'{k}, vocabulary {vocab_size}': x for k, x in one.items()}
  print(json.dumps(found))


if __name__ == '__main__':
  main()
