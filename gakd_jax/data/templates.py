"""Prompt templates: from a row to the text that stands before the response.

The response follows the prompt directly, then the end-of-sequence token.
"""

import difflib

from gakd_jax import UserError
from gakd_jax.data.sources import BadRow

_TASK = 'Below is an instruction that describes a task'
_REQUEST = 'Write a response that appropriately completes the request.'


def qwen3(row, tokenizer):
  """Qwen3's own chat template with thinking off."""
  return _render(row, tokenizer, enable_thinking=False)


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


def chat(row, tokenizer):
  """Whatever chat template the tokenizer carries, with its own defaults."""
  return _render(row, tokenizer)


def raw(row, tokenizer):
  """The prompt as it is."""
  _refuse_turns(row)
  return _user_text(row)


TEMPLATES = {t.__name__: t for t in (qwen3, gakd, alpaca, chat, raw)}
# These write every special token themselves; the others leave it to the
# tokenizer to put its BOS before the prompt.
CHAT_TEMPLATES = ('qwen3', 'gakd', 'chat')


def prompt_text(name, row, tokenizer):
  """The prompt of a row, up to where the response begins.

  Raises UserError for an unknown template or a tokenizer that has none, and
  BadRow for a row that the template cannot hold.
  """
  return _template(name)(row, tokenizer)


def eos_id(name, tokenizer):
  """The token that ends a response: trained as its last, stops generation."""
  _template(name)
  end = turn_end_id(tokenizer)
  if name in ('qwen3', 'gakd') and end is not None:
    return end
  if tokenizer.eos_token_id is None:
    raise UserError(
      f'tokenizer {tokenizer.name_or_path}: it names no EOS token; set '
      '"eos_token" in its tokenizer_config.json'
    )
  return tokenizer.eos_token_id


def stop_ids(template, tokenizer):
  """The tokens at which an answer is over, whichever its model has learned."""
  return tuple(sorted({eos_id(template, tokenizer), *stops(tokenizer)}))


def stops(tokenizer):
  """EOS and the ends of turns that a tokenizer knows."""
  ids = {tokenizer.eos_token_id, turn_end_id(tokenizer)}
  ids.add(_id(tokenizer, '<end_of_turn>'))  # Gemma's
  return ids - {None}


def turn_end_id(tokenizer):
  """The id of `<|im_end|>`, or None for a tokenizer without it."""
  return _id(tokenizer, '<|im_end|>')


def _id(tokenizer, token):
  found = tokenizer.convert_tokens_to_ids(token)
  return None if found == tokenizer.unk_token_id else found


def _template(name):
  if name not in TEMPLATES:
    close = difflib.get_close_matches(str(name), TEMPLATES, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise UserError(
      f'unknown template {name!r}: {hint}there are {", ".join(TEMPLATES)}'
    )
  return TEMPLATES[name]


def _sections(row):
  _refuse_turns(row)
  extra = f'### Input:\n{row.input}\n\n' if row.input else ''
  return f'### Instruction:\n{row.instruction}\n\n{extra}### Response:\n'


def _user_text(row):
  return '\n'.join(text for text in (row.instruction, row.input) if text)


def _refuse_turns(row):
  if row.messages:
    raise BadRow(row.where, 'this template holds one user turn only')


def _render(row, tokenizer, **options):
  if not tokenizer.chat_template:
    raise UserError(
      f'tokenizer {tokenizer.name_or_path}: it has no chat template; use '
      "template 'alpaca' or 'raw'"
    )
  import jinja2

  turns = row.messages or ({'role': 'user', 'content': _user_text(row)},)
  try:
    return tokenizer.apply_chat_template(
      list(turns), tokenize=False, add_generation_prompt=True, **options
    )
  except jinja2.TemplateError as error:
    raise BadRow(row.where, f'the chat template says: {error}') from error
