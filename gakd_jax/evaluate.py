"""The evaluation binary.

  python -m gakd_jax.evaluate --config=configs/eval_instruct.py \\
    --model=DIR[,DIR...] --workdir=runs/eval

Models are Hugging Face directories, hub ids, adapters, or directories of
finished runs; `--config.teacher.path` adds the one that they should behave
like. Each is measured by all evaluators of the config, then all are compared:
<workdir>/<model>/results.json and answers/, comparisons.json, report.html.

Run again, the same command goes on with the batch of answers where it stopped,
and a model that is added to it joins those that are measured.
"""

import functools
import itertools
import json
import statistics
import sys
from pathlib import Path

import jax
from absl import flags

from gakd_jax import (
  UserError,
  best,
  binary,
  build,
  fingerprint,
  models,
  report,
  rundir,
  sharding,
  summary,
  tables,
)
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import answers, tasks
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.evals import statistics as statistics_lib
from gakd_jax.models import pair

_CONFIG = binary.config_flag('What is measured.')
_MODEL = flags.DEFINE_list('model', None, 'Directories, runs or hub ids.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where it all goes; default: runs/<name of the config>.'
)


def run(config, paths, workdir):
  """Measures models, compares them; returns {model: {metric: value}}.

  Args:
    config: see configs/base.py; what is about training alone is not read.
    paths: of the models, see above.
    workdir: a directory.

  Raises:
    UserError: for anything wrong with config, data or models, in one line.
  """
  workdir = Path(workdir)
  with fingerprint.lock(workdir):
    return _run(config, paths, workdir)


def _run(config, paths, workdir):
  teacher = config.teacher.path
  named = _named([teacher, *paths] if teacher else paths)

  @functools.cache
  def prompters():
    """{model: (template, tokenizer)}."""
    for path in named.values():
      models.read_config(path)
    return {
      name: (
        best.template_of(path, config.data.template),
        tokenizer_lib.load(models.tokenizer_dir(path)),
      )
      for name, path in named.items()
    }

  # What can be wrong comes up before any weight is loaded.
  evaluators = evaluator_lib.make(
    config.evals,
    config.data.validation,
    lambda: prompters().values(),
    config.data.on_bad_row,
  )
  if not evaluators:
    raise UserError('config.evals is empty: there is nothing to measure')
  fingerprint.record(config, workdir)
  mesh = sharding.make_mesh(**config.mesh)
  runs = {name: workdir / name for name in named}
  if teacher:
    t_path, out = next(zip(named.values(), runs.values(), strict=True))

    def load():
      settings = config.teacher.dtype, mesh, None, config.teacher.quantize
      return models.load(t_path, *settings)

    reads = any(x.teacher_reads_student_ids for x in evaluators.values())
    if reads:
      load = functools.cache(load)  # Once, for all students.
    teacher = t_path, out, load, reads
  results = {}
  with jax.set_mesh(mesh):
    for name, path in named.items():
      results[name] = _measure(
        config, evaluators, path, runs[name], prompters()[name], teacher, mesh
      )
  comparisons = compare(evaluators, runs)
  if jax.process_index() == 0:
    text = report.to_json(comparisons, indent=2) + '\n'
    report.write_atomically(workdir / 'comparisons.json', text)
    summary.write(
      workdir / 'report.html',
      runs,
      answers=config.report.answers,
      comparisons=comparisons,
    )
    tables.write(workdir, runs)
  return results


def _named(paths):
  """{name: model directory}, named by as much of its path as it takes."""
  found = {}
  for path in paths:
    given = Path(path).expanduser()
    if not given.is_dir():  # A hub id.
      found[str(path).strip('/')] = path
      continue
    given = given.absolute()
    if given.name == 'best':  # Named as its run is.
      found[str(given.parent)] = given
    elif (given / 'best').is_dir():
      found[str(given)] = given / 'best'
    elif (given / 'config.json').exists() or _is_adapter(given):
      found[str(given)] = given
    else:
      runs = sorted(x.parent.name for x in given.glob('*/best'))
      hint = f'; its runs are {", ".join(runs)}' if runs else ''
      raise UserError(
        f'--model: {path} is neither a model nor a finished run{hint}'
      )
  parts = [[x for x in path.split('/') if x] for path in found]
  for n in range(1, 1 + max(map(len, parts))):
    names = ['-'.join(p[-n:]) for p in parts]
    if len(set(names)) == len(names):
      return dict(zip(names, found.values(), strict=True))
  raise UserError(f'--model: cannot tell {", ".join(found)} apart by name')


def _is_adapter(path):
  return (path / 'adapter_config.json').exists()


def _measure(config, evaluators, path, workdir, prompter, teacher, mesh):
  """The results of one model; those that are there are taken.

  `prompter` is the model's (template, tokenizer). `teacher` is its path, where
  its results go, what loads it, and whether students are measured by it; or
  None.
  """
  identity, data = models.identity(path), evaluator_lib.contents(evaluators)
  scored_by = {
    name: f'{evaluator.task}, version {tasks.get(evaluator.task).version}'
    for name, evaluator in evaluators.items()
    if hasattr(evaluator, 'task')
  }
  record = workdir / 'model.json'
  known = json.loads(record.read_text()) if record.exists() else None
  if known and known['identity'] != identity:
    raise UserError(
      f'{workdir} has the answers of other weights ({known["path"]}); delete '
      'it, or use another --workdir'
    )
  if known and known['data'] != data:
    raise UserError(
      f'{workdir} has the answers to other test rows: the data has changed, '
      'or which of its rows the template of each model can hold; use another '
      '--workdir'
    )
  if known and known.get('tasks', scored_by) != scored_by:
    raise UserError(
      f'{workdir} was scored by other rules ({known["tasks"]}; they are '
      f'{scored_by} now); use another --workdir'
    )
  if rundir.is_finished(workdir):
    print(f'{workdir.name}: has been measured', flush=True)
    return rundir.read_results(workdir)
  if jax.process_index() == 0:
    about = {'path': str(path), 'identity': identity, 'data': data}
    about['is_teacher'] = teacher is not None and workdir == teacher[1]
    about |= best.read(path)
    about |= {'template': prompter[0], 'tasks': scored_by}
    report.write_atomically(record, json.dumps(about, indent=2) + '\n')
  subject, params = _subject(
    config, path, workdir, prompter, teacher, mesh, identity
  )
  results = {}
  for evaluator in evaluators.values():
    results |= evaluator_lib.measure(evaluator, subject, params, 0)
    if hasattr(evaluator, 'task'):
      version = tasks.get(evaluator.task).version
      results |= {f'{evaluator.name}/task_version': version}
  if jax.process_index() == 0:
    rundir.finish(workdir, results)
    for file in (workdir / 'answers').glob('*.partial'):
      file.unlink()
  return results


def _subject(config, path, workdir, prompter, teacher, mesh, identity):
  """A model as evaluators see it, and its parameters."""
  template, tokenizer = prompter
  dtype = config.train.precision
  t_path, t_workdir, load_teacher, reads = teacher or (None, None, None, False)
  is_teacher = workdir == t_workdir
  t_model = None
  if is_teacher or reads:
    tokenizer_lib.check_same(
      tokenizer,
      tokenizer_lib.load(models.tokenizer_dir(t_path)),
      path,
      t_path,
    )
    t_model = load_teacher()
  # A teacher is measured against itself.
  model = t_model if is_teacher else models.load(path, dtype, mesh)
  both, params = pair.make(
    model,
    t_model,
    dtype=dtype,
    attention=config.attention,
    packed=False,
    tokenizers=(tokenizer, tokenizer),
  )
  subject = evaluator_lib.Subject(
    models=both,
    template=template,
    thinking=config.data.thinking,
    max_length=config.data.max_length,
    max_prompt_length=config.data.max_prompt_length,
    head_chunk=config.train.head_chunk,
    mesh=mesh,
    workdir=workdir,
    identity=identity,
    teacher_workdir=t_workdir,
  )
  return subject, params


def compare(evaluators, runs):
  """Each model against those before it, on the same rows.

  Args:
    evaluators: {name: evaluator}; those that score answers are compared, by
      the first metric of their task.
    runs: {model: directory with answers/}.

  Returns:
    A dict for each: 'set', 'metric', 'a', 'b', and what
    `statistics.paired_bootstrap` says of scores that are means over seeds.
  """
  comparisons = []
  for name, evaluator in evaluators.items():
    if not hasattr(evaluator, 'task'):
      continue
    metric = tasks.TASKS[evaluator.task].scores[0]
    scores = {
      model: _row_means(path, name, evaluator.seeds, metric)
      for model, path in runs.items()
    }
    for b, a in itertools.combinations(runs, 2):
      comparisons.append(
        {'set': name, 'metric': metric, 'a': a, 'b': b}
        | statistics_lib.paired_bootstrap(scores[a], scores[b])
      )
  return comparisons


def _row_means(workdir, name, seeds, metric):
  """The score of each row, mean over seeds."""
  by_seed = [
    [line['scores'][metric] for line in answers.read(workdir, name, seed)]
    for seed in seeds
  ]
  return [statistics.fmean(row) for row in zip(*by_seed, strict=True)]


def _main(argv):
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags look like --name=x')
  if _CONFIG.value is None:
    raise UserError('--config is missing; try configs/eval_instruct.py')
  build.check_settings(_CONFIG.value)
  if not _MODEL.value:
    raise UserError('--model is missing: name one or several directories')
  binary.use_compilation_cache()
  run(_CONFIG.value, _MODEL.value, _WORKDIR.value or binary.default_workdir())


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
