"""The tokenizer that a .gguf file describes, as tokenizer.json.

Such a file has a vocabulary, merges or scores, kinds of tokens, and the name
of the rule that cuts a text into words. Rules that are not known here are
refused: ids would be others than those that the model was trained with. The
first files of llama.cpp name none, and only GPT-2's are read.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from gakd_jax import UserError

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6

_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA3.replace('{1,3}', '')
# tokenizer.ggml.pre: how words are cut out of a text.
_WORDS = {
  name: words
  for names, words in (
    (('gpt-2',), ()),
    (
      ('smollm', 'refact', 'command-r', 'starcoder'),
      (pre_tokenizers.Digits(individual_digits=True),),
    ),
    (('llama-bpe', 'llama3', 'llama-v3'), _LLAMA3),
    (('qwen2', 'deepseek-r1-qwen'), _QWEN2),
  )
  for name in names
}


def write(said, path):
  """Writes the tokenizer's files into a directory.

  said: {key: value} of the file's metadata.
  """
  kind = said.get('tokenizer.ggml.model')
  build = {'gpt2': _of_bytes, 'llama': _of_pieces}.get(kind)
  tokens = said.get('tokenizer.ggml.tokens')
  if build is None or not tokens:
    raise UserError(
      f'tokenizer {kind!r} is not supported; supported are gpt2 (of bytes) and '
      'llama (of SentencePiece)'
    )
  if len(set(tokens)) < len(tokens):
    raise UserError('tokenizer.ggml.tokens has a token twice')
  kinds = _kinds(said)
  vocab = {token: i for i, token in enumerate(tokens) if token in kinds}
  tokenizer = build(said, vocab)
  for token, kind_of in kinds.items():
    if kind_of in (_CONTROL, _USER_DEFINED):
      add = tokenizer.add_tokens
      if kind_of == _CONTROL:
        add = tokenizer.add_special_tokens
      add([tokenizers.AddedToken(token, normalized=False)])
  if tokenizer.get_vocab_size() != len(vocab):
    raise UserError(
      f'its tokenizer would have {tokenizer.get_vocab_size()} tokens, and '
      f'tokenizer.ggml.tokens has {len(vocab)}'
    )
  special = {
    f'{ours}_token': tokens[i]
    for ours, theirs in (
      ('bos', 'bos'),
      ('eos', 'eos'),
      ('unk', 'unknown'),
      ('pad', 'padding'),
    )
    if (i := special_id(said, theirs)) is not None
  }
  # llama.cpp's own defaults.
  has_begin = build is _of_pieces or _words(said) is _LLAMA3
  begins = said.get('tokenizer.ggml.add_bos_token', has_begin)
  ends = said.get('tokenizer.ggml.add_eos_token', False)
  _surround(
    tokenizer,
    special['bos_token'] if begins and 'bos_token' in special else None,
    special['eos_token'] if ends and 'eos_token' in special else None,
  )
  tokenizer.save(str(Path(path) / 'tokenizer.json'))
  config = special | {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'add_bos_token': bool(begins),
    'add_eos_token': bool(ends),
  }
  text = json.dumps(config, indent=2, ensure_ascii=False)
  (Path(path) / 'tokenizer_config.json').write_text(text + '\n')
  if template := said.get('tokenizer.chat_template'):
    (Path(path) / 'chat_template.jinja').write_text(template)


def _kinds(said):
  """{token: its kind}, without the rows of an embedding that have no token.

  The converter calls these [PAD<id>], unused or, in older versions, the user's.
  """
  tokens = said['tokenizer.ggml.tokens']
  kinds = said.get('tokenizer.ggml.token_type') or [None] * len(tokens)
  if len(kinds) != len(tokens):
    raise UserError(
      f'tokenizer.ggml.token_type has {len(kinds)} numbers for {len(tokens)} '
      'tokens'
    )
  return {
    token: kind
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
    if not (kind in (_UNUSED, _USER_DEFINED) and token == f'[PAD{i}]')
  }


# What llama.cpp takes them to be where a file of SentencePiece does not say.
_OF_PIECES = {'unknown': 0, 'bos': 1, 'eos': 2}


def special_id(said, name):
  """The id of 'bos', 'eos', 'unknown' or 'padding'; None: there is none."""
  key = f'tokenizer.ggml.{name}_token_id'
  n = len(said['tokenizer.ggml.tokens'])
  is_pieces = said.get('tokenizer.ggml.model') == 'llama'
  i = said.get(key, _OF_PIECES.get(name, -1) if is_pieces else -1)
  if i in (-1, 2**32 - 1):
    return None
  if not 0 <= i < n:
    raise UserError(f'{key} is {i}, and there are {n} tokens')
  return int(i)


def _words(said):
  """How words are cut, of `_WORDS`."""
  words = said.get('tokenizer.ggml.pre', 'default')
  if words == 'default' and said.get('general.architecture') == 'gpt2':
    words = 'gpt-2'
  if words not in _WORDS:
    raise UserError(
      f'tokenizer.ggml.pre {words!r} is not supported; supported are '
      f'{", ".join(_WORDS)}: take a newer file, or the Hugging Face directory'
    )
  return _WORDS[words]


def _of_bytes(said, vocab):
  """BPE over bytes, GPT-2's alphabet."""
  cut = _words(said)
  merges = [tuple(x.split(' ')) for x in said.get('tokenizer.ggml.merges', ())]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab, merges, ignore_merges=cut is _LLAMA3)
  )
  if isinstance(cut, str):
    split = pre_tokenizers.Split(tokenizers.Regex(cut), 'isolated')
    parts = split, pre_tokenizers.ByteLevel(False, use_regex=False)
  else:
    parts = *cut, pre_tokenizers.ByteLevel(False)
  if cut is _QWEN2:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _of_pieces(said, vocab):
  """SentencePiece's BPE: merges follow from the scores of what they make."""
  unknown, tokens = special_id(said, 'unknown'), said['tokenizer.ggml.tokens']
  scores = said.get('tokenizer.ggml.scores', ())
  if said.get('general.architecture') in ('gemma', 'gemma2'):
    scores = [-i for i in range(len(tokens))]  # Its own are no order.
  if len(scores) != len(tokens):
    raise UserError(
      f'tokenizer.ggml.scores has {len(scores)} numbers for {len(tokens)} '
      'tokens'
    )
  scores = {x: y for x, y in zip(tokens, scores, strict=True) if x in vocab}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab,
      _merges(vocab, scores),
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=_BYTE in said.get('tokenizer.ggml.token_type', ()),
    )
  )
  blanks, begins = [normalizers.Replace(' ', '▁')], []
  if said.get('tokenizer.ggml.add_space_prefix', True):
    blanks.insert(0, normalizers.Prepend('▁'))
    begins = [decoders.Strip(' ', 1, 0)]
  tokenizer.normalizer = normalizers.Sequence(blanks)
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *begins,
    ]
  )
  return tokenizer


def _merges(vocab, scores):
  """Pairs of pieces that are a piece, the best first."""
  found = []
  for piece, score in scores.items():
    for i in range(1, len(piece)):
      a, b = piece[:i], piece[i:]
      if a in vocab and b in vocab:
        found.append((-score, vocab[a], vocab[b], a, b))
  return [(a, b) for *_, a, b in sorted(found)]


def _surround(tokenizer, begin, end):
  """Of every text: its first and its last token."""
  around = [x for x in (begin, end) if x]
  if around:
    begin, end = ([x] if x else [] for x in (begin, end))
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[*begin, '$A', *end],
      pair=[*begin, '$A', *end, *(f'{x}:1' for x in begin), '$B:1']
      + [f'{x}:1' for x in end],
      special_tokens=[(x, tokenizer.token_to_id(x)) for x in around],
    )
