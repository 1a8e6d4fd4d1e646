"""Programs that show metrics: TensorBoard, Weights & Biases, MLflow.

A tracker is made with (workdir, config, resume_step) and has
`write(step, values)` and `close()`; values are as in `log.Metrics`. A run
that goes on is given all steps up to `resume_step` again, those that an
interruption may have lost: a tracker leaves out what it has, so that it has
every step once. It is imported when it is chosen, by `config.report.trackers`.
"""

import importlib.util
import json
import math
import os
import re
import socket
import struct
import time
import uuid
from pathlib import Path

import numpy as np

from gakd_jax import UserError, fingerprint, log


class TensorBoard:
  """Event files in <workdir>/tensorboard.

  Written here and not by tensorboardX, whose queue loses what is in it when
  the process is killed.
  """

  package = 'tensorboardX'

  def __init__(self, workdir, config, resume_step):
    del config
    from tensorboardX import proto, record_writer

    self._proto, self._crc = proto, record_writer.masked_crc32c
    folder = Path(workdir) / 'tensorboard'
    folder.mkdir(parents=True, exist_ok=True)
    goes_on = resume_step and any(folder.iterdir())
    self._first = resume_step if goes_on else 0
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}'
    # Unbuffered: what is written outlives the process.
    self._file = (folder / name).open('wb', buffering=0)
    self._put(file_version='brain.Event:2')
    # Hides the steps from here on of earlier files.
    started = proto.event_pb2.SessionLog(status=1)
    self._put(step=self._first, session_log=started)

  def write(self, step, values):
    if step >= self._first:
      shown = [self._value(*item) for item in values.items()]
      summary = self._proto.summary_pb2.Summary(value=shown)
      self._put(step=step, summary=summary)

  def close(self):
    self._file.close()

  def _value(self, name, value):
    make = self._proto.summary_pb2
    if not isinstance(value, list):
      return make.Summary.Value(tag=name, simple_value=value)
    edges, counts = log.HISTOGRAM_EDGES, np.array(value)
    middles = (edges[1:] + edges[:-1]) / 2
    histogram = make.HistogramProto(
      min=edges[0],
      max=edges[-1],
      num=counts.sum(),
      sum=counts @ middles,
      sum_squares=counts @ middles**2,
      bucket_limit=edges[1:],
      bucket=counts,
    )
    return make.Summary.Value(tag=name, histo=histogram)

  def _put(self, **event):
    event = self._proto.event_pb2.Event(wall_time=time.time(), **event)
    data = event.SerializeToString()
    size = struct.pack('<Q', len(data))
    crcs = (struct.pack('<I', self._crc(x)) for x in (size, data))
    self._file.write(b''.join((size, next(crcs), data, next(crcs))))


class Wandb:
  """A run of Weights & Biases, which WANDB_PROJECT and others of its variables
  place; offline, an attempt that goes on holds the steps before it as well.
  It takes no step twice: online, an evaluation that is made up for, after a
  stop, at a step that it has is in the run's own files only.
  """

  package = 'wandb'

  def __init__(self, workdir, config, resume_step):
    del resume_step
    import wandb

    self._histogram = wandb.Histogram
    try:
      self._run = wandb.init(
        dir=workdir,
        id=_run_id(workdir, 'wandb', lambda: uuid.uuid4().hex),
        resume='allow',
        name=Path(workdir).name,
        config=_settings(config),
      )
    except wandb.Error as error:
      raise UserError(_line('wandb', error)) from error

  def write(self, step, values):
    if step >= self._run.starting_step:
      edges = log.HISTOGRAM_EDGES
      values = {
        name: self._histogram(np_histogram=(x, edges)) if _is_list(x) else x
        for name, x in values.items()
      }
      self._run.log(values, step=step)

  def close(self):
    self._run.finish()


class MLflow:
  """A run of MLflow, which MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME
  place; it has no histograms.
  """

  package = 'mlflow'

  def __init__(self, workdir, config, resume_step):
    del resume_step
    import mlflow

    self._metric = mlflow.entities.Metric
    self._last = {}  # {metric: the last step that MLflow has}
    try:
      self._client = client = mlflow.MlflowClient()

      def new():
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'gakd_jax')
        experiment = mlflow.set_experiment(name).experiment_id
        run = client.create_run(experiment, run_name=Path(workdir).name)
        for key, value in fingerprint.flatten(_settings(config)).items():
          client.log_param(run.info.run_id, key, value)
        return run.info.run_id

      self._id = _run_id(workdir, 'mlflow', new)
      client.update_run(self._id, 'RUNNING')
    except mlflow.MlflowException as error:
      raise UserError(_line('mlflow', error)) from error

  def write(self, step, values):
    now = int(1000 * time.time())
    # It refuses other characters in names.
    named = {re.sub(r'[^\w./ :-]', '_', k): x for k, x in values.items()}
    self._client.log_batch(
      self._id,
      [
        self._metric(name, value, now, step)
        for name, value in named.items()
        if not _is_list(value) and step > self._last_step(name)
      ],
    )

  def close(self):
    self._client.set_terminated(self._id)

  def _last_step(self, name):
    if name not in self._last:
      history = self._client.get_metric_history(self._id, name)
      self._last[name] = max((x.step for x in history), default=-math.inf)
    return self._last[name]


TRACKERS = {'tensorboard': TensorBoard, 'wandb': Wandb, 'mlflow': MLflow}


def make(names, workdir, config, resume_step):
  """The trackers of these names, for `log.Metrics`."""
  return [TRACKERS[name](workdir, config, resume_step) for name in names]


def check(names):
  """Refuses trackers whose package is not installed."""
  for name in names:
    package = TRACKERS[name].package
    found = importlib.util.find_spec(package)
    # A folder of that name, as wandb makes one, is no package.
    if found is None or found.origin is None:
      raise UserError(
        f'config.report.trackers: {name} needs a package; pip install {package}'
      )


def _run_id(workdir, name, make):
  """The id of a tracker's run, which stays that of the directory."""
  path = Path(workdir) / f'{name}_run.txt'
  if not path.exists():
    log.write_atomically(path, make())
  return path.read_text()


def _settings(config):
  return json.loads(config.to_json_best_effort())


def _is_list(value):
  return isinstance(value, list)


def _line(name, error):
  return f'{name}: {str(error).strip().splitlines()[0]}'
