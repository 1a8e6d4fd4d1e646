"""Tokenizers: loading, comparing, from rows to ids and back to answers.

Prompt and response are tokenised apart, so that the ids of a training prompt
are those that generation starts from. Special tokens are what templates write:
see `special`; of template `raw`, what the prompt itself holds.
"""

import dataclasses
import hashlib
import os
import re
import tempfile
from pathlib import Path

from gakd_jax import UserError, fingerprint
from gakd_jax.data import special as special_lib
from gakd_jax.data import templates
from gakd_jax.data.sources import BadRow
from gakd_jax.data.special import Special

# Where tokenizers with one vocabulary differ: case, accents, blanks, digits,
# normal forms, joined scripts, special tokens.
_PROBES = (
  'The quick brown fox doesn\'t jump; "it" CAN\'T.',
  ' two  spaces\n\n\n\ttabs \r\n and a trailing one ',
  '1234567890 3.14159 1,000,000 2026-01-31',
  'na\u00efve caf\u00e9 cafe\u0301 \ufb01n \u00bd \u2460 \u2126',
  '\u4f60\u597d\u4e16\u754c \u0928\u092e\u0938\u094d\u0924\u0947',
  '\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2014 \u2026',
  'def f(x):\n  return {"a": x**2}  # <b>&amp;</b>',
  '<s></s><|im_start|><|im_end|><|endoftext|><think></think>[INST]<unk>',
)


def load(path):
  """The tokenizer of a directory or hub id; raises UserError in one line."""
  # Only tokenizers are wanted: that torch is missing is no news.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  import transformers  # Slow to import; the workers that batch do without it.

  try:
    # Left open, remote code would be asked for on the terminal of every host.
    return transformers.AutoTokenizer.from_pretrained(
      path, trust_remote_code=False
    )
  except Exception as error:  # Its errors have no common class.
    reason = (str(error).splitlines() or [''])[0]
    raise UserError(
      f'{path}: no tokenizer can be loaded ({type(error).__name__}: {reason}); '
      'give a directory with tokenizer.json, or a hub id'
    ) from error


def pad_id(tokenizer):
  """The id that fills rows; it is never looked at, so EOS serves as well."""
  for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token_id is not None:
      return token_id
  raise UserError(
    f'tokenizer {tokenizer.name_or_path}: it names neither a pad nor an EOS '
    'token; set "eos_token" in its tokenizer_config.json'
  )


def size(tokenizer):
  """How many ids there are, up to the largest; some may have no token."""
  return 1 + max(tokenizer.get_vocab().values())


def identity(tokenizer):
  """A text that differs between tokenizers, wherever they lie."""
  with tempfile.TemporaryDirectory() as directory:
    tokenizer.save_pretrained(directory)
    files = sorted(Path(directory).rglob('*.*'))
    return fingerprint.digest(
      [[f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]
    )


def check_same(student, teacher, student_path, teacher_path):
  """Raises UserError unless both tokenizers give every text the same ids.

  Vocabularies of one size prove nothing: ids of one tokenizer fed to a model
  of another are read as different text.
  """
  difference = _difference(student, teacher)
  if difference:
    raise UserError(
      f'{student_path} and {teacher_path} have different tokenizers: '
      f'{difference}; use a teacher with the tokenizer of the student, or a '
      'cross-tokenizer objective'
    )


def are_same(student, teacher):
  """Whether both tokenizers give every text the same ids."""
  return _difference(student, teacher) is None


def _difference(student, teacher):
  s_vocab, t_vocab = student.get_vocab(), teacher.get_vocab()
  if s_vocab != t_vocab:
    different = dict(s_vocab.items() ^ t_vocab.items())
    s_tokens, t_tokens = (
      {i: token for token, i in vocab.items() if token in different}
      for vocab in (s_vocab, t_vocab)
    )
    first = min(
      i
      for i in s_tokens.keys() | t_tokens.keys()
      if s_tokens.get(i) != t_tokens.get(i)
    )
    s_token, t_token = (
      repr(tokens[first]) if first in tokens else 'absent'
      for tokens in (s_tokens, t_tokens)
    )
    return f'token {first} is {s_token} in the first and {t_token} in the other'
  for text in _PROBES:
    s_ids, t_ids = (
      tokenizer(text, add_special_tokens=False).input_ids
      for tokenizer in (student, teacher)
    )
    if s_ids != t_ids:
      return f'they split {text!r} differently'
  return None


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
    prompt = _some(row, start + ids[0])
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
    return start + ids

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
