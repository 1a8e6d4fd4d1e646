"""The one decoder: a pre-norm transformer whose families are configs.

A model returns the *hidden states* and the vocabulary head that would turn
them into logits; (B, T, V) logits exist only where somebody asks for them in
so many words (`Decoder.logits`) and, chunk by chunk, in `objectives/head.py`.

Layers are stacked along a leading L and scanned in training, for a short
compile. Decoding unrolls them: a scan would copy the key-value cache for every
token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx, struct


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What distinguishes one decoder from another.

  `vocab_size` counts the rows of the embedding, which may be more than the
  tokenizer has tokens; `head_dim` need not be `width / heads`.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ff_width: int
  tied_head: bool
  rope_theta: float
  norm_eps: float
  max_length: int  # positions that the model was made for; not enforced
  family: str = 'qwen3'  # the key of `families.FAMILIES`


@struct.dataclass
class Head:
  """What turns hidden states into logits: z = h W'. `weight_VD` is [V, D]."""

  weight_VD: jax.Array

  @property
  def vocab_size(self):
    return self.weight_VD.shape[0]

  def __call__(self, hidden_ND):
    """Logits in fp32 whatever the compute dtype; [N, D] -> [N, V]."""
    return jnp.einsum(
      'nd,vd->nv',
      hidden_ND,
      self.weight_VD,
      preferred_element_type=jnp.float32,
    )


@struct.dataclass
class Outputs:
  """What a model returns for a batch."""

  hidden_BTD: jax.Array
  head: Head


class Linear(nnx.Module):
  """x W, with W of [in, out]."""

  def __init__(self, n_in, n_out, rngs):
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (n_in, n_out)))

  def __call__(self, x):
    return x @ self.kernel[...]


class RMSNorm(nnx.Module):
  """Root-mean-square norm, computed in fp32 (arXiv 1910.07467)."""

  def __init__(self, size, eps):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(size))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
    scale = self.scale[...]
    return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rope_tables(positions_BT, head_dim, theta):
  """Cosines and sines of the rotary embedding, fp32, each [B, T, 1, H/2]."""
  frequency_h = theta ** -(
    jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  )
  angle_BT1h = (
    positions_BT[:, :, None, None].astype(jnp.float32)
    * frequency_h[None, None, None, :]
  )
  return jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)


def apply_rope(x_BTNH, tables):
  """Rotates halves, as Hugging Face's checkpoints expect (arXiv 2104.09864)."""
  cos, sin = tables
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def attend_cache(q_BTNH, k_BKSH, v_BKSH, mask_BTS):
  """Softmax attention over cached keys and values; scores in fp32."""
  B, T, N, H = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(B, T, k_BKSH.shape[1], -1, H)
  score_BKGTS = jnp.einsum(
    'btkgh,bksh->bkgts', q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
  )
  score_BKGTS = jnp.where(
    mask_BTS[:, None, None], score_BKGTS * H**-0.5, -jnp.inf
  )
  weight_BKGTS = jax.nn.softmax(score_BKGTS).astype(v_BKSH.dtype)
  y_BTKGH = jnp.einsum('bkgts,bksh->btkgh', weight_BKGTS, v_BKSH)
  return y_BTKGH.reshape(B, T, N, H)


class Attention(nnx.Module):
  """Grouped-query attention with normalised queries and keys (Qwen3)."""

  def __init__(self, config, rngs):
    c = self.config = config
    self.query = Linear(c.width, c.heads * c.head_dim, rngs)
    self.key = Linear(c.width, c.kv_heads * c.head_dim, rngs)
    self.value = Linear(c.width, c.kv_heads * c.head_dim, rngs)
    self.out = Linear(c.heads * c.head_dim, c.width, rngs)
    self.query_norm = RMSNorm(c.head_dim, c.norm_eps)
    self.key_norm = RMSNorm(c.head_dim, c.norm_eps)

  def __call__(self, x_BTD, rope, mask_BTS, cache=None, slots_BT=None):
    """With a cache, keys and values go to `slots_BT` and all are read.

    A cache is [B, K, S, H], so that a head's slots lie together: every token
    reads all of it, and `dot_product_attention` would transpose it first.
    """
    c = self.config
    B, T, _ = x_BTD.shape
    q_BTNH = self.query(x_BTD).reshape(B, T, c.heads, c.head_dim)
    k_BTKH = self.key(x_BTD).reshape(B, T, c.kv_heads, c.head_dim)
    v_BTKH = self.value(x_BTD).reshape(B, T, c.kv_heads, c.head_dim)
    q_BTNH = apply_rope(self.query_norm(q_BTNH), rope)
    k_BTKH = apply_rope(self.key_norm(k_BTKH), rope)
    if cache is None:
      y_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_BTS[:, None]
      )
    else:
      slots = jnp.arange(B)[:, None], slice(None), slots_BT
      cache = tuple(
        old_BKSH.at[slots].set(new_BTKH, mode='drop')
        for old_BKSH, new_BTKH in zip(cache, (k_BTKH, v_BTKH), strict=True)
      )
      y_BTNH = attend_cache(q_BTNH, *cache, mask_BTS)
    return self.out(y_BTNH.reshape(B, T, -1)), cache


class MLP(nnx.Module):
  """Gated feed-forward, silu(x W_g) * (x W_u) W_d (arXiv 2002.05202)."""

  def __init__(self, config, rngs):
    self.gate = Linear(config.width, config.ff_width, rngs)
    self.up = Linear(config.width, config.ff_width, rngs)
    self.down = Linear(config.ff_width, config.width, rngs)

  def __call__(self, x_BTD):
    return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
  def __init__(self, config, rngs):
    self.attention_norm = RMSNorm(config.width, config.norm_eps)
    self.attention = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.width, config.norm_eps)
    self.mlp = MLP(config, rngs)

  def __call__(self, x_BTD, rope, mask_BTS, cache=None, slots_BT=None):
    y_BTD, cache = self.attention(
      self.attention_norm(x_BTD), rope, mask_BTS, cache, slots_BT
    )
    x_BTD = x_BTD + y_BTD
    return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


def segment_positions(segments_BT):
  """The position of each token within its segment, counted from 0; [B, T]."""
  t_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
  starts_BT = jnp.concatenate(
    [
      jnp.ones_like(segments_BT[:, :1], bool),
      segments_BT[:, 1:] != segments_BT[:, :-1],
    ],
    axis=1,
  )
  return t_BT - jax.lax.cummax(jnp.where(starts_BT, t_BT, 0), axis=1)


def stack_blocks(config, rngs):
  """Fresh blocks, their parameters stacked along a leading L."""
  return nnx.vmap(lambda key: Block(config, nnx.Rngs(key)))(
    jax.random.split(rngs.params(), config.layers)
  )


def run_blocks(config, blocks, x_BTD, segments_BT, remat=False):
  """Stacked blocks over whole sequences.

  Tokens see earlier tokens of their own segment only, and positions count from
  the start of each. `remat` recomputes each block in the backward pass instead
  of keeping its activations.
  """
  T = x_BTD.shape[1]
  rope = rope_tables(
    segment_positions(segments_BT), config.head_dim, config.rope_theta
  )
  mask_BTS = jnp.tril(jnp.ones((1, T, T), bool)) & (
    segments_BT[:, :, None] == segments_BT[:, None, :]
  )
  blocks_def, params_L = nnx.split(blocks)

  def body(x_BTD, params):
    return nnx.merge(blocks_def, params)(x_BTD, rope, mask_BTS)[0], None

  if remat:
    body = jax.checkpoint(body, prevent_cse=False)
  return jax.lax.scan(body, x_BTD, params_L)[0]


class Decoder(nnx.Module):
  """A decoder-only language model.

  Its parameters are fp32 when made and keep whatever dtype they are given:
  the dtype of the weights is the compute dtype, so mixed precision is a cast
  of the parameter tree. `source` is the directory that the model was loaded
  from, whose tokenizer travels with it.
  """

  def __init__(self, config, rngs, source=''):
    self.config = config
    self.source = source
    init = nnx.initializers.normal(0.02)
    shape_VD = (config.vocab_size, config.width)
    self.embedding = nnx.Param(init(rngs.params(), shape_VD))
    self.blocks = stack_blocks(config, rngs)
    self.final_norm = RMSNorm(config.width, config.norm_eps)
    if not config.tied_head:
      self.head_weight = nnx.Param(init(rngs.params(), shape_VD))

  @property
  def head(self):
    tied = self.config.tied_head
    return Head((self.embedding if tied else self.head_weight)[...])

  def __call__(self, ids_BT, segments_BT=None, *, remat=False):
    """Hidden states of whole sequences.

    Args:
      ids_BT: int32 token ids.
      segments_BT: int32, see `run_blocks`; None is one segment.
      remat: see `run_blocks`.
    """
    if segments_BT is None:
      segments_BT = jnp.ones_like(ids_BT)
    x_BTD = run_blocks(
      self.config, self.blocks, self.embedding[...][ids_BT], segments_BT, remat
    )
    return Outputs(self.final_norm(x_BTD), self.head)

  def init_cache(self, batch, slots):
    """An empty key-value cache: keys and values [B, K, S, H] of each layer."""
    c = self.config
    zeros = jnp.zeros(
      (batch, c.kv_heads, slots, c.head_dim), self.embedding[...].dtype
    )
    return [(zeros, zeros) for _ in range(c.layers)]

  def unstacked(self):
    """The blocks one by one: slice the stack once, outside a decoding loop."""
    blocks_def, params_L = nnx.split(self.blocks)
    return [
      nnx.merge(blocks_def, jax.tree.map(lambda p, l=l: p[l], params_L))
      for l in range(self.config.layers)
    ]

  def decode(self, blocks, ids_BT, positions_BT, cache):
    """Hidden states of tokens that extend a cache.

    The slot of a token is its position, for every row its own: rows of
    different length never disturb each other, and a row is rolled back by not
    advancing its position. Slots at or past the end of the cache are dropped.

    Args:
      blocks: `unstacked()`.
      ids_BT, positions_BT: the tokens and where they stand; [B, T].
      cache: from `init_cache` or an earlier call.

    Returns:
      `Outputs` for the T tokens, and the cache that holds them.
    """
    S = cache[0][0].shape[2]
    rope = rope_tables(
      positions_BT, self.config.head_dim, self.config.rope_theta
    )
    mask_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    x_BTD = self.embedding[...][ids_BT]
    new_cache = []
    for block, layer_cache in zip(blocks, cache, strict=True):
      x_BTD, layer_cache = block(
        x_BTD, rope, mask_BTS, layer_cache, positions_BT
      )
      new_cache.append(layer_cache)
    return Outputs(self.final_norm(x_BTD), self.head), new_cache

  def logits(self, ids_BT, segments_BT=None):
    """fp32 logits [B, T, V], for small uses: training never makes them."""
    outputs = self(ids_BT, segments_BT)
    return jax.vmap(outputs.head)(outputs.hidden_BTD)


def split(model):
  """A model as (definition, parameters): a static value and nested dicts.

  `nnx.merge(definition, parameters)` is the model again; functions under
  `jax.jit` take the parameters and merge inside.
  """
  definition, state = nnx.split(model)
  return definition, nnx.to_pure_dict(state)


def apply(definition, params, tokens, dtype, remat=False):
  """`Outputs` of a split model on `data.pipeline.Tokens`, computed in `dtype`.

  Master weights stay as they are: their gradient passes through the cast.
  """
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  model = nnx.merge(definition, params)
  return model(tokens.ids_BT, tokens.segments_BT, remat=remat)
