"""What was written is in every tracker once, also after a kill."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import base
from gakd_jax import UserError, fields, log, trackers

ROOT = Path(__file__).parents[1]


def events(folder):
  """[(step, {name: value})] as TensorBoard reads them."""
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while len(data) >= 12:
      (size,) = struct.unpack('<Q', data[:8])
      if len(data) < 16 + size:
        break  # Cut off by a kill.
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.HasField('session_log'):
        found = [(step, x) for step, x in found if step < event.step]
      elif event.HasField('summary'):
        values = {
          v.tag: v.histo if v.HasField('histo') else v.simple_value
          for v in event.summary.value
        }
        found.append((event.step, values))
  return found


def write(names, workdir, steps, resume_step=0):
  config = base.get_config()
  made = trackers.make(names, workdir, config, resume_step)
  rows = [x for x in log.read_metrics(workdir) if x['step'] <= resume_step]
  metrics = log.Metrics(workdir, made, len(rows))
  counts = np.zeros(len(log.HISTOGRAM_EDGES) - 1, int)
  counts[3] = 2
  for step in steps:
    metrics.write(step, {'train/loss': step, 'train/scores': counts})
    if step % 2 == 0:
      metrics.write(step, {'x/rouge_l_101+': -step})
  return metrics


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests import test_trackers
first, last, resume_step = map(int, sys.argv[4:])
steps = range(first, last + 1)
test_trackers.write([sys.argv[2]], sys.argv[3], steps, resume_step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def write_and_be_killed(name, workdir, first, last, resume_step):
  args = [ROOT, name, workdir, first, last, resume_step]
  command = [sys.executable, '-c', KILLED, *map(str, args)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_tensorboard_has_every_step_once_after_kills(tmp_path):
  write_and_be_killed('tensorboard', tmp_path, 1, 7, 0)
  folder = tmp_path / 'tensorboard'
  assert [step for step, x in events(folder) if 'train/loss' in x] == [
    *range(1, 8)
  ]
  write_and_be_killed('tensorboard', tmp_path, 6, 6, 5)
  (last, *_) = sorted(folder.iterdir(), reverse=True)
  last.write_bytes(last.read_bytes()[:-5])  # In the middle of a record.
  write(['tensorboard'], tmp_path, [6, 7, 8], 5).close()
  found = events(folder)
  rows = {step: x for step, x in found if 'train/loss' in x}
  assert [step for step, x in found if 'train/loss' in x] == [*range(1, 9)]
  assert [step for step, x in found if 'train/loss' not in x] == [2, 4, 6, 8]
  assert rows[7]['train/loss'] == 7
  histogram = rows[7]['train/scores']
  assert (histogram.num, histogram.bucket[3]) == (2, 2)
  assert histogram.sum == pytest.approx(sum(log.HISTOGRAM_EDGES[3:5]))


def test_a_tracker_that_comes_later_has_the_steps_before(tmp_path):
  write([], tmp_path, [1, 2, 3]).close()
  write(['tensorboard'], tmp_path, [3], 2).close()
  found = events(tmp_path / 'tensorboard')
  assert [step for step, _ in found] == [1, 2, 2, 3]


def test_tensorboard_itself_reads_that(tmp_path):
  accumulator = pytest.importorskip(
    'tensorboard.backend.event_processing.event_accumulator',
    reason='tensorboard is not installed',
  )
  write(['tensorboard'], tmp_path, range(1, 8)).close()
  write(['tensorboard'], tmp_path, [6, 7, 8], 5).close()
  folder = str(tmp_path / 'tensorboard')
  seen = accumulator.EventAccumulator(folder, {'histograms': 0})  # 0: all
  seen.Reload()
  loss = [(x.step, x.value) for x in seen.Scalars('train/loss')]
  assert loss == [(i, i) for i in range(1, 9)]
  assert [x.step for x in seen.Histograms('train/scores')] == [*range(1, 9)]


def test_mlflow_has_every_step_once(tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file:{tmp_path}/mlruns')
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
  write_and_be_killed('mlflow', tmp_path, 1, 7, 0)
  (run,) = mlflow.search_runs(search_all_experiments=True, output_format='list')
  assert run.info.status == 'RUNNING'
  write(['mlflow'], tmp_path, [6, 7, 8], 5).close()
  (run,) = mlflow.search_runs(search_all_experiments=True, output_format='list')
  assert run.info.status == 'FINISHED'
  assert run.data.params['train.batch_size'] == '32'
  client = mlflow.MlflowClient()
  for name, want in (
    ('train/loss', [(i, i) for i in range(1, 9)]),
    ('x/rouge_l_101_', [(i, -i) for i in range(2, 9, 2)]),
  ):
    history = client.get_metric_history(run.info.run_id, name)
    assert [(x.step, x.value) for x in history] == want
  assert set(run.data.metrics) == {'train/loss', 'x/rouge_l_101_'}


def wandb_rows(path):
  """The rows that an attempt of wandb offline left, {name: JSON}."""
  from wandb.proto import wandb_internal_pb2

  data, at, part, rows = path.read_bytes(), 7, b'', []
  while at + 7 <= len(data):  # Records in the format of LevelDB's log.
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    size, kind = struct.unpack('<HB', data[at + 4 : at + 7])
    part += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or its last piece
      record = wandb_internal_pb2.Record.FromString(part)
      part = b''
      if record.HasField('history'):
        rows.append(
          {
            item.key or '/'.join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
          }
        )
  return rows


def test_wandb_has_every_step_once(tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason='wandb is not installed')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  write_and_be_killed('wandb', tmp_path, 1, 7, 0)
  write(['wandb'], tmp_path, [6, 7, 8], 5).close()
  attempts = sorted((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))
  assert len({path.name for path in attempts}) == 1  # One run.
  rows = wandb_rows(attempts[-1])
  assert [row['_step'] for row in rows] == [*range(1, 9)]
  assert [row['train/loss'] for row in rows] == [*range(1, 9)]
  assert [row.get('x/rouge_l_101+') for row in rows[4:]] == [None, -6, None, -8]


def test_a_tracker_that_is_not_there_is_said_before_anything_is_read(
  monkeypatch, tmp_path
):
  c = base.get_config()
  c.report.trackers = ('tensorboard', 'wandb')
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match='wandb needs a package; pip install'):
    fields.check(c)
  monkeypatch.undo()
  (tmp_path / 'wandb_').mkdir()  # As wandb leaves a folder of its name.
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(trackers.Wandb, 'package', 'wandb_')
  with pytest.raises(UserError, match='wandb needs a package; pip install'):
    fields.check(c)
  c.report.trackers = ('clearml',)
  with pytest.raises(
    UserError, match=r'trackers=.*: expected a tuple, each one of tens'
  ):
    fields.check(c)


@pytest.mark.slow
def test_a_run_that_is_killed_has_every_step_once(tiny_model_dir, tmp_path):
  workdir = tmp_path / 'run'
  settings = {
    'student.path': tiny_model_dir(),
    'data.train': 'python:tools.synthetic:rows:train:40',
    'data.template': 'chat',
    'data.max_length': 96,
    'data.max_prompt_length': 64,
    'data.buckets': '(96,)',
    'train.steps': 40,
    'train.batch_size': 8,
    'checkpoint.every': 5,
    'evals': '{}',
  }
  command = [sys.executable, '-m', 'gakd_jax.main', f'--workdir={workdir}']
  command += ['--config=configs/base.py']
  command += [f'--config.{key}={value}' for key, value in settings.items()]
  for stop in (7, 19):
    with subprocess.Popen(
      command, cwd=ROOT, stdout=subprocess.DEVNULL
    ) as process:
      while not any(row['step'] >= stop for row in log.read_metrics(workdir)):
        assert process.poll() is None
        time.sleep(0.01)
      os.kill(process.pid, signal.SIGKILL)
  subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
  found = events(workdir / 'tensorboard')
  assert [step for step, x in found if 'train/loss' in x] == [*range(1, 41)]
  assert len([*(workdir / 'tensorboard').iterdir()]) == 3
