"""Training, from a config to results: restore, loop, export, report.

`run` is one run in one directory; called again after an interruption, it
continues from the last checkpoint, bit for bit. `run_stages` is a sequence of
runs that build on each other.
"""

import contextlib
import re
import resource
from pathlib import Path

import jax

from gakd_jax import (
  UserError,
  best,
  build,
  chosen,
  fingerprint,
  hosts,
  inputs,
  loop,
  models,
  page,
  rundir,
  sharding,
)
from gakd_jax import checkpoint as checkpoint_lib
from gakd_jax import training as training_lib
from gakd_jax.data import sources
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.models import gguf_files, hub


def run_stages(config, workdir, force=False, strict_resume=False):
  """Runs `config.stages` in order, then compares them in report.html."""
  workdir = Path(workdir)
  for name, stage in config.stages:
    print(f'== {name}', flush=True)
    run(stage, workdir / name, workdir, force, strict_resume)
    # A stage's programs map some two thousand areas of memory, of which Linux
    # gives a process 65530. What the next one shares is on disk (`binary`).
    jax.clear_caches()
  runs = {name: workdir / name for name, _ in config.stages}
  hosts.only_first(
    lambda: page.write(
      workdir / 'report.html', runs, answers=config.report.answers
    )
  )


def run(config, workdir, root=None, force=False, strict_resume=False):
  """One run: trains, evaluates and exports; returns its final results.

  Args:
    config: see configs/base.py.
    workdir: the run's directory.
    root: where the stages lie that the config names; None: it names none.
    force: go on in a directory that was begun with other settings or contents,
      see `fingerprint`.
    strict_resume: refuse to go on from another checkpoint than the newest.

  Raises:
    UserError: for anything wrong with config, data or models, in one line.
    Interrupted: after SIGINT or SIGTERM, when the state is saved.
  """
  workdir = Path(workdir)
  if config.student.path is None:
    raise UserError('config.student.path is not set: name a model directory')
  with fingerprint.lock(workdir), fingerprint.unless_refused(workdir):
    return _run(config, workdir, root or workdir, force, strict_resume)


def _run(config, workdir, root, force, strict_resume):
  _forget_peak_memory()
  fingerprint.begin(workdir, force, config=fingerprint.as_json(config))
  found = hosts.of_first(lambda: _finished(config, workdir, root, force))
  if found:
    return found
  answers = hosts.of_first(lambda: _answers_of_stages(config, root))
  config = hosts.of_first(lambda: rundir.resolve_stages(config, root))
  config.data.template = best.template_of(
    config.student.path, config.data.template
  )
  if config.teacher.path:  # Says if it was trained with another.
    best.template_of(config.teacher.path, config.data.template)
  mesh = sharding.make_mesh(**config.mesh)
  with jax.set_mesh(mesh):
    current = build.build(config, workdir, mesh, force)
    contents = _contents(current) | answers
    fingerprint.begin(
      workdir, force, contents=contents, models=_origins(config)
    )
    evaluates_only = config.train.steps == 0
    if evaluates_only:
      found = _evaluate_only(current)
    else:
      found = _train(current, strict_resume)
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


def _finished(config, workdir, root, force):
  """The results of a run that has finished; else None."""
  if not rundir.is_finished(workdir):
    return None
  began, now = rundir.read_contents(workdir), _answers_of_stages(config, root)
  for key, path in _models(config).items():
    if stage := rundir.finished_stage(root, path):
      path = stage / 'best'
    if hub.directory(path) or gguf_files.is_one(path):
      with contextlib.suppress(UserError):  # What is no model any more.
        now[key] = models.identity(path)
  now = {key: now[key] for key in now.keys() & began.keys()}
  began = {key: began[key] for key in now}
  if fingerprint.check(f'{workdir}: contents', began, now, force):
    (workdir / 'results.json').unlink()
    return None
  if not (workdir / 'report.html').exists():  # It was stopped just there.
    _write_report(config, workdir)
  print(f'{workdir} has finished; its report is {workdir}/report.html')
  return rundir.read_results(workdir)


def _answers_of_stages(config, root):
  """{'stage:<name>' of the data, if it has finished: its answers' contents}."""
  found = {}
  for spec in sources.parts(config.data.train) if config.data.train else ():
    if stage := rundir.finished_stage(root, spec):
      (found[spec],) = sources.identity(stage / 'answers.jsonl')
  return found


def _finish(config, workdir, results):
  rundir.finish(workdir, results)
  _write_report(config, workdir)
  return rundir.read_results(workdir)


def _is_teacher(config, contents):
  """Whether the student, as it is, is its own teacher."""
  student, teacher = contents['config.student'], contents.get('config.teacher')
  is_whole = config.student.shape is None and config.student.keep is None
  return student == teacher and is_whole


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
  contents = {k: models.identity(p) for k, p in _models(run.config).items()}
  if run.texts is not None:
    contents['config.data.train'] = run.texts.digest
  return contents | evaluator_lib.contents(run.evaluators)


def _models(config):
  """{setting: the path of a model} of those that are named."""
  c = config
  paths = {
    'config.student': c.student.path,
    'config.teacher': c.teacher.path,
    'config.critic': c.critic.init_from,
  }
  return {name: path for name, path in paths.items() if path}


def _evaluate_only(run):
  """A run of no steps: the student as it is, and the teacher's answers."""
  if run.writer.makes_rows:
    inputs.teacher_answers(run)
  params = run.start()
  found = chosen.evaluate(run, params, 0, run.evaluators, run.workdir)
  chosen.export(run, params, found)
  return {'best': found, 'last': found}


def _train(run, strict_resume):
  c = run.config
  batches = inputs.training_batches(run)
  total = inputs.total_steps(c, batches)
  training = training_lib.make(run, batches.steps_per_epoch, total)
  checkpoints = checkpoint_lib.Checkpoints(
    run.workdir / 'checkpoints',
    c.checkpoint.keep,
    c.checkpoint.keep_every,
    strict_resume,
  )
  texts = loop.Texts(run, batches, total)

  def shapes(host):
    return {'train': training.state, 'ahead': texts.shapes(host)}

  with contextlib.closing(checkpoints):
    found = checkpoints.restore(shapes)
    if found is None:
      state = training.init()
      host = chosen.start([*run.evaluators] if c.eval_first else None)
    else:
      restored, host = found
      state = restored['train']
      texts.restore(restored['ahead'])
      if int(state.step) > total:
        raise UserError(
          f'{run.workdir}: stands at step {int(state.step)}, and the run is to '
          f'have {total}; ask for more, or use another --workdir'
        )
      print(f'continuing from step {int(state.step)}', flush=True)
      if host['is_best']:  # The export may be what was interrupted.
        chosen.export(run, state.params['student'], host['best'])
    state = loop.run(run, state, host, training.step, texts, total, checkpoints)
  return chosen.of_best(run, state, host)


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
