"""A run looked at before it starts: settings, data, sizes, the first batch.

  python -m gakd_jax.main --config=configs/quickstart.py --check

It is built as it would be, and refused as it would be, with shapes in the place
of weights. Nothing is written.
"""

import dataclasses
import itertools
import textwrap
from pathlib import Path

import jax

from gakd_jax import (
  UserError,
  best,
  build,
  fingerprint,
  inputs,
  objectives,
  plan,
  rollout,
  rundir,
  sharding,
)
from gakd_jax import training as training_lib
from gakd_jax.data import sources
from gakd_jax.evals import evaluator as evaluator_lib

_WIDTH = 80
_ROWS = 4  # that are shown of the first batch
_LINES = 12  # that are shown of a text, half of them from its end
# Of objectives, writers and evaluators: fields that no config sets there.
_NO_SETTINGS = ('name', 'head_chunk', 'critic', 'ends', 'rows', 'about')


def run(config, workdir, defaults=None, force=False):
  """Prints what a run, or each of its stages, is made of and would read.

  Args:
    config: see configs/base.py.
    workdir: the run's directory, which need not be there.
    defaults: the config in which nothing is set, to mark what is; or None.
    force: go on with a run of other settings, see `fingerprint.check`.

  Raises:
    UserError: for what the run would refuse.
  """
  workdir = Path(workdir)
  before, stages = {}, {}
  for name, given in config.stages or [('', config)]:
    if name:
      print(f'\n== {name}')
    here = workdir / name
    began = {'config': fingerprint.as_json(given)}
    record, has_changed = fingerprint.compare(here, force, **began)
    if rundir.is_finished(here) and not has_changed:
      print(f'{here} has finished')
    elif record:
      print(f'{here} was begun, and goes on')
    stage, missing, unread = _resolved(given, stages, workdir)
    settings = _settings(stage, defaults)
    shown = {k: x for k, x in settings.items() if before.get(k) != x}
    with_what = ' that differ from those before' if before else ''
    print(f'settings{with_what} (* not the default):')
    for key, (value, is_set) in shown.items():
      line = f'{"*" if is_set else " "} {key:<31} {value!r}'
      print(textwrap.fill(line, _WIDTH, subsequent_indent=' ' * 34))
    for what in missing:
      print(f'{what} has not run: of its model, the shape is known')
    for what in unread:
      print(f'{what} has not run: its answers are left out of the data')
    unknown = {'data'} if unread and stage.data.train is None else set()
    if given.critic.init_from in missing:
      unknown |= {'critic'}
    mesh = sharding.make_mesh(**stage.mesh)
    with jax.set_mesh(mesh):
      _look(stage, here, mesh, unknown)
    before, stages = settings, stages | {name: stage}


def _resolved(config, stages, root):
  """A copy that names no stage, and which it named that have not run.

  First those for their models, of which the shapes are known, then those for
  their answers, of which nothing is.
  """
  config = config.copy_and_resolve_references()

  def has_run(spec):
    name = str(spec).removeprefix(rundir.STAGE)
    if name == str(spec) or rundir.is_finished(root / name):
      return True
    if name not in stages:
      raise UserError(f'{spec}: config.stages has no stage {name} before this')
    return False

  c, data = config, config.data.train
  specs = data if isinstance(data, list | tuple) else [data]
  models = [c.student.path, c.teacher.path, c.critic.init_from]
  missing = [x for x in dict.fromkeys(models) if not has_run(x)]
  unread = [x for x in specs if not has_run(x)]
  if c.student.path in missing and c.data.template is None:
    start = stages[c.student.path.removeprefix(rundir.STAGE)]
    c.data.template = start.data.template
  with c.ignore_type():
    if c.critic.init_from in missing:
      c.critic.init_from = None
    if unread:
      c.data.train = tuple(x for x in specs if x not in unread) or None
  c = rundir.resolve_stages(rundir.stage_shapes(c, stages, root), root)
  c.data.template = best.template_of(c.student.path, c.data.template)
  return c, missing, unread


def _settings(config, defaults):
  """{setting: (its value, whether it is other than the default)}."""
  parts = {
    'objective': objectives.make(**config.objective),
    'rollout': rollout.make(**config.rollout),
  } | {
    f'evals.{name}': evaluator_lib.kind_of(name, line)
    for name, line in config.evals.items()
  }
  usual = fingerprint.flatten(defaults.to_dict()) if defaults else {}
  for part, cls in parts.items():
    usual |= {
      f'{part}.{field.name}': field.default
      for field in dataclasses.fields(cls)
      if field.name not in _NO_SETTINGS
      and field.default is not dataclasses.MISSING
    }
  given = fingerprint.flatten(config.to_dict())
  return {
    key: (value, value != usual.get(key))
    for key, value in sorted((usual | given).items())
    if key != 'stages' and (key in usual or value is not None)
  }


def _look(config, workdir, mesh, unknown):
  """Prints what is read, how large it is, and the first batch.

  But for what of 'data' and 'critic' is unknown.
  """
  c = config
  trains = c.train.steps != 0
  if 'data' in unknown:  # As if there were none to train on.
    config = c.copy_and_resolve_references()
    config.train.steps = 0
  run = build.build(config, workdir, mesh, weights=False)
  for name, evaluator in run.evaluators.items():
    if hasattr(evaluator, 'rows'):
      n, dropped = len(evaluator.rows), sum(evaluator.about['dropped'].values())
      print(f'evals.{name}: {n:,} rows, {dropped:,} left out')
  batches = None
  if run.writer.makes_rows and not (workdir / 'answers.jsonl').exists():
    if 'data' not in unknown:
      _print_prompts(c)
  elif trains and 'data' not in unknown:
    batches = inputs.training_batches(run)
  per_epoch = batches.steps_per_epoch if batches else 0
  total = inputs.total_steps(c, batches) if batches else c.train.steps
  # How many there are changes no shape; so many fit any warm-up.
  training = training_lib.make(run, per_epoch, total or 10**9)
  sizes = plan.parameters(training.state, run.models.frozen)
  for name, n in sizes.items():
    if name not in unknown:
      print(f'{name}: {n:,} parameters')
  if trains:
    in_all = 'unknown' if total is None else f'{total:,}'
    an_epoch = f'{per_epoch:,}' if batches else 'unknown'
    print(f'steps: {an_epoch} an epoch, {in_all} in all')
  else:
    print('it trains nothing')
  if batches:
    _print_batch(next(batches).student, run)


def _print_prompts(c):
  if c.data.train is None:
    raise UserError('config.data.train is not set: name a file of prompts')
  rows, bad = sources.load(
    c.data.train, on_bad_row=c.data.on_bad_row, need_response=False
  )
  print(f'data: {len(rows):,} prompts, which the teacher answers first')
  for reason, n in sorted(bad.items()):
    print(f'data: {n:,} skipped: {reason}')


def _print_batch(tokens, run):
  """Prints rows of `Tokens`: each text, and where its loss is."""
  B, T = tokens.ids_BT.shape
  print(f'first batch: {B} rows of {T} tokens; > is trained on')
  if run.writer.room:
    share = f'{run.writer.share:.0%} of these responses'
    print(f'(in the run, a model writes in the place of {share})')
  for b in range(min(B, _ROWS)):
    print(f'row {b + 1}')
    start = 0
    runs = zip(tokens.segments_BT[b], tokens.mask_BT[b], strict=True)
    for (document, is_trained), group in itertools.groupby(runs):
      end = start + len([*group])
      what = 'trained on' if is_trained else 'prompt'
      of = f'document {document}, {what}' if document else 'padding'
      print(f'  {of}: {end - start} tokens')
      if document:
        ids = tokens.ids_BT[b, start:end]
        _print_text(run.models.tokenizer, ids, '  > ' if is_trained else '    ')
      start = end
  if B > _ROWS:
    print(f'and {B - _ROWS} rows more')


def _print_text(tokenizer, ids, indent):
  """Special tokens and ends of lines are seen; a long text is cut."""
  text = tokenizer.decode(
    ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
  )
  *lines, last = text.split('\n')
  lines = [f'{line}⏎' for line in lines] + [last] * bool(last)
  shown = []
  for line in lines:
    line = ''.join(x if x.isprintable() else repr(x)[1:-1] for x in line)
    width = _WIDTH - len(indent)
    shown += textwrap.wrap(line, width, drop_whitespace=False)
  if len(shown) > _LINES:
    half = _LINES // 2
    more = f'... {len(shown) - 2 * half} lines more ...'
    shown = [*shown[:half], more, *shown[-half:]]
  for line in shown:
    print(indent + line)
