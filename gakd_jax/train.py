"""Training: restore, loop, log, evaluate, save.

`run` is one run in one directory; called again after an interruption, it
continues from the last checkpoint, bit for bit. `run_stages` is a sequence of
runs that build on each other.
"""

import contextlib
import re
import resource
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gakd_jax import (
  Interrupted,
  UserError,
  best,
  build,
  chosen,
  fingerprint,
  hosts,
  inputs,
  keys,
  log,
  models,
  page,
  rollout_log,
  rundir,
  sharding,
  trackers,
)
from gakd_jax import checkpoint as checkpoint_lib
from gakd_jax import training as training_lib
from gakd_jax.evals import evaluator as evaluator_lib


def run_stages(config, workdir, force=False):
  """Runs `config.stages` in order, then compares them in report.html."""
  workdir = Path(workdir)
  for name, stage in config.stages:
    print(f'== {name}', flush=True)
    run(stage, workdir / name, root=workdir, force=force)
  runs = {name: workdir / name for name, _ in config.stages}
  hosts.only_first(
    lambda: page.write(
      workdir / 'report.html', runs, answers=config.report.answers
    )
  )


def run(config, workdir, root=None, force=False):
  """One run: trains, evaluates and exports; returns its final results.

  Args:
    config: see configs/base.py.
    workdir: the run's directory.
    root: where the stages lie that the config names; None: it names none.
    force: go on in a directory that was begun with other settings or contents,
      see `fingerprint`.

  Raises:
    UserError: for anything wrong with config, data or models, in one line.
    Interrupted: after SIGINT or SIGTERM, when the state is saved.
  """
  workdir = Path(workdir)
  if config.student.path is None:
    raise UserError('config.student.path is not set: name a model directory')
  with fingerprint.lock(workdir):
    return _run(config, workdir, root or workdir, force)


def _run(config, workdir, root, force):
  _forget_peak_memory()
  fingerprint.begin(workdir, force, config=fingerprint.as_json(config))
  found = hosts.of_first(lambda: _finished(config, workdir))
  if found:
    return found
  config = hosts.of_first(lambda: rundir.resolve_stages(config, root))
  config.data.template = best.template_of(
    config.student.path, config.data.template
  )
  if config.teacher.path:  # Says if it was trained with another.
    best.template_of(config.teacher.path, config.data.template)
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    current = build.build(config, workdir, mesh, force)
    contents = _contents(current)
    fingerprint.begin(
      workdir, force, contents=contents, models=_origins(config)
    )
    evaluates_only = config.train.steps == 0
    found = (_evaluate_only if evaluates_only else _train)(current)
  results = {
    'step': found['last']['step'],
    **best.recipe(config),
    'template': config.data.template,
    'is_teacher': evaluates_only and _is_teacher(config, contents),
    'averages': {k: [*x] for k, x in config.report.averages.items()},
    'peak_memory_gb': _peak_memory_gb(),
    **found,
  }
  return hosts.of_first(lambda: _finish(config, workdir, results))


def _finished(config, workdir):
  """The results of a run that has finished; else None."""
  if not rundir.is_finished(workdir):
    return None
  if not (workdir / 'report.html').exists():  # It was stopped just there.
    _write_report(config, workdir)
  print(f'{workdir} has finished; its report is {workdir}/report.html')
  return rundir.read_results(workdir)


def _finish(config, workdir, results):
  rundir.finish(workdir, results)
  _write_report(config, workdir)
  return rundir.read_results(workdir)


def _is_teacher(config, contents):
  """Whether the student, as it is, is its own teacher."""
  student, teacher = contents['config.student'], contents.get('config.teacher')
  return student == teacher and config.student.shape is None


def _write_report(config, workdir):
  runs = {workdir.name: workdir}
  page.write(workdir / 'report.html', runs, answers=config.report.answers)


def _origins(config):
  """{'student': ...}: the paths of a run's models, and commits of the hub."""
  return {
    name: {'path': str(path), 'revision': models.revision(path)}
    for name, path in (
      ('student', config.student.path),
      ('teacher', config.teacher.path),
    )
    if path
  }


def _contents(run):
  """What the files of a run hold; see `fingerprint.begin`."""
  c = run.config
  paths = {
    'config.student': c.student.path,
    'config.teacher': c.teacher.path,
    'config.critic': c.critic.init_from,
  }
  contents = {name: models.identity(p) for name, p in paths.items() if p}
  if run.texts is not None:
    contents['config.data.train'] = run.texts.digest
  return contents | evaluator_lib.contents(run.evaluators)


def _evaluate_only(run):
  """A run of no steps: the student as it is, and the teacher's answers."""
  if run.writer.makes_rows:
    inputs.teacher_answers(run)
  params = run.start()
  found = chosen.evaluate(run, params, 0, run.evaluators, run.workdir)
  chosen.export(run, params, found)
  return {'best': found, 'last': found}


def _train(run):
  c = run.config
  batches = inputs.training_batches(run)
  total = inputs.total_steps(c, batches)
  training = training_lib.make(run, batches.steps_per_epoch, total)
  checkpoints = checkpoint_lib.Checkpoints(
    run.workdir / 'checkpoints', c.checkpoint.keep
  )
  host = chosen.start()
  with contextlib.closing(checkpoints):
    if checkpoints.latest_step() is None:
      state = training.init()
    else:
      state, host = checkpoints.restore(training.state)
      batches.set_state(host['data'])
      print(f'continuing from step {int(state.step)}', flush=True)
      if host['is_best']:  # The export may be what was interrupted.
        chosen.export(run, state.params['student'], host['best'])
    state = _loop(run, state, host, training.step, batches, total, checkpoints)
  return chosen.of_best(run, state, host)


def _loop(run, state, host, train_step, batches, total, checkpoints):
  """Steps to `total`, or until `host` says that it is enough: the state."""
  c = run.config
  start = int(state.step)
  rollouts = rollout_log.RolloutLog(run, start, total)
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
      wants_to_save |= chosen.is_enough(c.checkpoint, host)
      if wants_to_save and not texts.ahead:
        wants_to_save = False
        logged.flush()  # What is saved is not logged again.
        checkpoints.save(now, state, host | {'data': batches.get_state()})
      if host['is_best']:  # Only then: an export that fails loses no step.
        chosen.export(run, state.params['student'], host['best'])
      if stops and now < total and not texts.ahead:
        checkpoints.wait()
        raise Interrupted(
          f'stopped and saved at step {now} of {total}; the same command '
          'continues from there'
        )
    checkpoints.wait()
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
    named = {f'train/{name}': value for name, value in metrics.items()}
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


def _forget_peak_memory():
  """Of the stages before; where the system cannot, the peak is that of all."""
  with contextlib.suppress(OSError):
    Path('/proc/self/clear_refs').write_text('5')


def _peak_memory_gb():
  """Of the first device; of the process where the backend does not tell."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'] / 1e9
  with contextlib.suppress(OSError):
    peak = re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())
    return int(peak[1]) * 1024 / 1e9
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
