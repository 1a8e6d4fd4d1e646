"""The loop of a run: text, step, log, evaluate, save; and how it stops."""

import contextlib
import signal
import time

import jax
import jax.numpy as jnp

from gakd_jax import (
  Interrupted,
  chosen,
  hosts,
  keys,
  log,
  rollout_log,
  skip_log,
  trackers,
)
from gakd_jax.evals import evaluator as evaluator_lib


def run(run, state, host, train_step, batches, total, checkpoints):
  """Steps to `total`, or until `host` says that it is enough: the state."""
  c = run.config
  start = int(state.step)
  rollouts = rollout_log.RolloutLog(run, start, total)
  skipped = skip_log.SkipLog(run, total)
  texts = _Texts(run, batches, total)
  any_of = hosts.AnyOf()
  stops = wants_to_save = False

  def due(every, now):
    return now == total or (every > 0 and now % every == 0)

  with (
    _stop_requests() as stop,
    _Log(run, start, total) as logged,
  ):

    def evaluate(params, now, names):
      logged.flush()
      found = chosen.evaluate(
        run, params, now, names, run.workdir / chosen.LAST
      )
      logged.write(now, evaluator_lib.curves(found['evaluators']))
      chosen.choose(c.checkpoint, host, found)

    if start == 0 and c.eval_first:
      evaluate(state.params['student'], 0, run.evaluators)
      if host['is_best']:
        chosen.export(run, state.params['student'], host['best'])
    for now in range(start + 1, total + 1):
      if chosen.is_enough(c.checkpoint, host) and not texts.ahead:
        print(
          f'stopped at step {now - 1} of {total}: {c.checkpoint.best_metric} '
          f'was no better {host["no_better"]} times',
          flush=True,
        )
        break
      rollouts.write(state.params['student'], now - 1)
      batch, about_text = texts.next(state.params['student'], now)
      size = jnp.count_nonzero(batch.student.segments_BT)
      state, metrics = train_step(state, run.models, batch)
      logged.step(now, metrics | about_text, size)
      skipped.step(now, metrics, batch)
      host['is_best'] = False
      names = [
        name
        for name, settings in c.evals.items()
        if due(settings.get('every', c.eval_every), now)
      ]
      if names or due(c.eval_every, now):
        evaluate(state.params['student'], now, names)
      stops |= any_of(stop.requested)
      wants_to_save |= due(c.checkpoint.every, now) or stops
      wants_to_save |= chosen.is_enough(c.checkpoint, host) or skipped.enough
      if wants_to_save and not texts.ahead:
        wants_to_save = False
        logged.flush()  # What is saved is not logged again.
        skipped.flush()
        checkpoints.save(now, state, host | {'data': batches.get_state()})
      if host['is_best']:  # Only then: an export that fails loses no step.
        chosen.export(run, state.params['student'], host['best'])
      if skipped.enough and not texts.ahead:
        break
      if stops and now < total and not texts.ahead:
        checkpoints.wait()
        raise Interrupted(
          f'stopped and saved at step {now} of {total}; the same command '
          'continues from there'
        )
    checkpoints.wait()
  skipped.check(state)
  rollouts.write(state.params['student'], int(state.step))
  return state


class _Texts:
  """The batches that are trained on, as the run's writer makes them.

  ahead: those of steps to come. They are not saved: a checkpoint waits until
    they are used up, so that they are always written by the same student.
  """

  def __init__(self, run, batches, total):
    self.ahead = []
    self._run = run
    self._batches = batches
    self._total = total
    self._key = keys.of(run.config.seed, 'writer')

  def next(self, params, now):
    """The batch of step `now` and its metrics; `params` are those before."""
    run = self._run
    if not self.ahead:
      n = min(run.writer.every, self._total - now + 1)
      given = [next(self._batches) for _ in range(n)]
      self.ahead = run.writer.write(
        run.models,
        params,
        given,
        run.mesh,
        key=self._key,
        step=now,
        progress=(now - 1) / self._total,
      )
      if run.reader:
        self.ahead = [
          run.reader.read(batch, *found, run.mesh)
          for batch, found in zip(given, self.ahead, strict=True)
        ]
    return self.ahead.pop(0)


class _Log:
  """Metrics to disk and screen, each fetched while the next step runs."""

  def __init__(self, run, start, total):
    self._metrics = None
    if jax.process_index() == 0:
      c = run.config
      made = trackers.make(c.report.trackers, run.workdir, c, start)
      self._metrics = log.Metrics(run.workdir, made, start)
    self._progress = log.Progress(total, start, run.workdir.name)
    self._watch = rollout_log.Watch()
    self._late = None
    self._time = None  # when the last step ended; None: no step to time from

  def __enter__(self):
    self._progress.__enter__()
    return self

  def __exit__(self, *exception):
    self.flush()
    self._progress.__exit__(*exception)
    if self._metrics:
      self._metrics.close()

  def step(self, now, metrics, tokens):
    """Takes the step that was just started, writes the one before."""
    late, self._late = self._late, (now, metrics, tokens)
    if late:
      self._write_step(*late)

  def flush(self):
    """Writes what is still to come; the next step is not timed."""
    if self._late:
      self._write_step(*self._late)
    self._late = self._time = None

  def write(self, now, results):
    if self._metrics:
      self._metrics.write(now, results)

  def _write_step(self, now, metrics, tokens):
    metrics, tokens = jax.device_get((metrics, tokens))
    before, self._time = self._time, time.perf_counter()
    speed = None
    if before is not None:
      seconds = self._time - before
      speed = tokens / seconds
      metrics |= {'seconds': seconds, 'tokens_per_second': speed}
    for line in self._watch.warnings(metrics):
      print(line, flush=True)
    named = {
      f'train/{name}': value
      for name, value in metrics.items()
      if not name.startswith('skipped/') or value
    }
    self.write(now, named)
    self._progress.update(now, loss=metrics['loss'], tokens_per_second=speed)


@contextlib.contextmanager
def _stop_requests():
  """SIGINT and SIGTERM ask the loop to save and stop; a second one kills."""

  class Stop:
    requested = False

  def handle(number, frame):
    del frame
    Stop.requested = True
    signal.signal(number, previous[number])

  signals = (signal.SIGINT, signal.SIGTERM)
  previous = {n: signal.signal(n, handle) for n in signals}
  try:
    yield Stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
