"""What best/ holds: which step of a run is exported, and what is known of it.

`host` is what a checkpoint keeps of that, beside the state.
"""

import functools
import math

import jax
from flax import nnx

from gakd_jax import best, hosts, models, results
from gakd_jax.evals import answers
from gakd_jax.evals import evaluator as evaluator_lib
from gakd_jax.models import lora, transformer

LAST = 'last'  # <workdir>/last/answers are of the last evaluation


def start(due):
  """The `host` of a run that begins.

  due: names of evaluators that are to measure the student as it is; None: none.
  """
  return {
    'rows': 0,  # lines that were logged
    'due': due,  # evaluators that have not yet measured this state, or None
    'best': None,  # the evaluation that best/ is of
    'is_best': False,  # whether it is of this state
    'no_better': 0,  # evaluations since
    'last': None,
  }


def evaluate(run, params, step, names, workdir):
  """{'step', 'evaluators'} of the evaluators of these names.

  workdir: where the answers go.
  """
  found = {}
  for name, evaluator in run.evaluators.items():
    if name in names:
      subject = run.subject_of(evaluator, workdir)
      found[name] = evaluator_lib.measure(evaluator, subject, params, step)
  # What is chosen by it, all choose alike.
  return hosts.of_first(lambda: {'step': step, 'evaluators': found})


def choose(config, host, found):
  """Notes an evaluation in `host`, and whether it is the best."""
  host['last'] = found
  if config.best_metric is None:
    host['best'], host['is_best'] = found, True
    return
  name, _, metric = config.best_metric.rpartition('/')
  if name not in found['evaluators']:
    return  # It is not measured at every evaluation.
  measured = found['evaluators'][name]['metrics'].get(metric, {})
  value = measured.get('mean', math.nan)
  best_value = host['best'] and host['best']['value']
  host['is_best'] = results.is_better(metric, value, best_value)
  host['no_better'] = 0 if host['is_best'] else host['no_better'] + 1
  if host['is_best']:
    host['best'] = found | {'metric': config.best_metric, 'value': value}


def is_enough(config, host):
  return config.patience is not None and host['no_better'] >= config.patience


def export(run, params, found):
  """The student as a Hugging Face directory, best/: its adapters, if any.

  `found` is what was measured of it; answers/ are of the same step.
  """
  answers.keep(run.workdir / LAST, run.workdir, found['step'])
  params = run.models.whole(params)
  if run.config.student.lora is None:  # Adapters are fp32, as PEFT has them.
    dtype = run.config.student.dtype
    params = jax.tree.map(lambda x: x.astype(dtype), params)
  student = nnx.merge(run.models.student_definition, params)
  metric = (found['metric'], found['value']) if 'metric' in found else None
  models.save(
    student,
    run.workdir / 'best',
    describe=functools.partial(
      best.describe, config=run.config, step=found['step'], metric=metric
    ),
  )


def of_best(run, state, host):
  """{'best', 'last'} of results.json: all evaluators of what was exported."""
  found = host['best']
  if found is None:
    print(
      f'{run.config.checkpoint.best_metric} was never a number; best/ is the '
      'last step',
      flush=True,
    )
    found = host['last']
    export(run, state.params['student'], found)
  others = [x for x in run.evaluators if x not in found['evaluators']]
  if others:
    params = _exported(run)
    more = evaluate(run, params, found['step'], others, run.workdir)
    measured = found['evaluators'] | more['evaluators']
    found = found | {'evaluators': {x: measured[x] for x in run.evaluators}}
  return {'best': found, 'last': host['last']}


def _exported(run):
  """The parameters that are trained, as they were exported to best/."""
  config = run.config.student
  settings = {'dtype': 'float32'}
  if config.lora is not None:
    settings = {'dtype': config.dtype, 'quantize': config.quantize}
  model = models.load(run.workdir / 'best', mesh=run.mesh, **settings)
  _, params = transformer.split(model)
  return lora.partition(params)[0] if lora.adapters(model) else params
