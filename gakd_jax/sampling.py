"""Sampling: prompts in, responses out, through a key-value cache.

`stream` is what evaluation and the command line call (`generate`: all at once);
`decode_batch` is the same decoding as a function under `jax.jit`, for rollouts.
How logits become a token is in `sampler`, how tokens are read in
`models/decoding`.

The loop carries rows (`State`) whose last token is not read yet: reading it
gives the distribution of the next one. So there is nothing to undo where a row
does not advance. `read_last`, `draw` and `append` are steps of any such loop.

A row's slot in the cache is its position, so rows of different length share a
batch without a common index, and no row waits for another. What a row draws
depends on the seed and on its place in `prompts` alone: not on the batch size,
on the other rows, or on padding. (The logits of another batch shape may differ
in their last bits, and so, rarely, a token that was a near tie.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, sharding, stopping
from gakd_jax.models import decoding, transformer
from gakd_jax.sampler import Sampler

# Prompts are padded to a power of two, at least this: less padding would cost
# more compilations than it saves time.
_SHORTEST_PROMPT = 64


@struct.dataclass
class State:
  """Rows as far as they are written.

  Row b's prompt and response are `ids_BS[b, :end_B[b]]`, and its response
  starts at `start_B[b]`. Nothing more is written to a row that is done.
  """

  ids_BS: jax.Array
  start_B: jax.Array
  end_B: jax.Array
  done_B: jax.Array


def start(prompt_BT, length_B, max_new_tokens):
  """The `State` of prompts without responses; S = T + max_new_tokens.

  A row of length 0 fills up the batch: it is done.
  """
  ids_BS = jnp.pad(prompt_BT, ((0, 0), (0, max_new_tokens)))
  return State(ids_BS, length_B, length_B, length_B == 0)


def read_last(reader, state):
  """Reads each row's last token.

  Returns:
    Its hidden state [B, D], and the reader that has read it. A done row reads
    the same token again, which changes nothing.
  """
  last_B1 = jnp.maximum(state.end_B - 1, 0)[:, None]
  ids_B1 = jnp.take_along_axis(state.ids_BS, last_B1, axis=1)
  hidden_B1D, reader = reader.read(ids_B1, last_B1)
  return hidden_B1D[:, 0], reader


def draw(sampler, logits_BV, state, key_B):
  """The token [B] after each row; response token i with fold_in(key, i)."""
  logits_BV = sampler.filter(logits_BV, state.ids_BS, state.end_B)
  i_B = state.end_B - state.start_B
  return sampler.draw(logits_BV, jax.vmap(jax.random.fold_in)(key_B, i_B))


def append(state, token_B, max_new_tokens, eos_ids):
  """Writes a token to each row that is not done.

  A row is done with an EOS, or with `max_new_tokens` of its response.
  """
  B, S = state.ids_BS.shape
  # Slot S does not exist: what would go to a done row is dropped.
  slot_B = jnp.where(state.done_B, S, state.end_B)
  end_B = jnp.where(state.done_B, state.end_B, state.end_B + 1)
  is_last_B = end_B - state.start_B >= max_new_tokens
  is_eos_B = jnp.isin(token_B, jnp.array(eos_ids, jnp.int32))
  return state.replace(
    ids_BS=state.ids_BS.at[jnp.arange(B), slot_B].set(token_B, mode='drop'),
    end_B=end_B,
    done_B=state.done_B | is_last_B | is_eos_B,
  )


def decode_batch(
  model,
  prompt_BT,
  length_B,
  key_B,
  sampler,
  max_new_tokens,
  eos_ids=(),
  mesh=None,
):
  """Writes a response to each prompt of a batch; to be called under a jit.

  Args:
    model: a `Decoder` of `decoding.unstack`.
    prompt_BT, length_B: row b's prompt is `prompt_BT[b, :length_B[b]]`. A row
      of length 0 fills up the batch: it is never waited for and stays empty.
    key_B: each row's key; response token i is drawn with fold_in(key, i).
    sampler: a `Sampler`.
    max_new_tokens: of each response, the EOS included. S = T + this.
    eos_ids: tuple of ids that end a response.
    mesh: that of the model, if any; the batch divides over it.

  Returns:
    ids_BS and end_B: row b's prompt and response are `ids_BS[b, :end_B[b]]`,
    the EOS included where there was one.
  """
  decode = functools.partial(
    _decode_rows,
    sampler=sampler,
    max_new_tokens=max_new_tokens,
    eos_ids=eos_ids,
  )
  return on_own_rows(decode, mesh)(model, prompt_BT, length_B, key_B)


def on_own_rows(decode, mesh):
  """decode(models, *rows) where each device of a mesh has its own rows.

  And the whole models, but for the split over `tensor`, and stops with the last
  of its rows: left to the compiler, the loop talks to the other devices for
  each token. `decode` takes, by name, `any_row`: whether something holds for a
  row. Of some collectives over `tensor` (permutations), each device of the mesh
  takes part: then it means any row of all, so that all do the same.
  """
  in_step = mesh is not None and mesh.shape['tensor'] > 1

  def any_row(is_B):
    is_any = jnp.any(is_B)
    if not in_step:
      return is_any
    return jax.lax.psum(is_any.astype(int), sharding.BATCH_AXES) > 0

  decode = functools.partial(decode, any_row=any_row)
  if mesh is None:
    return decode
  rows = P(sharding.BATCH_AXES)

  def mapped(models, *arrays):
    return jax.shard_map(
      decode,
      mesh=mesh,
      in_specs=(P(), *[rows] * len(arrays)),
      out_specs=rows,
      axis_names=set(sharding.BATCH_AXES),
      check_vma=False,
    )(models, *arrays)

  return mapped


def _decode_rows(
  model, prompt_BT, length_B, key_B, sampler, max_new_tokens, eos_ids, any_row
):
  """`decode_batch` of a device's own rows."""
  state = start(prompt_BT, length_B, max_new_tokens)
  reader = decoding.prefill(model, prompt_BT, state.ids_BS.shape[1])

  def write_token(carry):
    state, reader = carry
    hidden_BD, reader = read_last(reader, state)
    token_B = draw(sampler, reader.model.head(hidden_BD), state, key_B)
    return append(state, token_B, max_new_tokens, eos_ids), reader

  state, _ = jax.lax.while_loop(
    lambda carry: any_row(~carry[0].done_B), write_token, (state, reader)
  )
  return state.ids_BS, state.end_B


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
  keep_end=False,
):
  """Yields (rows, their responses), a batch at a time.

  While the caller works on one batch the next is being decoded. Prompts of
  similar length share a batch, the longest first: what does not fit in memory
  fails at once. Which do is a function of `prompts` and `batch_size` alone, so
  a caller that was interrupted gets the same batches again.

  Args:
    model: a `Decoder` of `decoding.unstack`. One on a mesh decodes on the
      whole mesh; every process then passes the same prompts and gets all the
      responses.
    prompts: non-empty lists of token ids.
    max_new_tokens: of each response, the EOS included.
    temperature, top_k, top_p, no_repeat_ngram, valid_vocab: see `Sampler`.
    eos_ids: ids that end a response.
    seed: the same seed gives the same responses.
    batch_size: rows decoded together; it does not change the result.
    done: rows that are not wanted; a batch of nothing else is left out.
    places: a number below 2**32 for each prompt, to draw with in place of its
      index.
    keep_end: responses keep the EOS that they ended in.

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

  def begin(rows):
    batch = _pad(prompts, rows, places, batch_size)
    if mesh:
      place = NamedSharding(mesh, P(sharding.BATCH_AXES))
      batch = sharding.put_whole(batch, place)
    written = _decode(
      definition, params, batch, key, sampler, max_new_tokens, eos_ids, mesh
    )
    # A process reads what it has whole.
    return rows, jax.device_put(written, mesh and sharding.replicated(mesh))

  def finish(rows, written):
    ids_BS, end_B = stopping.fetch(written)
    responses = []
    for b, i in enumerate(rows):
      response = ids_BS[b, len(prompts[i]) : end_B[b]].tolist()
      ended = response and response[-1] in eos_ids and not keep_end
      responses.append(response[:-1] if ended else response)
    return rows, responses

  running = None
  for rows in batches_of(prompts, batch_size):
    if done.issuperset(rows):
      continue
    started = begin(rows)
    if running:
      yield finish(*running)
    running = started
  if running:
    yield finish(*running)


def batches_of(prompts, batch_size):
  """Which rows share a batch: lists of indices, the longest prompts first."""
  order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padding(prompts, batch_size):
  """The share of prompt slots that `stream` fills with nothing."""
  batch_size = min(batch_size, len(prompts))
  slots = sum(
    batch_size * _bucket(max(len(prompts[i]) for i in rows))
    for rows in batches_of(prompts, batch_size)
  )
  return 1 - sum(map(len, prompts)) / slots


@functools.partial(
  jax.jit,
  static_argnames=(
    'definition',
    'sampler',
    'max_new_tokens',
    'eos_ids',
    'mesh',
  ),
)
def _decode(
  definition, params, batch, key, sampler, max_new_tokens, eos_ids, mesh=None
):
  """`decode_batch`; parameters are an argument: new ones do not recompile."""
  prompt_BT, length_B, place_B = batch
  key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, place_B)
  model = nnx.merge(definition, params)
  return decode_batch(
    model, prompt_BT, length_B, key_B, sampler, max_new_tokens, eos_ids, mesh
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
  ways = sharding.batch_ways(place.mesh)
  return place.mesh, -(-batch_size // ways) * ways


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
