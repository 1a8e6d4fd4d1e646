"""The blocks of a decoder and of a critic: stacked, and run over sequences.

`config` is a `transformer.DecoderConfig`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gakd_jax import sharding
from gakd_jax.data import segments
from gakd_jax.models import attention, layers, scores

# Nothing; all but products with weights (norms, activations, attention); whole
# blocks, but for what attention puts out where `tensor` splits it.
REMAT = 'none', 'products', 'blocks'


class Block(nnx.Module):
  """Attention, then feed-forward, each on a normed copy of the residual."""

  def __init__(self, config, rngs):
    self.config = config
    self.attention_norm = layers.make_norm(config)
    self.attention = attention.Attention(config, rngs)
    self.mlp_norm = layers.make_norm(config)
    self.mlp = layers.MLP(config, rngs)
    if config.post_norms:
      self.attention_post_norm = layers.make_norm(config)
      self.mlp_post_norm = layers.make_norm(config)

  def __call__(self, x_BTD, context, cache=None):
    y_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
    y_BTD = checkpoint_name(y_BTD, 'attention')
    if self.config.post_norms:
      y_BTD = self.attention_post_norm(y_BTD)
    x_BTD = x_BTD + y_BTD
    y_BTD = self.mlp(self.mlp_norm(x_BTD), context.key)
    if self.config.post_norms:
      y_BTD = self.mlp_post_norm(y_BTD)
    return x_BTD + y_BTD, cache


def stack(config, rngs):
  """Fresh blocks, their parameters stacked along a leading L."""
  return nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(
    jax.random.split(rngs.params(), config.layers)
  )


def _kept(remat):
  """What a block keeps for its backward pass, a policy of `jax.checkpoint`."""
  if remat == 'products':
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  # A sum over `tensor` is kept: devices would talk again to recompute it.
  kept = ['attention'] if sharding.ways('tensor') > 1 else []
  return jax.checkpoint_policies.save_only_these_names(*kept)


def rope(config, positions_BT):
  if config.learned_positions:
    return None
  return layers.rope_tables(
    positions_BT, config.head_dim, config.rope_theta, config.rope_scaling
  )


def run(
  config,
  blocks,
  x_BTD,
  segments_BT,
  remat='none',
  key=None,
  backend='chunked',
  packed=True,
  groups=scores.GROUPS,
):
  """Stacked blocks over whole sequences.

  Tokens see earlier tokens of their own segment only, and positions count from
  the start of each.

  Args:
    config, blocks: from `stack`.
    x_BTD: what the first block reads.
    segments_BT: int32, see `data.segments`.
    remat: one of `REMAT`, what is computed again in the backward pass instead
      of being kept.
    key: draws the dropout of adapters; None: there is none.
    backend: of attention, from `attention.choose_backend`.
    packed: False promises that each row is one document from its start, then
      padding.
    groups: see `scores.chunked`.
  """
  T = x_BTD.shape[1]
  # A window that hides nothing is none.
  windows = [w if 0 < w < T else None for w in config.windows]
  differ = len(set(windows)) > 1
  context = attention.Context(
    rope=rope(config, segments.positions(segments_BT)),
    segments_BT=segments_BT,
    window=windows[0] if windows and not differ else None,
    backend=backend,
    packed=packed,
    groups=groups,
  )
  blocks_def, params_L = nnx.split(blocks)
  scanned = (
    params_L,
    jnp.array([w or T for w in windows]) if differ else None,
    None if key is None else jax.random.split(key, config.layers),
  )

  def body(x_BTD, scanned):
    params, window, key = scanned
    layer = context._replace(key=key)
    if differ:
      layer = layer._replace(window=window)
    x_BTD, _ = nnx.merge(blocks_def, params)(sharding.by_rows(x_BTD), layer)
    return sharding.by_rows(x_BTD), None

  if remat != 'none':
    body = jax.checkpoint(body, prevent_cse=False, policy=_kept(remat))
  return jax.lax.scan(body, x_BTD, scanned)[0]
