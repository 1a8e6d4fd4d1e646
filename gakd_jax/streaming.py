"""Any number of prompts in, responses out, by a batch of rows that is refilled.

`stream` is what evaluation, data sets and the command line call (`generate`:
all at once). A row whose response has ended gets the next prompt, so that a
long one does not hold the others: as soon as a quarter of the rows have ended,
a group of as many prompts takes their places. A prompt that is there several
times, to be answered differently, stands together, and is read once a group.

What a response is depends on the seed and on its place alone, as `sampling`
says; who stands in the other rows is not seen. Groups and the shapes of all
that is computed are functions of the prompts and the batch size, so that a
caller who was interrupted gets the same responses again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, grouping, sampling, sharding, stopping
from gakd_jax.models import decoding, transformer
from gakd_jax.sampler import Sampler


@struct.dataclass
class Rows:
  """A batch of responses that are being written, and what was read of them."""

  state: sampling.State
  cache: Any  # of `decoding.Reader`
  place_B: jax.Array  # uint32, what each row draws with


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
  """Yields (indices, their responses), some at a time, as they end.

  While the caller works on some the next are being decoded. The longest prompts
  come first: what does not fit in memory fails at once.

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
    done: prompts that are not wanted.
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
  mesh, ways = mesh_of(params)
  eos_ids = tuple(int(i) for i in eos_ids)
  places = range(len(prompts)) if places is None else places
  plan = grouping.make(prompts, batch_size, ways)
  groups = [group for group in plan.groups if not done.issuperset(group)]
  if not groups:
    return
  B, G = plan.rows, plan.size
  settings = definition, mesh, sampler, max_new_tokens, eos_ids
  key = jax.random.key(seed)
  rows = _empty(params, B, plan.longest + max_new_tokens, settings)
  owners = [None] * B  # which prompt each row is of
  finished = [], []
  while True:
    while groups and (slots := plan.take(groups[0], owners, done)):
      group = groups.pop(0)
      batch = plan.batch(group, slots, places)
      if mesh:
        place = NamedSharding(mesh, P(sharding.BATCH_AXES))
        batch = sharding.put_whole(batch, place)
      rows = _refill(params, rows, batch, settings)
    if all(i is None for i in owners):
      yield finished
      return
    # Up to where there is room for a group on each device, or to the end.
    most = (B - G) // ways if groups else 0
    rows, written = _go_on(params, rows, key, most, settings)
    # A process reads what it has whole.
    written = jax.device_put(written, mesh and sharding.replicated(mesh))
    if finished[0]:
      yield finished
    finished = [], []
    ids_BS, end_B, done_B = stopping.fetch(written)
    for b, i in enumerate(owners):
      if i is not None and done_B[b]:
        owners[b] = None
        response = ids_BS[b, len(prompts[i]) : end_B[b]].tolist()
        ended = response and response[-1] in eos_ids and not keep_end
        finished[0].append(i)
        finished[1].append(response[:-1] if ended else response)


@functools.partial(jax.jit, static_argnames=('B', 'S', 'settings'))
def _empty(params, B, S, settings):
  """`Rows` that are done."""
  definition, mesh, *_ = settings
  model = nnx.merge(definition, params)
  zeros_B = jnp.zeros(B, jnp.int32)
  rows = Rows(
    sampling.State(
      jnp.zeros((B, S), jnp.int32), zeros_B, zeros_B, jnp.ones(B, bool)
    ),
    model.init_cache(B, S),
    jnp.zeros(B, jnp.uint32),
  )
  if mesh is None:
    return rows
  return jax.lax.with_sharding_constraint(
    rows, NamedSharding(mesh, P(sharding.BATCH_AXES))
  )


@functools.partial(jax.jit, static_argnames='settings', donate_argnames='rows')
def _refill(params, rows, batch, settings):
  """`Rows` with other prompts in some places."""
  definition, mesh, *_ = settings

  def refill(model, rows, prompt_UT, of_G, length_G, place_G, slot_G, any_row):
    del any_row
    S = rows.state.ids_BS.shape[1]
    state = sampling.start(prompt_UT[of_G], length_G, S - prompt_UT.shape[1])
    reader = decoding.prefill(model, prompt_UT, S)
    cache = jax.tree.map(lambda x: x[of_G], reader.cache)
    return jax.tree.map(
      lambda x, new: x.at[slot_G].set(new, mode='drop'),
      rows,
      Rows(state, cache, place_G),
    )

  model = nnx.merge(definition, params)
  return sampling.on_own_rows(refill, mesh)(model, rows, *batch)


@functools.partial(jax.jit, static_argnames='settings', donate_argnames='rows')
def _go_on(params, rows, key, most, settings):
  """Writes until no more than `most` of a device's rows are left.

  Returns:
    Rows, and a copy of what is written: ids [B, S], where each row ends, and
    whether it is done.
  """
  definition, mesh, sampler, max_new_tokens, eos_ids = settings

  def write(given, rows, any_row):
    model, key, most = given
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.place_B)
    state, reader = sampling.go_on(
      decoding.Reader(model, rows.cache),
      rows.state,
      key_B,
      sampler,
      max_new_tokens,
      eos_ids,
      lambda state: any_row(jnp.sum(~state.done_B) > most),
    )
    return rows.replace(state=state, cache=reader.cache)

  given = nnx.merge(definition, params), key, most
  rows = sampling.on_own_rows(write, mesh)(given, rows)
  return rows, (rows.state.ids_BS, rows.state.end_B, rows.state.done_B)


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


def mesh_of(params):
  """The parameters' mesh, or None, and over how many devices it splits rows."""
  place = jax.tree.leaves(params)[0].sharding
  if not isinstance(place, NamedSharding):
    return None, 1
  return place.mesh, sharding.batch_ways(place.mesh)
