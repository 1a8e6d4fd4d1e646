"""Sampling: prompts in, responses out, through a key-value cache.

`stream` is what evaluation and the command line call (`generate`: all at once);
`decode_batch` is the same decoding as a function under `jax.jit`, for rollouts.
How logits become a token is in `sampler`.

A row's slot in the cache is its position, so rows of different length share a
batch without a common index, and no row waits for another. What a row draws
depends on the seed and on its place in `prompts` alone: not on the batch size,
on the other rows, or on padding. (The logits of another batch shape may differ
in their last bits, and so, rarely, a token that was a near tie.)
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, sharding
from gakd_jax.models import transformer
from gakd_jax.sampler import Sampler

# Prompts are padded to a power of two, at least this: less padding would cost
# more compilations than it saves time.
_SHORTEST_PROMPT = 64


def prefill(model, blocks, prompt_BT, length_B, slots):
  """Reads right-padded prompts.

  Args:
    model, blocks: the decoder and its `unstacked()` blocks.
    prompt_BT, length_B: row b's prompt is `prompt_BT[b, :length_B[b]]`.
    slots: S, the size of the cache to make; at least T.

  Returns:
    The hidden states [B, D] of each row's last prompt token, and the cache.
  """
  B, T = prompt_BT.shape
  position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  # Attend over the T slots in use, and make room for the response only then.
  outputs, cache = model.decode(
    blocks, prompt_BT, position_BT, model.init_cache(B, T)
  )
  cache = [
    (
      jnp.pad(k_BKHS, ((0, 0), (0, 0), (0, 0), (0, slots - T))),
      jnp.pad(v_BKSH, ((0, 0), (0, 0), (0, slots - T), (0, 0))),
    )
    for k_BKHS, v_BKSH in cache
  ]
  last_B = jnp.maximum(length_B - 1, 0)
  return outputs.hidden_BTD[jnp.arange(B), last_B], cache


def decode_batch(
  model, prompt_BT, length_B, key_B, sampler, max_new_tokens, eos_ids=()
):
  """Writes a response to each prompt of a batch; to be called under a jit.

  Args:
    model: the `Decoder`.
    prompt_BT, length_B: right-padded prompts, as for `prefill`. A row of
      length 0 fills up the batch: it is never waited for and stays empty.
    key_B: each row's key; response token i is drawn with fold_in(key, i).
    sampler: a `Sampler`.
    max_new_tokens: of each response, the EOS included. S = T + this.
    eos_ids: tuple of ids that end a response.

  Returns:
    ids_BS and end_B: row b's prompt and response are `ids_BS[b, :end_B[b]]`,
    the EOS included where there was one.
  """
  B, T = prompt_BT.shape
  S = T + max_new_tokens
  blocks = model.unstacked()
  hidden_BD, cache = prefill(model, blocks, prompt_BT, length_B, S)
  eos_ids = jnp.array(eos_ids, jnp.int32)

  def unfinished(state):
    step, _, _, done_B, _, _ = state
    return (step < max_new_tokens) & ~jnp.all(done_B)

  def write_token(state):
    step, ids_BS, end_B, done_B, hidden_BD, cache = state
    logits_BV = sampler.filter(model.head(hidden_BD), ids_BS, end_B)
    step_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
    token_B = sampler.draw(logits_BV, step_key_B)
    # Slot S does not exist: what finished rows write there is dropped.
    slot_B = jnp.where(done_B, S, end_B)
    ids_BS = ids_BS.at[jnp.arange(B), slot_B].set(token_B, mode='drop')
    outputs, cache = model.decode(
      blocks, token_B[:, None], slot_B[:, None], cache
    )
    end_B = jnp.where(done_B, end_B, end_B + 1)
    done_B |= jnp.isin(token_B, eos_ids)
    return step + 1, ids_BS, end_B, done_B, outputs.hidden_BTD[:, 0], cache

  ids_BS = jnp.pad(prompt_BT, ((0, 0), (0, max_new_tokens)))
  state = (0, ids_BS, length_B, length_B == 0, hidden_BD, cache)
  _, ids_BS, end_B, *_ = jax.lax.while_loop(unfinished, write_token, state)
  return ids_BS, end_B


def generate(model, prompts, **settings):
  """Responses to prompts, in their order: see `stream` for the arguments."""
  responses = [[] for _ in prompts]
  for rows, written in stream(model, prompts, **settings):
    for i, response in zip(rows, written, strict=True):
      responses[i] = response
  return responses


def stream(
  model,
  prompts,
  *,
  max_new_tokens,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  no_repeat_ngram=0,
  eos_ids=(),
  seed=0,
  batch_size=32,
  valid_vocab=None,
  done=frozenset(),
  places=None,
):
  """Yields (rows, their responses), a batch at a time.

  While the caller works on one batch the next is being decoded. Prompts of
  similar length share a batch, the longest first: what does not fit in memory
  fails at once. Which do is a function of `prompts` and `batch_size` alone, so
  a caller that was interrupted gets the same batches again.

  Args:
    model: the `Decoder`. One on a mesh decodes on the whole mesh; every
      process then passes the same prompts and gets all the responses.
    prompts: non-empty lists of token ids.
    max_new_tokens: of each response, the EOS included.
    temperature, top_k, top_p, no_repeat_ngram, valid_vocab: see `Sampler`.
    eos_ids: ids that end a response.
    seed: the same seed gives the same responses.
    batch_size: rows decoded together; it does not change the result.
    done: rows that are not wanted; a batch of nothing else is left out.
    places: a number below 2**32 for each prompt, to draw with in place of its
      index.

  Yields:
    Indices into `prompts`, and for each a list of token ids, without prompt
    and EOS. One of `max_new_tokens` tokens was cut off there; a shorter one
    ended in an EOS.

  Raises:
    UserError: for settings that make no sense, an empty prompt, or ids that
      the model does not have.
  """
  sampler = Sampler(temperature, top_k, top_p, no_repeat_ngram, valid_vocab)
  _check(prompts, model.config, max_new_tokens, batch_size)
  definition, params = transformer.split(model)
  mesh, batch_size = _fit_batch(params, min(batch_size, len(prompts) or 1))
  eos_ids = tuple(int(i) for i in eos_ids)
  key = jax.random.key(seed)
  places = range(len(prompts)) if places is None else places

  def start(rows):
    batch = _place(
      _pad(prompts, rows, places, batch_size), mesh, P(sharding.BATCH_AXES)
    )
    written = _decode(
      definition, params, batch, key, sampler, max_new_tokens, eos_ids
    )
    return rows, _place(
      written, mesh, P()
    )  # A process reads what it has whole.

  def finish(rows, written):
    ids_BS, end_B = jax.device_get(written)
    responses = []
    for b, i in enumerate(rows):
      response = ids_BS[b, len(prompts[i]) : end_B[b]].tolist()
      ended = response and response[-1] in eos_ids
      responses.append(response[:-1] if ended else response)
    return rows, responses

  running = None
  for rows in plan(prompts, batch_size):
    if done.issuperset(rows):
      continue
    started = start(rows)
    if running:
      yield finish(*running)
    running = started
  if running:
    yield finish(*running)


def plan(prompts, batch_size):
  """Which rows share a batch: lists of indices, the longest prompts first."""
  order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padding(prompts, batch_size):
  """The share of prompt slots that `stream` fills with nothing."""
  batch_size = min(batch_size, len(prompts))
  slots = sum(
    batch_size * _bucket(max(len(prompts[i]) for i in rows))
    for rows in plan(prompts, batch_size)
  )
  return 1 - sum(map(len, prompts)) / slots


@functools.partial(
  jax.jit,
  static_argnames=('definition', 'sampler', 'max_new_tokens', 'eos_ids'),
)
def _decode(definition, params, batch, key, sampler, max_new_tokens, eos_ids):
  """`decode_batch`; parameters are an argument: new ones do not recompile."""
  prompt_BT, length_B, place_B = batch
  key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, place_B)
  model = nnx.merge(definition, params)
  return decode_batch(
    model, prompt_BT, length_B, key_B, sampler, max_new_tokens, eos_ids
  )


def _check(prompts, config, max_new_tokens, batch_size):
  if max_new_tokens < 1 or batch_size < 1:
    raise UserError(
      f'generation: max_new_tokens={max_new_tokens} and '
      f'batch_size={batch_size}; both must be at least 1'
    )
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(f'prompt {i} (counted from 0) is empty; give it a token')
    if max(prompt) >= config.vocab_size:
      raise UserError(
        f'prompt {i} (counted from 0) has token id {max(prompt)}, but the '
        f'model has ids below {config.vocab_size}; use the tokenizer of this '
        'model'
      )
    length = len(prompt) + max_new_tokens
    if config.learned_positions and length > config.max_length:
      raise UserError(
        f'prompt {i} (counted from 0) and {max_new_tokens} new tokens are '
        f'{length}, and the model has {config.max_length} positions; lower '
        'max_new_tokens'
      )


def _fit_batch(params, batch_size):
  """The parameters' mesh, if any, and a batch size that divides over it."""
  place = jax.tree.leaves(params)[0].sharding
  if not isinstance(place, NamedSharding):
    return None, batch_size
  ways = math.prod(place.mesh.shape[axis] for axis in sharding.BATCH_AXES)
  return place.mesh, -(-batch_size // ways) * ways


def _place(arrays, mesh, spec):
  return jax.device_put(arrays, NamedSharding(mesh, spec)) if mesh else arrays


def _bucket(length):
  """The next of 64, 96, 128, 192, 256 ...: few shapes, little padding."""
  power = max(_SHORTEST_PROMPT, 1 << (length - 1).bit_length())
  smaller = power * 3 // 4
  return smaller if _SHORTEST_PROMPT <= length <= smaller else power


def _pad(prompts, rows, places, batch_size):
  """Prompts of `rows` on a grid [B, T]; missing rows have length 0."""
  longest = max(len(prompts[i]) for i in rows)
  T = _bucket(longest)
  prompt_BT = np.zeros((batch_size, T), np.int32)
  length_B = np.zeros(batch_size, np.int32)
  place_B = np.zeros(batch_size, np.uint32)
  for b, i in enumerate(rows):
    prompt_BT[b, : len(prompts[i])] = prompts[i]
    length_B[b], place_B[b] = len(prompts[i]), places[i]
  return prompt_BT, length_B, place_B
