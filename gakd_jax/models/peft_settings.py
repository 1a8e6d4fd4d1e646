"""What adapter_config.json says, as PEFT 0.21 reads it.

Options are accepted by name and value. Any other, be it one of a later PEFT,
has to say nothing (null, false or empty), else it is refused by its name.
"""

import re

from gakd_jax import UserError, json_file
from gakd_jax.models import hub


def _is_rank(x):
  return type(x) is int and 1 <= x <= 2**24


def _is_scale(x):
  return type(x) in (int, float) and 0 < x < 1e9


def _is_share(x):
  return type(x) in (int, float) and 0 <= x <= 1


def _is_bool(x):
  return type(x) is bool


def _is_text(x):
  return type(x) is str


def _is_names(x):
  return _is_text(x) or (type(x) is list and all(map(_is_text, x)))


def _is_layers(x):
  return type(x) is int or (
    type(x) is list and all(type(layer) is int for layer in x)
  )


def _is_pattern(of):
  return lambda x: type(x) is dict and all(map(of, x.values()))


# Of these the adapter is computed: default, what is right, and that in words.
COMPUTED = {
  'r': (8, _is_rank, 'a whole number, 1 or more'),
  'lora_alpha': (8, _is_scale, 'a positive number'),
  'rank_pattern': ({}, _is_pattern(_is_rank), 'whole numbers by name'),
  'alpha_pattern': ({}, _is_pattern(_is_scale), 'positive numbers by name'),
  'use_rslora': (False, _is_bool, 'true or false'),
  'lora_dropout': (0.0, _is_share, 'from 0 to 1'),
  'target_modules': (None, _is_names, 'names or a pattern'),
  'exclude_modules': ([], _is_names, 'names or a pattern'),
  'layers_to_transform': ([], _is_layers, 'numbers of layers'),
  'layers_pattern': ([], _is_names, 'names'),
  'base_model_name_or_path': (None, _is_text, 'a directory or hub id'),
  'revision': (None, _is_text, 'a revision of the hub'),
}
# What an adapter that is loaded does, does not depend on these: notes, how the
# base stores its weights, and what belongs to options that are off.
WITHOUT_EFFECT = (
  'auto_mapping',
  'peft_version',
  'inference_mode',
  'runtime_config',
  'fan_in_fan_out',
  'megatron_core',
  'qalora_group_size',
  'loftq_config',
  'eva_config',
  'corda_config',
  'lora_ga_config',
)
# What is accepted beside nothing. Other ways to start an adapter change its
# base: PEFT does so again when it loads one (pissa, olora, loftq), or did when
# it was made, so that it does not belong on the base it names (corda, lora_ga).
ONLY = {
  'peft_type': ('LORA',),
  'task_type': ('CAUSAL_LM',),
  'bias': ('none',),
  'init_lora_weights': (True, 'gaussian', 'eva', 'orthogonal', 'mica'),
}


def check(settings, file):
  """The `COMPUTED` options of adapter_config.json.

  Raises:
    UserError: for an option that is not accepted, or a value that makes no
      sense.
  """
  # The kind first: others have options of their own.
  for name, value in ({'peft_type': None} | settings).items():
    if name in COMPUTED or name in WITHOUT_EFFECT:
      continue
    if _says_nothing(value) and name != 'peft_type':
      continue
    if value not in ONLY.get(name, ()):
      others = ', '.join(map(repr, ONLY.get(name, ())))
      raise UserError(
        f'{file}: {name}={json_file.shown(value)} is not supported'
        f'{others and f" (expected {others})"}; most such adapters can be '
        'merged into their base with peft (merge_and_unload): load that'
      )
  computed = {name: _value(settings, name, file) for name in COMPUTED}
  wanted, layers = computed['target_modules'], computed['layers_to_transform']
  if wanted is None:
    raise UserError(f'{file}: target_modules is missing')
  if layers != [] and _is_text(wanted):
    raise UserError(
      f'{file}: layers_to_transform needs a list of names as target_modules, '
      f'not {json_file.shown(wanted)}'
    )
  return computed


def base(settings, file):
  """The directory or hub id that an adapter belongs on.

  A directory may be anywhere, as adapters that are trained here name it.
  """
  name, revision = settings['base_model_name_or_path'], settings['revision']
  if not name:
    raise UserError(
      f'{file}: base_model_name_or_path is missing; name the model that the '
      'adapter belongs on'
    )
  return f'{name}@{revision}' if revision and not hub.directory(name) else name


def _says_nothing(value):
  return value is None or value is False or value in ('', [], {})


def _value(settings, name, file):
  """What an option says, or its default."""
  default, is_right, words = COMPUTED[name]
  value = settings.get(name)
  if value is None:
    return default
  if not is_right(value):
    raise UserError(f'{file}: {name}={json_file.shown(value)} must be {words}')
  if name.endswith('_modules') and not _is_text(value):
    return value
  if name.endswith(('_pattern', '_modules')):
    for pattern in [value] if _is_text(value) else value:
      try:
        re.compile(pattern)
      except re.error as e:
        what = json_file.shown(pattern)
        raise UserError(
          f'{file}: {name}: {what} is no regular expression ({e})'
        ) from None
  return value


def is_target(settings, module, layer):
  """Whether an adapter is on a module, by its full name in the base.

  As `check_target_module_exists` of PEFT; `settings` are `check`ed.
  """
  wanted = settings['target_modules']
  if _named(settings['exclude_modules'], module):
    return False
  if wanted == 'all-linear' or (not _is_text(wanted) and module in wanted):
    return True
  layers = settings['layers_to_transform']
  if not _named(wanted, module) or layers == []:
    return _named(wanted, module)
  if layer != layers and layer not in (layers if type(layers) is list else ()):
    return False
  names = settings['layers_pattern']
  names = [names] if _is_text(names) else names
  return any(
    re.match(rf'(?:^|.*?\.){name}\.{layer}\.', module)
    for name in filter(None, names or [r'[^.]*'])
  )


def _named(names, module):
  """Whether names (of its end) or a pattern (of all of it) are a module's."""
  if _is_text(names):
    return bool(re.fullmatch(names, module))
  return any(f'.{module}'.endswith(f'.{name}') for name in names)


def rank_and_scale(settings, module):
  """The rank of a module's adapter, and what its A B is multiplied with."""

  def of(pattern, default):
    # As PEFT: the first that matches its end counts.
    for key, value in settings[pattern].items():
      if re.match(rf'(.*\.)?({key})$', module):
        return value
    return settings[default]

  rank = of('rank_pattern', 'r')
  alpha = of('alpha_pattern', 'lora_alpha')
  return rank, alpha / (rank**0.5 if settings['use_rslora'] else rank)
