"""Held-out loss: cross-entropy, and how far the student is from its teacher.

Means over the response tokens of the first reference of every row: `ce`
(nats), and with a teacher `forward_kl`, `reverse_kl` (nats) and `agreement`,
the share of tokens on which both have the same most likely next token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gakd_jax import sharding
from gakd_jax.data import pipeline
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.models import transformer
from gakd_jax.objectives import divergences, head


@dataclasses.dataclass(frozen=True)
class Loss:
  name: str
  rows: tuple
  batch_size: int = 16

  def run(self, subject, params, tag):
    del tag
    examples, _ = pipeline.encode_rows(
      self.rows,
      subject.tokenizer,
      template=subject.template,
      max_length=subject.max_length,
      max_prompt_length=subject.max_prompt_length,
    )
    ways = sharding.batch_ways(subject.mesh)
    batches = pipeline.batches(
      examples,
      # Empty rows fill up what the mesh cannot divide.
      batch_size=-(-self.batch_size // ways) * ways,
      max_length=subject.max_length,
      pad_id=tokenizer_lib.pad_id(subject.tokenizer),
      epochs=1,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    totals = {}
    for batch in batches:
      batch = sharding.put_batch(batch, subject.mesh)
      sums = _sums(
        subject.student,
        subject.teacher,
        subject.dtype,
        subject.head_chunk,
        params,
        subject.frozen,
        batch,
      )
      for name, value in jax.device_get(sums).items():
        totals[name] = totals.get(name, 0.0) + float(value)
    tokens = totals.pop('tokens')
    return {name: total / tokens for name, total in totals.items()}


@functools.partial(
  jax.jit, static_argnames=('student', 'teacher', 'dtype', 'head_chunk')
)
def _sums(student, teacher, dtype, head_chunk, params, frozen, batch):
  outputs = [transformer.apply(student, params, batch.student, dtype)]
  if teacher is not None:
    outputs.append(
      transformer.apply(teacher, frozen['teacher'], batch.teacher, dtype)
    )
  _, sums = head.token_mean(
    _measure, tuple(outputs), batch.student, 1, chunk=head_chunk
  )
  return sums | {'tokens': jnp.sum(batch.student.mask_BT)}


def _measure(logits, targets_N):
  log_q_NV = jax.nn.log_softmax(logits[0])
  ce_N = divergences.cross_entropy(log_q_NV, targets_N)
  measured = {'ce': ce_N}
  if len(logits) == 2:
    log_p_NV = jax.nn.log_softmax(logits[1])
    same_N = jnp.argmax(log_p_NV, -1) == jnp.argmax(log_q_NV, -1)
    measured |= {
      'forward_kl': divergences.forward_kl(log_p_NV, log_q_NV),
      'reverse_kl': divergences.reverse_kl(log_p_NV, log_q_NV),
      'agreement': same_N.astype(jnp.float32),
    }
  return ce_N, measured
