"""Runs side by side: the page has what their directories have, and no more."""

import json
import re

import numpy as np
import pytest

from gakd_jax import log, page
from gakd_jax.page import tables, training
from tests.written import write_results


def _run(path, results, metrics=(), about=(), **files):
  write_results(path, results, **dict(about))
  for name, content in files.items():
    (path / f'{name}.json').write_text(json.dumps(content))
  metrics_file = log.Metrics(path)
  for step, values in enumerate(metrics, start=1):
    metrics_file.write(step, values)
  metrics_file.close()
  return path


def _headings(html):
  return re.findall('<h2>(.*?)</h2>', html)


def test_a_run_of_nothing_but_results_has_a_page(tmp_path, capsys):
  path = _run(tmp_path / 'a', {'loss/ce': 1.5})
  (path / 'metrics.jsonl').unlink()
  page.write(tmp_path / 'report.html', {'a': path})
  html = (tmp_path / 'report.html').read_text()
  assert _headings(html) == ['Results']
  out = capsys.readouterr().out
  assert 'loss/ce' in out
  assert '1.500' in out


def test_bars_are_of_numbers(tmp_path):
  runs = {
    name: _run(tmp_path / name, {'loss/ce': ce})
    for name, ce in (('a', 1.0), ('b', 2.0), ('c', float('nan')))
  }
  page.write(tmp_path / 'report.html', runs)
  html = (tmp_path / 'report.html').read_text()
  (bars,) = re.findall('<ul class="bars">.*?</ul>', html, re.DOTALL)
  assert re.findall('<li><span>(.)</span>', bars) == ['a', 'b']
  assert 'nan%' not in html


def test_what_is_not_finite_has_a_page(tmp_path):
  """Whether it was written as null or, by earlier versions, as Infinity."""
  runs = {
    f'a-seed{i}': _run(
      tmp_path / str(i),
      {'sums/accuracy': x, 'loss/ce': x},
      about={'recipe': 'a', 'seed': i},
    )
    for i, x in enumerate((1.0, float('inf'), None))
  }
  line = {'instruction': 'p', 'answer': '9' * 400, 'gold': float('-inf')}
  line |= {'extracted': float('inf'), 'scores': {'accuracy': None}}
  (tmp_path / '0' / 'answers').mkdir()
  (tmp_path / '0' / 'answers' / 'sums-0.jsonl').write_text(
    json.dumps(line) + '\n'
  )
  page.write(tmp_path / 'report.html', runs)
  html = (tmp_path / 'report.html').read_text()
  (data,) = re.findall('<script[^>]*json[^>]*>(.*?)</script>', html, re.DOTALL)
  (row,) = json.loads(data, parse_constant=pytest.fail)['sets'][0]['rows']
  (answer,) = row['answers']['0'].values()
  assert answer['scores'] == {}
  assert answer['extracted'] is row['gold'] is None
  tables.write(tmp_path, runs)
  assert '| nan ± nan |' in (tmp_path / 'table.md').read_text()


def test_seeds_share_a_row_and_a_look(tmp_path):
  metrics = [{'train/loss': 1.0}, {'train/loss': 0.5}]
  runs = {
    f'gakd-seed{i}': _run(
      tmp_path / str(i),
      {'loss/ce': ce},
      metrics,
      about={'recipe': 'gakd', 'seed': i},
    )
    for i, ce in enumerate((1.0, 2.0, 3.0))
  }
  runs['sft'] = _run(tmp_path / 'sft', {'loss/ce': 4.0})
  page.write(tmp_path / 'report.html', runs)
  html = (tmp_path / 'report.html').read_text()
  assert '2.000 ± 1.000' in html
  tables.write(tmp_path, runs)
  assert (tmp_path / 'table.md').read_text().splitlines()[2:] == [
    '| gakd-seed{0,1,2} | **2.000 ± 1.000** |',
    '| sft | 4.000 |',
  ]
  latex = (tmp_path / 'table.tex').read_text()
  assert r'gakd-seed\{0,1,2\} & \textbf{2.000 $\pm$ 1.000} \\' in latex
  (keys,) = re.findall('<ul class="keys">(.*?)</ul>', html)
  assert keys.count('<li') == 1
  assert 'gakd-seed{0,1,2}' in keys


def test_the_page_has_the_critics_last_scores(tmp_path):
  """Of twenty steps the last two count."""
  bins = len(log.HISTOGRAM_EDGES) - 1

  def counts(i, n):
    return np.bincount([i] * n, minlength=bins)

  metrics = [
    {
      'train/loss': 1.0,
      'train/critic/margin': 0.5,
      'train/hidden_grad_cosine': 0.1,
      'train/critic/histogram_teacher': counts(3 if step < 18 else 50, 2),
      'train/critic/histogram_student': counts(52, 4),
    }
    for step in range(20)
  ]
  runs = {
    'a': _run(tmp_path / 'a', {'loss/ce': 1.0}, metrics),
    'b': _run(tmp_path / 'b', {'loss/ce': 1.0}, [{'train/loss': 1.0}]),
  }
  stairs = training.histogram(log.read_metrics(runs['a']))
  for label, want in (('teacher', [4, 0, 0]), ('student', [0, 0, 8])):
    x, y = stairs[label]
    np.testing.assert_array_equal(x, np.repeat(log.HISTOGRAM_EDGES[50:54], 2))
    np.testing.assert_array_equal(y, [0, *np.repeat(want, 2), 0])
  assert training.histogram(log.read_metrics(runs['b'])) is None
  page.write(tmp_path / 'report.html', runs)
  html = (tmp_path / 'report.html').read_text()
  assert _headings(html) == ['Results', 'Scores', 'Training', 'Critic']
  _, losses, critics = re.split('<h2>(?:Training|Critic)</h2>', html)
  assert 'train/loss' in losses
  assert 'train/critic/margin' not in losses
  for title in (
    'train/critic/margin',
    'train/hidden_grad_cosine',
    'a: critic scores at the end',
  ):
    assert f'<h3>{title}</h3>' in critics
  assert 'b: critic scores' not in critics
  assert 'train/critic/histogram' not in html


def test_scores_by_length_need_two_lengths(tmp_path):
  results = {
    'x/rouge_l': {
      'mean': 3.0,
      'by_length': {'0-10': {'mean': 1.0}, '101+': {'mean': 5.0}},
    },
    'y/rouge_l': {'mean': 3.0, 'by_length': {'11-50': {'mean': 3.0}}},
  }
  page.write(tmp_path / 'report.html', {'a': _run(tmp_path / 'a', results)})
  html = (tmp_path / 'report.html').read_text()
  assert _headings(html) == ['Results', 'By length']
  assert '<h3>x ROUGE-L</h3>' in html
  assert '<h3>y ROUGE-L</h3>' not in html


def test_divergences_by_position_are_tables(tmp_path):
  def reverse_kl(*means):
    places = {
      place: {'mean': x}
      for place, x in zip(('1-8', '9-16'), means, strict=False)
    }
    return {'loss/reverse_kl': {'mean': means[0], 'by_position': places}}

  runs = {
    'a': _run(tmp_path / 'a', reverse_kl(0.5, 0.25)),
    'b': _run(tmp_path / 'b', reverse_kl(0.75)),
  }
  page.write(tmp_path / 'report.html', runs)
  html = (tmp_path / 'report.html').read_text()
  assert 'By position' in _headings(html)
  assert 'By length' not in _headings(html)
  part = html.partition('By position</h2>')[2]
  assert '<h3>loss, by the place of a token in its answer</h3>' in part
  rows = re.findall('<tr>.*?</tr>', part)[:3]
  texts = [re.sub('<[^>]*>', ' ', row).split() for row in rows]
  assert texts[0][1] == '1-8'
  assert '9-16' in texts[0]
  assert [text[0] for text in texts[1:]] == ['a', 'b']
  assert texts[1][1:] == ['0.500', '0.250']
  assert texts[2][1] == '0.750'


def test_comparisons_say_where_luck_is_no_explanation(tmp_path):
  runs = {'a': _run(tmp_path / 'a', {'loss/ce': 1.0})}
  sure = {'set': 'x', 'metric': 'rouge_l', 'a': 'a', 'b': 'b'}
  sure |= {'difference': 2.0, 'low': 1.0, 'high': 4.0, 'p': 0.0001}
  unsure = sure | {'difference': -1.0, 'low': -3.0, 'high': 1.0, 'p': 0.25}
  path = tmp_path / 'report.html'
  small = sure | {'metric': 'forward_kl', 'difference': -0.004}
  small |= {'low': -0.0045, 'high': -0.0031}
  bad = sure | dict.fromkeys(('difference', 'low', 'high', 'p'))
  worse = bad | {'difference': float('nan'), 'low': float('nan')}
  page.write(path, runs, comparisons=[sure, unsure, small, bad, worse])
  html = path.read_text()
  assert _headings(html) == ['Results', 'Comparisons']
  rows = re.findall('<tr>.*?</tr>', html.partition('Comparisons</h2>')[2])
  texts = [re.sub('<[^>]*>', ' ', row).split() for row in rows[1:]]
  shown = 'x ROUGE-L a b +2.00 +1.00 to +4.00 &lt;0.001'
  assert texts[0] == shown.split()
  assert texts[1][-5:] == ['-1.00', '-3.00', 'to', '+1.00', '0.250']
  assert texts[2][-5:-1] == ['-0.0040', '-0.0045', 'to', '-0.0031']
  for row in texts[3:]:
    assert row == ['x', 'ROUGE-L', 'a', 'b', '-', '-', '-']
  assert 'nan' not in html
  assert '<strong>+2.00</strong>' in html
  assert '<strong>-1.00</strong>' not in html
  # On a scale from -4 to 4, the interval from 1 to 4.
  assert 'left: 62.5%; width: 37.5%' in html


def test_speed_is_of_training_and_of_decoding(tmp_path):
  steps = [{'train/tokens_per_second': x} for x in (1, 1234, 99999)]
  speed = {
    'x-1': {'tokens_per_second': 10, 'seconds': 60, 'padding': 0.2},
    'x-2': {'tokens_per_second': 30, 'seconds': 40, 'padding': 0.4},
  }
  runs = {
    'trained': _run(
      tmp_path / 'a', {'loss/ce': 1.0}, steps, {'peak_memory_gb': 12.5}
    ),
    'evaluated': _run(tmp_path / 'b', {'loss/ce': 1.0}, speed=speed),
  }
  columns, rows = page.speed(runs)
  names = [' '.join(name) for name in columns[1:]]
  assert names == [
    'training tokens/s',
    'decoding tokens/s',
    'decoding seconds',
    'decoding padding',
    'peak memory, GB',
  ]
  assert rows == [
    ['trained', '1,234', None, None, None, 12.5],
    ['evaluated', None, '20', '100', '30 %', None],
  ]
  assert page.speed({'b': runs['evaluated']})[0][-1][1] == 'padding'


@pytest.mark.parametrize('count', [0, 1])
def test_answers_are_those_of_the_first_prompts(tmp_path, count):
  path = _run(tmp_path / 'a', {'loss/ce': 1.0})
  (path / 'answers').mkdir()
  row = {'input': '', 'references': ['x'], 'answer': 'y', 'rouge_l': 1.0}
  lines = [json.dumps(row | {'instruction': f'Prompt {i}'}) for i in range(3)]
  (path / 'answers' / 'greedy-0.jsonl').write_text('\n'.join(lines) + '\n')
  page.write(tmp_path / 'report.html', {'a': path}, answers=count)
  html = (tmp_path / 'report.html').read_text()
  assert html.count('<article') == count
  assert ('"prompt":"Prompt 2"' in html) == (count > 0)
  assert ('3 prompts in one set' in html) == (count > 0)


def test_settings_name_the_runs_that_differ(tmp_path):
  runs = {
    name: _run(
      tmp_path / name,
      {'loss/ce': 1.0},
      config={'config': {'train': {'steps': 5}, 'seed': seed}},
    )
    for name, seed in (('a', 1), ('b', 2), ('c', 1))
  }
  runs['evaluated'] = _run(tmp_path / 'evaluated', {'loss/ce': 1.0})
  assert page.settings(runs) == [
    ('train.steps', '5'),
    ('seed', 'a, c: 1\nb: 2'),
  ]
