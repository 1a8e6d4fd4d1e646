"""Metrics survive kills and resumption; the terminal shows the numbers."""

import json
import math
import os
import re

import numpy as np
import pytest

from gakd_jax import UserError, log


def _write(workdir, steps, **kwargs):
  metrics = log.Metrics(workdir, **kwargs)
  for step in steps:
    metrics.write(step, {'train/loss': step})
  metrics.close()


def _steps(workdir):
  return [row['step'] for row in log.read_metrics(workdir)]


def test_metrics_are_on_disk_as_soon_as_they_are_written(tmp_path):
  assert log.read_metrics(tmp_path / 'new') == []
  metrics = log.Metrics(tmp_path / 'new')
  metrics.write(np.int32(3), {'train/loss': np.float32(0.5)})
  metrics.write(3, {'eval/ce': 2})
  got = log.read_metrics(tmp_path / 'new')
  metrics.close()
  assert got == [{'step': 3, 'train/loss': 0.5}, {'step': 3, 'eval/ce': 2.0}]


def test_histograms_are_lists_of_counts(tmp_path):
  counts = np.zeros(len(log.HISTOGRAM_EDGES) - 1, np.float32)
  counts[3] = 2
  metrics = log.Metrics(tmp_path)
  metrics.write(1, {'scores': counts, 'a': 0.5})
  metrics.close()
  (row,) = log.read_metrics(tmp_path)
  assert row == {'step': 1, 'scores': counts.astype(int).tolist(), 'a': 0.5}
  assert isinstance(row['scores'][3], int)
  _write(tmp_path, [2], rows=1)  # and are copied as they are
  assert log.read_metrics(tmp_path)[0] == row


def test_null_stands_for_what_is_not_finite_however_deep():
  deep = {'é': [1, (math.nan, {'x': math.inf}), 0.5, None, True]}
  text = log.to_json(deep)
  assert text == '{"é": [1, [null, {"x": null}], 0.5, null, true]}'


def test_what_is_not_finite_is_strict_json(tmp_path):
  metrics = log.Metrics(tmp_path)
  metrics.write(1, {'a': math.nan, 'b': -math.inf, 'c': 1})
  metrics.close()
  line = (tmp_path / 'metrics.jsonl').read_text()
  strict = json.loads(line, parse_constant=pytest.fail)
  assert strict == {'step': 1, 'a': None, 'b': None, 'c': 1.0}
  (row,) = log.read_metrics(tmp_path)
  assert math.isnan(row['a'])
  assert math.isnan(row['b'])
  _write(tmp_path, [2], rows=1)  # NaN is copied as null again
  assert (tmp_path / 'metrics.jsonl').read_text().startswith(line)


def test_a_resumed_run_overwrites_the_later_steps(tmp_path):
  _write(tmp_path, [1, 2, 3, 4])
  _write(tmp_path, [3, 4, 5], rows=2)
  assert _steps(tmp_path) == [1, 2, 3, 4, 5]
  _write(tmp_path, [0, 1])
  _write(tmp_path, [0, 1])  # killed before its first checkpoint
  assert _steps(tmp_path) == [0, 1]


def test_a_line_that_was_deleted_doubles_no_step(tmp_path):
  _write(tmp_path, [1, 2, 4, 5, 6, 7])  # 3 was damaged.
  _write(tmp_path, [6, 7], rows=5, step=5)
  assert _steps(tmp_path) == [1, 2, 4, 5, 6, 7]


class Failing:
  def __init__(self, at):
    self.at, self.steps = at, []

  def write(self, step, values):
    del values
    if step == self.at:
      raise ConnectionError('the server\nhas gone')
    self.steps.append(step)

  def close(self):
    if self.at is None:
      raise RuntimeError


def test_a_tracker_that_fails_stops_no_run(tmp_path, capsys):
  trackers = [Failing(3), Failing(None)]
  _write(tmp_path, [1, 2, 3, 4], trackers=trackers)
  assert [x.steps for x in trackers] == [[1, 2], [1, 2, 3, 4]]
  assert _steps(tmp_path) == [1, 2, 3, 4]
  first, second = capsys.readouterr().out.splitlines()
  assert 'Failing failed and is left out from here on (the server has' in first
  assert '(RuntimeError)' in second


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
  _write(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text()[:-5])
  assert _steps(tmp_path) == [1]
  _write(tmp_path, [2, 3], rows=2)
  assert _steps(tmp_path) == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl:2: not JSON'):
    log.read_metrics(tmp_path)


def test_progress_prints_a_line_now_and_then_to_a_file(capsys, monkeypatch):
  now = 0.0
  monkeypatch.setattr(log.time, 'monotonic', lambda: now)
  with log.Progress(140, 100, 'distil [a]') as progress:
    for step in range(101, 141):
      now += 1
      progress.update(step, loss=2 / 3, tokens_per_second=12345.6)
      if step == 105:
        progress.say('saved [red]' + 100 * 'x')
  assert capsys.readouterr().out.splitlines() == [
    'distil [a]  101/140  loss 0.6667  12,346 tokens/s  elapsed 0:00:01',
    'saved [red]' + 100 * 'x',
    *(
      f'distil [a]  {step}/140  loss 0.6667  12,346 tokens/s'
      f'  elapsed 0:00:{step - 100}  ETA 0:00:{140 - step:02}'
      for step in (111, 121, 131)
    ),
    'distil [a]  140/140  loss 0.6667  12,346 tokens/s  elapsed 0:00:40',
  ]


def test_progress_leaves_its_last_line_when_the_run_dies(capsys):
  def run():
    with log.Progress(10) as progress:
      progress.update(1)
      progress.update(2)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run()
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines] == ['1/10', '2/10']


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
  monkeypatch.setenv('TTY_COMPATIBLE', '1')
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '90')
  with log.Progress(140, 100, 'distil [a]') as progress:
    progress.update(140, loss=0.5, tokens_per_second=12345.6)
    progress.say('saved [red]')
  out = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', capsys.readouterr().out)
  assert 'saved [red]\n' in out
  last = out.splitlines()[-1]
  for text in ('distil [a] ━', '140/140', 'loss 0.5000  12,346 tokens/s'):
    assert text in last


COLUMNS = ['model', 'ROUGE-L', 'CE', 'note']
ROWS = [
  ['teacher [b]', '27.1 ± 0.2', 10.5, 'a < b'],
  ['GAKD', '9.9 ± 0.1', 9.25, None],
]


def test_tables_in_a_file_are_markdown_of_any_width(capsys):
  log.print_table(COLUMNS, [*ROWS, ['x' * 200, 'y', 1, '']], 'Dolly [c]')
  title, *lines = capsys.readouterr().out.splitlines()
  assert title.strip() == 'Dolly [c]'
  rows = [re.split(r'\s*\|\s*', line.strip(' |')) for line in lines]
  assert ['teacher [b]', '27.1 ± 0.2', '10.50', 'a < b'] in rows
  assert ['GAKD', '9.9 ± 0.1', '9.25', '-'] in rows
  assert ['x' * 200, 'y', '1'] in rows
  log.print_table(COLUMNS, [], 'nothing yet')


def test_tables_on_a_narrow_terminal_lose_nothing(capsys, monkeypatch):
  monkeypatch.setenv('TTY_COMPATIBLE', '1')
  monkeypatch.setenv('COLUMNS', '30')
  log.print_table(['a', 'b'], [['x' * 40, 'y' * 40]], 'T')
  out = re.sub(r'\x1b\[[0-9;]*m', '', capsys.readouterr().out)
  assert max(map(len, out.splitlines())) <= 30
  assert (out.count('x'), out.count('y')) == (40, 40)


def test_the_floats_of_a_column_share_their_decimals():
  columns = {
    '.2f': [12.345, 9.0, math.nan],
    '.3f': [np.float32(9.5), 0.001, 0.0],
    '.2e': [5e-6, 0.0],
  }
  for spec, cells in columns.items():
    rows = log.format_rows([[cell] for cell in cells])
    assert rows == [[format(cell, spec)] for cell in cells]
  assert log.format_rows([[1, None, 'x']]) == [['1', '-', 'x']]


def test_numbers_are_known_by_their_text():
  for numeric in (['24.1 ± 0.3', '-'], ['+1.00', '-2.0'], ['<0.001', 'nan']):
    assert log.is_numeric(numeric)
  for text in (['a', '1'], ['-', ''], ['2 a', 'b']):
    assert not log.is_numeric(text)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
  (tmp_path / 'taken').mkdir()
  with pytest.raises(UserError, match='taken'):
    log.write_atomically(tmp_path / 'taken', 'text')
  with pytest.raises(UnicodeEncodeError):
    log.write_atomically(tmp_path / 'text', '\ud800')
  assert [path.name for path in tmp_path.iterdir()] == ['taken']


def test_a_file_has_its_name_once_it_is_on_the_disk(tmp_path, monkeypatch):
  order, fsync, replace = [], os.fsync, os.replace

  def synced(fd):
    order.append('fsync')
    fsync(fd)

  def replaced(source, target):
    order.append('replace')
    replace(source, target)

  monkeypatch.setattr(os, 'fsync', synced)
  monkeypatch.setattr(os, 'replace', replaced)
  log.write_atomically(tmp_path / 'x', 'text')
  assert order == ['fsync', 'replace']
  assert (tmp_path / 'x').read_text() == 'text'
