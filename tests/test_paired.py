"""tools/paired.py: rows and differences of runs with several seeds."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import paired

ROOT = Path(__file__).parents[1]


def write(path, scores, ce):
  """A run of scores by answer and prompt, of an evaluator `sampled`."""
  means = {str(seed): float(np.mean(x)) for seed, x in enumerate(scores)}
  rouge_l = {'mean': float(np.mean(scores)), 'by_seed': means}
  (path / 'answers').mkdir(parents=True)
  for seed, of_prompts in enumerate(scores):
    lines = [
      # The text has an end of lines that is none of JSON's.
      f'{{"index": {i}, "answer": "\u2028", "scores": {{"rouge_l": {x}}}}}'
      for i, x in enumerate(of_prompts)
    ]
    file = path / f'answers/sampled-{seed}.jsonl'
    file.write_text('\n'.join(lines), 'utf-8')
  evaluators = {
    'loss': {'metrics': {'ce': {'mean': ce}}},
    'sampled': {'data': 'of test', 'metrics': {'rouge_l': rouge_l}},
  }
  (path / 'results.json').write_text(
    json.dumps({'best': {'evaluators': evaluators}})
  )


@contextlib.contextmanager
def changed(path):
  file = path / 'results.json'
  results = json.loads(file.read_text())
  yield results['best']['evaluators']
  file.write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
  """Two trainings, one of which has no twin, in two places."""
  write(tmp_path / 'x/a-seed0', [[1, 2, 3], [3, 4, 5]], 1.0)
  write(tmp_path / 'y/a-seed1', [[5, 6, 7], [5, 6, 7]], 2.0)
  write(tmp_path / 'x/b-seed0', [[1, 1, 1], [1, 1, 1]], 1.5)
  (tmp_path / 'x/b-seed1').mkdir()  # has not finished
  return [tmp_path / 'x', tmp_path / 'y']


def test_rows_are_means_and_pairs_differences(runs):
  a, b = (paired.seeds_of(runs, name) for name in 'ab')
  assert [*a] == ['0', '1']
  assert [*b] == ['0']
  assert paired.row(a, 'loss/ce') == '1.50 ± 0.71'
  assert paired.row(b, 'loss/ce') == '1.50'
  assert paired.row(a, 'loss/reverse_kl') == ''
  assert paired.difference(a, b, 'loss/ce') == '-0.50'
  found = paired.difference(a, b, 'sampled/rouge_l')
  assert found.startswith('+2.00 (1.')
  assert found.endswith('): +2.00')
  assert paired.difference(a, b, 'loss/reverse_kl') == ''
  for path in (a['0'], b['0']):
    with changed(path) as evaluators:  # By seed, but of no answer.
      nats = {'mean': 1.0, 'by_seed': {'0': 1.0}}
      evaluators['own'] = {'metrics': {'nats': nats}}
  assert paired.difference(a, b, 'own/nats') == '+0.00'
  for path, of_rows in ((a['0'], [1.0, 2.0, 6.0]), (b['0'], [1.0, 1.0, 1.0])):
    with changed(path) as evaluators:
      evaluators['loss']['metrics']['forward_kl'] = {
        'mean': np.mean(of_rows),
        'by_row': of_rows,
      }
  kl = paired.difference(a, b, 'loss/forward_kl')
  assert kl.startswith('+2.00 (0.')
  assert kl.endswith('): +2.00')
  # Of another evaluator, whose name begins alike; of a seed that is no more; of
  # fewer prompts.
  answers = runs[0] / 'a-seed0/answers'
  for name in ('sampled-05-0', 'sampled-7'):
    (answers / f'{name}.jsonl').write_text('{"index": 0, "scores": {}}')
  assert paired.difference(a, b, 'sampled/rouge_l') == found
  for file in answers.glob('sampled-[01].jsonl'):
    file.write_text(file.read_text('utf-8').rpartition('\n')[0], 'utf-8')
  assert paired.difference(a, b, 'sampled/rouge_l').endswith('same prompts)')


def test_prompts_are_paired_by_what_they_are(runs):
  a, b = (paired.seeds_of(runs, name) for name in 'ab')
  # Models that agree, each of which has left another prompt unanswered.
  for path, of_rows in (
    (a['0'], [None, 2.0, 6.0, 1.0]),
    (b['0'], [5.0, None, 6.0, 1.0]),
  ):
    with changed(path) as evaluators:
      evaluators['loss']['metrics']['ce'] = {'mean': 3.0, 'by_row': of_rows}
  found = paired.difference(a, b, 'loss/ce')
  assert found == '+0.00 (0.00 to 0.00): +0.00'
  with changed(b['0']) as evaluators:
    evaluators['sampled']['data'] = 'of others, as many'
  found = paired.difference(a, b, 'sampled/rouge_l')
  assert found == '+2.00 (not of the same prompts)'


def test_an_interval_is_of_trainings_and_prompts():
  rng = np.random.default_rng(0)
  d_SN = rng.standard_normal((5, 400))
  of_prompts = 2 * 1.96 / 2000**0.5
  low, high = paired.interval(d_SN)
  assert low < d_SN.mean() < high
  # What differs by neither alone is counted with both, and as it is.
  assert high - low == pytest.approx(3**0.5 * of_prompts, rel=0.1)
  # What differs by training alone is as wide as these differ.
  low, high = paired.interval(np.repeat(np.arange(5.0)[:, None], 400, axis=1))
  assert high - low == pytest.approx(2 * 1.96 * (2 / 5) ** 0.5, rel=0.1)
  assert [*paired.interval(np.full((3, 9), 2.0))] == [2, 2]


def test_a_table_is_printed(runs):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'tools.paired', *map(str, runs)),
      *('--rows=a,b', '--pairs=a:b', '--metrics=loss/ce,sampled/rouge_l'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  lines = done.stdout.splitlines()
  assert lines[0] == '| | loss/ce | sampled/rouge_l |'
  assert lines[2] == '| a (2) | 1.50 ± 0.71 | 4.50 ± 2.12 |'
  assert lines[4].startswith('| a - b | -0.50 | +2.00 (')
