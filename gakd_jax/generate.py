"""Answers one prompt, every line that is typed, or a whole data set.

  python -m gakd_jax.generate --model=DIR --prompt='Why is the sky blue?'
  python -m gakd_jax.generate --model=DIR
  python -m gakd_jax.generate --model=DIR --dataset=SPEC --output=FILE.jsonl

Without --prompt, each line of the input is a prompt of its own, without memory
of earlier ones, until an empty line, 'exit' or the end of the input.

With --dataset (see data/sources.py; prompts are enough) the answers become rows
to train on (sequence-level distillation, arXiv 1606.07947). Stopped and started
again, the same command goes on where it was.
"""

import os
import sys
from pathlib import Path

from absl import flags

from gakd_jax import (
  UserError,
  answering,
  best,
  binary,
  hosts,
  models,
  rollout,
  settings,
  sharding,
  streaming,
)
from gakd_jax.data import encoding, sources, templates
from gakd_jax.data import tokenizer as tokenizers
from gakd_jax.models import caches, decoding
from gakd_jax.settings import Natural

_MODEL = flags.DEFINE_string(
  'model', None, 'Hugging Face directory, hub id or run.', required=True
)
_PROMPT = flags.DEFINE_string('prompt', None, 'Answer this, then stop.')
_TEMPLATE = flags.DEFINE_string(
  'template',
  None,
  'What stands around a prompt; default: what a student was trained with; of '
  "another model 'chat' if its tokenizer has a chat template, else 'raw'.",
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
_CACHE = flags.DEFINE_enum(
  'cache', None, caches.KINDS, 'Keys and values of what was read in int8.'
)

_DATASET = flags.DEFINE_multi_string(
  'dataset', None, 'Answer the prompts of this data; may be given repeatedly.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'With --dataset: the .jsonl file that the answers become.'
)
_SAMPLES = flags.DEFINE_integer(
  'samples', 1, 'With --dataset: answers to each prompt.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 32, 'With --dataset: prompts answered together.', lower_bound=1
)
_MAX_PROMPT_LENGTH = flags.DEFINE_integer(
  'max_prompt_length',
  1024,
  'With --dataset: tokens of a prompt; longer ones are shortened.',
  lower_bound=1,
)
_KEEP_UNFINISHED = flags.DEFINE_bool(
  'keep_unfinished',
  False,
  'With --dataset: keep answers that are empty or were cut off.',
)
_LOGPROBS = flags.DEFINE_integer(
  'logprobs',
  0,
  'With --dataset: the most likely ids of each token and their '
  "log-probabilities, for config.teacher.cache='data'; 0: none.",
  lower_bound=0,
)
_FORCE = binary.force_flag()
flags.adopt_module_key_flags(binary)  # So that --help shows them.
_OF_DATASET = (
  _FORCE,
  _OUTPUT,
  _SAMPLES,
  _BATCH_SIZE,
  _MAX_PROMPT_LENGTH,
  _KEEP_UNFINISHED,
  _LOGPROBS,
)


def _check():
  """Refuses numbers that are out of range."""
  known = settings.types_of(rollout.Teacher) | {'seed': Natural}
  given = _sampling() | {
    'seed': _SEED.value,
    'samples': _SAMPLES.value,
    'batch_size': _BATCH_SIZE.value,
  }
  settings.checked('--', given, known, 'generate')


def _sampling():
  """What the flags say of decoding."""
  return {
    'max_new_tokens': _MAX_NEW_TOKENS.value,
    'temperature': _TEMPERATURE.value,
    'top_k': _TOP_K.value,
    'top_p': _TOP_P.value,
    'no_repeat_ngram': _NO_REPEAT_NGRAM.value,
  }


def _tokenizer():
  """The model's tokenizer, and the name of the template."""
  tokenizer = tokenizers.load(models.tokenizer_dir(_MODEL.value))
  default = 'chat' if tokenizer.chat_template else 'raw'
  return tokenizer, best.template_of(_MODEL.value, _TEMPLATE.value, default)


def answers(prompts):
  """Yields the answer (a string) to each prompt as it comes."""
  model = decoding.unstack(
    models.load(_MODEL.value, dtype=_DTYPE.value), cache=_CACHE.value
  )
  tokenizer, template = _tokenizer()
  eos_ids = templates.stop_ids(template, tokenizer)
  for i, prompt in enumerate(prompts):
    try:
      ids, _ = encoding.encode(tokenizer, sources.Row(prompt), template)
    except sources.BadRow as error:
      raise UserError(f'prompt {i + 1}: {error.reason}') from error
    response = streaming.generate(
      model,
      [ids],
      eos_ids=eos_ids,
      seed=_SEED.value + i,  # A question that is repeated is drawn anew.
      valid_vocab=tokenizers.size(tokenizer),
      **_sampling(),
    )[0]
    yield encoding.decode(tokenizer, response)


def write_dataset():
  """Writes --output; what can be wrong is looked at before the weights are."""
  if _PROMPT.value is not None:
    raise UserError('--dataset has its own prompts; leave --prompt out')
  if not (_OUTPUT.value or '').endswith('.jsonl'):
    raise UserError('--dataset needs --output=FILE.jsonl, to write answers to')
  binary.start_hosts()
  if hosts.of_first(lambda: os.path.exists(_OUTPUT.value)):
    raise UserError(f'--output={_OUTPUT.value}: it exists; name another file')
  hosts.only_first(
    lambda: Path(_OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
  )
  writer = rollout.Teacher(
    samples=_SAMPLES.value,
    batch_size=_BATCH_SIZE.value,
    cache=_CACHE.value,
    **_sampling(),
  )
  tokenizer, template = _tokenizer()
  templates.eos_id(template, tokenizer)
  rows, bad = sources.load(_DATASET.value, need_response=False)
  for reason, n in sorted(bad.items()):
    print(f'data: {n} skipped: {reason}', flush=True)
  answering.write(
    writer,
    # All devices share the prompts.
    decoding.unstack(
      models.load(_MODEL.value, _DTYPE.value, sharding.make_mesh()),
      cache=_CACHE.value,
    ),
    tokenizer,
    rows,
    _OUTPUT.value,
    source={
      'model': _MODEL.value,
      'weights': models.identity(_MODEL.value),
      'dtype': _DTYPE.value,
      'data': _DATASET.value,
      'template': template,
    },
    template=template,
    max_prompt_length=_MAX_PROMPT_LENGTH.value,
    seed=_SEED.value,
    keep_unfinished=_KEEP_UNFINISHED.value,
    logprobs=_LOGPROBS.value,
    force=_FORCE.value,
  )


def typed_lines():
  """Lines of the input, up to an empty one, 'exit' or the end."""
  sign = '> ' if sys.stdin.isatty() else ''
  while True:
    try:
      line = input(sign).strip()
    except EOFError:
      return
    except UnicodeDecodeError as error:
      raise UserError(f'the input is no text: {error}') from error
    if line in ('', 'exit'):
      return
    yield line


def _main(argv):
  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]!r}; quote the prompt')
  _check()
  binary.use_compilation_cache()
  if _DATASET.value:
    write_dataset()
    return
  for flag in (*_OF_DATASET, *binary.HOSTS):
    if flag.present:
      raise UserError(f'--{flag.name} is of --dataset; give both, or none')
  sys.stdout.reconfigure(errors='backslashreplace')  # A terminal of ASCII.
  prompts = typed_lines() if _PROMPT.value is None else [_PROMPT.value]
  try:
    for answer in answers(prompts):
      print(answer, flush=True)
  except KeyboardInterrupt:
    print()


if __name__ == '__main__':
  binary.guarded(_main, sys.argv)
