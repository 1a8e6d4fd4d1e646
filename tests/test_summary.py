"""Runs side by side: seeds share a row, critics show their scores."""

import json

import numpy as np
import pytest

from gakd_jax import report, summary


def _run(path, results, metrics):
  path.mkdir()
  (path / 'config.json').write_text(json.dumps({'config': {'seed': 0}}))
  (path / 'results.json').write_text(json.dumps(results))
  log = report.Metrics(path, tensorboard=False)
  for step, values in enumerate(metrics, start=1):
    log.write(step, values)
  log.close()
  return path


def test_seeds_share_a_row(tmp_path):
  runs = {
    f'gakd-seed{i}': _run(tmp_path / str(i), {'loss/ce': ce, 'x/y': 1}, [])
    for i, ce in enumerate((1.0, 2.0, 3.0))
  }
  runs['sft'] = _run(tmp_path / 'sft', {'loss/ce': 4.0}, [])
  columns, rows = summary.table(runs)
  assert columns == ['run', 'loss/ce']
  assert rows == [['gakd', '2.000 ± 1.000'], ['sft', 4.0]]


def test_the_page_has_the_critics_last_scores(tmp_path):
  """Of twenty steps the last two count."""
  bins = len(report.HISTOGRAM_EDGES) - 1

  def counts(i, n):
    return np.bincount([i] * n, minlength=bins)

  metrics = [
    {
      'train/loss': 1.0,
      'train/critic/histogram_teacher': counts(3 if step < 18 else 50, 2),
      'train/critic/histogram_student': counts(52, 4),
    }
    for step in range(20)
  ]
  runs = {
    'a': _run(tmp_path / 'a', {'loss/ce': 1.0}, metrics),
    'b': _run(tmp_path / 'b', {'loss/ce': 1.0}, [{'train/loss': 1.0}]),
  }
  ((title, xlabel, stairs),) = summary._histograms(
    {name: report.read_metrics(path) for name, path in runs.items()}
  )
  assert title == 'a: critic scores at the end'
  assert xlabel == 'score'
  for label, want in (('teacher', [4, 0, 0]), ('student', [0, 0, 8])):
    x, y = stairs[label]
    np.testing.assert_array_equal(
      x, np.repeat(report.HISTOGRAM_EDGES[50:54], 2)
    )
    np.testing.assert_array_equal(y, [0, *np.repeat(want, 2), 0])
  summary.write(tmp_path / 'report.html', runs)
  page = (tmp_path / 'report.html').read_text()
  assert title in page
  assert 'train/critic/histogram' not in page


@pytest.mark.parametrize('count', [0, 1])
def test_answers_are_those_of_the_first_prompts(tmp_path, count):
  path = _run(tmp_path / 'a', {'loss/ce': 1.0}, [])
  (path / 'answers').mkdir()
  row = {'instruction': 'Hi', 'input': '', 'references': ['x'], 'answer': 'y'}
  (path / 'answers' / 'greedy-0.jsonl').write_text(json.dumps(row) + '\n')
  want = [{'prompt': 'Hi', 'references': ['x'], 'a': 'y'}]
  assert summary._answers({'a': path}, count) == want[:count]
