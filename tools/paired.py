"""Runs of several seeds beside their twins: a study's tables from its runs.

  python -m tools.paired WORKDIR... --rows=sft,text,text_critic \\
    --pairs=text_critic:text --metrics=sampled/rouge_l,greedy/accuracy

A row NAME is the mean over WORKDIR/NAME-seed0, NAME-seed1, ..., with the
standard deviation over them; a metric is that of an evaluator in results.json
(EVALUATOR/METRIC). Of a pair there is the difference, by seed, and where the
metric is known by prompt (scores of answers, losses), its 95 % interval:
prompts and trainings are both drawn with replacement (Owen 2007, "The
pigeonhole bootstrap"), which is wide where neither explains a difference, and
short where trainings do and are few: of three it then holds the true difference
in about 75 of 100 cases, of five in 83. A prompt that one of the models has
answered by nothing has no loss, and is left out of all.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

_DRAWS = 4000


def seeds_of(workdirs, name):
  """{seed: directory} of a row."""
  found = {}
  for workdir in workdirs:
    for path in sorted(Path(workdir).glob(f'{name}-seed*')):
      if (path / 'results.json').exists():
        found.setdefault(path.name.rpartition('-seed')[2], path)
  return found


def _evaluator(path, metric):
  best = json.loads((path / 'results.json').read_text('utf-8'))['best']
  return best['evaluators'].get(metric.partition('/')[0], {})


def _measured(path, metric):
  metrics = _evaluator(path, metric).get('metrics', {})
  return metrics.get(metric.partition('/')[2], {'mean': None})


def mean_of(path, metric):
  """A metric of a finished run; None where it has none."""
  return _measured(path, metric)['mean']


def scores_of(path, metric):
  """{prompt: the mean over answers, or the loss}; None where none is known."""
  measured = _measured(path, metric)
  if 'by_row' in measured:
    return dict(enumerate(measured['by_row']))
  evaluator, _, name = metric.partition('/')
  found = {}
  for seed in measured.get('by_seed', ()):
    file = path / 'answers' / f'{evaluator}-{seed}.jsonl'
    if not file.exists():
      return None  # of a metric that is none of an answer
    # Not splitlines: a text may hold other ends of lines.
    for text in filter(None, file.read_text('utf-8').split('\n')):
      line = json.loads(text)
      score = line.get('scores', {}).get(name)
      if score is None:
        return None
      found.setdefault(line['index'], []).append(score)
  return {i: statistics.fmean(scores) for i, scores in found.items()} or None


def interval(d_SN, draws=_DRAWS):
  """95 % of the means over trainings and prompts drawn with replacement."""
  rng = np.random.default_rng(0)
  S, N = d_SN.shape
  means = [
    d_SN[rng.integers(S, size=S)][:, rng.integers(N, size=N)].mean()
    for _ in range(draws)
  ]
  return np.percentile(means, [2.5, 97.5])


def row(runs, metric):
  values = [mean_of(path, metric) for path in runs.values()]
  if not values or None in values:
    return ''
  if len(values) == 1:
    return f'{values[0]:.2f}'
  return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}'


def difference(a, b, metric):
  both = [(a[seed], b[seed]) for seed in a if seed in b]
  found = [[mean_of(path, metric) for path in pair] for pair in both]
  if not found or any(None in pair for pair in found):
    return ''
  text = ' '.join(f'{x - y:+.2f}' for x, y in found)
  scores = [[scores_of(path, metric) for path in pair] for pair in both]
  if any(x is None for pair in scores for x in pair):
    return text
  data = {
    _evaluator(path, metric).get('data') for pair in both for path in pair
  }
  if len(data) > 1 or any(x.keys() != y.keys() for x, y in scores):
    return f'{text} (not of the same prompts)'
  answered = [
    i
    for i in scores[0][0]
    if all(x.get(i) is not None for pair in scores for x in pair)
  ]
  if not answered:
    return text
  d_SN = np.array([[x[i] - y[i] for i in answered] for x, y in scores])
  low, high = interval(d_SN)
  return f'{d_SN.mean():+.2f} ({low:.2f} to {high:.2f}): {text}'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdirs', nargs='+')
  parser.add_argument('--rows', required=True)
  parser.add_argument('--pairs', default='')
  parser.add_argument('--metrics', default='loss/ce,sampled/rouge_l')
  args = parser.parse_args()
  metrics = args.metrics.split(',')
  print(f'| | {" | ".join(metrics)} |\n|---{"|---" * len(metrics)}|')
  for name in args.rows.split(','):
    runs = seeds_of(args.workdirs, name)
    cells = [row(runs, metric) for metric in metrics]
    print(f'| {name} ({len(runs)}) | {" | ".join(cells)} |')
  for pair in filter(None, args.pairs.split(',')):
    runs = [seeds_of(args.workdirs, name) for name in pair.split(':')]
    cells = [difference(*runs, metric) for metric in metrics]
    print(f'| {pair.replace(":", " - ")} | {" | ".join(cells)} |')


if __name__ == '__main__':
  main()
