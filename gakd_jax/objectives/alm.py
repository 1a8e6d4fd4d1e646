"""ALM: how likely a piece of text is to each model, however it is cut up.

(1 - kd) CE + kd L, L a mean over chunks of text that both tokenizers end alike
of f(log p(chunk), log q(chunk)), each the sum over the chunk's tokens: a number
of each model, so that nothing is asked of the vocabularies ("Universal
cross-tokenizer distillation via approximate likelihood matching", arXiv
2503.20083; tokenkit). f is, with a = log p / tau and b = log q / tau,

  binary_kl  KL between "this chunk or not": e^a against e^b, tau = 100
  binary_ce  the same, with the teacher's entropy: what the authors descend
  abs        |log p - log q|

`space` adds to both the log-probability that a token with a space before it
follows the chunk, or the end: else a model that would go on with the word is
not told from one that would not. As the authors do, also of the chunk that an
answer's end is, where neither model has learned what follows. `sizes` are how
many chunks of a document are joined into one before they are compared; with
several, L is the mean over all chunks of all sizes, and, as the authors do,
divided by the number of sizes.
`by_tokens` weights a chunk by the teacher's tokens in it. One token is one
chunk where both models have one tokenizer.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gakd_jax.data import segments
from gakd_jax.objectives import base, divergences, head, pairs, vocabularies
from gakd_jax.settings import Counts, Share

_TAU = 100.0


def _binary_ce(log_p, log_q):
  a, b = (x / _TAU - 1e-6 for x in (log_p, log_q))
  return -(jnp.exp(a) * b - jnp.expm1(a) * jnp.log(-jnp.expm1(b)))


DIFFERENCES = {
  'binary_kl': lambda log_p, log_q: (
    _binary_ce(log_p, log_q) - _binary_ce(log_p, log_p)
  ),
  'binary_ce': _binary_ce,
  'abs': lambda log_p, log_q: divergences.absolute(log_p - log_q),
}


@dataclasses.dataclass(frozen=True)
class ALM(base.Objective):
  kd: Share = 0.5  # weight of all but cross-entropy, 0 to 1
  difference: Literal[*DIFFERENCES] = 'binary_kl'  # f, of `DIFFERENCES`
  space: bool = True  # with the probability that a word ends there
  sizes: Counts = (1,)  # chunks that are joined
  by_tokens: bool = False  # a chunk counts as often as it has tokens

  one_tokenizer = False
  align = ('span',)
  more_head_passes = 1, 0  # the student's once more, to go back

  def constants(self, models):
    return vocabularies.spaces(models) if self.space else {}

  def count(self, batch):
    n = sum(jnp.sum(self._chunks(batch, size)[-1]) for size in self.sizes)
    return super().count(batch) | {'chunks': jnp.maximum(n, 1)}

  def _chunks(self, batch, size):
    """Chunks of both sides, the teacher's position for the last of each.

    And the weight of each chunk, there.
    """
    sides = [
      _joined(spans, tokens.response_segments_BT, size)
      for spans, tokens in zip(
        pairs.spans(batch), (batch.student, batch.teacher), strict=True
      )
    ]
    index_BT, ends_BT = pairs.ends(*sides)
    weight_BT = ends_BT.astype(jnp.float32)
    if self.by_tokens:
      counts_BR = segments.total(jnp.ones(sides[1].shape), sides[1])
      weight_BT *= jnp.take_along_axis(counts_BR, index_BT, axis=1)
    return *sides, index_BT, weight_BT

  def loss(self, student, teacher, batch, own, key):
    del key
    numbers = [
      self._numbers(outputs, tokens, spans, own.constants.get(f'space_{side}'))
      for side, outputs, tokens, spans in zip(
        'st',
        (student, teacher),
        (batch.student, batch.teacher),
        pairs.spans(batch),
        strict=True,
      )
    ]
    total = 0
    for size in self.sizes:
      s_BT, t_BR, index_BT, weight_BT = self._chunks(batch, size)
      log_q_BT, log_p_BR = (
        segments.total(x['log_prob'] * (chunks > 0), chunks) + x['space']
        for x, chunks in zip(numbers, (s_BT, t_BR), strict=True)
      )
      log_p_BT = jnp.take_along_axis(log_p_BR, index_BT, axis=1)
      value_BT = DIFFERENCES[self.difference](
        jnp.minimum(log_p_BT, 0), jnp.minimum(log_q_BT, 0)
      )
      total += jnp.sum(value_BT * weight_BT)
    alm = total / batch.totals['chunks'] / len(self.sizes)
    target, mask_BT = base.targets(batch)

    def mean(x_BT):
      return jnp.sum(x_BT * mask_BT) / batch.totals['tokens']

    metrics = {'ce': mean(-numbers[0]['log_prob'])}
    if target.data_N is not None:
      metrics = {
        'ce': mean(-numbers[0]['log_prob'] * target.data_N),
        'entropy': mean(numbers[0]['entropy'] * target.written_N),
      }
    loss = (1 - self.kd) * metrics['ce'] + self.kd * alm
    return loss, metrics | {'alm': alm}

  def _numbers(self, outputs, tokens, spans_BT, space_V):
    """Of every token that is predicted, at the position before it; [B, T].

    'log_prob'; 'entropy'; 'space', log-probability that a word ends after it.
    """
    after_BT = jnp.roll(segments.is_last(spans_BT), 1, axis=1)

    def function(z_NV, id_N, _):
      log_q_NV = jax.nn.log_softmax(z_NV)
      space_N = jnp.zeros_like(z_NV[:, 0])
      if space_V is not None:
        space_N = jax.nn.logsumexp(
          jnp.where(space_V, log_q_NV, vocabularies.NEVER), axis=-1
        )
      return jnp.stack(
        [
          -divergences.cross_entropy(log_q_NV, id_N),
          space_N,
          divergences.entropy(log_q_NV),
        ],
        axis=1,
      )

    ids_BT, mask_BT = head.next_token(tokens)
    log_prob_BT, space_BT, entropy_BT = jnp.moveaxis(
      head.token_map(
        function,
        outputs,
        ids_BT,
        (),
        mask_BT | after_BT,
        chunk=self.head_chunk,
      ),
      -1,
      0,
    )
    return {
      'log_prob': log_prob_BT,
      'space': jnp.roll(space_BT, -1, axis=1),
      'entropy': entropy_BT,
    }


def _joined(spans_BT, documents_BT, size):
  """Spans of a document, `size` of them as one: that of the first.

  A number that no span has (a piece that is no text) ends what is joined.
  """

  def row(spans_T, documents_T):
    n = spans_T.size + 1
    known_T = jnp.maximum(spans_T, 0)
    first_S = (
      jnp.full(n, n).at[documents_T].min(jnp.where(spans_T > 0, spans_T, n))
    )
    is_there_S = jnp.zeros(n, bool).at[known_T].set(True).at[0].set(False)
    is_first_S = is_there_S & ~jnp.roll(is_there_S, 1)
    run_S = jax.lax.cummax(jnp.where(is_first_S, jnp.arange(n), 0))
    first_T = jnp.maximum(first_S[documents_T], run_S[known_T])
    return spans_T - (spans_T - first_T) % size

  joined_BT = jax.vmap(row)(spans_BT, documents_BT)
  return jnp.where(spans_BT > 0, joined_BT, 0)
