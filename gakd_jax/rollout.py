"""Who writes the responses that a student learns from.

A writer is a frozen dataclass of its settings (`config.rollout`) that stands
between the data and the train step:

  dataset      nobody: the responses of the data
  teacher      the teacher, once, before training (SeqKD)
  student      the student as it is, before the step (on-policy distillation)
  speculative  the student, corrected by the teacher (SKD)

The last two write in one jitted function of (models, parameters, prompts, key)
on the run's mesh. Token ids are trained on as they were drawn. What a row draws
depends on the seed, the step and the row's place in the data alone. No gradient
flows through it: the step gets ids.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax import UserError, sampling, sharding, speculative, writing
from gakd_jax import settings as settings_lib
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import caches, decoding
from gakd_jax.sampler import Sampler
from gakd_jax.settings import Count, Length, Mass, Natural, NotNegative, Share
from gakd_jax.writers import Dataset, Ends, Teacher, refuse_copies


@dataclasses.dataclass(frozen=True)
class Student(Dataset):
  """The student writes, as it is before the step, and is corrected there.

  On-policy distillation: GKD (arXiv 2306.13649), its lambda being `share`.
  Responses that were cut off carry no EOS.
  """

  share: Share = 1.0  # of rows that are written, instead of the data's response
  begin: Share = 0.0  # of the run: written from here
  end: Share = 1.0  # of the run: written up to here
  every: Count = 1  # optimizer steps served by one student; 1 is on-policy
  samples: Count = 1  # responses to each prompt: a row for each
  beside: bool = False  # one more row, with the response of the data
  # Write, and train on, the first so many tokens of a response only; None: all.
  prefix: Count | None = None
  max_new_tokens: Length = 256  # of a response, EOS included
  temperature: NotNegative = 1.0  # 0 is greedy
  top_k: Natural = 0  # 0: off
  top_p: Mass = 1.0  # 1: off
  cache: Literal[*caches.KINDS] | None = None  # keys and values in int8
  ends: Ends | None = None  # by `for_tokenizer`
  # Chunks in which what is written is scored, by `for_objective`; None: it is
  # not.
  scores_in: int | None = None

  def __post_init__(self):
    if self.begin >= self.end:
      raise UserError(
        f'config.rollout: nothing is written from begin={self.begin} to '
        f'end={self.end}; raise end'
      )
    if not self.needs_teacher:  # Who may draw where the student does not.
      refuse_copies(self)

  @property
  def group(self):
    return self.samples + self.beside

  @property
  def room(self):
    return min(self.max_new_tokens, self.prefix or self.max_new_tokens)

  @property
  def needs_responses(self):
    return self.beside or (self.share, self.begin, self.end) != (1, 0, 1)

  def for_tokenizer(self, template, tokenizer):
    ends = Ends(
      templates.stop_ids(template, tokenizer),
      tokenizer_lib.pad_id(tokenizer),
      tokenizer_lib.size(tokenizer),
    )
    return dataclasses.replace(self, ends=ends)

  def for_objective(self, objective):
    is_asked = objective.asks_old and self.every > 1
    chunk = objective.head_chunk if is_asked else None
    return dataclasses.replace(self, scores_in=chunk)

  def check(self, config):
    c = config.data
    if c.packing:
      raise UserError(
        'config.data.packing: packed rows have no room for what the student '
        'writes; set it to False'
      )
    if c.max_prompt_length + self.room > c.max_length:
      raise UserError(
        f'config.rollout.max_new_tokens: {self.room} tokens after a prompt of '
        f'max_prompt_length={c.max_prompt_length} do not fit in config.data.'
        f'max_length={c.max_length}; lower one, or raise max_length'
      )

  def write(self, models, params, group, mesh, *, key, step, progress):
    if not self.begin <= progress < self.end:
      return [
        (writing.as_it_is(batch, mesh, self.group), {}) for batch in group
      ]
    lengths = [batch.student.ids_BT.shape[1] for batch in group]
    # A teacher that reads other tokens gets these from `rereading`.
    host = writing.interleaved(
      [batch.replace(teacher=batch.student, align={}) for batch in group],
      max(lengths),
    )
    steps_B = np.arange(step, step + len(group), dtype=np.uint32)
    steps_B = np.tile(steps_B, len(host.rows_B) // len(group))
    host, steps_B = writing.grouped((host, steps_B), self.group)
    host = host.replace(teacher=host.student)  # The same arrays, sent once.
    batch, steps_B = sharding.put_batch((host, steps_B), mesh)
    tokens, written_B, _, old_log_BT, metrics = writing.write(
      self, models, params, batch.student, batch.rows_B, steps_B, key
    )
    batch = batch.replace(
      student=tokens,
      teacher=tokens,
      written_B=written_B,
      old_log_BT=old_log_BT,
      group=self.group,
    )
    if len(group) == 1:
      return [(batch, metrics)]
    return [
      (writing.part(batch, i, len(group), T), metrics if i == 0 else {})
      for i, T in enumerate(lengths)
    ]

  def sample(self, models, params, batch, key):
    """Responses to a batch on the mesh, beside the training.

    Returns:
      `Tokens`, and which of them are the teacher's, [B, T].
    """
    steps_B = jnp.zeros_like(batch.rows_B)  # Training counts from 1.
    writer = dataclasses.replace(
      self, share=1.0, samples=1, beside=False, scores_in=None
    )
    tokens, _, by_teacher_BT, _, _ = writing.write(
      writer, models, params, batch.student, batch.rows_B, steps_B, key
    )
    return tokens, by_teacher_BT

  def lower(self, models, params, batch):
    """The jitted rollout of shapes, to plan with; EOS may be any token."""
    ends = Ends((0,), 0, models.student_config.vocab_size)
    key = jax.eval_shape(jax.random.key, 0)
    writer = dataclasses.replace(self, ends=ends)
    return writing.write.lower(
      writer, models, params, batch.student, batch.rows_B, batch.rows_B, key
    )

  def decode(self, models, params, prompt_BT, length_B, key_B, mesh):
    """ids_BS and end_B, which tokens are the teacher's, and metrics."""
    ids_BS, end_B = sampling.decode_batch(
      decoding.unstack(models.student(params), models.dtype, self.cache),
      prompt_BT,
      length_B,
      key_B,
      self._sampler(),
      self.room,
      self.ends.eos_ids,
      mesh,
    )
    return ids_BS, end_B, jnp.zeros(ids_BS.shape, bool), {}

  def _sampler(self):
    vocab = self.ends and self.ends.vocab
    return Sampler(self.temperature, self.top_k, self.top_p, valid_vocab=vocab)


@dataclasses.dataclass(frozen=True)
class Speculative(Student):
  """The student drafts, and the teacher replaces what it would not say.

  SKD (arXiv 2410.11325); see `speculative`.
  """

  needs_teacher = True
  one_tokenizer = True

  gamma: Count = 5  # tokens that the teacher reads at a time
  accept: Literal['rank', 'probability', 'mixture'] = 'rank'
  k: Count = 25  # rank: among the teacher's k most likely
  alpha: Share = 0.05  # probability: at least that likely to the teacher
  g: Share = 0.5  # mixture: the share of the teacher
  teacher_temperature: NotNegative = 1.0
  teacher_top_k: Natural = 0
  teacher_top_p: Mass = 1.0

  def __post_init__(self):
    super().__post_init__()
    if self.accept == 'mixture' and not (
      self.temperature and self.teacher_temperature
    ):
      raise UserError(
        "config.rollout: accept='mixture' weighs the likelihoods of what both "
        'draw, and at temperature=0 or teacher_temperature=0 nothing is drawn; '
        'set top_k=1 or teacher_top_k=1 instead'
      )

  def decode(self, models, params, prompt_BT, length_B, key_B, mesh):
    both = [models.student(params), models.teacher()]
    ids_BS, end_B, trace = speculative.decode_batch(
      [decoding.unstack(model, models.dtype, self.cache) for model in both],
      prompt_BT,
      length_B,
      key_B,
      self._drafting(),
      mesh,
    )
    judged_J, kept_J = jnp.sum(trace.judged_BJ, 0), jnp.sum(trace.kept_BJ, 0)
    shares_J = kept_J / judged_J  # NaN where no draft came that far.
    tokens = jnp.sum(end_B - length_B)
    own = jnp.sum(trace.by_teacher_BS)
    metrics = {
      'accepted': jnp.sum(kept_J) / jnp.maximum(jnp.sum(judged_J), 1),
      'tokens_per_call': tokens / jnp.maximum(jnp.sum(trace.blocks_B), 1),
      'by_teacher': own / jnp.maximum(tokens, 1),
    }
    metrics |= {f'accepted_{j + 1}': shares_J[j] for j in range(self.gamma)}
    return ids_BS, end_B, trace.by_teacher_BS, metrics

  def _drafting(self):
    rule = {
      'rank': speculative.Rank(self.k),
      'probability': speculative.Probability(self.alpha),
      'mixture': speculative.Mixture(self.g),
    }[self.accept]
    return speculative.Drafting(
      student=self._sampler(),
      teacher=Sampler(
        self.teacher_temperature,
        self.teacher_top_k,
        self.teacher_top_p,
        valid_vocab=self.ends and self.ends.vocab,
      ),
      rule=rule,
      gamma=self.gamma,
      max_new_tokens=self.room,
      eos_ids=self.ends.eos_ids if self.ends else (),
    )


WRITERS = {
  'dataset': Dataset,
  'teacher': Teacher,
  'student': Student,
  'speculative': Speculative,
}


def make(writer, **settings):
  """The writer of a config; one line for what is misspelt."""
  settings_lib.check('config.rollout.writer', writer, Literal[*WRITERS])
  known = settings_lib.types_of(WRITERS[writer], 'ends', 'scores_in')
  owner = f'writer {writer!r}'
  settings = settings_lib.checked('config.rollout.', settings, known, owner)
  return WRITERS[writer](**settings)
