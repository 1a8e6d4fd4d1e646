"""SKD: GSM8K from its public files to a table, with tiny models."""

import json
from pathlib import Path

import pytest

from configs import skd, tiny_teacher
from gakd_jax import results, rundir, train
from tests.written import value
from tools import prepare_data

TEACHER, STUDENT = skd.PAIRS['gemma']


def shrink(c):
  """In place: the same files and methods, small models and few steps."""
  c.teacher.dtype = c.student.dtype = c.train.precision = 'float32'
  c.student.remat = 'none'
  if c.student.path == STUDENT:
    c.student.shape = {'width': 32, 'layers': 1, 'ff_width': 64}
  if c.student.path in (TEACHER, STUDENT):
    c.student.path = tiny_teacher.PATH
  prompt, response = 192, 64
  c.data.max_prompt_length, c.data.max_length = prompt, prompt + response
  if 'max_new_tokens' in c.rollout:
    c.rollout.max_new_tokens = response
  written = c.rollout.writer in ('student', 'speculative')
  c.data.buckets = (prompt if written else prompt + response,)
  if c.train.steps is None:
    c.train.steps, c.train.epochs = 2, None
  c.train.head_chunk = 256
  c.report.trackers = ()
  c.mesh.fsdp = 1
  for settings in c.evals.values():
    if 'max_new_tokens' in settings:
      settings.max_new_tokens = 24
      # What these models write has no blank lines to be cut at.
      settings.stop = (*settings.stop, ' ')


@pytest.mark.slow
def test_gsm8k_from_public_files_to_a_table(shared_dir, tmp_path, monkeypatch):
  files = shared_dir / 'data' / 'gsm8k'
  monkeypatch.chdir(tmp_path)
  for file, made, *options in (
    ('train', 'train', '--limit=24'),
    ('train', 'dev', '--skip=7000', '--limit=8'),
    ('test', 'test', '--limit=8'),
  ):
    arguments = [f'{files}/{file}.jsonl', f'data/gsm8k/{made}.jsonl']
    assert prepare_data.main([*arguments, *options]) == 0
  config = skd.get_config('gsm8k,all')
  for _, stage in config.stages:
    shrink(stage)
  train.run_stages(config, 'run')

  trained = ['teacher', *skd.WRITERS]
  tests = {name: Path('run', f'test_{name}') for name in trained}
  table, _ = results.tables(results.read(tests), results.teachers(tests))
  assert [name for name, _ in table.rows] == trained
  assert ('gsm8k', 'accuracy') in table.columns
  assert None not in [cell for _, cells in table.rows for cell in cells]
  assert table.teachers == {'teacher'}
  page = Path('run', 'report.html').read_text()
  for name, directory in tests.items():
    assert f'>test_{name}<' in page
    answers = (directory / 'answers' / 'gsm8k-0.jsonl').read_text()
    lines = [json.loads(line) for line in answers.splitlines()]
    assert len(lines) == 8
    assert lines[0]['instruction'].startswith('Janet')
    assert lines[0]['gold'] == 18
    assert not any(' ' in line['answer'] for line in lines)
  assert any(line.get('cut_at') == ' ' for line in lines)
  # No two students were trained alike.
  found = [rundir.read_results(tests[x])['best'] for x in skd.WRITERS]
  losses = {value(x, 'loss/ce') for x in found}
  assert len(losses) == len(skd.WRITERS)
