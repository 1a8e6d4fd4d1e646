"""Floating-point operations of a train step, by formula.

A multiplication and an addition are two. A decoder takes 2 a token for every
weight of its matrices, and 4 T N H a layer for attention, which is computed for
all T positions; a backward pass takes as much for the inputs and, of what is
trained, as much for the weights. All T tokens count as response: the head does
less on prompts. Norms, softmax and the optimizer are left out.
"""

import math
import re

import jax

from gakd_jax import sharding


def of_step(
  objective,
  models,
  params,
  own,
  *,
  rows,
  length,
  microbatches=1,
  cache='none',
):
  """{part: FLOPs} of one optimizer step, over all devices.

  Args:
    objective: the method.
    models: `models.pair.Models`; parameters may be shapes, here as below.
    params: of the student, those that are trained.
    own: the method's `Own`.
    rows, length: B and T of the whole batch.
    microbatches: into how many it is split.
    cache: what there is of the teacher, of `config.teacher.cache`.
  """
  student, teacher = models.configs
  frozen = models.frozen
  n = rows * length
  again = own.critic and objective.updates_critic_first(microbatches)
  base = block_weights(frozen.get('student', {}))
  trained = block_weights(params)
  forward = 2 * (base + trained) + attention(student, length)
  backward = forward + 2 * trained + attention(student, length)
  parts = {
    'student forward': n * forward * (2 if again else 1),
    'student backward': n
    * (backward + (forward if models.remat == 'blocks' else 0)),
  }
  V = U = student.vocab_size
  if objective.needs_teacher and cache in ('none', 'hidden'):
    U = teacher.vocab_size
    if objective.one_tokenizer:
      V = U = min(V, U)
    if objective.teacher_over_students:
      U = V
    if cache == 'none':
      weights = block_weights(frozen['teacher'])
      parts['teacher forward'] = n * (2 * weights + attention(teacher, length))
    parts['teacher head'] = n * 2 * U * teacher.width
  # Logits, the gradient of the hidden states, and that of the head.
  passes = 3 if models.head_name in params else 2
  parts['student head'] = n * passes * 2 * V * student.width
  return parts | objective.flops(
    student, teacher, own, rows, length, microbatches
  )


def of_rollout(writer, models, params, rows, length):
  """{part: FLOPs} of writing a batch; {} where nobody writes in the run.

  Every row that is written is as long as can be, and a teacher that corrects
  accepts every draft.
  """
  if not writer.room:
    return {}
  written = writer.share * rows * writer.samples / writer.group
  sides = {'student': (params, models.frozen.get('student', {}))}
  if writer.needs_teacher:
    sides['teacher'] = (models.frozen['teacher'],)
  parts = {}
  for side, config in zip(sides, models.configs, strict=False):
    weights = sum(map(block_weights, sides[side]))
    read = length * (2 * weights + attention(config, length))
    heads = writer.room * 2 * config.vocab_size * config.width
    parts[f'rollout, {side}'] = written * (read + heads)
  return parts


def block_weights(params):
  """How many weights the matrices of stacked blocks have: [L, in, out]."""
  return sum(
    math.prod(x.shape)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if re.search('^blocks/.*(?<!_scale)$', sharding.path_name(path))
    and len(x.shape) > 2
  )


def attention(config, length):
  """Of a token in a forward pass: products with keys, and with values."""
  return 4 * length * config.layers * config.heads * config.head_dim
