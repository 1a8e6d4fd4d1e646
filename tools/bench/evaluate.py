"""An evaluation, beside the plain loop of transformers and rouge_score.

  pip install -e '.[bench]'
  python -m tools.bench.evaluate

A random Qwen3 student of 6 layers x 384 and teacher of 8 x 512, fp32, with the
quickstart's tokenizer and 96 of its test rows, four references each. `loss` is
held-out cross-entropy and KL both ways, of the first reference, 16 rows at a
time; `answers` are greedy, of at most 72 tokens, 32 at a time, and their
ROUGE-L, the best of all references. The plain loop pads batches to their
longest row, in the order of the rows, and has full logits. Prompts are the same
ids for both; answers must be the same tokens, and all figures the same to
1e-4 (ROUGE-L of what random models say is 0).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from tools.bench import side_by_side
from tools.bench.generate import digest

SHAPES = {
  'student': {'width': 384, 'layers': 6, 'heads': 6, 'ff_width': 1152},
  'teacher': {'width': 512, 'layers': 8, 'heads': 8, 'ff_width': 1536},
}
LIMIT, NEW = 96, 72
MAX_PROMPT, MAX_LENGTH = 80, 160
ROWS, ANSWERS = 16, 32  # of a batch
FIGURES = 'ce', 'forward_kl', 'reverse_kl', 'rouge_l'


def save_models(folder):
  from configs import tiny_teacher
  from gakd_jax import models

  for seed, (name, shape) in enumerate(SHAPES.items()):
    shape |= {'kv_heads': 2, 'head_dim': 64}
    model = models.init(tiny_teacher.PATH, seed, 'float32', **shape)
    models.save(model, f'{folder}/{name}')


def measured(folder, loss, answers):
  """A function that takes both parts; what they found, and seconds of each.

  loss: -> {figure: mean}; answers: -> {figure: mean}, ids of each.
  """

  def take():
    start = time.perf_counter()
    found = loss()
    between = time.perf_counter()
    scores, ids = answers()
    seconds = {
      'loss': between - start,
      'answers': time.perf_counter() - between,
    }
    flat = [i for answer in ids for i in (*answer, -1)]
    return {
      'tokens': digest(flat),
      'written': sum(map(len, ids)),
      **{name: (found | scores)[name] for name in FIGURES},
      **seconds,
    }

  return take


def subject(folder):
  """(the student as evaluators see it, its parameters, {name: evaluator})."""
  from configs import quickstart
  from gakd_jax import models, sharding
  from gakd_jax.data import tokenizer as tokenizer_lib
  from gakd_jax.evals import evaluator
  from gakd_jax.models import pair

  mesh = sharding.make_mesh()
  student, teacher = (
    models.load(f'{folder}/{name}', 'float32', mesh) for name in SHAPES
  )
  tokenizer = tokenizer_lib.load(f'{folder}/student')
  both, params = pair.make(
    student, teacher, dtype='float32', packed=False, tokenizers=(tokenizer,) * 2
  )
  evaluators = evaluator.make(
    {
      'loss': {'batch_size': ROWS, 'limit': LIMIT},
      'answers': {
        'limit': LIMIT,
        'kind': 'generation',
        'max_new_tokens': NEW,
        'temperature': 0.0,
        'no_repeat_ngram': 0,
        'seeds': (0,),
        'batch_size': ANSWERS,
      },
    },
    quickstart.TEST,
    lambda: [('chat', tokenizer)],
  )
  seen = evaluator.Subject(
    models=both,
    template='chat',
    max_length=MAX_LENGTH,
    max_prompt_length=MAX_PROMPT,
    head_chunk=1024,
    mesh=mesh,
    workdir=Path(folder),
  )
  return seen, params, evaluators


def jax_side(folder):
  import jax

  from gakd_jax import binary
  from gakd_jax.evals import answers as answers_lib

  binary.use_compilation_cache()  # as a run does
  seen, params, evaluators = subject(folder)
  jax.set_mesh(seen.mesh)

  def loss():
    return evaluators['loss'].run(seen, params, 0)['metrics']

  def answers():
    found = evaluators['answers'].run(seen, params, 0)['metrics']
    lines = answers_lib.read(seen.workdir, evaluators['answers'], 0)
    ids = [line['ids'] for line in lines]
    return {'rouge_l': found['rouge_l']['mean']}, ids

  return measured(folder, loss, answers)


def save_rows(folder):
  """What both sides read: ids of prompts and first references, and texts."""
  from gakd_jax.evals import encoded

  seen, _, evaluators = subject(folder)
  rows = evaluators['loss'].rows
  texts = encoded.encode(seen, rows)
  found = {
    'prompts': texts.prompts,
    'responses': texts.references,
    'references': [row.references for row in rows],
  }
  Path(folder, 'rows.json').write_text(json.dumps(found))


def plain_side(folder):
  import torch
  import transformers
  from rouge_score import rouge_scorer

  from tools.bench import peers

  rows = json.loads(Path(folder, 'rows.json').read_text())
  student, teacher = (peers.model(f'{folder}/{name}').eval() for name in SHAPES)
  tokenizer = transformers.AutoTokenizer.from_pretrained(f'{folder}/student')
  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)
  ends = student.generation_config.eos_token_id
  ends = ends if isinstance(ends, list) else [ends]
  pad = tokenizer.pad_token_id

  @torch.inference_mode()
  def loss():
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    pairs = [*zip(rows['prompts'], rows['responses'], strict=True)]
    for first in range(0, len(pairs), ROWS):
      some = pairs[first : first + ROWS]
      length = max(len(p) + len(r) for p, r in some)
      ids = torch.full((len(some), length), pad)
      seen = torch.zeros_like(ids)
      counts = torch.zeros(ids.shape, dtype=torch.bool)
      for i, (p, r) in enumerate(some):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        seen[i, : len(p) + len(r)] = 1
        counts[i, len(p) : len(p) + len(r)] = True
      log_q, log_p = (
        model(ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
        for model in (student, teacher)
      )
      per_token = torch.stack(
        [
          -log_q.gather(-1, ids[:, 1:, None])[..., 0],
          (log_p.exp() * (log_p - log_q)).sum(-1),
          (log_q.exp() * (log_q - log_p)).sum(-1),
        ]
      )
      sums += per_token[:, counts[:, 1:]].double().sum(-1)
      tokens += int(counts[:, 1:].sum())
    return dict(zip(FIGURES, (sums / tokens).tolist(), strict=False))

  @torch.inference_mode()
  def answers():
    scores, written = [], []
    for first in range(0, len(rows['prompts']), ANSWERS):
      prompts = rows['prompts'][first : first + ANSWERS]
      length = max(map(len, prompts))
      left = [[pad] * (length - len(p)) + p for p in prompts]
      seen = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
      output = student.generate(
        torch.tensor(left),
        attention_mask=torch.tensor(seen),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=pad,
      )
      for ids in output[:, length:].tolist():
        end = next((n + 1 for n, i in enumerate(ids) if i in ends), len(ids))
        written.append(ids[:end])
    for ids, references in zip(written, rows['references'], strict=True):
      text = tokenizer.decode(ids, skip_special_tokens=True)
      scores.append(
        max(scorer.score(x, text)['rougeL'].fmeasure for x in references)
      )
    return {'rouge_l': 100 * sum(scores) / len(scores)}, written

  return measured(folder, loss, answers)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  side_by_side.add_arguments(parser, ('jax', 'transformers'))
  args = parser.parse_args()
  sides = {'jax': lambda: jax_side(args.folder)}
  if side_by_side.installed('torch', 'transformers'):
    sides['transformers'] = lambda: plain_side(args.folder)
  if args.side:
    side_by_side.run(args, sides)
    return
  with tempfile.TemporaryDirectory() as folder:
    save_models(folder)
    save_rows(folder)
    results = side_by_side.run(args, sides, f'--folder={folder}')
  for measured_ in results.values():
    for x in measured_:
      x |= x['result']
  side_by_side.check_alike(results, 0, 'tokens')
  for name in FIGURES:
    side_by_side.check_alike(results, 1e-4, name)
  ratios = {
    'times faster than transformers': ('seconds', 'transformers', 'jax'),
    'in loss': ('loss', 'transformers', 'jax'),
    'in answers': ('answers', 'transformers', 'jax'),
    'memory of transformers': ('peak_gb', 'jax', 'transformers'),
  }
  keys = 'seconds', 'loss', 'answers', 'peak_gb'
  print(json.dumps(side_by_side.summary(results, ratios, keys=keys)))


if __name__ == '__main__':
  main()
