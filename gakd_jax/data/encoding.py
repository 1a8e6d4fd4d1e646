"""From rows to ids, and from ids back to answers.

Prompt and response are tokenised apart, so that the ids of a training prompt
are those that generation starts from. Special tokens are what templates write:
see `special`; of template `raw`, what the prompt itself holds.
"""

import dataclasses
import re

from gakd_jax import UserError
from gakd_jax.data import special as special_lib
from gakd_jax.data import templates
from gakd_jax.data.sources import BadRow
from gakd_jax.data.special import Special


def encode(tokenizer, row, template, thinking='refuse'):
  """Returns (prompt ids, ids of the first reference and its end) as lists.

  A row without references has no response ids. `thinking`: 'refuse' or 'keep'
  a response with thoughts under a template that has closed them, or without
  under one that has opened them. Raises BadRow.
  """
  (found,) = encode_batch(tokenizer, [row], template, thinking)
  if isinstance(found, BadRow):
    raise found
  return found


def encode_batch(tokenizer, rows, template, thinking='refuse'):
  """`encode` of many rows at once; a bad one becomes its BadRow."""
  end = templates.eos_id(template, tokenizer)
  start = templates.start(template, tokenizer)
  special = special_too = Special.of(tokenizer)
  if thinking == 'keep':
    tags = {templates.THINK, templates.THOUGHT}
    special_too = Special.of(tokenizer, but=tags)

  def texts_of(row):
    prompt = _prompt(tokenizer, row, template, special)
    if not row.references:
      return prompt, ''
    response = row.references[0]
    special_lib.check_characters(row.where, response)
    _check_thinking(thinking, row, prompt, response)
    return prompt, special_too.apart(row.where, response)

  def ids_of(row, texts, ids):
    special.check(row.where, texts[0], ids[0])
    special_too.check(row.where, texts[1], ids[1])
    prompt = _some(row, _begun(start, ids[0]))
    return prompt, [*ids[1], end] if row.references else []

  texts = [_tried(texts_of, row) for row in rows]
  good = [x for x in texts if not isinstance(x, BadRow)]
  prompts, responses = ([x[i] for x in good] for i in (0, 1))
  ids = zip(
    special_lib.ids(tokenizer, prompts),
    special_lib.ids(tokenizer, responses),
    strict=True,
  )
  return [
    text if isinstance(text, BadRow) else _tried(ids_of, row, text, next(ids))
    for row, text in zip(rows, texts, strict=True)
  ]


def _tried(function, *arguments):
  """What a function returns, or the BadRow that it raises."""
  try:
    return function(*arguments)
  except BadRow as error:
    return error


def _begun(start, ids):
  """With the ids before a prompt, which one that was rendered has already."""
  return ids if ids[: len(start)] == start else start + ids


def _some(row, prompt):
  """The ids of a prompt, if there are any: a response needs one before it."""
  if not prompt:
    raise BadRow(row.where, 'a prompt without a token')
  return prompt


def encode_responses(tokenizer, texts, ended, template):
  """The ids of responses that a model wrote, with its end where it ended.

  Or that it might write: the options of a question, say, that have not ended.
  """
  end, special = templates.eos_id(template, tokenizer), Special.of(tokenizer)
  # A model may write bytes of what is no character.
  texts = map(special_lib.as_unicode, texts)
  found = special_lib.ids(
    tokenizer, [special.apart('an answer', x) for x in texts]
  )
  return [
    [*ids, end] if is_whole else ids
    for ids, is_whole in zip(found, ended, strict=True)
  ]


def _check_thinking(thinking, row, prompt, response):
  """Refuses a response whose thoughts are not where its prompt has them."""
  if thinking not in ('refuse', 'keep'):
    raise UserError(
      f"config.data.thinking={thinking!r}: use 'refuse' or 'keep'"
    )
  thinks = templates.THINK in response or templates.THOUGHT in response
  prompt = prompt.rstrip()
  problem = None
  if prompt.endswith(templates.THOUGHT) and thinks:
    problem = 'a response with thoughts, which the template has closed'
  elif prompt.endswith(templates.THINK) and templates.THOUGHT not in response:
    problem = 'a response without thoughts, which the template has opened'
  if problem and thinking == 'refuse':
    raise BadRow(row.where, problem)


def fit_prompt(tokenizer, row, template, max_prompt_length):
  """The prompt ids of a row, at most max_prompt_length of them.

  A longer prompt loses text from the middle of its input, then of its
  instruction (of its longest message, in a conversation), so that the task at
  the start and the words that ask for the answer at the end both stay. Raises
  UserError if the template alone is longer.
  """

  special = Special.of(tokenizer)
  start = templates.start(template, tokenizer)

  def ids_of(texts):
    text = _prompt(tokenizer, _with_texts(row, texts), template, special)
    (ids,) = special_lib.ids(tokenizer, [text])
    special.check(row.where, text, ids)
    return _begun(start, ids)

  texts = _texts(row)
  ids = ids_of(texts)
  if len(ids) <= max_prompt_length:
    return _some(row, ids)
  order = range(len(texts))
  if row.messages:
    order = sorted(order, key=lambda i: -len(row.messages[i]['content']))
  for i in order:
    text, texts[i] = texts[i], ''
    ids = ids_of(texts)
    if len(ids) > max_prompt_length:
      continue  # All of this text is not enough: cut the next one as well.
    low, high = 0, len(text)  # Characters to keep: this fits, this does not.
    while high - low > 1:
      middle = (low + high) // 2
      texts[i] = text[: (middle + 1) // 2] + text[len(text) - middle // 2 :]
      shorter = ids_of(texts)
      if len(shorter) <= max_prompt_length:
        low, ids = middle, shorter
      else:
        high = middle
    return _some(row, ids)
  raise UserError(
    f'{row.where}: template {template!r} alone takes {len(ids)} tokens, and '
    f'max_prompt_length is {max_prompt_length}; raise it'
  )


def _texts(row):
  """What may be cut in a row; of a single turn, the input first."""
  if row.messages:
    return [message['content'] for message in row.messages]
  return [row.input, row.instruction]


def _with_texts(row, texts):
  if row.messages:
    pairs = zip(row.messages, texts, strict=True)
    turns = tuple({**message, 'content': text} for message, text in pairs)
    return dataclasses.replace(row, messages=turns)
  return dataclasses.replace(row, input=texts[0], instruction=texts[1])


def _prompt(tokenizer, row, template, special):
  """The prompt of a row, in which what the user says is text."""
  texts = _texts(row)
  special_lib.check_characters(row.where, *texts)
  if template != 'raw':
    row = _with_texts(row, [special.apart(row.where, text) for text in texts])
  return templates.prompt_text(template, row, tokenizer)


def decode(tokenizer, ids):
  """The answer that ids spell: up to its end, no special tokens, no thinking.

  The prompt may have opened a block of thoughts, and an answer that was cut
  while thinking has no answer.
  """
  stops = templates.stops(tokenizer)
  ids = [int(i) for i in ids]
  ids = ids[: next((n for n, i in enumerate(ids) if i in stops), len(ids))]
  # As tokens, since special ones leave no text; then as text, since in other
  # vocabularies they are several tokens.
  think, thought = (
    templates.token_id(tokenizer, token)
    for token in (templates.THINK, templates.THOUGHT)
  )
  if thought is not None and thought in ids:
    ids = ids[ids.index(thought) + 1 :]
  if think is not None and think in ids:
    ids = ids[: ids.index(think)]
  text = tokenizer.decode(
    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  text = re.sub(r'^.*?</think>', '', text, count=1, flags=re.DOTALL)
  return re.sub(r'<think>.*', '', text, flags=re.DOTALL).strip()
