"""The loop of a run: text, step, log, evaluate, save; and how it stops."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax import (
  Interrupted,
  chosen,
  keys,
  log,
  rollout_log,
  skip_log,
  stopping,
  trackers,
  writing,
)
from gakd_jax.evals import evaluator as evaluator_lib


def run(run, state, host, train_step, texts, total, checkpoints):
  """Steps to `total`, or until `host` says that it is enough: the state."""
  c = run.config
  now = int(state.step)
  rollouts = rollout_log.RolloutLog(run, now, total)
  skipped = skip_log.SkipLog(run, total)
  logged = _Log(run, now, total, host['rows'], skipped)
  with stopping.listening(), logged:

    def save():
      if checkpoints.newest == now:
        return
      logged.flush()  # What is saved is not logged again.
      ahead, position = texts.to_save()
      host.update(position, rows=logged.rows)
      checkpoints.save(now, {'train': state, 'ahead': ahead}, host)

    try:
      while True:
        stopping.check()
        params = state.params['student']
        if host['due'] is not None:
          logged.flush()
          found = chosen.evaluate(
            run, params, now, host['due'], run.workdir / chosen.LAST
          )
          logged.write(now, evaluator_lib.curves(found['evaluators']))
          chosen.choose(c.checkpoint, host, found)
          host.update(due=None, rows=logged.rows)
          if checkpoints.newest == now:
            checkpoints.amend(now, host)
          elif host['is_best'] and c.checkpoint.best_metric is not None:
            save()  # best/ is never of a step that a kill would lose.
            checkpoints.wait()
          if host['is_best']:
            chosen.export(run, params, host['best'])
        is_enough = chosen.is_enough(c.checkpoint, host)
        if skipped.enough:
          logged.flush()  # One step more is under way, which may be good.
        if now == total or is_enough or skipped.enough:
          break
        if rollouts.is_due(now):
          logged.flush()  # No step is to count what this takes.
        rollouts.write(params, now)
        batch, about_text = texts.next(params, now + 1)
        now += 1
        size = jnp.count_nonzero(batch.student.segments_BT)
        state, metrics = train_step(state, run.models, batch)
        logged.step(now, metrics | about_text, size, batch.rows_B)
        host.update(is_best=False, due=_due(c, now, total))
        if now == total or _is_due(c.checkpoint.every, now):
          save()
      if is_enough and now < total:
        print(
          f'stopped at step {now} of {total}: {c.checkpoint.best_metric} was '
          f'no better {host["no_better"]} times',
          flush=True,
        )
      save()
      skipped.check(state)
      rollouts.write(state.params['student'], now)
    except stopping.Stopped:
      save()
      checkpoints.wait()
      raise Interrupted(
        f'stopped and saved at step {now} of {total}; the same command '
        'continues from there'
      ) from None
    checkpoints.wait()
  return state


def _due(config, now, total):
  """Names of evaluators that are to measure step `now`; None: nothing is.

  What reads the answers of another (`of`) is due when that one is, too.
  """
  c = config
  due = {
    name: now == total or _is_due(settings.get('every', c.eval_every), now)
    for name, settings in c.evals.items()
  }
  names = [
    name
    for name, settings in c.evals.items()
    if due[name] and due[settings.get('of', name)]
  ]
  return names if names or now == total or _is_due(c.eval_every, now) else None


def _is_due(every, now):
  return every > 0 and now % every == 0


class Texts:
  """The batches that are trained on, as the run's writer makes them.

  What is written ahead, for steps to come, is saved: the student that wrote it
  is gone.
  """

  def __init__(self, run, batches, total):
    self._run = run
    self._batches = batches
    self._total = total
    self._key = keys.of(run.config.seed, 'writer')
    self._ahead = []  # (where it is in the data, batch, metrics)

  def next(self, params, now):
    """The batch of step `now` and its metrics; `params` are those before."""
    if not self._ahead:
      self._ahead = self._write(params, now)
    return self._ahead.pop(0)[1:]

  def _write(self, params, now):
    run = self._run
    places, given = self._read(min(run.writer.every, self._total - now + 1))
    try:
      written = run.writer.write(
        run.models,
        params,
        given,
        run.mesh,
        key=self._key,
        step=now,
        progress=(now - 1) / self._total,
      )
      if run.writer.room:
        stopping.wait([batch for batch, _ in written])
    except stopping.Stopped:
      self._batches.set_state(places[0])
      raise
    if run.reader:
      written = [
        run.reader.read(batch, *found, run.mesh)
        for batch, found in zip(given, written, strict=True)
      ]
    return [(place, *x) for place, x in zip(places, written, strict=True)]

  def _read(self, n):
    """n batches of the data, and where each begins."""
    pairs = [(self._batches.get_state(), next(self._batches)) for _ in range(n)]
    return [list(x) for x in zip(*pairs, strict=True)]

  def to_save(self):
    """The batches ahead, and what the host has to remember: JSON."""
    places, batches, metrics = [], [], []
    for place, batch, found in self._ahead:
      places.append(place)
      batches.append(batch)
      found = {k: float(x) for k, x in jax.device_get(found).items()}
      shapes = [x.shape for x in jax.tree.leaves(batch)]
      is_scored = batch.old_log_BT is not None
      metrics.append({'metrics': found, 'shapes': shapes, 'scored': is_scored})
    place = places[0] if places else self._batches.get_state()
    return batches, {'data': place, 'ahead': metrics}

  def shapes(self, host):
    """Of the batches ahead that a checkpoint has; goes to where they begin."""
    self._batches.set_state(host['data'])
    if not host['ahead']:
      return []
    places, given = self._read(len(host['ahead']))
    self._ahead = [*zip(places, given, host['ahead'], strict=True)]
    found = []
    for batch, about in zip(given, host['ahead'], strict=True):
      if about.get('scored'):
        zeros_BT = np.zeros(batch.student.ids_BT.shape, np.float32)
        batch = batch.replace(old_log_BT=zeros_BT)
      leaves, tree = jax.tree.flatten(
        writing.as_it_is(batch, self._run.mesh, self._run.writer.group)
      )
      leaves = [
        jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)
        for shape, x in zip(about['shapes'], leaves, strict=True)
      ]
      found.append(jax.tree.unflatten(tree, leaves))
    return found

  def restore(self, batches):
    """Has these, of `shapes`, ahead."""
    self._ahead = [
      (place, batch, about['metrics'])
      for (place, _, about), batch in zip(self._ahead, batches, strict=True)
    ]


class _Log:
  """Metrics to disk and screen, each fetched while the next step runs."""

  def __init__(self, run, start, total, rows, skipped):
    self._skipped = skipped
    self._metrics = None
    if jax.process_index() == 0:
      c = run.config
      made = trackers.make(c.report.trackers, run.workdir, c, start)
      self._metrics = log.Metrics(run.workdir, made, rows, start)
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

  @property
  def rows(self):
    """Lines of metrics.jsonl; the first process's, which saves them."""
    return self._metrics.rows if self._metrics else 0

  def step(self, now, *found):
    """Takes the step that was just started, writes the one before.

    found: its metrics, tokens and `Batch.rows_B`.
    """
    late, self._late = self._late, (now, *found)
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

  def _write_step(self, now, metrics, tokens, rows_B):
    metrics, tokens = jax.device_get((metrics, tokens))
    before, self._time = self._time, time.perf_counter()
    speed = None
    if before is not None:
      seconds = self._time - before
      speed = tokens / seconds
      metrics |= {'seconds': seconds, 'tokens_per_second': speed}
    self._skipped.look(now, metrics, rows_B)
    for line in self._watch.warnings(metrics):
      print(line, flush=True)
    named = {
      f'train/{name}': value
      for name, value in metrics.items()
      if not name.startswith('skipped/') or value
    }
    self.write(now, named)
    self._progress.update(now, loss=metrics['loss'], tokens_per_second=speed)
