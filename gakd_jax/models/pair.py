"""A student and its teacher: the one owner of both models of a run."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import lora, transformer
from gakd_jax.models.attention import choose_backend


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['frozen'],
  meta_fields=[
    'student_definition',
    'teacher_definition',
    'student_config',
    'teacher_config',
    'dtype',
    'remat',
    'backends',
    'packed',
    'vocabs',
  ],
  drop_fields=['tokenizers'],
)
@dataclasses.dataclass(frozen=True)
class Models:
  """Student and teacher, but for what of the student is trained.

  A tree whose leaves are `frozen`, so that functions under `jax.jit` take it as
  an argument; tokenizers stay outside. Definitions are static, see
  `transformer.split`. The teacher gets no gradient; None: there is none.
  """

  student_definition: Any
  teacher_definition: Any
  student_config: transformer.DecoderConfig
  teacher_config: transformer.DecoderConfig | None
  # Parameters of the 'teacher', of a 'student' whose adapters alone are
  # trained, and 'constants' of the method; never donated, never saved.
  frozen: dict
  dtype: Any  # of the computation
  remat: str = 'none'  # of the student's blocks, see `blocks.REMAT`
  # Of attention, of student and teacher.
  backends: tuple = ('chunked', 'chunked')
  packed: bool = True  # False: each row is one document, then padding
  # See `Head.valid`, of student and teacher; (): None.
  vocabs: tuple = ()
  tokenizers: tuple = ()  # of student and teacher

  @property
  def configs(self):
    return self.student_config, self.teacher_config

  @property
  def tokenizer(self):
    """The student's."""
    return self.tokenizers[0]

  @property
  def head_name(self):
    """The student's parameter that is its vocabulary head."""
    return 'embedding' if self.student_config.tied_head else 'head_weight'

  def alone(self):
    """The student without a teacher."""
    frozen = {k: x for k, x in self.frozen.items() if k != 'teacher'}
    return dataclasses.replace(
      self, teacher_definition=None, teacher_config=None, frozen=frozen
    )

  def whole(self, params):
    """The student's parameters, of those that are trained."""
    return lora.combine(params, self.frozen.get('student'))

  def student(self, params):
    """The student as a `Decoder`, in its own dtype."""
    return nnx.merge(self.student_definition, self.whole(params))

  def teacher(self):
    """The teacher as a `Decoder`, in its own dtype."""
    return nnx.merge(self.teacher_definition, self.frozen['teacher'])

  def student_hidden(self, params, batch, key=None):
    """Hidden states [B, T, D] of `batch.student`; `key` draws dropout."""
    return transformer.apply(
      self.student_definition,
      self.whole(params),
      batch.student,
      self.dtype,
      remat=self.remat,
      key=key,
      backend=self.backends[0],
      packed=self.packed,
    )

  def teacher_hidden(self, batch):
    """[B, R, E] of `batch.teacher`, or as they were cached; or None."""
    if self.teacher_definition is None or 'teacher_hidden' in batch.cached:
      return batch.cached.get('teacher_hidden')
    return transformer.apply(
      self.teacher_definition,
      self.frozen['teacher'],
      batch.teacher,
      self.dtype,
      backend=self.backends[1],
      packed=self.packed,
    )

  def heads(self, params):
    """(student's, teacher's or None), gathered: once for many batches."""
    return self._ready(self.student(params).head, 0), self.teacher_head()

  def teacher_head(self):
    """Gathered; or None."""
    if self.teacher_definition is None:
      return None
    return self._ready(self.teacher().head, 1)

  def _ready(self, head, side):
    return head.replace(
      weight_VD=head.weight_VD.astype(self.dtype),
      valid=self.vocabs[side] if self.vocabs else None,
    ).gathered()

  def pair(self, params, heads, hiddens):
    """`Outputs` of student and teacher (None), from their parts."""
    student = transformer.Outputs(
      hiddens[0], heads[0], self.whole(params)['embedding']
    )
    if self.teacher_definition is None:
      return student, None
    embedding = self.frozen['teacher']['embedding']
    return student, transformer.Outputs(hiddens[1], heads[1], embedding)

  def outputs(self, params, batch):
    """`Outputs` of student and teacher (None) on a batch."""
    hiddens = self.student_hidden(params, batch), self.teacher_hidden(batch)
    return self.pair(params, self.heads(params), hiddens)


def make(
  student,
  teacher=None,
  *,
  dtype,
  attention='auto',
  platform=None,
  tokenizers=(),
  **settings,
):
  """`Models` of two `Decoder`s, and the parameters of the student to train.

  Those are its adapters if it has any, else all of them. Parameters may be
  shapes. `attention` is one of `attention.BACKENDS`, on this `platform`;
  settings are other fields of `Models`.
  """
  definition, params = transformer.split(student)
  frozen, t_definition = {}, None
  if lora.adapters(student):
    params, frozen['student'] = lora.partition(params)
  if teacher is not None:
    t_definition, frozen['teacher'] = transformer.split(teacher)
  models = Models(
    student_definition=definition,
    teacher_definition=t_definition,
    student_config=student.config,
    teacher_config=teacher and teacher.config,
    frozen=frozen,
    dtype=jnp.dtype(dtype),
    backends=tuple(
      model and choose_backend(attention, model.config, dtype, platform)
      for model in (student, teacher)
    ),
    tokenizers=tuple(tokenizers),
    vocabs=tuple(
      _valid(model, tokenizer)
      for model, tokenizer in zip((student, teacher), tokenizers, strict=False)
    ),
    **settings,
  )
  return models, params


def _valid(model, tokenizer):
  size = tokenizer_lib.size(tokenizer)
  return size if model and size < model.config.vocab_size else None
