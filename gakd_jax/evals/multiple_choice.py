"""Multiple choice by likelihood: which of a row's options is most likely?

Each option is read as the response to the row's prompt, and scored by its
log-probability. `normalise` says by what that is divided, so that longer
options are not worse for being long: 'tokens' (Brown et al., arXiv 2005.14165,
section 2.4), 'bytes' of its text in UTF-8, which where it is ASCII are the
characters that lm-evaluation-harness has in `acc_norm`, or 'none', as in its
`acc`.
"""

import dataclasses
import functools
import math
import statistics
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from gakd_jax import UserError, sharding, stopping
from gakd_jax.data import encoding, pipeline
from gakd_jax.data import texts as texts_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import answers, encoded, extract, tasks
from gakd_jax.evals import statistics as statistics_lib
from gakd_jax.objectives import head
from gakd_jax.settings import Count


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
  task: ClassVar[str] = 'choice'
  scores: ClassVar[tuple] = ('accuracy',)
  seeds: ClassVar[tuple] = (0,)
  teacher_reads_student_ids: ClassVar[bool] = False

  name: str
  rows: tuple
  # What is scored: 'text' of the options, or their 'label' as a tuned model
  # answers, "the correct answer is answer1".
  candidates: Literal['text', 'label'] = 'text'
  normalise: Literal['tokens', 'bytes', 'none'] = 'tokens'
  batch_size: Count = 32
  about: dict = dataclasses.field(default_factory=dict)  # see `evaluator`

  def __post_init__(self):
    for row in self.rows:  # Bad ones come up before any work.
      tasks.gold('choice', row)

  def metrics(self, has_teacher):
    del has_teacher
    return self.scores

  def run(self, subject, params, tag):
    """'accuracy', a percentage; choices go to <workdir>/answers."""
    texts = encoded.encode(subject, self.rows)
    score_of = iter(self._scores(subject, params, texts.prompts))
    lines = []
    for i, row in enumerate(self.rows):
      options = self._options(row)
      by_label = {label: next(score_of) for label in options}
      answer = max(by_label, key=by_label.get)
      if any(map(math.isnan, by_label.values())):
        answer = None  # The model says nothing: it is wrong.
      gold = tasks.gold('choice', row)
      lines.append(
        answers.prompt(i, row, tag)
        | {
          'answer': options.get(answer, ''),
          'extracted': answer,
          'gold': gold,
          'log_probs': by_label,
          'scores': {'accuracy': 100.0 * (answer == gold)},
        }
      )
    answers.write(subject.workdir, self.name, self.seeds[0], lines)
    right = [line['scores']['accuracy'] for line in lines]
    accuracy = {
      'mean': statistics.fmean(right),
      'stderr': statistics_lib.standard_error(right),
    }
    return {'shortened': texts.shortened, 'metrics': {'accuracy': accuracy}}

  def _options(self, row):
    """{label: what is scored for it}."""
    labels = extract.labels(row)
    if self.candidates == 'label':
      return {label: f'the correct answer is {label}' for label in labels}
    return dict(zip(labels, extract.option_texts(row), strict=True))

  def _scores(self, subject, params, prompts):
    """The score of each option of each row: see above."""
    tokenizer = subject.models.tokenizer
    asked = [
      (prompt, text)
      for prompt, row in zip(prompts, self.rows, strict=True)
      for text in self._options(row).values()
    ]
    options = encoding.encode_responses(
      tokenizer,
      [text for _, text in asked],
      [False] * len(asked),
      subject.template,
    )
    pairs, sizes = [], []
    for (prompt, text), ids in zip(asked, options, strict=True):
      pairs.append((prompt, ids))
      size = {'tokens': len(ids), 'bytes': len(text.encode())}
      sizes.append(size.get(self.normalise, 1))
    longest = max(len(prompt) + len(option) for prompt, option in pairs)
    config = subject.models.student_config
    if config.learned_positions and longest > config.max_length:
      raise UserError(
        f'config.evals.{self.name}: a prompt and an option have {longest} '
        f'tokens, and the model has learned only {config.max_length} positions;'
        ' lower config.data.max_prompt_length'
      )
    ways = sharding.batch_ways(subject.mesh)
    batch_size = -(-self.batch_size // ways) * ways
    batches = pipeline.batches(
      texts_lib.of(pairs),
      batch_size=batch_size,
      max_length=longest,
      pad_id=tokenizer_lib.pad_id(tokenizer),
      epochs=1,
      rows=sharding.own_rows(batch_size, subject.mesh),
    )
    whole = sharding.replicated(subject.mesh)
    scores = [None] * len(pairs)
    for batch in batches:
      batch = sharding.put_batch(batch, subject.mesh)
      sums_B = _sums(subject.models.alone(), params, batch, subject.head_chunk)
      found = stopping.fetch(jax.device_put((batch.rows_B, sums_B), whole))
      for i, total in zip(*found, strict=True):
        if i >= 0:
          scores[i] = float(total) / sizes[i]
    return scores


@functools.partial(jax.jit, static_argnames='head_chunk')
def _sums(models, params, batch, head_chunk):
  student, _ = models.outputs(params, batch)
  log_q_BT = head.log_probs(
    student, *head.next_token(batch.student), chunk=head_chunk
  )
  return jnp.sum(log_q_BT, axis=1)
