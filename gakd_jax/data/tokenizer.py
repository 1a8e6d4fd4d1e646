"""Tokenizers: loading, comparing, from rows to ids and back to answers.

Prompt and response are tokenised apart, so that the ids of a training prompt
are those that generation starts from.
"""

import dataclasses
import os
import re

from gakd_jax import UserError
from gakd_jax.data import templates

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


def encode(tokenizer, row, template):
  """Returns (prompt ids, ids of the first reference and EOS) as lists.

  A row without references has no response ids. Raises BadRow.
  """
  prompt = templates.prompt_text(template, row, tokenizer)
  return encode_batch(tokenizer, [prompt], [row], template)[0]


def encode_batch(tokenizer, prompts, rows, template):
  """`encode` for many rows at once, given their prompt texts."""
  eos = templates.eos_id(template, tokenizer)
  prompt_ids = _ids(tokenizer, prompts, _adds_bos(template))
  responses = [row.references[0] if row.references else '' for row in rows]
  response_ids = _ids(tokenizer, responses, add_special_tokens=False)
  return [
    (prompt, [*response, eos] if row.references else [])
    for prompt, response, row in zip(
      prompt_ids, response_ids, rows, strict=True
    )
  ]


def fit_prompt(tokenizer, row, template, max_prompt_length):
  """The prompt ids of a row, at most max_prompt_length of them.

  A longer prompt loses text from the middle of its input, then of its
  instruction (of its longest message, in a conversation), so that the task at
  the start and the words that ask for the answer at the end both stay. Raises
  UserError if the template alone is longer.
  """

  def ids_of(texts):
    text = templates.prompt_text(template, _with_texts(row, texts), tokenizer)
    return _ids(tokenizer, [text], _adds_bos(template))[0]

  texts = _texts(row)
  ids = ids_of(texts)
  if len(ids) <= max_prompt_length:
    return ids
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
    return ids
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


def decode(tokenizer, ids):
  """The answer that ids spell: up to EOS, no special tokens, no thinking."""
  stops = templates.stops(tokenizer)
  ids = [int(i) for i in ids]
  end = next((n for n, i in enumerate(ids) if i in stops), len(ids))
  text = tokenizer.decode(
    ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
  )
  # Thinking tokens are not "special". The prompt may have opened the block, and
  # an answer that was cut while thinking has no answer.
  text = re.sub(r'^.*?</think>', '', text, count=1, flags=re.DOTALL)
  return re.sub(r'<think>.*', '', text, flags=re.DOTALL).strip()


def _adds_bos(template):
  return template not in templates.CHAT_TEMPLATES


def _ids(tokenizer, texts, add_special_tokens):
  if not texts:
    return []
  # One call for all texts: the tokenizer splits it over its Rust threads.
  return tokenizer(
    texts,
    add_special_tokens=add_special_tokens,
    return_attention_mask=False,
    verbose=False,
  ).input_ids
