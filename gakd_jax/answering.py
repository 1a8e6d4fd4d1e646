"""A model answers the prompts of a data set, in a file to train on.

For the writer `rollout.Teacher` and `python -m gakd_jax.generate --dataset`.
"""

import collections
import dataclasses
import json
import time
from pathlib import Path

from gakd_jax import (
  UserError,
  fingerprint,
  hosts,
  log,
  odds,
  partial,
  settings,
  streaming,
)
from gakd_jax.data import encoding, sources, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import scores
from gakd_jax.settings import Natural

# A sample's place is its row and, in the bits above these, its number: what it
# draws does not depend on how many rows and samples there are.
_ROW_BITS = 24
_KEPT = {
  'i': Natural,
  'problem': str | None,
  'sample': Natural,
  'finished': bool,
  'tokens': Natural,
}
MOST_SAMPLES = 1 << (32 - _ROW_BITS)


def write(
  writer,
  model,
  tokenizer,
  rows,
  path,
  *,
  source,
  template,
  max_prompt_length,
  seed,
  keep_unfinished=False,
  logprobs=0,
  on_bad_row='skip',
  force=False,
):
  """Writes a data file in which a model answers the prompts of `rows`.

  Each line can be trained on: `instruction, input, output`, or `messages` for
  a conversation. Beside them stand `sample` (0 ... samples - 1), `finished`
  (it ended with an EOS), `tokens` (its number, without the EOS), for a row with
  references `rouge_l`, and where they are asked for `logprobs`. Lines are in
  the order of `rows`. An answer depends on the seed, its row's index and its
  sample's number alone.

  Finished answers are kept in `<path>.partial`: killed and called again, this
  goes on there, and the file is the same to the byte. It appears when it is
  complete. On several processes the first one writes, and `path` is of a file
  system that all see.

  Args:
    writer: a `rollout.Teacher`: how answers are drawn, and how many to each
      prompt.
    model: a `Decoder` of `decoding.unstack`, which has the writer's `cache`.
    tokenizer, rows, path: see above.
    source: what identifies model and data; a dict of names to JSON values.
    keep_unfinished: otherwise answers that are empty or did not end within
      `max_new_tokens` are left out: a student would learn not to stop.
    logprobs: of each token, how many of the most likely ids stand beside it,
      see `odds`; 0: none.
    on_bad_row: 'skip' or 'fail', of rows that the template cannot hold.
    force: begins anew where `<path>.partial` is of other settings.

  Returns:
    How many answers were left out, and rows skipped, by reason: a Counter.

  Raises:
    UserError: also if `<path>.partial` is of other settings.
  """
  path = Path(path)
  decoding = dataclasses.asdict(writer) | {
    'eos_ids': templates.stop_ids(template, tokenizer),
    'seed': seed,
    'valid_vocab': tokenizer_lib.size(tokenizer),
  }
  samples, cache = decoding.pop('samples'), decoding.pop('cache')
  prompts, left_out = _prompts(
    tokenizer, rows, template, max_prompt_length, on_bad_row
  )
  # Of each answer: its prompt, its row and its number.
  wanted = [(ids, r, n) for r, ids in prompts.items() for n in range(samples)]
  references = [rows[r].references for r in prompts]
  begun_with = (
    source
    | decoding
    | {
      'samples': samples,
      'cache': cache,
      'rows': fingerprint.digest(
        [*zip(prompts.items(), references, strict=True)]
      ),
    }
  )
  ask, vocab = None, decoding['valid_vocab']
  if logprobs >= vocab:
    raise UserError(
      f'--logprobs={logprobs}: the model has only {vocab} ids, and one at '
      'least is left out; lower it'
    )
  if logprobs:
    begun_with['logprobs'] = logprobs
    ask = odds.Odds(model, tokenizer, template, logprobs, writer.batch_size)
  kept = partial.Partial(
    path.with_name(path.name + '.partial'), begun_with, force
  )
  answers = kept.read(_taken)
  _fill(answers, kept, model, tokenizer, rows, wanted, decoding, ask)
  lines = []
  for _, (problem, line) in sorted(answers.items()):
    if problem is None or keep_unfinished:
      lines.append(json.dumps(line, ensure_ascii=False) + '\n')
    else:
      left_out[problem] += 1
  if not lines:
    raise UserError(
      f'none of {len(wanted)} answers ended within max_new_tokens='
      f'{writer.max_new_tokens} and said something; raise it, or fine-tune the '
      'model that answers'
    )
  hosts.only_first(lambda: log.write_atomically(path, ''.join(lines)))
  kept.remove()
  facts = [
    f'answers: {len(lines):,} to {len(prompts):,} prompts',
    *(f'{n:,} left out: {why}' for why, n in sorted(left_out.items())),
  ]
  print('; '.join(facts), flush=True)
  return left_out


def _taken(line):
  """What is made of a line of `<path>.partial`."""
  i, problem, answer = line
  found = {'i': i, 'problem': problem} | answer
  settings.check_row('', found, _KEPT)
  return i, (problem, answer)


def _fill(answers, kept, model, tokenizer, rows, wanted, decoding, ask):
  """Adds the answers that are not there, as they end."""
  with log.Progress(len(wanted), len(answers), 'answers') as progress:
    last = time.monotonic()
    for batch, responses in streaming.stream(
      model,
      [ids for ids, _, _ in wanted],
      done=frozenset(answers),
      places=[r + (n << _ROW_BITS) for _, r, n in wanted],
      **decoding,
    ):
      new = {}
      for i, ids in zip(batch, responses, strict=True):
        _, r, n = wanted[i]
        finished = len(ids) < decoding['max_new_tokens']
        text = encoding.decode(tokenizer, ids)
        new[i] = _answer(rows[r], n, text, finished, len(ids))
      if ask:
        _add_logprobs(ask, new, [wanted[i] for i in batch], rows)
      answers |= new
      kept.append([i, *answer] for i, answer in new.items())
      now = time.monotonic()
      rate = sum(map(len, responses)) / (now - last)
      progress.update(len(answers), tokens_per_second=rate)
      last = now


def _add_logprobs(ask, new, wanted, rows):
  """Adds the `logprobs` of answers that say something."""
  lines, answered, prompts = [], [], []
  for (problem, line), (prompt, r, _) in zip(new.values(), wanted, strict=True):
    if problem != 'empty':
      row = rows[r]
      text = line['messages'][-1]['content'] if row.messages else line['output']
      lines.append(line)
      answered.append(dataclasses.replace(row, references=(text,)))
      prompts.append(prompt)
  for line, found in zip(lines, ask(answered, prompts), strict=True):
    if found is not None:
      line['logprobs'] = found


def _prompts(tokenizer, rows, template, max_prompt_length, on_bad_row):
  """{index of a row: its prompt's ids}, and a Counter of the rows without."""
  prompts, bad = {}, collections.Counter()
  for r, row in enumerate(rows):
    try:
      prompts[r] = encoding.fit_prompt(
        tokenizer, row, template, max_prompt_length
      )
    except sources.BadRow as error:
      if on_bad_row == 'fail':
        raise
      bad[error.reason] += 1
  if not prompts:
    raise UserError(
      f'no usable row for template {template!r}: '
      f'{", ".join(f"{n} {why}" for why, n in bad.items()) or "there is none"}'
    )
  return prompts, bad


def _answer(row, sample, text, finished, tokens):
  """(what is wrong with an answer or None, its line)."""
  if row.messages is None:
    line = {'instruction': row.instruction, 'input': row.input, 'output': text}
  else:
    answer_turn = {'role': 'assistant', 'content': text}
    line = {'messages': [*row.messages, answer_turn]}
  line |= {'sample': sample, 'finished': finished, 'tokens': tokens}
  if row.references:
    line['rouge_l'] = scores.rouge_l(text, row.references)
  if not finished:
    return 'unfinished', line
  return (None if text.strip() else 'empty'), line
