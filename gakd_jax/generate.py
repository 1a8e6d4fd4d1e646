"""Answers one prompt, or every line that is typed.

  python -m gakd_jax.generate --model=DIR --prompt='Why is the sky blue?'
  python -m gakd_jax.generate --model=DIR

Without --prompt, each line of the input is a prompt of its own, without memory
of earlier ones, until an empty line, 'exit' or the end of the input.
"""

import sys

from absl import app, flags

from gakd_jax import UserError, models, sampling
from gakd_jax.data import sources, templates
from gakd_jax.data import tokenizer as tokenizers

_MODEL = flags.DEFINE_string(
  'model', None, 'Hugging Face directory or hub id.', required=True
)
_PROMPT = flags.DEFINE_string('prompt', None, 'Answer this, then stop.')
_TEMPLATE = flags.DEFINE_string(
  'template',
  None,
  "What stands around a prompt; default: 'chat' if the tokenizer has a chat "
  "template, else 'raw'.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 256, 'Tokens of an answer, at most.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 is greedy.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Most likely tokens kept; 0 is off.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Most likely mass kept; 1 is off.')
_NO_REPEAT_NGRAM = flags.DEFINE_integer(
  'no_repeat_ngram', 0, 'No n tokens in a row occur twice; 0 is off.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Same seed, same answers.')
_DTYPE = flags.DEFINE_enum(
  'dtype', None, ['float32', 'bfloat16'], "Default: that of the model's file."
)


def answers(prompts):
  """Yields the answer (a string) to each prompt as it comes."""
  model = models.load(_MODEL.value, dtype=_DTYPE.value)
  tokenizer = tokenizers.load(models.tokenizer_dir(_MODEL.value))
  template = _TEMPLATE.value
  if template is None:
    template = 'chat' if tokenizer.chat_template else 'raw'
  eos_ids = (templates.eos_id(template, tokenizer),)
  for i, prompt in enumerate(prompts):
    row = sources.Row(prompt, where=f'prompt {i + 1}')
    ids, _ = tokenizers.encode(tokenizer, row, template)
    response = sampling.generate(
      model,
      [ids],
      max_new_tokens=_MAX_NEW_TOKENS.value,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      no_repeat_ngram=_NO_REPEAT_NGRAM.value,
      eos_ids=eos_ids,
      seed=_SEED.value + i,  # A question that is repeated is drawn anew.
      valid_vocab=len(tokenizer),
    )[0]
    yield tokenizers.decode(tokenizer, response)


def typed_lines():
  """Lines of the input, up to an empty one, 'exit' or the end."""
  sign = '> ' if sys.stdin.isatty() else ''
  while True:
    try:
      line = input(sign).strip()
    except EOFError:
      return
    if line in ('', 'exit'):
      return
    yield line


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}; quote the prompt')
  prompts = typed_lines() if _PROMPT.value is None else [_PROMPT.value]
  try:
    for answer in answers(prompts):
      print(answer, flush=True)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print()


if __name__ == '__main__':
  app.run(main)
