"""Rows: what a record of a data file asks, and how it may be answered.

A record holds `messages` (or ShareGPT's `conversations`), or `instruction,
input, output` (the last two may be called `context, response`), or `question,
context, answer`, or `prompt, response` (or `completion`), or `query, response`,
or `dialogue, summary` (`summary1` and so on are several references); the first
of these that is there counts, since some data sets also store a rendered
`prompt`. `output` and `response` may be a list of references. `system` (or
`system_prompt`) and `history`, pairs of [user, assistant], go before the
prompt. What else a prompt would need, and no template here can show, makes a
bad row.
"""

import dataclasses
import decimal
import functools
import math
import numbers
import re

from gakd_jax import UserError, settings
from gakd_jax.data import records
from gakd_jax.data.records import BadRow

# A prompt, and what its response may be called, in order of priority.
_FIELDS = {
  'instruction': ('output', 'response'),
  'question': ('answer', 'response'),
  'prompt': ('response', 'completion'),
  'query': ('response',),
}
_PROMPTS = (*_FIELDS, 'messages', 'dialogue')
_ROLES = {'human': 'user', 'gpt': 'assistant'} | {
  role: role for role in ('system', 'user', 'assistant')
}
# Of records, of records with a `question`, and of turns: parts of the prompt
# that are not shown.
_UNSEEN = ('tools', 'functions', 'image', 'images', 'video', 'videos')
_UNSEEN += ('audio', 'audios')
_CHOICES = ('options', 'choices')
_CALLS = ('tool_calls', 'function_call', 'reasoning_content', 'thinking')


@dataclasses.dataclass(frozen=True)
class Row:
  """A prompt and its references.

  `references`: train on the first, score against all; empty if there is only a
  prompt. `messages`: the turns before the answer (role and content), for rows
  with a system message or several turns, else None. `where`: 'file:line', or
  'file[index]' where a file has no lines. `answer`: the short answer of a row
  with an `answer` beside its `output`, which shows how one comes to it (math
  and multiple choice of LLM-Adapters); it alone tells right from wrong.
  """

  instruction: str
  input: str = ''
  references: tuple[str, ...] = ()
  messages: tuple[dict, ...] | None = None
  where: str = ''
  answer: str = ''

  @property
  def text(self):
    """What the user says, of a single turn."""
    return '\n'.join(filter(None, (self.instruction, self.input)))


@dataclasses.dataclass(frozen=True)
class Rules:
  """Which rows a record is, and what happens to bad ones.

  on_bad_row: 'skip' counts a bad row by reason, 'fail' raises it.
  need_response: whether a row without a response is a bad row.
  turns: of a conversation, 'last' asks for its last answer; 'all' for each of
  its answers, as rows of their own: each is asked for as it will be, after the
  turns before it.
  """

  on_bad_row: str = 'skip'
  need_response: bool = True
  turns: str = 'last'

  def __post_init__(self):
    for name, known in (
      ('on_bad_row', ('skip', 'fail')),
      ('turns', ('last', 'all')),
    ):
      value = getattr(self, name)
      if value not in known:
        expected = ' or '.join(map(repr, known))
        raise UserError(f'config.data.{name}={value!r}: use {expected}')

  def refuse(self, bad):
    """A function that takes bad rows: into the Counter `bad`, or raises."""

    def refuse(row):
      if self.on_bad_row == 'fail':
        raise row
      bad[row.reason] += 1

    return refuse


def read(where, record, rules):
  """The Rows of a record, which may be a BadRow itself; raises BadRow."""
  row, weights = _read(where, record, rules.need_response)
  rows = [row]
  if weights[-1] == 0:
    rows = [dataclasses.replace(row, references=())]
  if rules.turns == 'all':
    rows = [*_earlier(row, weights), *rows]
  if rules.need_response:
    rows = [row for row in rows if row.references]
  if not rows:
    raise BadRow(where, 'empty response')
  return rows


def _earlier(row, weights):
  """Yields a Row for each answer among the turns of a Row."""
  turns = row.messages or ()
  for i, turn in enumerate(turns[1:], start=1):
    asks = turns[i - 1]['role'] == 'user' and turns[i - 1]['content'].strip()
    answers = turn['role'] == 'assistant' and turn['content'].strip()
    if asks and answers and weights[i]:
      yield Row(
        instruction=turns[i - 1]['content'],
        references=(turn['content'],),
        messages=turns[:i] if i > 1 else None,
        where=row.where,
      )


def _read(where, record, need_response):
  """A Row, and the weights of its turns, of which the answer is the last."""
  record = records.check(where, record)
  _refuse(where, record, _UNSEEN)
  if 'messages' in record or 'conversations' in record:
    return _conversation(where, record)
  if 'dialogue' in record:
    record = _dialogue(record)
  row = _pair(where, record, need_response)
  return row, [1] * (1 + len(row.messages or ()))


def _refuse(where, record, keys):
  for key in keys:
    if not records.is_nothing(record.get(key)):
      raise BadRow(where, f'has {key}, which no template shows')


@functools.lru_cache  # Bad rows tend to have the same names.
def _meant(names, known):
  hints = ''.join(settings.did_you_mean(name, known) for name in names)
  return f'; {hints}'.rstrip('; ')


def _pair(where, record, need_response):
  prompt_key = next((key for key in _FIELDS if key in record), None)
  if prompt_key is None:
    meant = _meant((*record,), _PROMPTS)
    raise BadRow(where, f'missing {", ".join(_PROMPTS)}{meant}')
  names = _FIELDS[prompt_key]
  response_key = next((name for name in names if name in record), names[0])
  if need_response and response_key not in record:
    meant = _meant((*record,), names)
    raise BadRow(where, f'missing {response_key}{meant}')
  if prompt_key == 'question':
    _refuse(where, record, _CHOICES)
  prompt = record[prompt_key]
  # Only instruction rows have an input; elsewhere `input` means something else.
  is_input = prompt_key == 'instruction' and 'input' in record
  extra_key = 'input' if is_input else 'context'
  has_extra = prompt_key in ('instruction', 'question')
  extra = record.get(extra_key, '') if has_extra else ''
  answer = _answer(where, record) if response_key == 'output' else ''
  for key, text in ((prompt_key, prompt), (extra_key, extra)):
    if not isinstance(text, str):
      raise BadRow(where, f'{key} is not text')
  if not (prompt.strip() or extra.strip()):
    raise BadRow(where, 'empty prompt')
  response = record.get(response_key)
  # As text, '[]' is an answer.
  is_text = isinstance(response, str) and response
  if not is_text and records.is_nothing(response):
    record = record | {response_key: answer}
  row = Row(
    instruction=prompt,
    input=extra if extra.strip() else '',
    references=_references(where, record, response_key),
    where=where,
    answer=answer,
  )
  turns = _system(where, record) + _history(where, record)
  if not turns:
    return row
  turns.append({'role': 'user', 'content': row.text})
  return dataclasses.replace(
    row, instruction=row.text, input='', messages=tuple(turns)
  )


def _references(where, record, key):
  value = record.get(key, [])
  references = value if isinstance(value, list) else [value]
  if not all(isinstance(text, str) for text in references):
    raise BadRow(where, f'{key} is not text')
  return _texts(*references)


def _answer(where, record):
  """The short answer beside an output, which may be a number."""
  value = record.get('answer', '')
  if isinstance(value, numbers.Real | decimal.Decimal):
    value = str(value) if math.isfinite(value) else None
  if not isinstance(value, str):
    raise BadRow(where, 'answer is neither text nor a number')
  return value


def _texts(*texts):
  return tuple(text for text in texts if text.strip())


def _system(where, record):
  """The turn that `system` is, if any."""
  key = 'system' if 'system' in record else 'system_prompt'
  text = record.get(key, '')
  if not isinstance(text, str):
    raise BadRow(where, f'{key} is not text')
  return [{'role': 'system', 'content': text}] if text.strip() else []


def _history(where, record):
  """The turns of `history`, as LlamaFactory and ms-swift have it."""
  turns = []
  pairs = record.get('history')
  if records.is_nothing(pairs):
    return []
  for pair in pairs if isinstance(pairs, list) else [pairs]:
    if (
      not isinstance(pair, list | tuple)
      or len(pair) != 2
      or not all(isinstance(text, str) for text in pair)
    ):
      raise BadRow(where, 'history is no list of [user, assistant]')
    turns += [
      {'role': role, 'content': text}
      for role, text in zip(('user', 'assistant'), pair, strict=True)
    ]
  return turns


def _dialogue(record):
  """A DialogSum record as an instruction."""
  return {
    'instruction': 'Summarize the following dialogue.',
    'input': record['dialogue'],
    'output': [
      text
      for key, text in sorted(record.items())
      if re.fullmatch(r'summary\d*', key)
    ],
  }


def _conversation(where, record):
  """Of messages that end with the user's, `output` has the references."""
  key = 'messages' if 'messages' in record else 'conversations'
  messages = record[key]
  if not isinstance(messages, list) or not messages:
    raise BadRow(where, f'{key} is not a list')
  turns = [_turn(where, message) for message in messages]
  weights = [_weight(where, message) for message in messages]
  system = _system(where, record)
  if system and turns[0]['role'] != 'system':
    turns = system + turns
    weights = [1, *weights]
  elif system and turns[0] != system[0]:
    raise BadRow(where, f'system beside the one of {key}')
  _refuse(where, record, ['history'])
  answer = ''
  if turns[-1]['role'] == 'assistant':
    references = _texts(turns.pop()['content'])
  else:
    references = _references(where, record, 'output')
    answer = _answer(where, record)
    weights.append(1)
  if not turns or turns[-1]['role'] != 'user':
    raise BadRow(where, 'messages without a last user turn')
  question = turns[-1]['content']
  if not question.strip():
    raise BadRow(where, 'empty prompt')
  return Row(
    instruction=question,
    references=references,
    messages=tuple(turns) if len(turns) > 1 else None,
    where=where,
    answer=answer,
  ), weights


def _weight(where, message):
  """Whether an assistant's turn is trained on, as OpenAI's files have it."""
  weight = message.get('weight')
  weight = 1 if weight is None else weight
  if not isinstance(weight, int | float) or weight not in (0, 1):
    raise BadRow(where, "a turn's weight is neither 0 nor 1")
  return weight


def _turn(where, message):
  """{'role', 'content'} of a message, or of ShareGPT's `from` and `value`."""
  if not isinstance(message, dict):
    raise BadRow(where, 'messages need a role and text as content')
  _refuse(where, message, _CALLS)
  role = message.get('role', message.get('from'))
  content = message.get('content', message.get('value'))
  if isinstance(content, list):
    content = ''.join(_part(where, part) for part in content)
  if not isinstance(role, str) or not isinstance(content, str):
    raise BadRow(where, 'messages need a role and text as content')
  if role not in _ROLES:
    raise BadRow(where, f'a turn of role {role[:40]!r}')
  turn = {'role': _ROLES[role], 'content': content}
  # Written again, it is not trained on either.
  return turn | ({} if _weight(where, message) else {'weight': 0})


def _part(where, part):
  text = part.get('text') if isinstance(part, dict) else None
  if not isinstance(text, str) or part.get('type') != 'text':
    raise BadRow(where, 'a part of a content is not text')
  return text
