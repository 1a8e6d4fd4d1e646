"""A run is looked at: all is said, no weight is read and nothing is written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base, quickstart
from gakd_jax import UserError, check, fingerprint, models, rundir
from gakd_jax.models import convert

ROWS = [
  {'instruction': 'Repeat one.', 'input': '', 'output': 'one\ttwo'},
  {'instruction': 'Repeat this. ' * 30, 'input': '', 'output': 'x'},
  {'instruction': 'Say it.', 'input': '', 'output': 'it\n\nis'},
]


@pytest.fixture
def config(tiny_model_dir, tmp_path, monkeypatch):
  for module, name in (
    (convert, 'load_params'),
    (models, 'load'),
    (models, 'init'),
  ):
    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail('weights'))
  data = tmp_path / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  c = base.get_config()
  c.student.path = c.teacher.path = str(tiny_model_dir())
  c.data.train = c.data.validation = str(data)
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 96, 64
  c.data.buckets = (96,)
  c.train.epochs, c.train.batch_size = 3.0, 4
  c.mesh.data = 1
  c.objective = {'name': 'gakd', 'kind': 'wgan'}
  c.critic.width, c.critic.layers, c.critic.ff_width = 16, 1, 16
  return c


def shown(config, workdir, capsys):
  check.run(config, workdir, base.get_config())
  assert not workdir.exists()
  out = capsys.readouterr().out
  assert max(map(len, out.splitlines())) <= 80
  return out


def test_a_run_is_shown_and_neither_read_nor_written(config, tmp_path, capsys):
  out = shown(config, tmp_path / 'run', capsys)
  for line in (
    '* train.batch_size                4',
    "  train.precision                 'bfloat16'",
    "* objective.kind                  'wgan'",
    '  objective.g                     ',
    'data: 2 rows; tokens: ',
    '; 1 skipped: prompt too long\n',
    'evals.loss: 3 rows, 0 left out\n',
    'student: 31,456 parameters\n',
    'teacher: 31,456 parameters\n',
    'critic: ',
    'steps: 1 an epoch, 3 in all\n',
    'first batch: 4 rows of 96 tokens; > is trained on\n',
    '  > one\\ttwo<|im_end|>\n',
    '    Repeat one.<|im_end|>⏎\n    <|im_start|>assistant⏎\n',
    '  > it⏎\n  > ⏎\n  > is<|im_end|>\n',
    'padding: 96 tokens\n',
  ):
    assert line in out


def test_what_is_wrong_is_said_as_the_run_would(config, tmp_path):
  config.data.max_prompt_length = 2
  with pytest.raises(UserError, match='no row is left'):
    check.run(config, tmp_path / 'run')
  config.student.path = 'stage:sft'
  with pytest.raises(UserError, match='no stage sft before this'):
    check.run(config, tmp_path / 'run')


@pytest.mark.slow
def test_a_run_that_is_there_is_said_or_refused(config, tmp_path, capsys):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  fingerprint.begin(workdir, config=fingerprint.as_json(config))
  begun = (workdir / 'config.json').read_text()
  config.eval_every = 7
  check.run(config, workdir)
  out = capsys.readouterr().out
  assert 'config.eval_every was ' in out
  assert f'{workdir} was begun, and goes on\n' in out
  rundir.finish(workdir, {})
  check.run(config, workdir)
  assert f'{workdir} has finished\n' in capsys.readouterr().out
  config.seed = 1
  with pytest.raises(UserError, match='seed was 0 and is 1; go on with'):
    check.run(config, workdir)
  check.run(config, workdir, force=True)
  out = capsys.readouterr().out
  assert f'{workdir}: forced: config.seed was 0 and is 1\n' in out
  assert ' has finished' not in out
  assert (workdir / 'config.json').read_text() == begun
  assert rundir.is_finished(workdir)


def test_stages_are_shown_as_far_as_they_can_be_known(config, tmp_path, capsys):
  stages = []
  for name, settings in {
    'sft': {'student.shape': {'layers': 1}, 'student.dtype': 'float32'},
    'more': {'student.path': 'stage:sft', 'data.template': None},
    'kd': {
      'student.path': 'stage:more',
      'critic.init_from': 'stage:sft',
      'data.train': (config.data.train, 'stage:answers'),
    },
    'last': {'data.train': 'stage:answers', 'train.steps': 5},
  }.items():
    stage = config.copy_and_resolve_references()
    with stage.ignore_type(), stage.unlocked():
      stage.update_from_flattened_dict(settings)
    stages.append((name, stage))
    if name == 'sft':
      answers = config.copy_and_resolve_references()
      answers.train.steps = 0
      answers.rollout = {'writer': 'teacher'}
      stages.append(('answers', answers))
  config.stages = tuple(stages)
  out = shown(config, tmp_path / 'run', capsys)
  sft, answers, more, kd, last = out.split('\n== ')[1:]
  assert 'student.shape.layers ' in sft
  assert 'data: 3 prompts, which the teacher answers first' in answers
  assert 'it trains nothing' in answers
  assert 'student.dtype ' in answers
  assert 'stage:sft has not run: of its model, the shape is known' in more
  sizes = [re.search('student: (.*)', x)[1] for x in (sft, more, kd, last)]
  assert len(set(sizes[:3])) == 1  # of one layer
  assert sizes[3] != sizes[0]
  assert "data.template                   'chat'" not in more  # As before.
  assert 'stage:answers has not run: its answers are left out' in kd
  assert 'data: 2 rows' in kd
  assert 'critic: ' in more
  assert 'critic: ' not in kd  # Its shape is that of the stage.
  assert 'steps: unknown an epoch, 5 in all' in last
  assert 'first batch' not in last


@pytest.mark.slow
def test_the_binary_checks_and_exits(tmp_path):
  workdir = tmp_path / 'run'
  command = [sys.executable, '-m', 'gakd_jax.main', '--check']
  command += [f'--workdir={workdir}', '--config=configs/quickstart.py']
  root = Path(quickstart.__file__).parents[1]
  done = subprocess.run(
    command, cwd=root, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('\n== ') == len(quickstart.get_config().stages)
  assert '* train.batch_size                8\n' in done.stdout
  assert 'a model writes in the place of 50% of these responses' in done.stdout
  assert not workdir.exists()
