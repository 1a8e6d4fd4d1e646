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
import difflib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax import UserError, sampling, sharding, speculative
from gakd_jax.answering import MOST_SAMPLES
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.pipeline import Tokens
from gakd_jax.models import decoding
from gakd_jax.sampler import Sampler

_SHARE = 1 << 31  # where a row's key is folded to decide who writes it


class Ends(NamedTuple):
  """What a writer knows of the tokenizer."""

  eos_ids: tuple  # each ends a response
  pad_id: int
  vocab: int  # ids from here on are no tokens


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The responses of the data, as they are."""

  needs_teacher = False
  makes_rows = False  # Whether it writes the rows before the first batch.
  needs_responses = True  # Whether the data must have some.
  room = 0  # tokens that it may write after a prompt
  prefix = None  # the first tokens of a response, which alone are trained on
  every = 1  # optimizer steps that one `write` serves

  def for_tokenizer(self, template, tokenizer):
    """The writer of responses that end as the template's do."""
    del template, tokenizer
    return self

  def check(self, config):
    """Refuses a run's config that the writer cannot work with."""

  def write(self, models, params, group, mesh, *, key, step, progress):
    """The batches that are trained on, and metrics of each.

    Args:
      models: `models.pair.Models`.
      params: of the student, those that are trained, before the step.
      group: `every` batches of the data (or what is left of them), this
        process's rows, for as many optimizer steps.
      mesh: of the run.
      key: of all writing in the run.
      step: the first of these optimizer steps, counted from 1.
      progress: the share of the run that is done.

    Returns:
      A list of (`data.pipeline.Batch` on the mesh, {metric: scalar}).
    """
    del models, params, key, step, progress
    return [(sharding.put_batch(batch, mesh), {}) for batch in group]


@dataclasses.dataclass(frozen=True)
class Teacher(Dataset):
  """The teacher answers the prompts of the data once, before training.

  Sequence-level distillation (arXiv 1606.07947). The answers are kept in
  <workdir>/answers.jsonl. Settings are those of `answering.write`.
  """

  needs_teacher = True
  makes_rows = True

  max_new_tokens: int = 256
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  no_repeat_ngram: int = 0
  batch_size: int = 32
  samples: int = 1

  def __post_init__(self):
    _check_ranges(
      self, 'answers', max_new_tokens=(1, np.inf), batch_size=(1, np.inf)
    )
    Sampler(self.temperature, self.top_k, self.top_p, self.no_repeat_ngram)
    if not 1 <= self.samples <= MOST_SAMPLES:
      raise UserError(
        f'samples={self.samples} of a prompt; expected 1 to {MOST_SAMPLES}'
      )
    if self.samples > 1 and self.temperature == 0:
      raise UserError(
        f'samples={self.samples} at temperature=0 would all be the same; raise '
        'the temperature, or take 1'
      )


@dataclasses.dataclass(frozen=True)
class Student(Dataset):
  """The student writes, as it is before the step, and is corrected there.

  On-policy distillation: GKD (arXiv 2306.13649), its lambda being `share`.
  Responses that were cut off carry no EOS.
  """

  share: float = 1.0  # of rows that are written, instead of the data's response
  begin: float = 0.0  # of the run: written from here
  end: float = 1.0  # of the run: written up to here
  every: int = 1  # optimizer steps served by one student; 1 is on-policy
  # Write, and train on, the first so many tokens of a response only; None: all.
  prefix: int | None = None
  max_new_tokens: int = 256  # of a response, EOS included
  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # 0: off
  top_p: float = 1.0  # 1: off
  ends: Ends | None = None  # by `for_tokenizer`

  def __post_init__(self):
    _check_ranges(
      self,
      'config.rollout',
      share=(0, 1),
      begin=(0, 1),
      end=(0, 1),
      every=(1, np.inf),
      prefix=(1, np.inf),
      max_new_tokens=(1, np.inf),
    )
    if self.begin >= self.end:
      raise UserError(
        f'config.rollout: nothing is written from begin={self.begin} to '
        f'end={self.end}; raise end'
      )
    self._sampler()

  @property
  def room(self):
    return min(self.max_new_tokens, self.prefix or self.max_new_tokens)

  @property
  def needs_responses(self):
    return (self.share, self.begin, self.end) != (1, 0, 1)

  def for_tokenizer(self, template, tokenizer):
    ends = Ends(
      templates.stop_ids(template, tokenizer),
      tokenizer_lib.pad_id(tokenizer),
      len(tokenizer),
    )
    return dataclasses.replace(self, ends=ends)

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
      return [(_as_it_is(batch, mesh), {}) for batch in group]
    lengths = [batch.student.ids_BT.shape[1] for batch in group]
    host = _interleaved(group, max(lengths))
    steps_B = np.arange(step, step + len(group), dtype=np.uint32)
    steps_B = np.tile(steps_B, len(host.rows_B) // len(group))
    batch, steps_B = sharding.put_batch((host, steps_B), mesh)
    tokens, written_B, metrics = _write(
      self, models, params, batch.student, batch.rows_B, steps_B, key
    )
    batch = batch.replace(student=tokens, teacher=tokens, written_B=written_B)
    return [
      (_part(batch, i, len(group), T), metrics if i == 0 else {})
      for i, T in enumerate(lengths)
    ]

  def decode(self, models, params, prompt_BT, length_B, key_B, mesh):
    """ids_BS, end_B, and {metric: scalar}; under a jit."""
    ids_BS, end_B = sampling.decode_batch(
      decoding.unstack(models.student(params), models.dtype),
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

  gamma: int = 5  # tokens that the teacher reads at a time
  accept: str = 'rank'  # rank, probability, mixture
  k: int = 25  # rank: among the teacher's k most likely
  alpha: float = 0.05  # probability: at least that likely to the teacher
  g: float = 0.5  # mixture: the share of the teacher
  teacher_temperature: float = 1.0
  teacher_top_k: int = 0
  teacher_top_p: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    _check_ranges(
      self,
      'config.rollout',
      gamma=(1, np.inf),
      k=(1, np.inf),
      alpha=(0, 1),
      g=(0, 1),
    )
    if self.accept not in ('rank', 'probability', 'mixture'):
      raise UserError(
        f'config.rollout: no rule accept={self.accept!r}; known are rank, '
        'probability, mixture'
      )
    self._drafting()

  def decode(self, models, params, prompt_BT, length_B, key_B, mesh):
    both = [models.student(params), models.teacher()]
    ids_BS, end_B, trace = speculative.decode_batch(
      [decoding.unstack(model, models.dtype) for model in both],
      prompt_BT,
      length_B,
      key_B,
      self._drafting(),
      mesh,
    )
    judged_J, kept_J = jnp.sum(trace.judged_BJ, 0), jnp.sum(trace.kept_BJ, 0)
    shares_J = kept_J / jnp.maximum(judged_J, 1)
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
  if writer not in WRITERS:
    raise UserError(
      f'config.rollout: no writer {writer!r}; known are {", ".join(WRITERS)}'
    )
  fields = {f.name for f in dataclasses.fields(WRITERS[writer])}
  known = sorted(fields - {'ends'})
  wrong = sorted(set(settings) - set(known))
  if wrong:
    near = difflib.get_close_matches(wrong[0], known, 1)
    hint = f'did you mean {near[0]!r}? ' if near else ''
    raise UserError(
      f'config.rollout: writer {writer!r} has no setting {wrong[0]!r}; {hint}'
      f'known are {", ".join(known) or "none"}'
    )
  return WRITERS[writer](**settings)


def _check_ranges(settings, where, **ranges):
  for name, (low, high) in ranges.items():
    value = getattr(settings, name)
    if value is not None and not low <= value <= high:
      expected = f'{low} or more' if high == np.inf else f'{low} to {high}'
      raise UserError(f'{where}: {name}={value}; expected {expected}')


@functools.partial(jax.jit, static_argnames='writer')
def _write(writer, models, params, tokens, rows_B, steps_B, key):
  """Tokens with responses, which rows were written, and metrics."""
  mesh = jax.sharding.get_abstract_mesh()
  ids_BT, is_text_BT = tokens.ids_BT, tokens.segments_BT > 0
  T = ids_BT.shape[1]
  fold_in = jax.vmap(jax.random.fold_in, (None, 0))
  key_B = jax.vmap(jax.random.fold_in)(
    fold_in(key, steps_B), rows_B.astype(jnp.uint32)
  )
  is_written_B = rows_B >= 0
  if writer.share < 1:
    share_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, _SHARE)
    is_written_B &= jax.vmap(jax.random.uniform)(share_key_B) < writer.share
  length_B = jnp.sum(is_text_BT & ~tokens.mask_BT, axis=1)
  length_B = jnp.where(is_written_B, length_B, 0)
  new_BT, end_B, _, metrics = writer.decode(
    models,
    params,
    ids_BT[:, : T - writer.room],
    length_B,
    key_B,
    None if mesh.empty else mesh,
  )
  place_1T = jnp.arange(T)[None]
  is_new_BT = place_1T < end_B[:, None]
  written = Tokens(
    jnp.where(is_new_BT, new_BT, writer.ends.pad_id),
    is_new_BT.astype(tokens.segments_BT.dtype),
    is_new_BT & (place_1T >= length_B[:, None]),
  )
  tokens = jax.tree.map(
    lambda new, old: sharding.by_rows(
      jnp.where(is_written_B[:, None], new, old)
    ),
    written,
    tokens,
  )
  metrics |= _measured(written, end_B - length_B, is_written_B, writer)
  metrics = {f'rollout/{name}': x for name, x in metrics.items()}
  return tokens, sharding.by_rows(is_written_B), metrics


def _measured(tokens, length_B, is_written_B, writer):
  """What tells a healthy response from a collapsed one."""
  last_B = jnp.take_along_axis(
    tokens.ids_BT, jnp.sum(tokens.segments_BT, axis=1)[:, None] - 1, axis=1
  )[:, 0]
  ended_B = jnp.isin(last_B, jnp.array(writer.ends.eos_ids))
  n = jnp.maximum(jnp.sum(is_written_B), 1)

  def share(x_B):
    return jnp.sum(x_B & is_written_B) / n

  return {
    'written': jnp.mean(is_written_B),
    'tokens': jnp.sum(length_B) / n,
    'unfinished': share(~ended_B),
    'empty': share(ended_B & (length_B == 1)),
    'repetition': _repetition(tokens),
  }


def _repetition(tokens, n=4):
  """The share of n-grams that their response has had before."""
  B, T = tokens.ids_BT.shape
  gram_BT = jnp.zeros((B, T), jnp.uint32)
  whole_BT = jnp.ones((B, T), bool)
  for i in range(n):  # Two n-grams of one hash are as good as never met.
    gram_BT = gram_BT * 1000003 + jnp.roll(tokens.ids_BT, -i, 1).astype('u4')
    whole_BT &= jnp.roll(tokens.mask_BT, -i, 1)
  whole_BT &= jnp.arange(T)[None] < T - n + 1
  # Sorted by whether they count, then by hash: equal ones are neighbours.
  gram_BT, last_BT = jnp.where(whole_BT, gram_BT, 0), ~whole_BT
  last_BT, gram_BT = jax.lax.sort((last_BT, gram_BT), num_keys=2)
  again_BT = (gram_BT[:, 1:] == gram_BT[:, :-1]) & ~last_BT[:, 1:]
  return jnp.sum(again_BT) / jnp.maximum(jnp.sum(whole_BT), 1)


def _as_it_is(batch, mesh):
  """A batch that nobody wrote to, of the form that written ones have."""
  written_B = np.zeros(batch.rows_B.shape, bool)
  return sharding.put_batch(batch.replace(written_B=written_B), mesh)


def _interleaved(group, length):
  """One batch of several, so that each device keeps its rows."""
  if len(group) == 1:
    return group[0]

  def join(*xs):
    if xs[0].ndim > 1:
      xs = [np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in xs]
    x = np.stack(xs, axis=1)
    return x.reshape(-1, *x.shape[2:])

  return jax.tree.map(join, *group)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _part(batch, i, n, length):
  """Batch i of the n that `_interleaved` made one."""

  def take(x):
    x = x.reshape(-1, n, *x.shape[1:])[:, i]
    return sharding.by_rows(x[:, :length] if x.ndim > 1 else x)

  return jax.tree.map(take, batch)
