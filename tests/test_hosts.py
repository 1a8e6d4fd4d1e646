"""Several processes that are one run, as a launcher starts them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import UserError, hosts, log, rundir

ROOT = Path(__file__).parents[1]
QUICK = os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
WORDS = ('one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
_CONFIG = """
from configs import base


def get_config():
  c = base.get_config()
  c.student.path, c.teacher.path = {models!r}
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.data.train = c.data.validation = {data!r}
  c.data.template = 'chat'
  c.data.max_length, c.data.max_prompt_length = 48, 32
  c.data.buckets = (48,)
  c.objective = {{'name': 'gakd', 'kind': 'rgan', 'warmup_steps': 2}}
  c.critic.width, c.critic.layers, c.critic.ff_width = 16, 1, 32
  c.critic.heads = 2
  c.optimizer.learning_rate = 3e-3
  c.train.batch_size, c.train.steps, c.train.head_chunk = 8, 6, 16
  c.mesh.data, c.mesh.fsdp = 2, 2
  c.evals = {{'loss': {{'batch_size': 8, 'limit': 8}}}}
  c.eval_every, c.checkpoint.every = 3, 2
  c.report.trackers = ()
  return c
"""


@pytest.fixture(scope='module')
def config_file(tiny_model_dir, tmp_path_factory):
  folder = tmp_path_factory.mktemp('config')
  rows = [
    {'instruction': f'Repeat {word}.', 'input': '', 'output': word}
    for word in WORDS * 3
  ]
  data = folder / 'rows.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  models = str(tiny_model_dir(seed=0)), str(tiny_model_dir(seed=1, width=48))
  path = folder / 'config.py'
  path.write_text(_CONFIG.format(models=models, data=str(data)))
  return path


@pytest.fixture
def begin(free_port):
  """`begin(arguments, processes=2, devices=2, wait=60)`: starts them."""
  started = []

  def do(
    arguments, processes=2, which=None, devices=2, wait=60, program='main'
  ):
    which = range(processes) if which is None else which
    for i in which:
      several = [
        f'--coordinator=localhost:{free_port}',
        f'--processes={processes}',
        f'--process_id={i}',
        f'--start_timeout={wait}',
        '--heartbeat_timeout=10',
      ]
      started.append(
        subprocess.Popen(
          [sys.executable, '-m', f'gakd_jax.{program}', *arguments]
          + (several if processes > 1 else []),
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
          cwd=ROOT,
          env=QUICK | {'JAX_NUM_CPU_DEVICES': str(devices)},
        )
      )
    return started[-len(which) :]

  yield do
  for process in started:
    process.kill()
    process.communicate()


def end(running, *codes):
  """What they have said on their ways out, which are these."""
  said = [p.communicate(timeout=120) for p in running]
  found = [p.returncode for p in running]
  assert found == list(codes), '\n'.join(err[-3000:] for _, err in said)
  return said


def losses(workdir):
  return {
    row['step']: (row['train/loss'], row['train/critic/loss'])
    for row in log.read_metrics(workdir)
    if 'train/loss' in row
  }


def of(config_file, workdir, *more):
  return [f'--config={config_file}', f'--workdir={workdir}', *more]


@pytest.mark.slow
def test_two_processes_train_as_one_does(config_file, begin, tmp_path):
  end(begin(of(config_file, tmp_path / 'two')), 0, 0)
  end(begin(of(config_file, tmp_path / 'one'), 1, devices=4), 0)
  two, one = losses(tmp_path / 'two'), losses(tmp_path / 'one')
  assert list(two) == list(one) == list(range(1, 7))
  np.testing.assert_allclose([*two.values()], [*one.values()], rtol=1e-5)
