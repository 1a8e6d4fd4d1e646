"""Rollouts in the page: which texts, whose words, and which curves."""

import html
import json
import re

import numpy as np
import pytest

from gakd_jax import log, page
from gakd_jax.page import rollouts
from tests.written import write_results


def _run(path, lines=(), metrics=()):
  path.mkdir(parents=True, exist_ok=True)
  write_results(path, {'loss/ce': 1.0})
  if lines:
    text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines)
    (path / 'rollouts.jsonl').write_text(text, encoding='utf-8')
  metrics_file = log.Metrics(path)
  for step, values in enumerate(metrics, start=1):
    metrics_file.write(step, {f'train/{name}': x for name, x in values.items()})
  metrics_file.close()
  return path


def _line(step, *pieces, index=0, tokens=12, finished=True):
  prompt = {'instruction': f'Prompt {index}?', 'input': ''}
  return prompt | {
    'index': index,
    'step': step,
    'pieces': [[text, is_teachers] for text, is_teachers in pieces],
    'tokens': tokens,
    'finished': finished,
  }


def _page(tmp_path, runs):
  path = tmp_path / 'report.html'
  page.write(path, runs)
  return path.read_text(encoding='utf-8')


def _sections(page):
  """{heading: its HTML}"""
  _, *parts = re.split('<h2>(.*?)</h2>', page)
  return dict(zip(parts[::2], parts[1::2], strict=True))


def _words(text):
  return html.unescape(re.sub('<[^>]*>', ' ', text)).split()


@pytest.mark.parametrize(
  ('n', 'shown'),
  [
    (1, [0]),
    (2, [0, 1]),
    (5, [0, 1, 2, 3, 4]),
    (6, [0, 1, 2, 4, 5]),
    (9, [0, 2, 4, 6, 8]),
    (101, [0, 25, 50, 75, 100]),
  ],
)
def test_texts_in_between_are_folded_away(tmp_path, n, shown):
  lines = [_line(1000 * i, (f'text {i}', False)) for i in range(n)]
  text = rollouts.texts({'a': _run(tmp_path, lines)})
  seen, _, folded = text.partition('<summary>Steps in between: ')
  steps = re.compile('<b>Step ([0-9,]*)</b>.*?>text ([0-9]*)</p>')
  found = [steps.findall(part) for part in (seen, folded)]
  rest = [i for i in range(n) if i not in shown]
  for got, want in zip(found, (shown, rest), strict=True):
    assert got == [(f'{1000 * i:,}', str(i)) for i in want]
  assert int(folded.partition('<')[0] or 0) == len(rest)


def test_a_text_says_who_wrote_it_and_how_it_ended(tmp_path):
  lines = [
    _line(0, (' a\n  b', False), (' <c>', True), ('d ', False)),
    _line(0, ('\n', False), index=1, tokens=1, finished=False),
    _line(5, ('\u2028e', True), tokens=1234, finished=False),
  ]
  text = rollouts.texts({'a': _run(tmp_path, lines)})
  note, first, second = re.split('<h4>Prompt</h4>', text)
  assert _words(first)[:2] == ['Prompt', '0?']
  begin, late = first.split('<li>')[1:]
  assert '<p class="text"> a\n  b<mark> &lt;c&gt;</mark>d </p>' in begin
  assert _words(begin)[:5] == ['Step', '0', '12', 'tokens,', 'ended']
  assert '<p class="text"><mark>\u2028e</mark></p>' in late
  assert _words(late)[:6] == ['Step', '5', '1,234', 'tokens,', 'cut', 'off']
  assert ' '.join(_words(second)) == (
    'Prompt 1? Step 0 1 token, cut off (nothing but white space)'
  )
  assert '<mark>' in note


def test_each_run_stands_under_its_name(tmp_path):
  runs = {
    name: _run(tmp_path / name, [_line(0, (f'by {name}', False))])
    for name in ('first', 'second')
  }
  runs['reader'] = _run(tmp_path / 'reader')
  section = _sections(_page(tmp_path, runs))['Rollouts']
  note, *groups = re.split('<details', section)
  assert '<mark>' not in note  # where no teacher wrote there is no legend
  assert [x.startswith(' open>') for x in groups] == [True, False]
  for name, group in zip(('first', 'second'), groups, strict=True):
    assert f'<summary>{name}</summary>' in group
    assert f'by {name}' in group
  assert 'reader' not in section


def test_a_run_that_wrote_nothing_has_no_section(tmp_path):
  metrics = [{'loss': 1.0, 'ce': 1.0}] * 2
  page = _page(tmp_path, {'a': _run(tmp_path / 'a', metrics=metrics)})
  assert [*_sections(page)] == ['Results', 'Training']
  assert '#rollouts"' not in page


def _metrics(steps, **more):
  fixed = {'loss': 1.0, 'entropy': 2.0, 'rollout/written': 1.0}
  fixed |= {'rollout/tokens': 9.0, 'rollout/empty': 0.0} | more
  return [fixed] * steps


def _titles(section):
  return re.findall('<h3>(.*?)</h3>', section)


def test_curves_of_rollouts_are_not_among_those_of_training(tmp_path):
  measured = {
    'rollout/unfinished': 0.1,
    'rollout/repetition': 0.1,
    'rollout/accepted': 0.5,
    'rollout/by_teacher': 0.5,
    'rollout/accepted_1': 0.5,
    'rollout/accepted_2': 0.5,
    'rollout/accepted_10': 0.5,
  }
  run = _run(tmp_path / 'a', metrics=_metrics(2, **measured))
  sections = _sections(_page(tmp_path, {'a': run}))
  assert [*sections] == ['Results', 'Training', 'Rollouts']
  assert _titles(sections['Training']) == ['train/loss']
  assert _titles(sections['Rollouts']) == [
    'train/rollout/tokens',
    'train/rollout/unfinished',
    'train/rollout/repetition',
    'train/entropy',
    'train/rollout/accepted',
    'share of drafts accepted at the end',
  ]


def test_empty_texts_have_a_curve_where_there_are_some(tmp_path):
  runs = {
    'a': _run(tmp_path / 'a', metrics=_metrics(2)),
    'b': _run(tmp_path / 'b', metrics=_metrics(2, **{'rollout/empty': 0.25})),
  }
  title = 'train/rollout/empty'
  shown = _sections(_page(tmp_path, {'a': runs['a']}))['Rollouts']
  assert title not in _titles(shown)
  shown = _sections(_page(tmp_path, runs))['Rollouts']
  assert title in _titles(shown)


def test_acceptance_by_place_is_of_the_last_steps_that_wrote(tmp_path):
  """Of twenty rows that wrote the last two count; NaN is no number."""

  def wrote(*shares):
    return {f'rollout/accepted_{i}': x for i, x in enumerate(shares, start=1)}

  metrics = [wrote(0.0, 0.0, 0.0)] * 18
  metrics += [wrote(1.0, 0.5, np.nan), {'loss': 1.0}]
  metrics += [wrote(0.5, np.nan, np.nan), {'loss': 1.0}]
  run = _run(tmp_path / 'a', metrics=metrics)
  shares = rollouts.by_place(log.read_metrics(run))
  np.testing.assert_allclose(shares, [0.75, 0.5, np.nan])
  assert rollouts.by_place([{'step': 1, 'train/loss': 1.0}]) == []


def test_acceptance_by_place_takes_blocks_and_has_a_line_a_run(tmp_path):
  name = 'rollout/accepted_{}'
  runs = {
    'one': _run(tmp_path / 'one', metrics=[{name.format(1): 0.5}]),
    'two': _run(
      tmp_path / 'two', metrics=[{name.format(1): 0.5, name.format(2): 0.4}]
    ),
  }
  title = '<h3>share of drafts accepted at the end</h3>'
  assert title not in _page(tmp_path, {'one': runs['one']})
  figure = _page(tmp_path, runs).partition(title)[2].partition('</figure>')[0]
  assert _words(figure.partition('</ul>')[0]) == ['two']
  ticks = re.findall('<text.*?>(.*?)</text>', figure)
  assert {'1', '2', 'place in the block'} <= set(ticks)
  assert '1.5' not in ticks
