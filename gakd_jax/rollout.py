"""Who writes the responses that a student learns from.

'dataset': the rows as they are. 'teacher': the teacher answers their prompts,
once, before training (sequence-level distillation, arXiv 1606.07947).
"""

import json

from gakd_jax import UserError, report, sampling
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib


def check(writer, **settings):
  """Refuses a rollout that does not exist, in one line."""
  known = {
    'dataset': set(),
    'teacher': {'max_new_tokens', 'temperature', 'top_p', 'batch_size'},
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


def answer(
  model,
  tokenizer,
  rows,
  path,
  *,
  template,
  max_prompt_length,
  seed,
  max_new_tokens=256,
  temperature=1.0,
  top_p=1.0,
  batch_size=32,
):
  """Writes a data file in which a model answers the prompts of `rows`.

  Each line has `instruction`, `input`, `output` and can be trained on. Answers
  that are empty or did not end within `max_new_tokens` are left out: a student
  would learn not to stop. The file appears when it is complete.

  Returns:
    The number of rows that were left out.
  """
  prompts = [
    tokenizer_lib.fit_prompt(tokenizer, row, template, max_prompt_length)
    for row in rows
  ]
  answers, count = [None] * len(rows), 0
  with report.Progress(len(rows), 0, 'teacher answers') as progress:
    for batch, responses in sampling.stream(
      model,
      prompts,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      eos_ids=(templates.eos_id(template, tokenizer),),
      seed=seed,
      batch_size=batch_size,
      valid_vocab=len(tokenizer),
    ):
      for i, ids in zip(batch, responses, strict=True):
        answers[i] = ids
      count += len(batch)
      progress.update(count)
  lines = []
  for row, ids in zip(rows, answers, strict=True):
    text = tokenizer_lib.decode(tokenizer, ids)
    if text.strip() and len(ids) < max_new_tokens:
      if row.messages is None:
        fields = {'instruction': row.instruction, 'input': row.input}
        fields |= {'output': text}
      else:
        answer_turn = {'role': 'assistant', 'content': text}
        fields = {'messages': [*row.messages, answer_turn]}
      lines.append(json.dumps(fields, ensure_ascii=False) + '\n')
  if not lines:
    raise UserError(
      f'config.rollout: none of {len(rows)} teacher answers ended within '
      f'max_new_tokens={max_new_tokens}; raise it, or fine-tune the teacher'
    )
  report.write_atomically(path, ''.join(lines))
  return len(rows) - len(lines)
