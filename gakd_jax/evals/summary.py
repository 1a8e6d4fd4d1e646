"""What is said of a model's answers: means over rows and seeds, and how sure.

Of an evaluator of kind `generation` these are the scores of its task, and the
`accuracy` of its `check` (0 to 100); `answer_tokens`; and `unfinished`, the
percentage that was cut off at `max_new_tokens`. With several seeds, where
answers are right or wrong, `pass_at_<k>` is that of k answers to a prompt one
is right (a percentage), and `distinct_2_of_prompt` is `scores.distinct_2` of
the answers to one prompt: how different they are.

Scores have a 'stderr', the standard error over rows, and 'by_length', of the
prompts whose first reference has so many tokens.
"""

import statistics

import numpy as np

from gakd_jax import results
from gakd_jax.evals import scores, tasks
from gakd_jax.evals import statistics as statistics_lib

_VARIED = 'distinct_2_of_prompt'


def names(evaluator):
  """The metrics that `of` gives."""
  corpus = tasks.get(evaluator.task).corpus
  found = [*evaluator.scores, *corpus, 'answer_tokens', 'unfinished']
  if 'accuracy' in evaluator.scores:
    found += _pass_at([], len(evaluator.seeds))
  if len(evaluator.seeds) > 1:
    found.append(_VARIED)
  return found


def of(evaluator, lines, buckets):
  """{metric: its mean, deviations and parts}.

  Args:
    evaluator: `generation.Generation`.
    lines: {seed: those of its answers}, see `answers`.
    buckets: of each row, in which bucket of `scores.length_bucket` it is.
  """
  metrics = statistics_lib.all_over_seeds(
    {seed: _of_seed(evaluator, some) for seed, some in lines.items()}
  )
  for key in evaluator.scores:
    by_seed = {
      seed: np.array([line['scores'][key] for line in some], float)
      for seed, some in lines.items()
    }
    rows = np.mean([*by_seed.values()], axis=0)
    metrics[key]['stderr'] = statistics_lib.standard_error(rows)
    metrics[key]['by_length'] = {
      bucket: statistics_lib.over_seeds(
        {s: float(x[buckets == bucket].mean()) for s, x in by_seed.items()}
      )
      for bucket in results.BUCKETS
      if bucket in buckets
    }
  of_prompts = [*zip(*lines.values(), strict=True)]
  if 'accuracy' in evaluator.scores:
    right = [
      sum(line['scores']['accuracy'] == 100 for line in some)
      for some in of_prompts
    ]
    passes = _pass_at(right, len(lines))
    metrics |= {name: {'mean': x} for name, x in passes.items()}
  if len(lines) > 1:
    varied = [
      scores.distinct_2([line['answer'] for line in some])
      for some in of_prompts
    ]
    metrics[_VARIED] = {'mean': statistics.fmean(varied)}
  return metrics


def _of_seed(evaluator, lines):
  """{metric: mean over rows} of the answers to one seed."""
  most = evaluator.max_new_tokens
  per_row = [
    line['scores']
    | {
      'answer_tokens': line['tokens'],
      'unfinished': 100.0 * (line['tokens'] >= most),
    }
    for line in lines
  ]
  means = {
    key: statistics.fmean(row[key] for row in per_row) for key in per_row[0]
  }
  return means | tasks.corpus_scores(
    evaluator.task,
    evaluator.rows,
    [line['answer'] for line in lines],
    evaluator.first_reference,
  )


def _pass_at(right, samples):
  """{'pass_at_<k>': percentage}; `right`: answers to each row that are."""
  passed = [statistics_lib.pass_at(n, samples) for n in right or [0]]
  return {
    f'pass_at_{k}': 100 * statistics.fmean(row[k] for row in passed)
    for k in passed[0]
  }
