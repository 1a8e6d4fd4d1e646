"""What best/ says of itself: where it comes from, how it was trained to talk.

gakd_jax.json has it for programs and README.md, a model card, for people. The
chat template and the ends of turns are those of the training: see
`models.prompts`.
"""

import re
from pathlib import Path

from gakd_jax import (
  UserError,
  __version__,
  fingerprint,
  json_file,
  log,
  models,
  rundir,
  settings,
)
from gakd_jax.models import peft, prompts
from gakd_jax.settings import Text

RECORD = 'gakd_jax.json'
_ABOUT = {'template': Text, 'recipe': Text, 'seed': int, 'step': int}


def describe(directory, config, *, step, metric=None):
  """Writes all that into a new model's directory.

  Args:
    directory: has weights, config.json and tokenizer.
    config: of the run.
    step: optimizer steps that were taken.
    metric: None, or (name, value) of what this step is the best by.
  """
  directory = Path(directory)
  c = config
  prompts.say_template(directory, c.data.template)
  prompts.say_ends(directory)
  data = c.data.train
  about = {
    'gakd_jax': __version__,
    'commit': fingerprint.commit(),
    **_origin('base', c.student.path),
    **_origin('teacher', c.teacher.path),
    'objective': c.objective.name,
    'rollout': c.rollout.writer,
    'data': data if data is None or isinstance(data, str) else [*data],
    'template': c.data.template,
    **recipe(c),
    'step': step,
    'metric': metric and metric[0],
    'value': metric and metric[1],
  }
  (directory / RECORD).write_text(log.to_json(about, indent=2) + '\n')
  (directory / 'README.md').write_text(_card(about, peft.is_adapter(directory)))


def recipe(config):
  """`fingerprint.recipe` of a run whose stages are resolved.

  What other runs made counts by their recipes, wherever it lies.
  """
  c, origins = config, {}
  for path in (c.student.path, c.teacher.path, c.critic.init_from):
    if path and Path(path).is_dir():
      origins[str(path)] = read(path).get('recipe', str(path))
  data = c.data.train or ()
  for spec in (data,) if isinstance(data, str) else data:
    if Path(spec).is_file() and rundir.is_finished(Path(spec).parent):
      made_by = rundir.read_results(Path(spec).parent)
      origins[spec] = made_by.get('recipe') or spec
  return fingerprint.recipe(fingerprint.as_json(c), origins)


def _origin(name, path):
  if not path:
    return {}
  revision = models.revision(path)
  return {name: str(path), f'{name}_revision': revision}


def read(path):
  """What a model says of itself; {} for one of another program."""
  file = models.resolve(path, RECORD) / RECORD
  if not file.exists():
    return {}
  try:
    about = json_file.read(file)
    settings.check_row('', about, _ABOUT)
  except UserError as error:
    raise UserError(f'{file}: not a record of gakd_jax ({error})') from error
  return {key: about[key] for key in _ABOUT}


def template_of(path, asked=None, default='qwen3'):
  """The name of the template for a model: that it was trained with.

  Unless another is `asked` for, which is said. `default`: where nothing is
  known of the model.
  """
  trained = read(path).get('template')
  if trained and asked and trained != asked:
    print(
      f'{path} was trained with template {trained!r}, and is asked with '
      f'{asked!r}',
      flush=True,
    )
  return asked or trained or default


def _cell(value):
  """A value as a cell of a Markdown table: nothing in it is markup."""
  return re.sub(
    r'[&<>|\[\]`*\\\n\r]', lambda found: f'&#{ord(found[0])};', str(value)
  )


def _card(about, is_adapter):
  """README.md, as the hub reads it."""
  facts = [
    f'| {name.replace("_", " ")} | {_cell(value)} |'
    for name, value in about.items()
    if value is not None
  ]
  hub_id = about['base'].partition('@')[0]
  return '\n'.join(
    [
      '---',
      *([f'base_model: {hub_id}'] if about['base_revision'] else []),
      f'library_name: {"peft" if is_adapter else "transformers"}',
      'pipeline_tag: text-generation',
      'tags: [distillation, gakd_jax]',
      '---',
      '',
      '# A student of gakd_jax',
      '',
      'Its chat template writes prompts as it was trained on them, and its',
      'files list all tokens that end its turns.',
      '',
      '| | |',
      '|---|---|',
      *facts,
      '',
    ]
  )
