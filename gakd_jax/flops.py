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
  shapes,
  params,
  frozen,
  critic,
  *,
  rows,
  length,
  microbatches=1,
  remat=False,
):
  """{part: FLOPs} of one optimizer step, over all devices.

  Args:
    objective: the method.
    shapes: the `DecoderConfig` of student and teacher (or None).
    params, frozen, critic: parameter trees of the state, arrays or shapes.
    rows, length: B and T of the whole batch.
    microbatches: into how many it is split.
    remat: whether the student's blocks are computed again.
  """
  student, teacher = shapes
  n = rows * length
  again = update_first(objective, critic, microbatches)
  base = block_weights(frozen.get('student', {}))
  trained = block_weights(params['student'])
  forward = 2 * (base + trained) + _attention(student, length)
  backward = forward + 2 * trained + _attention(student, length)
  parts = {
    'student forward': n * forward * (2 if again else 1),
    'student backward': n * (backward + (forward if remat else 0)),
  }
  V = student.vocab_size
  if objective.needs_teacher:
    V = min(V, teacher.vocab_size)
    weights = block_weights(frozen['teacher'])
    parts['teacher forward'] = n * (2 * weights + _attention(teacher, length))
    parts['teacher head'] = n * 2 * V * teacher.width
  head = 'embedding' if student.tied_head else 'head_weight'
  # Logits, the gradient of the hidden states, and that of the head.
  passes = 3 if head in params['student'] else 2
  parts['student head'] = n * passes * 2 * V * student.width
  if critic:
    parts['critic'] = _critic(
      objective, shapes, critic, n, length, microbatches
    )
  return parts


def update_first(objective, critic, microbatches):
  """Whether the student runs once more, for the critic (`step`)."""
  return bool(
    critic and microbatches > 1 and not objective.critic_by_microbatch
  )


def block_weights(params):
  """How many weights the matrices of stacked blocks have: [L, in, out]."""
  return sum(
    math.prod(x.shape)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if re.search('^blocks/.*(?<!_scale)$', sharding.path_name(path))
    and len(x.shape) > 2
  )


def _attention(config, length):
  """Of a token in a forward pass: products with keys, and with values."""
  return 4 * length * config.layers * config.heads * config.head_dim


def _critic(objective, shapes, critic, n, length, microbatches):
  """Its projection W of both heads, W'W, and its trunk (`objectives/gakd`)."""
  V, C = critic['projection'].shape
  update, loss = objective.critic_passes
  config = objective.critic_config(*shapes)
  trunk = 2 * block_weights(critic) + _attention(config, length)

  def read(shape):
    """Of the critic's input, for all tokens of one model."""
    if objective.input == 'probs' or shape.head_cap:  # through logits
      return 2 * n * V * (shape.width + C)
    # E'W once a microbatch, then every token.
    return 2 * C * (V * microbatches + n) * shape.width

  student, teacher = map(read, shapes)
  # W'W is of the penalty, and has as many products as that has passes.
  gram = (update - 6) * V * C * C * microbatches
  # Forward, and the gradient of W.
  per_update = n * update * trunk + 2 * (student + teacher) + gram
  # Of L_G: forward, of the teacher if its third pass is there, and the
  # gradients of the student's hidden states and head.
  per_loss = n * loss * trunk + (loss - 2) * teacher + 3 * student
  return objective.critic_steps * per_update + per_loss
