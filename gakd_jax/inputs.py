"""From a config to the data of a run: examples, batches, a teacher's answers.

`run` is a `build.Run`.
"""

import dataclasses
import math

import jax

from gakd_jax import UserError, answering, models
from gakd_jax.data import pipeline, sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import decoding


def examples(config, spec, tokenizer, writer):
  """The tokenised rows of a data spec; says what was left out and why."""
  if spec is None:
    raise UserError('config.data.train is not set: name a data file')
  c = config.data
  rows, bad = sources.load(
    spec, on_bad_row=c.on_bad_row, need_response=writer.needs_responses
  )
  encoded, bad_too = pipeline.encode_rows(
    rows,
    tokenizer,
    template=c.template,
    max_length=c.max_length,
    max_prompt_length=c.max_prompt_length,
    on_bad_row=c.on_bad_row,
    thinking=c.thinking,
  )
  if writer.prefix is not None:
    encoded = [_first(writer.prefix, e) for e in encoded]
  size = pipeline.stats(encoded)
  facts = [
    f'data: {size["examples"]:,} rows',
    f'tokens: {size["prompt_tokens"]:,} of prompts, '
    f'{size["response_tokens"]:,} of responses',
    *([f'{size["truncated"]} truncated'] if size['truncated'] else []),
    *(f'{n} skipped: {why}' for why, n in sorted((bad + bad_too).items())),
  ]
  print('; '.join(facts), flush=True)
  return encoded


def _first(n, example):
  return dataclasses.replace(
    example,
    response_ids=example.response_ids[:n],
    truncated=example.truncated or len(example.response_ids) > n,
  )


def training_batches(run):
  """The data iterator."""
  c = run.config
  encoded = run.examples
  if encoded is None:
    encoded = examples(
      c, teacher_answers(run), run.models.tokenizer, run.writer
    )
  batches = pipeline.batches(
    encoded,
    batch_size=c.train.batch_size,
    max_length=c.data.max_length - run.writer.room,
    room=run.writer.room,
    pad_id=tokenizer_lib.pad_id(run.models.tokenizer),
    buckets=c.data.buckets,
    packing=c.data.packing,
    seed=c.seed,
    workers=c.data.workers,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  print(
    f'batches: {batches.steps_per_epoch} an epoch, '
    f'{batches.padding:.0%} of their slots empty',
    flush=True,
  )
  return batches


def total_steps(config, steps_per_epoch):
  """How many optimizer steps the run takes."""
  if config.train.steps is not None:
    return config.train.steps
  return math.ceil(config.train.epochs * steps_per_epoch)


def teacher_answers(run):
  """The data file that the teacher wrote; it is written if it is not there."""
  c = run.config
  path = run.workdir / 'answers.jsonl'
  if not path.exists():
    if c.data.train is None:
      raise UserError('config.data.train is not set: name a file of prompts')
    rows, bad = sources.load(
      c.data.train, on_bad_row=c.data.on_bad_row, need_response=False
    )
    for reason, n in sorted(bad.items()):
      print(f'data: {n} skipped: {reason}', flush=True)
    answering.write(
      run.writer,
      decoding.unstack(run.models.teacher()),
      run.models.tokenizers[1],
      rows,
      path,
      source={
        'model': c.teacher.path,
        'weights': models.identity(c.teacher.path),
        'data': c.data.train,
      },
      template=c.data.template,
      max_prompt_length=c.data.max_prompt_length,
      seed=c.seed,
      on_bad_row=c.data.on_bad_row,
      force=run.force,
    )
  return path
