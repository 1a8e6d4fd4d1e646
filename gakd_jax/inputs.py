"""From a config to the data of a run: texts, batches, a teacher's answers.

`run` is a `build.Run`.
"""

import dataclasses
import json

import numpy as np

from gakd_jax import (
  UserError,
  answering,
  fingerprint,
  hosts,
  json_file,
  log,
  models,
  sharding,
  teacher_cache,
)
from gakd_jax.data import aligned, logprobs, pipeline, sources
from gakd_jax.data import texts as texts_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import decoding

_LEAST_COVERAGE = 0.05
_MOST_TIMES = 1000  # An epoch that has a row more often is a mistake.


def rows(config, writer, places):
  """The rows of the training data at some places."""
  return sources.at(config.data.train, _rules(config, writer), places)


def _rules(config, writer):
  c = config.data
  return sources.Rules(c.on_bad_row, writer.needs_responses, c.turns)


def texts(config, spec, readers, writer, kinds=()):
  """The tokenised rows of a data spec; says what was left out and why.

  readers: (tokenizer, template) of the student; and of the teacher, if it reads
    the text in tokens of its own. What relates these is of `kinds`, see
    `data.aligned`.
  """
  if spec is None:
    raise UserError('config.data.train is not set: name a data file')
  c = config.data
  _check(c, spec)
  rules = _rules(config, writer)
  contents = sources.identity(spec)
  read = [
    texts_lib.load(
      spec,
      contents,
      tokenizer,
      template=template,
      rules=rules,
      thinking=c.thinking,
      root=c.cache,
    )
    for tokenizer, template in readers
  ]
  every, bad = read[0]
  if config.teacher.cache == 'data':
    every, wrong = logprobs.load(
      spec,
      contents,
      every,
      readers[0],
      rules=rules,
      size=config.teacher.cache_size,
      root=c.cache,
    )
    bad += wrong
  if len(read) == 2:
    tokenizers = [tokenizer for tokenizer, _ in readers]
    n = len(every)
    every = aligned.load(every, read[1][0], tokenizers, kinds, c.cache)
    if n > len(every):
      bad['not to be shown to the teacher'] = n - len(every)
    _say_coverage(every, tokenizers)
  found, cut = every.fit(c.max_length, c.max_prompt_length, writer.prefix)
  n = len(every) - len(found)
  if n:
    bad['prompt too long'] = n
    _refuse_long(rules, spec, every, c.max_prompt_length)
  if not len(found):
    reasons = ', '.join(f'{n} {reason}' for reason, n in bad.most_common())
    raise UserError(
      f'{spec}: no row is left ({reasons}); max_prompt_length is '
      f'{c.max_prompt_length}, the shortest prompt has {every.prompts.min()} '
      f'tokens in the template {c.template!r}'
    )
  size = found.stats
  facts = [
    f'data: {size["rows"]:,} rows',
    f'tokens: {size["prompt_tokens"]:,} of prompts, '
    f'{size["response_tokens"]:,} of responses',
    *([f'{cut:,} truncated'] if cut else []),
    *(f'{n:,} skipped: {why}' for why, n in sorted(bad.items())),
  ]
  print('; '.join(facts), flush=True)
  return found


def first_rows(config, tokenizer, n):
  """[(ids_BT, segments_BT)] of the first rows of the data, a text each."""
  c = config.data
  texts, _ = texts_lib.load(
    c.train,
    sources.identity(c.train),
    tokenizer,
    template=c.template,
    rules=sources.Rules(c.on_bad_row, False, c.turns),  # Prompts are text, too.
    thinking=c.thinking,
    root=c.cache,
  )
  texts, _ = texts.fit(c.max_length, c.max_prompt_length)
  batches = pipeline.batches(
    texts.take(np.arange(min(n, len(texts)))),
    batch_size=min(16, n),
    max_length=c.max_length,
    pad_id=tokenizer_lib.pad_id(tokenizer),
    epochs=1,
  )
  return [(x.student.ids_BT, x.student.segments_BT) for x in batches]


def _say_coverage(every, tokenizers):
  """Prints which share of tokens has a partner; refuses almost none."""
  for name, share in every.coverage().items():
    print(f'{name}: {share:.1%} of response tokens have a partner', flush=True)
    if share < _LEAST_COVERAGE:
      s, t = (
        tokenizer.decode(text[1])[:60]
        for tokenizer, text in zip(tokenizers, every[0], strict=False)
      )
      raise UserError(
        f'{name}: only {share:.1%} of the response tokens of the student have '
        f'a partner among those of the teacher (it takes {_LEAST_COVERAGE:.0%})'
        f'; the student reads {s!r} where the teacher reads {t!r}; compare '
        'tokenizers and templates'
      )


def _check(settings, spec):
  c = settings
  if not 0 < c.max_prompt_length < c.max_length:
    raise UserError(
      f'config.data.max_prompt_length is {c.max_prompt_length} and max_length '
      f'{c.max_length}: the prompt must leave room for a response'
    )
  n = len(sources.parts(spec))
  if c.weights is not None and (
    len(c.weights) != n or max(c.weights) > _MOST_TIMES
  ):
    raise UserError(
      f'config.data.weights={c.weights}: give a number, at most {_MOST_TIMES}, '
      f'for each of the {n} parts of config.data.train'
    )


def _refuse_unseen(weights, texts):
  """Of parts that have so few rows that an epoch would have none of them."""
  times = np.asarray(weights)[texts.sets]
  for value in np.unique(times[times > 0]):
    if round(value * np.sum(times == value)) == 0:
      raise UserError(
        f'config.data.weights={weights}: {value} of {np.sum(times == value)} '
        'rows is none in any epoch; raise it'
      )


def _refuse_long(rules, spec, texts, most):
  """Raises the first row whose prompt is too long, if rows are not skipped."""
  if rules.on_bad_row == 'fail':
    first = np.flatnonzero(texts.prompts > most)[0]
    (row,) = sources.at(spec, rules, [texts.places[first]])
    raise sources.BadRow(row.where, 'prompt too long')


def training_batches(run):
  """The data iterator."""
  c = run.config
  found = run.texts
  if found is None:
    found = texts(
      c, teacher_answers(run), run.reading, run.writer, run.objective.align
    )
  if c.data.weights is not None:
    _refuse_unseen(c.data.weights, found)
  cached = None
  if c.teacher.cache == 'data':
    cached = found.known.kept(found)
  elif c.teacher.cache != 'none' and run.has_weights:
    cached = teacher_cache.load(c, run.objective, run.models, found, run.mesh)
  pads = [tokenizer_lib.pad_id(tokenizer) for tokenizer, _ in run.reading]
  batches = pipeline.batches(
    found,
    batch_size=c.train.batch_size,
    max_length=c.data.max_length - run.writer.room,
    room=run.writer.room,
    pad_id=pads if len(pads) == 2 else pads[0],
    buckets=c.data.buckets,
    packing=c.data.packing,
    seed=c.seed,
    weights=c.data.weights,
    drop_last=c.data.drop_last,
    cached=cached,
    rows=sharding.own_rows(c.train.batch_size, run.mesh),
  )
  facts = [
    f'batches: {batches.steps_per_epoch:,} an epoch',
    f'{batches.padding:.0%} of their slots empty',
  ]
  if batches.empty:
    n = c.train.batch_size
    facts.append(f'one of them has {n - batches.empty} of {n} rows')
  print('; '.join(facts), flush=True)
  return batches


def total_steps(config, batches):
  """How many optimizer steps the run takes."""
  if config.train.steps is not None:
    return config.train.steps
  return batches.steps(config.train.epochs)


def teacher_answers(run):
  """The data file that the teacher wrote; it is written if it is not there.

  Raises:
    UserError: if what is there was written under other settings.
  """
  c = run.config
  path = run.workdir / 'answers.jsonl'
  if c.data.train is None:
    raise UserError('config.data.train is not set: name a file of prompts')
  source = {
    'model': c.teacher.path,
    'weights': models.identity(c.teacher.path),
    'data': c.data.train,
  }
  settings = dict(
    template=run.readers[-1][1],
    max_prompt_length=c.data.max_prompt_length,
    seed=c.seed,
    on_bad_row=c.data.on_bad_row,
  )
  made_with = source | settings | dataclasses.asdict(run.writer)
  made_with['rows'] = sources.identity(c.data.train)
  made_with = json.loads(json.dumps(made_with, default=str))  # As it is read.
  if not hosts.of_first(lambda: _are_there(path, made_with, run.force)):
    rows, bad = sources.load(
      c.data.train, on_bad_row=c.data.on_bad_row, need_response=False
    )
    for reason, n in sorted(bad.items()):
      print(f'data: {n} skipped: {reason}', flush=True)
    answering.write(
      run.writer,
      decoding.unstack(run.models.teacher(), cache=run.writer.cache),
      run.models.tokenizers[1],
      rows,
      path,
      source=source,
      **settings,
      force=run.force,
    )
  return path


def _are_there(path, made_with, force):
  """Whether answers are; else, notes what those to come are made with."""
  about = path.with_name('answers.about.json')
  if path.exists():
    began = json_file.read(about) if about.exists() else made_with
    if not fingerprint.check(path, began, made_with, force):
      return True
    path.unlink()
  log.write_atomically(about, log.to_json(made_with) + '\n')
  return False
