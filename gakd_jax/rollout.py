"""Who writes the responses that a student learns from.

'dataset': the rows as they are. 'teacher': the teacher answers their prompts,
once, before training (sequence-level distillation, arXiv 1606.07947); `write`
does it, for `python -m gakd_jax.generate --dataset` too.
"""

import collections
import json
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from gakd_jax import UserError, partial, report, sampling
from gakd_jax.data import sources, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import scores
from gakd_jax.models import decoding as decoding_lib

# A sample's place is its row and, in the bits above these, its number: what it
# draws does not depend on how many rows and samples there are.
_ROW_BITS = 24
MOST_SAMPLES = 1 << (32 - _ROW_BITS)


def check(writer, **settings):
  """Refuses a rollout that does not exist, in one line."""
  known = {
    'dataset': set(),
    'teacher': {
      'max_new_tokens',
      'temperature',
      'top_k',
      'top_p',
      'no_repeat_ngram',
      'batch_size',
      'samples',
    },
  }
  if writer not in known:
    raise UserError(
      f'config.rollout: no writer {writer!r}; known are {", ".join(known)}'
    )
  wrong = sorted(set(settings) - known[writer])
  if wrong:
    raise UserError(
      f'config.rollout: writer {writer!r} has no setting {wrong[0]!r}; known '
      f'are {", ".join(sorted(known[writer])) or "none"}'
    )
  check_samples(settings.get('samples', 1), settings.get('temperature', 1.0))


def check_samples(samples, temperature):
  if not 1 <= samples <= MOST_SAMPLES:
    raise UserError(
      f'samples={samples} of a prompt; expected 1 to {MOST_SAMPLES}'
    )
  if samples > 1 and temperature == 0:
    raise UserError(
      f'samples={samples} at temperature=0 would all be the same; raise the '
      'temperature, or take one'
    )


def write(
  model,
  tokenizer,
  rows,
  path,
  *,
  source,
  template,
  max_prompt_length,
  seed,
  max_new_tokens=256,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  no_repeat_ngram=0,
  batch_size=32,
  samples=1,
  keep_unfinished=False,
  on_bad_row='skip',
):
  """Writes a data file in which a model answers the prompts of `rows`.

  Each line can be trained on: `instruction, input, output`, or `messages` for
  a conversation. Beside them stand `sample` (0 ... samples - 1), `finished`
  (it ended with an EOS), `tokens` (its number, without the EOS) and, for a row
  with references, `rouge_l`. Lines are in the order of `rows`. An answer
  depends on the seed, its row's index and its sample's number alone.

  Finished batches are kept in `<path>.partial`: killed and called again, this
  goes on there, and the file is the same to the byte. It appears when it is
  complete. On several processes the first one writes, and `path` is of a file
  system that all see.

  Args:
    model, tokenizer, rows, path: see above.
    source: what identifies model and data; a dict of names to JSON values.
    samples: answers to each prompt.
    keep_unfinished: otherwise answers that are empty or did not end within
      `max_new_tokens` are left out: a student would learn not to stop.
    on_bad_row: 'skip' or 'fail', of rows that the template cannot hold.

  Returns:
    How many answers were left out, and rows skipped, by reason: a Counter.

  Raises:
    UserError: also if `<path>.partial` is of other settings.
  """
  check_samples(samples, temperature)
  path = Path(path)
  decoding = {
    'max_new_tokens': max_new_tokens,
    'temperature': temperature,
    'top_k': top_k,
    'top_p': top_p,
    'no_repeat_ngram': no_repeat_ngram,
    'eos_ids': templates.stop_ids(template, tokenizer),
    'seed': seed,
    'batch_size': batch_size,
    'valid_vocab': len(tokenizer),
  }
  prompts, left_out = _prompts(
    tokenizer, rows, template, max_prompt_length, on_bad_row
  )
  # Of each answer: its prompt, its row and its number.
  wanted = [(ids, r, n) for r, ids in prompts.items() for n in range(samples)]
  references = [rows[r].references for r in prompts]
  settings = (
    source
    | decoding
    | {
      'samples': samples,
      'rows': partial.digest([*zip(prompts.items(), references, strict=True)]),
    }
  )
  log = partial.Partial(path.with_name(path.name + '.partial'), settings)
  answers = {i: (problem, line) for i, problem, line in log.read()}
  _fill(answers, log, model, tokenizer, rows, wanted, decoding)
  lines = []
  for _, (problem, line) in sorted(answers.items()):
    if problem is None or keep_unfinished:
      lines.append(json.dumps(line, ensure_ascii=False) + '\n')
    else:
      left_out[problem] += 1
  if not lines:
    raise UserError(
      f'none of {len(wanted)} answers ended within max_new_tokens='
      f'{max_new_tokens} and said something; raise it, or fine-tune the '
      'model that answers'
    )
  if jax.process_index() == 0:
    report.write_atomically(path, ''.join(lines))
  log.remove()
  multihost_utils.sync_global_devices(f'wrote {path}')
  facts = [
    f'answers: {len(lines):,} to {len(prompts):,} prompts',
    *(f'{n:,} left out: {why}' for why, n in sorted(left_out.items())),
  ]
  print('; '.join(facts), flush=True)
  return left_out


def _fill(answers, log, model, tokenizer, rows, wanted, decoding):
  """Adds the answers that are not there, a batch at a time."""
  with report.Progress(len(wanted), len(answers), 'answers') as progress:
    last = time.monotonic()
    for batch, responses in sampling.stream(
      decoding_lib.unstack(model),
      [ids for ids, _, _ in wanted],
      done=frozenset(answers),
      places=[r + (n << _ROW_BITS) for _, r, n in wanted],
      **decoding,
    ):
      new = {}
      for i, ids in zip(batch, responses, strict=True):
        _, r, n = wanted[i]
        finished = len(ids) < decoding['max_new_tokens']
        text = tokenizer_lib.decode(tokenizer, ids)
        new[i] = _answer(rows[r], n, text, finished, len(ids))
      answers |= new
      log.append([i, *answer] for i, answer in new.items())
      now = time.monotonic()
      rate = sum(map(len, responses)) / (now - last)
      progress.update(len(answers), tokens_per_second=rate)
      last = now


def _prompts(tokenizer, rows, template, max_prompt_length, on_bad_row):
  """{index of a row: its prompt's ids}, and a Counter of the rows without."""
  prompts, bad = {}, collections.Counter()
  for r, row in enumerate(rows):
    try:
      prompts[r] = tokenizer_lib.fit_prompt(
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
