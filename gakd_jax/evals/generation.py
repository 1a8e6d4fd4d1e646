"""Answers to held-out prompts, scored against their references.

Defaults are the field's protocol for instruction sets (MiniLLM, arXiv
2306.08543): sampling at temperature 1, no top-p or top-k, no repeated 6-gram,
at most 256 new tokens, five seeds; ROUGE-L is the maximum over references.
With temperature 0 one seed is enough.
"""

import collections
import dataclasses
import json
import statistics

from flax import nnx

from gakd_jax import report, sampling
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import scores


@dataclasses.dataclass(frozen=True)
class Generation:
  name: str
  rows: tuple
  max_new_tokens: int = 256
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  no_repeat_ngram: int = 6
  seeds: tuple = (10, 20, 30, 40, 50)
  batch_size: int = 32

  def run(self, subject, params, tag):
    """ROUGE-L and exact match (0 to 100), and answer length in tokens.

    `rouge_l_11-50` and the like are of the prompts whose first reference has so
    many tokens.
    Answers go to <workdir>/answers/<name>-<seed>.jsonl, those of the last
    evaluation; with several seeds, `rouge_l_std` is the deviation over them.
    """
    prompts = [
      tokenizer_lib.fit_prompt(
        subject.tokenizer, row, subject.template, subject.max_prompt_length
      )
      for row in self.rows
    ]
    lengths = [
      len(subject.tokenizer.encode(r.references[0], add_special_tokens=False))
      for r in self.rows
    ]
    model = nnx.merge(subject.student, subject.cast(params))
    metrics = [
      self._one_seed(subject, model, prompts, lengths, seed, tag)
      for seed in self.seeds
    ]
    result = {
      key: statistics.fmean(m[key] for m in metrics) for key in metrics[0]
    }
    if len(metrics) > 1:
      result['rouge_l_std'] = statistics.stdev(m['rouge_l'] for m in metrics)
    return result

  def _one_seed(self, subject, model, prompts, lengths, seed, tag):
    answers = sampling.generate(
      model,
      prompts,
      max_new_tokens=self.max_new_tokens,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      no_repeat_ngram=self.no_repeat_ngram,
      eos_ids=(templates.eos_id(subject.template, subject.tokenizer),),
      seed=seed,
      batch_size=self.batch_size,
      valid_vocab=len(subject.tokenizer),
    )
    lines, rouge, exact = [], [], []
    for row, answer_ids in zip(self.rows, answers, strict=True):
      answer = tokenizer_lib.decode(subject.tokenizer, answer_ids)
      rouge.append(scores.rouge_l(answer, row.references))
      exact.append(scores.exact_match(answer, row.references))
      lines.append(
        {
          'step': tag,
          'instruction': row.instruction,
          'input': row.input,
          'references': row.references,
          'answer': answer,
          'rouge_l': rouge[-1],
        }
      )
    report.write_atomically(
      subject.workdir / 'answers' / f'{self.name}-{seed}.jsonl',
      ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines),
    )
    buckets = collections.defaultdict(list)
    for length, score in zip(lengths, rouge, strict=True):
      buckets[scores.length_bucket(length)].append(score)
    by_length = {
      f'rouge_l_{bucket}': statistics.fmean(buckets[bucket])
      for bucket in sorted(buckets)
    }
    return {
      'rouge_l': statistics.fmean(rouge),
      'exact_match': statistics.fmean(exact),
      'answer_tokens': statistics.fmean(map(len, answers)),
    } | by_length
