"""Held-out loss: cross-entropy, and how far the student is from its teacher.

Means over the response tokens of the first reference of every row: `ce` (nats),
`ece`, and with a teacher `forward_kl`, `reverse_kl`, `jsd` (nats, the last with
beta 0.5) and `agreement`, the share of tokens on which both have the same most
likely next token.

`ece` is the expected calibration error (arXiv 1706.04599) of next-token
predictions: with tokens in 15 bins of equal width by the probability of the
most likely token, the mean over tokens of their bin's difference between that
probability and how often the text goes on with it; 0 to 1.

`reverse_kl` is there by position in the response as well: what a student that
follows its own text loses on the way.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax import sharding, stopping
from gakd_jax.data import pipeline
from gakd_jax.data import texts as texts_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import encoded
from gakd_jax.objectives import divergences, head
from gakd_jax.settings import Count

LOSSES = ('ce', 'forward_kl', 'reverse_kl')  # those that are known by row
METRICS = ('ce', 'ece', 'forward_kl', 'reverse_kl', 'jsd', 'agreement')
_BINS = 15
# Positions in a response, from 1: the last ones of buckets, and all buckets.
_LAST = (8, 16, 32, 64, 128)
POSITIONS = ('1-8', '9-16', '17-32', '33-64', '65-128', '129+')


@dataclasses.dataclass(frozen=True)
class Loss:
  teacher_reads_student_ids: ClassVar[bool] = True

  name: str
  rows: tuple
  batch_size: Count = 16
  about: dict = dataclasses.field(default_factory=dict)  # see `evaluator`

  def metrics(self, has_teacher):
    return METRICS if has_teacher else METRICS[:2]

  def run(self, subject, params, tag):
    del tag
    texts = encoded.encode(subject, self.rows)
    pairs = [*zip(texts.prompts, texts.references, strict=True)]
    return {
      'shortened': texts.shortened,
      'truncated': texts.truncated,
      'metrics': measure(subject, params, pairs, self.batch_size),
    }


def measure(subject, params, pairs, batch_size):
  """{metric: mean over response tokens} of (prompt ids, response ids).

  Of the losses 'by_row' too: each response's sum, over the mean length of all,
  so that their mean is the metric, and paired differences have intervals.
  """
  ways = sharding.batch_ways(subject.mesh)
  # Empty rows fill up what the mesh cannot divide.
  batch_size = -(-batch_size // ways) * ways
  batches = pipeline.batches(
    texts_lib.of(pairs),
    batch_size=batch_size,
    max_length=subject.max_length,
    pad_id=tokenizer_lib.pad_id(subject.models.tokenizer),
    epochs=1,
    rows=sharding.own_rows(batch_size, subject.mesh),
  )
  totals, by_row = {}, {}
  for batch in batches:
    batch = sharding.put_batch(batch, subject.mesh)
    rows_B = jax.device_put(batch.rows_B, sharding.replicated(subject.mesh))
    sums = _sums(subject.models, params, batch, subject.head_chunk)
    sums, rows_B = stopping.fetch((sums, rows_B))
    there_B = rows_B >= 0
    for name in set(LOSSES).intersection(sums):
      nats = by_row.setdefault(name, np.zeros(len(pairs)))
      nats[rows_B[there_B]] = sums.pop(name)[there_B]
    for name, value in sums.items():
      totals[name] = totals.get(name, 0.0) + value.astype(float)
  tokens = totals.pop('tokens')
  off, counts = totals.pop('overconfidence'), totals.pop('at')
  by_position = totals.pop('reverse_kl_at', None)
  means = {name: float(total / tokens) for name, total in totals.items()}
  means['ece'] = float(np.sum(np.abs(off)) / tokens)
  for name, nats in by_row.items():
    of_rows = nats * len(pairs) / tokens
    means[name] = {'mean': float(of_rows.mean()), 'by_row': of_rows.tolist()}
  if by_position is not None:
    means['reverse_kl']['by_position'] = {
      name: {'mean': float(total / n)}
      for name, total, n in zip(POSITIONS, by_position, counts, strict=True)
      if n
    }
  return means


@functools.partial(jax.jit, static_argnames='head_chunk')
def _sums(models, params, batch, head_chunk):
  outputs = tuple(filter(None, models.outputs(params, batch)))
  targets_BT, mask_BT = head.next_token(batch.student)
  # Each row is one text.
  position_BT = jnp.cumsum(mask_BT, axis=1) - mask_BT + 1
  bucket_BT = jnp.searchsorted(jnp.array(_LAST), position_BT)
  B, T = mask_BT.shape
  row_BTB = jnp.broadcast_to(jnp.eye(B)[:, None], (B, T, B))
  _, sums = head.weighted_sum(
    _measure,
    head.shared(outputs),
    (targets_BT, bucket_BT, row_BTB),
    mask_BT.astype(jnp.float32),
    chunk=head_chunk,
  )
  return sums | {'tokens': jnp.sum(batch.student.mask_BT)}


def _measure(logits, targets):
  targets_N, bucket_N, row_NB = targets
  log_q_NV = jax.nn.log_softmax(logits[0])
  ce_N = divergences.cross_entropy(log_q_NV, targets_N)
  losses = {'ce': ce_N}
  measured = {
    'overconfidence': _overconfidence(log_q_NV, targets_N),
    'at': jax.nn.one_hot(bucket_N, len(POSITIONS)),
  }
  if len(logits) == 2:
    log_p_NV = jax.nn.log_softmax(logits[1])
    same_N = jnp.argmax(log_p_NV, -1) == jnp.argmax(log_q_NV, -1)
    # Those that are NaN would all agree on the first token.
    is_number_N = jnp.isfinite(log_p_NV.max(-1) + log_q_NV.max(-1))
    losses['forward_kl'] = divergences.forward_kl(log_p_NV, log_q_NV)
    losses['reverse_kl'] = divergences.reverse_kl(log_p_NV, log_q_NV)
    measured |= {
      'reverse_kl_at': measured['at'] * losses['reverse_kl'][:, None],
      'jsd': divergences.jsd(log_p_NV, log_q_NV, beta=0.5),
      'agreement': jnp.where(is_number_N, same_N, jnp.nan),
    }
  by_row = {name: x_N[:, None] * row_NB for name, x_N in losses.items()}
  return ce_N, measured | by_row


def _overconfidence(log_q_NV, targets_N):
  """Confidence less correctness of each token, in the column of its bin."""
  confidence_N = jnp.exp(jnp.max(log_q_NV, axis=-1))
  right_N = jnp.argmax(log_q_NV, axis=-1) == targets_N
  bin_N = jnp.minimum((confidence_N * _BINS).astype(int), _BINS - 1)
  return jax.nn.one_hot(bin_N, _BINS) * (confidence_N - right_N)[:, None]
