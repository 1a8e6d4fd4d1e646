"""Prompt templates: from a row to the text that stands before the response.

The response follows the prompt directly, then the end-of-sequence token.
"""

import datetime
import difflib
import functools
import json
import re
from pathlib import Path

from gakd_jax import UserError
from gakd_jax.data.records import LONGEST, TOO_LONG
from gakd_jax.data.sources import BadRow, Row

_TASK = 'Below is an instruction that describes a task'
_REQUEST = 'Write a response that appropriately completes the request.'
# The date of prompts that have one: they do not depend on the day. Llama 3.1's
# own default.
_TODAY = datetime.datetime(2024, 7, 26)
_PROBE = 'Blue-green whales'  # a text to find again in what a template writes
# Before a chat template: nobody need ask it for no thoughts.
_NO_THINKING = (
  '{%- if enable_thinking is not defined %}'
  '{%- set enable_thinking = false %}{%- endif %}'
)
_SURROGATE = re.compile('[\ud800-\udfff]')  # No tokenizer takes one.
THINK, THOUGHT = '<think>', '</think>'


def qwen3(row, tokenizer, variant=None):
  """The tokenizer's chat template with thinking off.

  Qwen3's closes an empty block of thoughts; for one that always opens a block,
  it is closed here.
  """
  text = _render(row, tokenizer, variant, enable_thinking=False)
  return text + _closing(text)


def gakd(row, tokenizer):
  """The Alpaca sections between chat tokens, as GAKD's authors wrote it."""
  return (
    f'<|im_start|>{_TASK}. {_REQUEST}\n\n{_sections(row)}'
    '<|im_end|><|im_start|>Assistant:\n<think>\n\n</think>\n\n'
  )


def alpaca(row, tokenizer):
  """Alpaca's and MiniLLM's sections, without any special token."""
  context = (
    ', paired with an input that provides further context' if row.input else ''
  )
  return f'{_TASK}{context}. {_REQUEST}\n\n{_sections(row)}'


def chat(row, tokenizer, variant=None):
  """Whatever chat template the tokenizer carries, with its own defaults.

  `chat:<name>` is one of several that have names.
  """
  return _render(row, tokenizer, variant)


def raw(row, tokenizer):
  """The prompt as it is, special tokens included."""
  _refuse_turns(row)
  return row.text


TEMPLATES = {t.__name__: t for t in (qwen3, gakd, alpaca, chat, raw)}
_RENDERED = ('qwen3', 'chat')  # by the tokenizer's own template
# These write every special token themselves; the others leave it to the
# tokenizer to put its BOS before the prompt.
_CHAT_TEMPLATES = ('qwen3', 'gakd', 'chat')


def prompt_text(name, row, tokenizer):
  """The prompt of a row, up to where the response begins.

  Raises UserError for an unknown template or a tokenizer that has none, and
  BadRow for a row that the template cannot hold.
  """
  base, variant = _split(name)
  if variant:
    return TEMPLATES[base](row, tokenizer, variant)
  return TEMPLATES[base](row, tokenizer)


def has_turns(name):
  """Whether a template can hold more than one user turn."""
  return _split(name)[0] in _RENDERED


def start(name, tokenizer):
  """The ids before a prompt: what a tokenizer puts before a text (its BOS).

  And not what some put after it. A chat template writes its own.
  """
  if _split(name)[0] in _CHAT_TEMPLATES:
    return []
  whole, text = (
    tokenizer('a', add_special_tokens=on).input_ids for on in (True, False)
  )
  places = range(len(whole) - len(text) + 1)
  return next(
    (whole[:i] for i in places if whole[i : i + len(text)] == text), []
  )


def eos_id(name, tokenizer):
  """The token that ends a response: trained as its last, stops generation.

  What a chat template writes after an assistant's text; where it is none, the
  tokenizer's EOS.
  """
  base, variant = _split(name)
  end = None
  if base == 'gakd':
    end = token_id(tokenizer, '<|im_end|>')
  elif base in _RENDERED:
    end = _turn_end(tokenizer, variant)
  if end is None:
    end = tokenizer.eos_token_id
  if end is None:
    raise UserError(
      f'tokenizer {tokenizer.name_or_path}: it names no EOS token; set '
      '"eos_token" in its tokenizer_config.json'
    )
  return end


def stop_ids(name, tokenizer):
  """The tokens at which an answer is over, whichever its model has learned."""
  return tuple(sorted({eos_id(name, tokenizer), *stops(tokenizer)}))


def stops(tokenizer):
  """What ends a turn, as far as a tokenizer and its directory say.

  Its EOS, what its chat template writes after an assistant's text, what
  generation_config.json lists, and ChatML's end, which `gakd` writes.
  """
  ids = {tokenizer.eos_token_id, _turn_end(tokenizer), *_listed(tokenizer)}
  ids.add(token_id(tokenizer, '<|im_end|>'))
  return ids - {None}


def token_id(tokenizer, token):
  """The id of a token, or None for a tokenizer without it."""
  found = tokenizer.convert_tokens_to_ids(token)
  return None if found == tokenizer.unk_token_id else found


def as_jinja(name, tokenizer):
  """A chat template that writes the prompts of a template.

  So that whoever loads the model asks it as it was trained. That of a template
  which is no chat template holds a single turn, without `input`.
  """
  base, variant = _split(name)
  if base in _RENDERED:
    text = _template_of(tokenizer, variant)
    if base == 'qwen3':
      text = _NO_THINKING + text
      probe = _render(Row(_PROBE), tokenizer, variant, enable_thinking=False)
      if end := _closing(probe):
        text = text.removesuffix('\n') + (  # As jinja does.
          '{% if add_generation_prompt %}{{ '
          + json.dumps(end)
          + ' }}{% endif %}'
        )
    return text
  before, after = prompt_text(name, Row(_PROBE), tokenizer).split(_PROBE)
  before = tokenizer.decode(start(name, tokenizer)) + before
  return (
    "{% for m in messages %}{% if loop.first and m.role == 'user' %}{{ "
    + f'{json.dumps(before)} + m.content + {json.dumps(after)}'
    + " }}{% elif loop.index == 2 and m.role == 'assistant' %}"
    + '{{ m.content + eos_token }}{% else %}'
    + "{{ raise_exception('this model answers one user turn') }}"
    + '{% endif %}{% endfor %}'
  )


def _split(name):
  """('chat', 'rag') for 'chat:rag'; the second is None for most."""
  base, _, variant = str(name).partition(':')
  if base not in TEMPLATES or (variant and base not in _RENDERED):
    close = difflib.get_close_matches(base, TEMPLATES, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise UserError(
      f'unknown template {name!r}: {hint}there are {", ".join(TEMPLATES)}'
    )
  return base, variant or None


def _sections(row):
  _refuse_turns(row)
  extra = f'### Input:\n{row.input}\n\n' if row.input else ''
  return f'### Instruction:\n{row.instruction}\n\n{extra}### Response:\n'


def _refuse_turns(row):
  if row.messages:
    raise BadRow(row.where, 'this template holds one user turn only')


def _template_of(tokenizer, variant):
  """The text of a tokenizer's chat template, which asks for no date."""
  text = _named_template(tokenizer, variant)
  if not isinstance(text, str):
    raise UserError(
      f'tokenizer {tokenizer.name_or_path}: its chat template is {text!r:.80}; '
      'expected text'
    )
  return re.sub(
    r'strftime_now\(\s*(["\'])(.*?)\1\s*\)',
    lambda match: json.dumps(_TODAY.strftime(match[2])),
    text,
  )


def _named_template(tokenizer, variant):
  found = tokenizer.chat_template
  where = f'tokenizer {tokenizer.name_or_path}'
  if not found:
    raise UserError(
      f"{where}: it has no chat template; use template 'alpaca' or 'raw'"
    )
  if not isinstance(found, dict):
    if variant:
      raise UserError(
        f"{where}: it has one chat template, and none {variant!r}; use 'chat'"
      )
    return found
  if (variant or 'default') not in found:
    raise UserError(
      f'{where}: it has no {variant or "default"} chat template but '
      f"{', '.join(found)}; use template 'chat:{next(iter(found))}' or the like"
    )
  return found[variant or 'default']


def _apply(tokenizer, variant, turns, **options):
  return tokenizer.apply_chat_template(
    turns,
    chat_template=_template_of(tokenizer, variant),
    tokenize=False,
    **options,
  )


def _render(row, tokenizer, variant=None, **options):
  turns = row.messages or ({'role': 'user', 'content': row.text},)
  try:
    text = _apply(
      tokenizer, variant, list(turns), add_generation_prompt=True, **options
    )
  except UserError:
    raise
  except Exception as error:  # A template is a program: it may raise anything.
    reason = (str(error).splitlines() or [''])[0] or type(error).__name__
    reason = f'the chat template says: {reason[:200]}'
    raise BadRow(row.where, reason) from error
  if len(text) > LONGEST:
    raise BadRow(row.where, TOO_LONG)
  if _SURROGATE.search(text):
    raise BadRow(row.where, 'the chat template writes what is not UTF-8')
  for turn in turns:
    said = turn['content']
    if turn['role'] == 'assistant':  # Earlier thoughts may be left out.
      said = said.rpartition(THOUGHT)[2]
    if said.strip() not in text:
      raise BadRow(
        row.where, f'the chat template leaves out what the {turn["role"]} says'
      )
  return text


def _closing(prompt):
  """What ends a block of thoughts that a prompt leaves open; '' if none is."""
  if not prompt.rstrip().endswith(THINK):
    return ''
  return ('' if prompt.endswith('\n') else '\n') + f'\n{THOUGHT}\n\n'


def _turn_end(tokenizer, variant=None):
  """The special token after an assistant's text in a chat template, or None."""
  return _turn_end_of(tokenizer, str(tokenizer.chat_template), variant)


@functools.lru_cache(maxsize=64)
def _turn_end_of(tokenizer, chat_template, variant):
  del chat_template  # A key: a tokenizer's may be set anew.
  turns = [
    {'role': 'user', 'content': 'Which?'},
    {'role': 'assistant', 'content': _PROBE},
  ]
  try:
    text = _apply(tokenizer, variant, turns)
  except Exception:  # Who needs the template will be told.
    return None
  _, found, rest = text.rpartition(_PROBE)
  special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
  special.discard(tokenizer.unk_token_id)
  for i in tokenizer(rest, add_special_tokens=False).input_ids if found else ():
    if i in special:
      return i
    if tokenizer.decode([i]).strip():
      break  # Text: turns have no end of their own.
  return None


def _listed(tokenizer):
  """The EOS ids of generation_config.json beside a tokenizer."""
  file = Path(tokenizer.name_or_path) / 'generation_config.json'
  return _listed_in(file, file.stat().st_mtime_ns if file.is_file() else None)


@functools.lru_cache(maxsize=64)
def _listed_in(file, changed):
  if changed is None:
    return ()
  try:
    ids = json.loads(file.read_text('utf-8')).get('eos_token_id')
  except (OSError, ValueError, AttributeError, RecursionError) as error:
    raise UserError(f'{file}: not a JSON object ({error}); mend it') from error
  ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
  if odd := [i for i in ids if type(i) is not int or i >= 1 << 31]:
    raise UserError(f'{file}: {odd[0]!r:.80} in eos_token_id; expected an id')
  return tuple(i for i in ids if i >= 0)
