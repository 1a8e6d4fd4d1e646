"""What a model's directory says of how it is asked and what ends its turns.

Transformers and vLLM read it there: the chat template, the tokenizer's EOS, and
generation_config.json's list of ends.
"""

import json
from pathlib import Path

from gakd_jax import UserError, json_file
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib

_TEMPLATE = 'chat_template.jinja'


def say_template(directory, name):
  """The template that a model was trained with becomes its chat template.

  And what it was trained to end with, its EOS.
  """
  directory = Path(directory)
  tokenizer = tokenizer_lib.load(directory)
  template = templates.as_jinja(name, tokenizer)
  end = tokenizer.convert_ids_to_tokens(templates.eos_id(name, tokenizer))
  changed = {}
  if template != tokenizer.chat_template:
    changed['chat_template'] = None
    (directory / _TEMPLATE).write_text(template)
  if end != tokenizer.eos_token:
    changed['eos_token'] = end
    _change(directory / 'special_tokens_map.json', {'eos_token': end})
  _change(directory / 'tokenizer_config.json', changed, new=True)


def say_ends(directory):
  """Everything that ends a turn stands in generation_config.json.

  See `templates.stops`. A directory whose files say all of it stays as it is.
  """
  directory = Path(directory)
  try:
    tokenizer = tokenizer_lib.load(directory)
  except UserError:  # None that can be used: who needs it will be told.
    return
  stops = templates.stops(tokenizer)
  file = directory / templates.GENERATION
  known = _read(file)
  if known is None:  # Transformers takes it from config.json then.
    config = _read(directory / 'config.json') or {}
    names = ('bos_token_id', 'eos_token_id', 'pad_token_id')
    known = {n: config[n] for n in names if config.get(n) is not None}
  listed = templates.listed(known, file)
  if missing := sorted(stops - {*listed}):
    ends = [*listed, *missing]
    known['eos_token_id'] = ends if len(ends) > 1 else ends[0]
    file.write_text(json.dumps(known, indent=2) + '\n')


def _read(file):
  return json_file.read(file) if file.exists() else None


def _change(file, values, new=False):
  """Sets values of a JSON file, None to leave out; where it is, or if `new`."""
  content = _read(file)
  if not values or (content is None and not new):
    return
  content = (content or {}) | values
  for name in [name for name, x in values.items() if x is None]:
    del content[name]
  file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n')
