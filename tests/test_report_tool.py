"""The page of any set of runs, from the command line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gakd_jax import UserError
from tests.written import write_results

TOOL = Path(__file__).parents[1] / 'tools' / 'report.py'


@pytest.fixture(scope='module')
def tool():
  spec = importlib.util.spec_from_file_location('report_tool', TOOL)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _run(path, time=0):
  write_results(path, {'loss/ce': 1.5})
  os.utime(path / 'results.json', (time, time))
  return path


def test_a_directory_of_runs_is_all_of_them_as_they_finished(tmp_path, tool):
  b, a = _run(tmp_path / 'w' / 'b', 1), _run(tmp_path / 'w' / 'a', 2)
  (tmp_path / 'w' / 'unfinished').mkdir()
  found = tool.find_runs([tmp_path / 'w'])
  assert list(found.items()) == [('b', b), ('a', a)]
  assert tool.find_runs([a, tmp_path / 'w']) == {'a': a, 'b': b}  # once


def test_a_finished_run_is_itself_whatever_it_contains(tmp_path, tool):
  run = _run(tmp_path / 'a')
  _run(run / 'inner')
  assert tool.find_runs([run]) == {'a': run}


def test_names_take_as_much_of_the_path_as_they_need(tmp_path, tool):
  runs = [_run(tmp_path / x / 'sft') for x in ('one', 'two')]
  assert list(tool.find_runs(runs)) == ['one/sft', 'two/sft']


def test_what_is_no_run_is_said(tmp_path, tool):
  (tmp_path / 'started').mkdir()
  (tmp_path / 'started' / 'config.json').write_text('{}')
  with pytest.raises(UserError, match=r'started has not finished: results\.js'):
    tool.find_runs([tmp_path / 'started'])
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='is no run, and contains none: results'):
    tool.find_runs([tmp_path / 'empty'])
  with pytest.raises(UserError, match='nothing: no such directory'):
    tool.find_runs([tmp_path / 'nothing'])


def test_comparisons_are_of_the_runs_shown(tmp_path, tool):
  numbers = dict.fromkeys(('difference', 'low', 'high', 'p'), 0.5)
  of = {'set': 'dolly', 'metric': 'rouge_l'} | numbers
  pairs = [of | {'a': 'x', 'b': 'y'}, of | {'a': 'x', 'b': 'z'}]
  (tmp_path / 'comparisons.json').write_text(json.dumps(pairs))
  runs = {x: tmp_path / x for x in 'xy'}
  assert tool.find_comparisons([tmp_path, tmp_path / 'x'], runs) == pairs[:1]
  longer = {f'one/{x}': tmp_path / x for x in 'xy'}  # as others are called
  assert tool.find_comparisons([tmp_path], longer) == [
    pairs[0] | {'a': 'one/x', 'b': 'one/y'}
  ]


@pytest.mark.slow
def test_the_command_writes_the_page_and_its_table(tmp_path):
  _run(tmp_path / 'w' / 'a')

  def call(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)

  output = tmp_path / 'out' / 'page.html'
  done = call(tmp_path / 'w', f'--output={output}')
  assert done.returncode == 0, done.stderr
  assert '1.500' in output.read_text()
  assert '| a | 1.500 |' in output.with_name('table.md').read_text()
  assert 'a & 1.500' in output.with_name('table.tex').read_text()
  (tmp_path / 'dir').mkdir()
  assert call(tmp_path / 'w', f'--output={tmp_path / "dir"}').returncode == 0
  assert (tmp_path / 'dir' / 'report.html').exists()
  done = call(tmp_path)
  assert done.returncode == 2
  assert done.stderr == (
    f'error: {tmp_path} is no run, and contains none: results.json is missing\n'
  )
