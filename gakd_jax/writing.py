"""Prompts in, texts to train on out: the jitted part of a `rollout` writer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gakd_jax import keys, sharding
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models.transformer import Outputs
from gakd_jax.objectives import head


@functools.partial(jax.jit, static_argnames='writer')
def write(writer, models, params, tokens, rows_B, steps_B, key):
  """Writes to a batch of prompts.

  Args:
    writer: a `rollout.Student` that knows its tokenizer.
    models, params: see `writers.Dataset.write`.
    tokens: `Tokens` of the data, with `writer.room` after the longest prompt;
      `writer.group` rows of each.
    rows_B, steps_B: place in the data (-1: an empty row), and optimizer step.
    key: of all writing in the run.

  Returns:
    `Tokens` with the new responses; which rows have one, [B]; which tokens are
    the teacher's, [B, T]; `Batch.old_log_BT`; {metric: scalar}.
  """
  mesh = jax.sharding.get_abstract_mesh()
  ids_BT, is_text_BT = tokens.ids_BT, tokens.segments_BT > 0
  T = ids_BT.shape[1]
  fold_in = jax.vmap(jax.random.fold_in, (None, 0))
  key_B = jax.vmap(jax.random.fold_in)(
    fold_in(key, steps_B), rows_B.astype(jnp.uint32)
  )
  is_written_B = rows_B >= 0
  # A row that the data's weights repeat in a step gets other answers each time.
  is_same_BB = (rows_B[None] == rows_B[:, None]) & (
    steps_B[None] == steps_B[:, None]
  )
  times_B = jnp.sum(jnp.tril(is_same_BB, -1), axis=1) // writer.group
  number_B = jnp.uint32(keys.AGAIN) + times_B.astype(jnp.uint32)
  again_B = jax.vmap(jax.random.fold_in)(key_B, number_B)
  key_B = jnp.where(times_B > 0, again_B, key_B)
  if writer.group > 1:
    number_B = jnp.arange(len(rows_B)) % writer.group
    key_B = jax.vmap(jax.random.fold_in)(key_B, number_B)
    is_written_B &= number_B < writer.samples
  if writer.share < 1:
    share_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, keys.SHARE)
    is_written_B &= jax.vmap(jax.random.uniform)(share_key_B) < writer.share
  length_B = jnp.sum(is_text_BT & ~tokens.mask_BT, axis=1)
  length_B = jnp.where(is_written_B, length_B, 0)
  new_BT, end_B, by_teacher_BT, metrics = writer.decode(
    models,
    params,
    ids_BT[:, : T - writer.room],
    length_B,
    key_B,
    None if mesh.empty else mesh,
  )
  place_1T = jnp.arange(T)[None]
  is_new_BT = place_1T < end_B[:, None]
  written = Tokens(
    jnp.where(is_new_BT, new_BT, writer.ends.pad_id),
    is_new_BT.astype(tokens.segments_BT.dtype),
    is_new_BT & (place_1T >= length_B[:, None]),
  )
  tokens = jax.tree.map(
    lambda new, old: sharding.by_rows(
      jnp.where(is_written_B[:, None], new, old)
    ),
    written,
    tokens,
  )
  old_log_BT = None
  if writer.scores_in is not None:
    hidden_BTD = models.student_hidden(params, Batch(tokens, tokens))
    old_log_BT = head.log_probs(
      Outputs(hidden_BTD, models.heads(params)[0]),
      *head.next_token(tokens),
      chunk=writer.scores_in,
    )
  metrics |= _measured(written, end_B - length_B, is_written_B, writer)
  metrics = {f'rollout/{name}': x for name, x in metrics.items()}
  is_written_B = sharding.by_rows(is_written_B)
  return tokens, is_written_B, by_teacher_BT, old_log_BT, metrics


def _measured(tokens, length_B, is_written_B, writer):
  """What tells a healthy response from a collapsed one."""
  last_B = jnp.take_along_axis(
    tokens.ids_BT, jnp.sum(tokens.segments_BT, axis=1)[:, None] - 1, axis=1
  )[:, 0]
  ended_B = jnp.isin(last_B, jnp.array(writer.ends.eos_ids))
  n = jnp.maximum(jnp.sum(is_written_B), 1)

  def share(x_B):
    return jnp.sum(x_B & is_written_B) / n

  metrics = {}
  if writer.room == writer.max_new_tokens:  # A prefix is cut off on purpose.
    metrics['unfinished'] = share(~ended_B)
  return metrics | {
    'written': jnp.mean(is_written_B),
    'tokens': jnp.sum(length_B) / n,
    'empty': share(ended_B & (length_B == 1)),
    'repetition': _repetition(tokens),
  }


def _repetition(tokens, n=4):
  """The share of n-grams that their response has had before."""
  B, T = tokens.ids_BT.shape
  gram_BT = jnp.zeros((B, T), jnp.uint32)
  whole_BT = jnp.ones((B, T), bool)
  for i in range(n):  # Two n-grams of one hash are as good as never met.
    gram_BT = gram_BT * 1000003 + jnp.roll(tokens.ids_BT, -i, 1).astype('u4')
    whole_BT &= jnp.roll(tokens.mask_BT, -i, 1)
  whole_BT &= jnp.arange(T)[None] < T - n + 1
  # Sorted by whether they count, then by hash: equal ones are neighbours.
  gram_BT, last_BT = jnp.where(whole_BT, gram_BT, 0), ~whole_BT
  last_BT, gram_BT = jax.lax.sort((last_BT, gram_BT), num_keys=2)
  again_BT = (gram_BT[:, 1:] == gram_BT[:, :-1]) & ~last_BT[:, 1:]
  return jnp.sum(again_BT) / jnp.maximum(jnp.sum(whole_BT), 1)


def as_it_is(batch, mesh, group=1):
  """A batch that nobody wrote to, of the form that written ones have."""
  written_B = np.zeros(batch.rows_B.shape, bool)
  batch = grouped(batch.replace(written_B=written_B), group)
  return sharding.put_batch(batch.replace(group=group), mesh)


def interleaved(group, length):
  """One batch of several, so that each device keeps its rows."""
  if len(group) == 1:
    return group[0]

  def join(*xs):
    if xs[0].ndim > 1:
      rest = ((0, 0),) * (xs[0].ndim - 2)
      xs = [np.pad(x, ((0, 0), (0, length - x.shape[1]), *rest)) for x in xs]
    x = np.stack(xs, axis=1)
    return x.reshape(-1, *x.shape[2:])

  return jax.tree.map(join, *group)


def grouped(tree, n):
  """Each row n times, one after the other."""
  if n == 1:
    return tree
  return jax.tree.map(lambda x: np.repeat(x, n, axis=0), tree)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def part(batch, i, n, length):
  """Batch i of the n that `interleaved` made one."""

  def take(x):
    x = x.reshape(-1, n, batch.group, *x.shape[1:])[:, i]
    x = x.reshape(-1, *x.shape[2:])
    return sharding.by_rows(x[:, :length] if x.ndim > 1 else x)

  return jax.tree.map(take, batch)
