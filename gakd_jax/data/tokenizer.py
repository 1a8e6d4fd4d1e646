"""Tokenizers: loading them, and telling whether two are the same."""

import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

from gakd_jax import UserError, fingerprint, json_file

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


# What renders and splits texts.
_LIBRARIES = 'transformers', 'tokenizers', 'jinja2'
_WANTED = 'give a directory with tokenizer.json, or a hub id'
# Of a directory, beside the vocabularies of older formats.
_FILES = (
  *('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'),
  *('added_tokens.json', 'config.json', 'chat_template.jinja'),
)


def load(path):
  """The tokenizer of a directory or hub id; raises UserError in one line."""
  for name in _FILES:
    file = Path(path) / name
    if file.exists() and not file.is_file():  # A pipe would be waited for.
      raise UserError(f'{file}: not a file')
  # Only tokenizers are wanted: that torch is missing is no news.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  import transformers  # Slow to import; the workers that batch do without it.

  try:
    # Left open, remote code would be asked for on the terminal of every host.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      path, trust_remote_code=False
    )
  except Exception as error:  # Its errors have no common class.
    for name in _FILES:  # Which it does not name.
      if name.endswith('.json') and (Path(path) / name).exists():
        json_file.read(Path(path) / name)
    reason = (str(error).splitlines() or [''])[0]
    raise UserError(
      f'{path}: no tokenizer can be loaded ({type(error).__name__}: {reason}); '
      f'{_WANTED}'
    ) from error
  _check(tokenizer, path)
  return tokenizer


def _check(tokenizer, path):
  """Refuses what transformers makes of files that are missing, or odd."""
  if len(tokenizer) == len(tokenizer.added_tokens_encoder):
    raise UserError(
      f'{path}: no tokenizer can be loaded: there is no vocabulary; {_WANTED}'
    )
  found = tokenizer.chat_template
  named = found if isinstance(found, dict) else {'default': found or ''}
  for name, right, expected in (
    (
      'chat_template',
      all(isinstance(text, str) for text in named.values()),
      'a text, or texts by name',
    ),
    (
      'model_max_length',
      isinstance(tokenizer.model_max_length, int | float),
      'a number',
    ),
  ):
    if not right:
      raise UserError(
        f'{path}: {name} of its tokenizer must be {expected}; mend '
        'tokenizer_config.json'
      )


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
  """A text that differs between tokenizers, wherever they lie.

  And between versions of what renders and splits texts.
  """
  with tempfile.TemporaryDirectory() as directory:
    tokenizer.save_pretrained(directory)
    files = sorted(Path(directory).rglob('*.*'))
    ends = Path(tokenizer.name_or_path) / 'generation_config.json'
    files += [ends] * ends.exists()
    return fingerprint.digest(
      [
        *([f.name, hashlib.sha256(f.read_bytes()).hexdigest()] for f in files),
        *([name, importlib.metadata.version(name)] for name in _LIBRARIES),
      ]
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
