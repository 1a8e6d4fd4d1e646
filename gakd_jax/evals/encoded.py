"""Prompts and references as ids: every evaluator of a set has the same."""

import dataclasses

from gakd_jax import UserError
from gakd_jax.data import encoding, sources


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Of some rows, in their order.

  prompts: at most `max_prompt_length` ids each; longer ones are shortened, see
    `encoding.fit_prompt`, and none is left out.
  references: the ids of the first reference and its end, as far as
    `max_length` has room for them.
  shortened, truncated: how many of these two lost something.
  """

  prompts: list
  references: list
  shortened: int
  truncated: int


def encode(subject, rows):
  """The rows as ids, under a subject's template.

  Raises:
    UserError: if lengths leave no room, or a row cannot be shown.
  """
  tokenizer, most = subject.models.tokenizer, subject.max_prompt_length
  if not 0 < most < subject.max_length:
    raise UserError(
      f'config.data.max_prompt_length is {most} and max_length '
      f'{subject.max_length}: the prompt must leave room for a response'
    )
  prompts, references = [], []
  shortened = truncated = 0
  for row, found in zip(
    rows,
    encoding.encode_batch(tokenizer, rows, subject.template, subject.thinking),
    strict=True,
  ):
    if isinstance(found, sources.BadRow):
      raise found
    prompt, reference = found
    if len(prompt) > most:
      shortened += 1
      prompt = encoding.fit_prompt(tokenizer, row, subject.template, most)
    room = subject.max_length - len(prompt)
    truncated += len(reference) > room
    prompts.append(prompt)
    references.append(reference[:room])
  return Encoded(prompts, references, shortened, truncated)
