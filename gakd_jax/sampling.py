"""Sampling: prompts in, responses out, through a key-value cache.

`decode_batch` writes a batch, under `jax.jit`; `streaming` any number of
responses. How logits become a token is in `sampler`, how tokens are read in
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
from flax import struct
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding
from gakd_jax.models import decoding


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
  state, _ = go_on(
    reader,
    state,
    key_B,
    sampler,
    max_new_tokens,
    eos_ids,
    lambda state: any_row(~state.done_B),
  )
  return state.ids_BS, state.end_B


def go_on(reader, state, key_B, sampler, max_new_tokens, eos_ids, wanted):
  """Writes tokens to rows as long as `wanted(state)`; (state, reader)."""

  def write_token(carry):
    state, reader = carry
    hidden_BD, reader = read_last(reader, state)
    token_B = draw(sampler, reader.model.head(hidden_BD), state, key_B)
    return append(state, token_B, max_new_tokens, eos_ids), reader

  return jax.lax.while_loop(
    lambda carry: wanted(carry[0]), write_token, (state, reader)
  )
