"""Whole runs in which models write, stopped and continued."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from configs import base
from gakd_jax import Interrupted, inputs, log, rollout, train
from gakd_jax.data import tokenizer
from tests import ending

ROWS = [
  {'instruction': f'Repeat {word}.', 'input': '', 'output': word}
  for word in ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
] * 2


@pytest.fixture(scope='module')
def config(tiny_model_dir, tmp_path_factory):
  """`config(**rollout)` of a run of 6 steps."""
  path = tmp_path_factory.mktemp('data') / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  student = tiny_model_dir(seed=0, layers=1)
  teacher = tiny_model_dir(seed=1, layers=1, width=48)

  def make(**settings):
    c = base.get_config()
    c.student.path, c.teacher.path = str(student), str(teacher)
    c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
    c.data.train = c.data.validation = str(path)
    c.data.template = 'chat'
    c.data.max_length = 40
    c.data.max_prompt_length = 32
    c.data.buckets = (32,)
    c.objective = {'name': 'kld', 'divergence': 'forward_kl'}
    c.rollout = {'max_new_tokens': 8} | settings
    c.optimizer.learning_rate = 3e-3
    c.train.batch_size = 8
    c.train.steps = 6
    c.train.head_chunk = 16
    c.mesh.data = 1
    c.evals = {'loss': {'batch_size': 8, 'limit': 8}}
    c.eval_every = 0
    c.checkpoint.every = 3
    return c

  return make


def test_responses_of_the_data_are_there_as_far_as_they_are_read(
  config, tmp_path
):
  """With `prefix` no further; where none is trained on, they may be missing."""
  path = tmp_path / 'rows.jsonl'
  rows = [ROWS[0] | {'output': 'so ' * 9}, {'instruction': 'Say hi.'}]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  c = config(writer='student')
  c.data.max_length = 64
  tokens = tokenizer.load(c.student.path)

  def sizes(**settings):
    writer = rollout.make('student', max_new_tokens=8, **settings)
    found = inputs.texts(c, str(path), [(tokens, c.data.template)], writer)
    return [len(response) for _, response in found]

  (whole,) = sizes(share=0.5)
  assert whole > 8
  assert sizes(share=0.5, prefix=2) == [2]
  assert sizes(begin=0.5) == sizes(end=0.5) == [whole]
  assert sizes() == [whole, 0]


def steps(workdir):
  """Metrics of each step, but for those of time."""
  return {
    row['step']: {
      k: v
      for k, v in row.items()
      if k.startswith('train/') and 'second' not in k
    }
    for row in log.read_metrics(workdir)
    if 'train/loss' in row
  }


class Killed(Exception):
  pass


def kill_in_rollout(monkeypatch, writer, at):
  write = writer.write

  def killed(self, *args, step, **settings):
    written = write(self, *args, step=step, **settings)
    if step == at:
      raise Killed
    return written

  monkeypatch.setattr(writer, 'write', killed)


def assert_same_run(workdir, whole):
  """Each step, the student, and what it wrote on the way."""
  want = steps(whole)
  assert sorted(want) == list(range(1, len(want) + 1))
  assert steps(workdir) == want
  ours, theirs = (
    safetensors.numpy.load_file(path / 'best' / 'model.safetensors')
    for path in (workdir, whole)
  )
  for name, x in theirs.items():
    np.testing.assert_array_equal(ours[name], x)
  ours, theirs = (
    (path / 'rollouts.jsonl').read_bytes() for path in (workdir, whole)
  )
  assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
  ('settings', 'at', 'goes_on_from'),
  [
    (
      {'writer': 'speculative', 'gamma': 3, 'every': 2, 'share': 0.75},
      5,
      3,  # With the text of step 4, which was written at 3.
    ),
    ({'writer': 'student', 'begin': 0.3, 'end': 0.8}, 4, 3),
  ],
  ids=['speculative', 'student'],
)
def test_a_run_killed_while_it_writes_continues_bit_for_bit(
  config, settings, at, goes_on_from, tmp_path, monkeypatch, capsys
):
  c = config(**settings)
  workdir, whole = tmp_path / 'run', tmp_path / 'whole'
  train.run(c, whole)
  with monkeypatch.context() as patch:
    kill_in_rollout(patch, rollout.WRITERS[settings['writer']], at)
    with pytest.raises(Killed):
      train.run(c, workdir)
  capsys.readouterr()
  train.run(c, workdir)
  assert f'continuing from step {goes_on_from}\n' in capsys.readouterr().out
  assert_same_run(workdir, whole)
  # With `every`, of the first step of a set alone.
  told = [n for n, x in steps(whole).items() if 'train/rollout/written' in x]
  assert told == ([3, 4, 5] if 'begin' in settings else [1, 3, 5])


@pytest.mark.slow
def test_what_is_written_ahead_is_saved(config, tmp_path, monkeypatch):
  c = config(writer='student', every=3)
  c.checkpoint.every = 0

  with (
    ending.at(2, ending.stop, monkeypatch),
    pytest.raises(Interrupted, match='step 2 of 6'),
  ):
    train.run(c, tmp_path / 'run')
  train.run(c, tmp_path / 'run')
  train.run(c, tmp_path / 'whole')
  assert_same_run(tmp_path / 'run', tmp_path / 'whole')


_CONFIG = """
import json
from configs import base

def get_config():
  c = base.get_config()
  c.update_from_flattened_dict(json.loads({flat!r}))
  with c.ignore_type():
    c.data.buckets = (32,)
    c.objective, c.rollout, c.evals = {parts!r}
  return c
"""


@pytest.mark.slow
def test_a_process_killed_outright_continues_bit_for_bit(config, tmp_path):
  c = config(writer='speculative', every=2)
  parts = [c[name].to_dict() for name in ('objective', 'rollout', 'evals')]
  flat = {
    f'{name}.{key}': c[name][key]
    for name, key in (
      ('student', 'path'),
      ('teacher', 'path'),
      ('student', 'dtype'),
      ('teacher', 'dtype'),
      ('train', 'precision'),
      ('data', 'train'),
      ('data', 'validation'),
      ('data', 'template'),
      ('data', 'max_length'),
      ('data', 'max_prompt_length'),
      ('train', 'batch_size'),
      ('train', 'head_chunk'),
      ('checkpoint', 'every'),
    )
  } | {'train.steps': 40, 'optimizer.learning_rate': 3e-3, 'mesh.data': 1}
  file = tmp_path / 'run_config.py'
  file.write_text(_CONFIG.format(flat=json.dumps(flat), parts=parts))

  def command(workdir):
    return [
      *(sys.executable, '-m', 'gakd_jax.main'),
      *(f'--config={file}', f'--workdir={workdir}'),
    ]

  workdir, whole = tmp_path / 'run', tmp_path / 'whole'
  metrics = workdir / 'metrics.jsonl'
  with subprocess.Popen(
    command(workdir), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
  ) as process:
    while process.poll() is None and (
      not metrics.exists() or metrics.read_text().count('\n') < 7
    ):
      time.sleep(0.01)
    process.kill()
    _, stderr = process.communicate()
  assert process.returncode == -signal.SIGKILL, stderr
  for path in (workdir, whole):
    done = subprocess.run(
      command(path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ('continuing from step' in done.stdout) == (path == workdir)
  assert_same_run(workdir, whole)
