"""The evaluation binary.

  python -m gakd_jax.evaluate --config=configs/eval_instruct.py \\
    --model=DIR[,DIR...] --workdir=runs/eval

Models are Hugging Face directories, hub ids, adapters, or directories of
finished runs; `--config.teacher.path` adds the one that they should behave
like. Each is measured by all evaluators of the config, then all are compared:
<workdir>/<model>/results.json and answers/, comparisons.json, report.html.

Run again, the same command goes on with the answers that are missing,
and a model that is added to it joins those that are measured.
"""

import functools
import itertools
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
  fields,
  fingerprint,
  hosts,
  log,
  models,
  page,
  rundir,
  sharding,
)
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import answers, loss
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.evals import statistics as statistics_lib
from gakd_jax.models import pair
from gakd_jax.page import tables

_CONFIG = binary.config_flag('What is measured.')
_MODEL = flags.DEFINE_list('model', None, 'Directories, runs or hub ids.')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where it all goes; default: runs/<name of the config>.'
)
_FORCE = binary.force_flag()
flags.adopt_module_key_flags(binary)  # So that --help shows them.


def run(config, paths, workdir, force=False):
  """Measures models, compares them; returns {model: its results}.

  Args:
    config: see configs/base.py; what is about training alone is not read.
    paths: of the models, see above.
    workdir: a directory.
    force: measure again what was begun with other settings, rows or weights,
      see `fingerprint`.

  Raises:
    UserError: for anything wrong with config, data or models, in one line.
  """
  fields.check(config)
  workdir = Path(workdir)
  with fingerprint.lock(workdir):
    return _run(config, paths, workdir, force)


def _run(config, paths, workdir, force):
  teacher = config.teacher.path
  named = _named([teacher, *paths] if teacher else paths)

  @functools.cache
  def prompters():
    """{model: (template, tokenizer)}."""
    found = {}
    for name, path in named.items():
      shape = models.read_config(path)
      tokenizer = tokenizer_lib.load(models.tokenizer_dir(path))
      build.check_readable(path, tokenizer, config.data.max_length, shape)
      found[name] = best.template_of(path, config.data.template), tokenizer
    return found

  # What can be wrong of config, data and tokenizers comes up before any weight
  # is loaded.
  evaluators = evaluator_lib.make(
    config.evals,
    config.data.validation,
    lambda: prompters().values(),
    config.data.on_bad_row,
    config.data.thinking,
  )
  if not evaluators:
    raise UserError('config.evals is empty: there is nothing to measure')
  mesh = sharding.make_mesh(**config.mesh)
  runs = {name: workdir / name for name in named}
  contents = evaluator_lib.contents(evaluators)
  if teacher:
    t_path, out = next(zip(named.values(), runs.values(), strict=True))
    contents['config.teacher'] = models.identity(t_path)

    def load():
      settings = config.teacher.dtype, mesh, None, config.teacher.quantize
      return models.load(t_path, *settings)

    reads = any(x.teacher_reads_student_ids for x in evaluators.values())
    if reads:
      load = functools.cache(load)  # Once, for all students.
      (_, t_tokenizer), *_ = prompters().values()
      for name, (_, tokenizer) in prompters().items():
        tokenizer_lib.check_same(tokenizer, t_tokenizer, named[name], t_path)
    teacher = out, load, reads
  results = {}
  with jax.set_mesh(mesh):
    for name, path in named.items():
      results[name] = _measure(
        config,
        evaluators,
        contents,
        path,
        runs[name],
        prompters()[name],
        teacher,
        mesh,
        force,
      )
  hosts.only_first(lambda: _write_report(config, evaluators, workdir, runs))
  return results


def _write_report(config, evaluators, workdir, runs):
  comparisons = compare(evaluators, runs)
  text = log.to_json(comparisons, indent=2) + '\n'
  log.write_atomically(workdir / 'comparisons.json', text)
  page.write(
    workdir / 'report.html',
    runs,
    answers=config.report.answers,
    comparisons=comparisons,
  )
  tables.write(workdir, runs)


def _named(paths):
  """{name: model directory}, named by as much of its path as it takes."""
  found = {}
  for path in paths:
    if not str(path).strip():
      raise UserError('--model: an empty name; leave out the comma')
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


def _measure(
  config, evaluators, contents, path, workdir, prompter, teacher, mesh, force
):
  """The results of one model; those that are there are taken.

  `contents` tell rows and teacher from others, see `fingerprint.begin`.
  `prompter` is the model's (template, tokenizer). `teacher` is where
  its results go, what loads it, and whether students are measured by it; or
  None.
  """
  identity = models.identity(path)
  fingerprint.begin(
    workdir,
    force,
    config=fingerprint.as_json(config),
    contents={'--model': identity} | contents,
    models={'student': {'path': str(path)}},
  )
  found = hosts.of_first(
    lambda: rundir.is_finished(workdir) and rundir.read_results(workdir)
  )
  if found:
    print(f'{workdir.name}: has been measured', flush=True)
    return found
  subject, params = _subject(
    config, path, workdir, prompter, teacher, mesh, identity, force
  )
  about = dict.fromkeys(('step', 'recipe', 'seed')) | best.read(path)
  found = {
    'step': about['step'],
    'evaluators': {
      name: evaluator_lib.measure(evaluator, subject, params, 0)
      for name, evaluator in evaluators.items()
    },
  }
  results = about | {
    'template': prompter[0],
    'is_teacher': teacher is not None and workdir == teacher[0],
    'averages': {k: [*x] for k, x in config.report.averages.items()},
    'best': found,
    'last': found,
  }
  return hosts.of_first(lambda: _finish(workdir, results))


def _finish(workdir, results):
  rundir.finish(workdir, results)
  for file in (workdir / 'answers').glob('*.partial'):
    file.unlink()
  return rundir.read_results(workdir)


def _subject(config, path, workdir, prompter, teacher, mesh, identity, force):
  """A model as evaluators see it, and its parameters."""
  template, tokenizer = prompter
  dtype = config.train.precision
  t_workdir, load_teacher, reads = teacher or (None, None, False)
  is_teacher = workdir == t_workdir
  t_model = None
  if is_teacher or reads:
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
    head_chunk=build.head_chunk(
      config.train, [x for x in both.configs if x], mesh
    ),
    mesh=mesh,
    workdir=workdir,
    identity=identity,
    teacher_workdir=t_workdir,
    force=force,
  )
  return subject, params


def compare(evaluators, runs):
  """Each model against those before it, on the same rows.

  Args:
    evaluators: {name: evaluator}; those that score answers are compared by the
      first of their scores, others by the losses of the data's text.
    runs: {model: directory with results.json and answers/}.

  Returns:
    A dict for each: 'set', 'metric', 'a', 'b', and what
    `statistics.paired_bootstrap` says of scores that are means over seeds.
  """
  return [
    {'set': name, 'metric': metric, 'a': a, 'b': b}
    | statistics_lib.paired_bootstrap(of_rows[a], of_rows[b])
    for name, evaluator in evaluators.items()
    for metric, of_rows in _compared(name, evaluator, runs).items()
    for b, a in itertools.combinations(runs, 2)
  ]


def _compared(name, evaluator, runs):
  """{metric: {model: what each row has}}."""
  if hasattr(evaluator, 'scores'):
    metric, *_ = evaluator.scores
    of_rows = {
      m: _row_means(path, evaluator, metric) for m, path in runs.items()
    }
    return {metric: of_rows}
  metrics = {
    model: rundir.read_results(path)['best']['evaluators'][name]['metrics']
    for model, path in runs.items()
  }
  return {
    metric: {model: x[metric]['by_row'] for model, x in metrics.items()}
    for loss_name in loss.LOSSES
    for metric in (loss_name, f'{loss_name}_gold')
    if all('by_row' in x.get(metric, ()) for x in metrics.values())
  }


def _row_means(workdir, evaluator, metric):
  """The score of each row, mean over seeds."""
  by_seed = [
    [_score(line, metric, workdir) for line in lines]
    for lines in (
      answers.read(workdir, evaluator, seed) for seed in evaluator.seeds
    )
  ]
  return [statistics.fmean(row) for row in zip(*by_seed, strict=True)]


def _score(line, metric, workdir):
  score = line.get('scores', {}).get(metric)
  if score is None:
    raise UserError(
      f'{workdir}/answers: one has no {metric}; move {workdir} away'
    )
  return score


def _main(argv):
  if len(argv) > 1:
    raise UserError(f'unknown argument {argv[1]!r}; flags look like --name=x')
  if _CONFIG.value is None:
    raise UserError('--config is missing; try configs/eval_instruct.py')
  if not _MODEL.value:
    raise UserError('--model is missing: name one or several directories')
  binary.use_compilation_cache()
  binary.start_hosts()
  workdir = _WORKDIR.value or binary.default_workdir()
  run(_CONFIG.value, _MODEL.value, workdir, _FORCE.value)


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
