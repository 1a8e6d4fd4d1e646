"""The one decoder: a pre-norm transformer whose families are configs.

A model returns the *hidden states* and the vocabulary head that would turn
them into logits; (B, T, V) logits exist only where somebody asks for them in
so many words (`Decoder.logits`) and, chunk by chunk, in `objectives/head.py`.

Layers are stacked along a leading L and scanned in training, for a short
compile. Decoding has single ones (`decoding.unstack`): a scan would copy the
key-value cache for every token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx, struct

from gakd_jax import sharding
from gakd_jax.data import segments
from gakd_jax.models import attention as attention_lib
from gakd_jax.models import blocks as blocks_lib
from gakd_jax.models import caches
from gakd_jax.models import layers as layers_lib


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
  max_length: int  # positions that the model was made for
  family: str = 'qwen3'  # the key of `families.FAMILIES`

  qk_norm: bool = True  # queries and keys are normed by head (Qwen3)
  qkv_bias: bool = False  # of queries, keys and values (Qwen2, GPT-2)
  bias: bool = False  # of all projections (GPT-2)
  gated: bool = True  # feed-forward; not GPT-2's
  gelu: bool = False  # else SiLU (GPT-2, Gemma)
  gelu_exact: bool = False  # else its tanh approximation
  layer_norm: bool = False  # else RMS norm (GPT-2)
  norm_from_one: bool = False  # norms store scale - 1 (Gemma)
  post_norms: bool = False  # after attention and feed-forward too (Gemma 2)
  scaled_embedding: bool = False  # by the root of the width (Gemma)
  learned_positions: bool = False  # `max_length` of them, else rotary (GPT-2)
  rope_scaling: tuple | None = None  # see `layers.rope_tables` (Llama 3)
  # How many positions each layer sees, its own included; 0: all. (): no layer
  # has a window (Mistral, Qwen2, Gemma 2).
  windows: tuple = ()
  attention_scale: float | None = None  # None: head_dim ** -0.5 (Gemma 2)
  attention_cap: float | None = None  # `soft_cap` of scores (Gemma 2)
  head_cap: float | None = None  # and of logits (Gemma 2)


_TABLES = ('embedding', 'position_embedding')
# The logit of what is no token: its probability is 0, and, being finite, no
# product with that is NaN.
_NEVER = -1e30


@struct.dataclass
class Head:
  """What turns hidden states into logits: z = h W', `soft_cap`ped by `cap`.

  weight_VD: [V, D], where `sharding.RULES` puts it.
  valid: None, or how many ids have a token: those from there on pad the
    embedding, and get no probability.
  gathered_RVD: None, or a whole copy of it on each of the R devices that split
    rows, made once a step for all that `objectives/head.py` does with it.
  """

  weight_VD: jax.Array
  cap: float | None = struct.field(pytree_node=False, default=None)
  valid: int | None = struct.field(pytree_node=False, default=None)
  gathered_RVD: jax.Array | None = None

  @property
  def vocab_size(self):
    return self.weight_VD.shape[0]

  def first(self, V):
    """The head of the first V ids."""
    if self.vocab_size == V:
      return self
    gathered = self.gathered_RVD
    if gathered is not None:
      gathered = gathered[:, :V]
    return self.replace(weight_VD=self.weight_VD[:V], gathered_RVD=gathered)

  def gathered(self):
    """With copies, if there is a mesh that splits rows."""
    return self.replace(gathered_RVD=sharding.copies(self.weight_VD))

  def linear(self, hidden_ND):
    """h W' in fp32 whatever the compute dtype; [N, D] -> [N, V]."""
    return jnp.einsum(
      'nd,vd->nv',
      hidden_ND,
      self.weight_VD,
      preferred_element_type=jnp.float32,
    )

  def capped(self, z_NV, first=0):
    """Logits, of what `linear` gives for the ids from `first` on."""
    z_NV = layers_lib.soft_cap(z_NV, self.cap) if self.cap else z_NV
    if self.valid is None:
      return z_NV
    ids_V = first + jnp.arange(z_NV.shape[-1])
    return jnp.where(ids_V < self.valid, z_NV, _NEVER)

  def __call__(self, hidden_ND):
    """Logits in fp32, [N, D] -> [N, V]."""
    return self.capped(self.linear(hidden_ND))


@struct.dataclass
class Outputs:
  """What a model returns for a batch; `embedding_VD` gets no gradient."""

  hidden_BTD: jax.Array
  head: Head
  embedding_VD: jax.Array | None = None


class Decoder(nnx.Module):
  """A decoder-only language model.

  Its parameters are fp32 when made and keep whatever dtype they are given:
  the dtype of the projections is the compute dtype, so mixed precision is a
  cast of the parameter tree. `source` is the directory whose config.json it has
  (and of adapters, the base), `companions` that whose tokenizer travels with
  it: the same, or an adapter's.
  """

  cache_kind = None  # of `caches.KINDS`, by `decoding.unstack`; None: exact

  def __init__(self, config, rngs, source='', companions=''):
    self.config = config
    self.source = str(source)
    self.companions = str(companions or source)
    # With a tied head, logits of a fresh model are then about 1, whatever its
    # width, and what a scaled embedding puts into the residual stream is, too.
    init = nnx.initializers.normal(config.width**-0.5)
    shape_VD = (config.vocab_size, config.width)
    self.embedding = nnx.Param(init(rngs.params(), shape_VD))
    if config.learned_positions:
      self.position_embedding = nnx.Param(
        init(rngs.params(), (config.max_length, config.width))
      )
    self.blocks = blocks_lib.stack(config, rngs)
    # What 2 L branches add to the stream does not grow with L (GPT-2).
    for linear in (self.blocks.attention.out, self.blocks.mlp.down):
      linear.kernel[...] *= (2 * max(1, config.layers)) ** -0.5
    self.final_norm = layers_lib.make_norm(config)
    if not config.tied_head:
      self.head_weight = nnx.Param(init(rngs.params(), shape_VD))

  @property
  def dtype(self):
    """Of the computation: the widest of the projections' dtypes."""
    linears = (m for _, m in nnx.iter_modules(self.blocks))
    return jnp.result_type(
      *{m.dtype for m in linears if isinstance(m, layers_lib.Linear)}
    )

  @property
  def head(self):
    tied = self.config.tied_head
    weight = self.embedding if tied else self.head_weight
    return Head(weight[...].astype(self.dtype), self.config.head_cap)

  def embed(self, ids_BT, positions_BT):
    """What the first block reads."""
    x_BTD = sharding.look_up(self.embedding[...], ids_BT, self.dtype)
    if self.config.scaled_embedding:
      x_BTD *= jnp.asarray(self.config.width**0.5, x_BTD.dtype)
    if self.config.learned_positions:
      x_BTD += sharding.look_up(
        self.position_embedding[...], positions_BT, self.dtype
      )
    return x_BTD

  def __call__(self, ids_BT, segments_BT=None, **settings):
    """Hidden states of whole sequences.

    Args:
      ids_BT: int32 token ids.
      segments_BT: int32, see `blocks.run`; None is one segment.
      **settings: remat, key, backend, packed: see `blocks.run`.
    """
    if segments_BT is None:
      segments_BT = jnp.ones_like(ids_BT)
    x_BTD = self.embed(ids_BT, segments.positions(segments_BT))
    x_BTD = blocks_lib.run(
      self.config, self.blocks, x_BTD, segments_BT, **settings
    )
    return Outputs(self.final_norm(x_BTD), self.head)

  def init_cache(self, batch, slots):
    """An empty key-value cache: a `caches.Cache` for each layer."""
    c = self.config
    sizes = batch, c.kv_heads, c.head_dim, slots
    return [
      caches.empty(*sizes, self.dtype, self.cache_kind) for _ in range(c.layers)
    ]

  def decode(self, ids_BT, positions_BT, cache):
    """Hidden states of tokens that extend a cache; of `decoding.unstack`.

    The slot of a token is its position, for every row its own: rows of
    different length never disturb each other, and a row is rolled back by not
    advancing its position. Slots at or past the end of the cache are dropped.

    Args:
      ids_BT, positions_BT: the tokens and where they stand; [B, T].
      cache: from `init_cache` or an earlier call.

    Returns:
      `Outputs` for the T tokens, and the cache that holds them.
    """
    slot_S = jnp.arange(cache[0].v_BKSH.shape[2])
    # Tables of all slots, to take positions from: else XLA computes cosines
    # again in every layer, for every head.
    rope = blocks_lib.rope(self.config, slot_S[None])
    if rope is not None:
      rope = tuple(table_1S1h[0, positions_BT] for table_1S1h in rope)
    context = attention_lib.Context(rope, slots_BT=positions_BT)
    windows = self.config.windows or [0] * len(self.blocks)
    x_BTD = self.embed(ids_BT, positions_BT)
    new_cache = []
    layers = zip(self.blocks, windows, cache, strict=True)
    for block, window, layer_cache in layers:
      layer = context._replace(window=window or None)
      x_BTD, layer_cache = block(x_BTD, layer, layer_cache)
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


def cast(params, dtype):
  """Parameters in `dtype`, but for integers, which are quantized ones."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.isdtype(x.dtype, 'real floating') else x,
    params,
  )


def apply(definition, params, tokens, dtype, **settings):
  """Hidden states [B, T, D] of a split model, computed in `dtype`.

  tokens: `data.pipeline.Tokens`. settings: see `blocks.run`. Master weights
  stay as they are: their gradient passes through the cast. Embeddings are cast
  once they are looked up, so that the gradient of a token is summed in their
  own dtype: in bf16, one that is there 4096 times would keep 6 % of it.
  """
  tables = {name: params[name] for name in _TABLES if name in params}
  model = nnx.merge(definition, cast(params, dtype) | tables)
  return model(tokens.ids_BT, tokens.segments_BT, **settings).hidden_BTD
