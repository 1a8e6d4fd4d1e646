"""From logits to the next token: the sampler and its filters.

Speculative decoding draws with them too.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gakd_jax import settings
from gakd_jax.settings import Count, Mass, Natural, NotNegative


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is chosen; hashable, so a static argument of a jit.

  The steps are those of transformers, in its order. Nothing is read from a
  model's generation_config.json: what is not asked for is off.
  """

  temperature: NotNegative = 1.0  # 0 is greedy
  top_k: Natural = 0  # draw from the k most likely tokens; 0 is off
  top_p: Mass = 1.0  # draw from the most likely mass p; 1 is off
  no_repeat_ngram: Natural = 0  # no n tokens in a row occur twice; 0 is off
  valid_vocab: Count | None = None  # ids from here on are never drawn

  def __post_init__(self):
    settings.check_row('sampling: ', vars(self), settings.types_of(Sampler))

  def valid(self, logits_BV):
    """Logits in fp32, -inf for what is no token."""
    logits_BV = logits_BV.astype(jnp.float32)
    if self.valid_vocab is None:
      return logits_BV
    valid_V = jnp.arange(logits_BV.shape[1]) < self.valid_vocab
    return jnp.where(valid_V[None, :], logits_BV, -jnp.inf)

  def filter(self, logits_BV, ids_BS=None, length_B=None):
    """The logits that the next token is drawn from; fp32 [B, V].

    Row b has the tokens `ids_BS[b, :length_B[b]]` so far, which only
    `no_repeat_ngram` asks for. The softmax of the result is the sampling
    distribution (for temperature 0: its argmax).
    """
    logits_BV = self.valid(logits_BV)
    if self.no_repeat_ngram:
      logits_BV = block_repeated_ngrams(
        logits_BV, ids_BS, length_B, self.no_repeat_ngram
      )
    if self.temperature == 0:  # The filters below never change the argmax.
      return logits_BV
    logits_BV = logits_BV / self.temperature
    if self.top_k:
      logits_BV = top_k_filter(logits_BV, self.top_k)
    if self.top_p < 1:
      logits_BV = top_p_filter(logits_BV, self.top_p)
    return logits_BV

  def draw(self, logits_BV, key_B):
    """One token for each row of `filter`'s result, with its own key; [B]."""
    if self.temperature == 0:
      return argmax(logits_BV)
    return inverse_cdf(logits_BV, jax.vmap(jax.random.uniform)(key_B))


def inverse_cdf(logits_BV, u_B):
  """The first id of each row whose cumulative probability exceeds u; [B].

  u is uniform on [0, 1), in steps of 1.2e-7: one random number a token, where
  Gumbel noise takes V of them. Sums of 128 neighbours first, then within those
  where u falls: a cumulative sum of a whole row takes six times as long.
  """
  B, V = logits_BV.shape
  logits_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
  weight_BV = jnp.pad(jnp.exp(logits_BV), ((0, 0), (0, -V % 128)))
  weight_BGV = weight_BV.reshape(B, -1, 128)

  def first_above(weight_BN, target_B):
    """Where the cumulative sum first exceeds the target; what is left of it."""
    sum_BN = jnp.cumsum(weight_BN, axis=1)
    # Rounding must not take the target past the end, or to an id of no weight:
    # a sum in a tree may grow, or fall, from one id to the next without any.
    has_BN = weight_BN > 0
    highest_B = jnp.max(sum_BN, axis=1, where=has_BN, initial=0)
    target_B = jnp.clip(target_B, 0, jnp.nextafter(highest_B, jnp.float32(0)))
    n_B = jnp.argmax(has_BN & (sum_BN > target_B[:, None]), axis=1)
    before_BN = jnp.pad(sum_BN, ((0, 0), (1, 0)))
    return n_B, target_B - before_BN[jnp.arange(B), n_B]

  group_BG = jnp.sum(weight_BGV, axis=2)
  group_B, rest_B = first_above(group_BG, u_B * jnp.sum(group_BG, axis=1))
  within_B, _ = first_above(weight_BGV[jnp.arange(B), group_B], rest_B)
  return (128 * group_B + within_B).astype(jnp.int32)


def argmax(x_BV):
  """The first place of each row's maximum; int32 [B].

  By way of the maxima of 128 neighbours each: the argmax of a whole row takes
  several times as long on a CPU.
  """
  B, V = x_BV.shape
  x_BV = jnp.pad(x_BV, ((0, 0), (0, -V % 128)), constant_values=-jnp.inf)
  x_BGV = x_BV.reshape(B, -1, 128)
  group_B = jnp.argmax(jnp.max(x_BGV, axis=2), axis=1)
  within_B = jnp.argmax(x_BGV[jnp.arange(B), group_B], axis=1)
  return (128 * group_B + within_B).astype(jnp.int32)


def top_k_filter(logits_BV, k):
  """Keeps each row's k highest logits and what ties with the last of them."""
  return _keep_highest(logits_BV, jnp.ones_like(logits_BV), k)


def top_p_filter(logits_BV, p):
  """Keeps each row's smallest set of tokens whose probabilities reach p.

  Nucleus sampling (arXiv 1904.09751). The most likely token always stays;
  tokens as likely as the last one of the set stay with it.
  """
  return _keep_highest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def _keep_highest(logits_BV, weight_BV, target):
  """Keeps the fewest of the highest logits whose weights reach `target`.

  Without a sort, which takes seconds for a large vocabulary: with fp32 logits
  seen as integers of the same order, the highest threshold above which the
  weights still reach the target is found exactly, bit by bit, in 32 sums.
  """
  bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
  top_bit = jnp.uint32(1 << 31)  # the sign; negative floats order backwards
  order_BV = jnp.where(bits_BV < top_bit, bits_BV | top_bit, ~bits_BV)

  def set_bit(i, threshold_B1):
    higher_B1 = threshold_B1 | (top_bit >> i.astype(jnp.uint32))
    sum_B1 = jnp.sum(
      weight_BV, axis=1, keepdims=True, where=order_BV >= higher_B1
    )
    return jnp.where(sum_B1 >= target, higher_B1, threshold_B1)

  highest_B1 = jnp.max(order_BV, axis=1, keepdims=True)
  threshold_B1 = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(highest_B1))
  # A target of 0 is reached by nothing at all; the highest stays even so.
  threshold_B1 = jnp.minimum(threshold_B1, highest_B1)
  return jnp.where(order_BV >= threshold_B1, logits_BV, -jnp.inf)


def block_repeated_ngrams(logits_BV, ids_BS, length_B, n):
  """Forbids each token that would end an n-gram that its row already has.

  Row b's tokens are `ids_BS[b, :length_B[b]]`, prompt and response alike, as
  for `no_repeat_ngram_size` of transformers.
  """
  B, S = ids_BS.shape
  if n > S:
    return logits_BV
  # Earlier n-grams start at slots 0 ... S - n; their first n - 1 tokens are
  # compared with the last n - 1 of the row.
  end_BW = jnp.broadcast_to(jnp.arange(n - 1, S), (B, S - n + 1))
  repeated_BW = end_BW < length_B[:, None]
  for i in range(n - 1):
    last_B1 = jnp.take_along_axis(
      ids_BS, jnp.maximum(length_B[:, None] - (n - 1) + i, 0), axis=1
    )
    repeated_BW &= ids_BS[:, i : i + S - n + 1] == last_B1
  return logits_BV.at[jnp.arange(B)[:, None], ids_BS[:, n - 1 :]].min(
    jnp.where(repeated_BW, -jnp.inf, jnp.inf)
  )
