"""Decoding: a model reads on from where it was, through a key-value cache.

`unstack` makes a model ready for that, once; a `Reader` is such a model and
what it has read. Functions take readers, not models: a second one, of another
model, stands beside the first with a cache of its own.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct

from gakd_jax.models import layers, lora, transformer


def unstack(model, dtype=None, cache=None):
  """The model with single layers instead of stacked ones.

  A slice of a stack is a copy: made here, it is not made by each call of a
  function that decodes. Adapters are merged into their projections, but for
  quantized ones, where they stay adapters. Parameters lie on a mesh as they
  did, and those outside of the layers are shared with `model`.

  Layers are copied one after another: beside the two models there is one
  merged layer at a time. `dtype`: of the result, to which what is merged is
  rounded once; None keeps what `model` has. `cache`: one of `caches.KINDS`;
  None keeps keys and values as they are computed.
  """
  definition, params = transformer.split(model)
  blocks_def, params_L = nnx.split(model.blocks)
  rest = {name: x for name, x in params.items() if name != 'blocks'}
  if dtype is not None:
    rest = transformer.cast(rest, dtype)
  unstacked = nnx.merge(definition, rest | {'blocks': params['blocks']})
  unstacked.blocks = nnx.List(
    [_layer(blocks_def, params_L, l, dtype) for l in range(model.config.layers)]
  )
  unstacked.cache_kind = cache
  return unstacked


@functools.partial(jax.jit, static_argnames=('definition', 'dtype'))
def _layer(definition, params_L, l, dtype):
  block = nnx.merge(definition, jax.tree.map(lambda p: p[l], params_L))
  for _, module in list(nnx.iter_modules(block)):
    if isinstance(module, layers.Linear) and not module.is_quantized:
      lora.fold(module)
  if dtype is None:
    return block
  definition, params = transformer.split(block)
  return nnx.merge(definition, transformer.cast(params, dtype))


@struct.dataclass
class Reader:
  """A model and what it has read of each row.

  A row's slot in the cache is its position, for every row its own. What was
  read is taken back by reading other tokens at the same positions: later ones
  are not seen.
  """

  model: transformer.Decoder  # of `unstack`
  cache: list  # of `Decoder.init_cache`

  def read(self, ids_BT, positions_BT):
    """Hidden states [B, T, D] of tokens, and the reader that has read them."""
    outputs, cache = self.model.decode(ids_BT, positions_BT, self.cache)
    return outputs.hidden_BTD, self.replace(cache=cache)


def prefill(model, prompt_BT, slots):
  """The `Reader` that has read right-padded prompts; room for `slots` tokens.

  Of the padding it has read too, which the row's own tokens overwrite.
  """
  B, T = prompt_BT.shape
  position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  # Attend over the T slots in use, and make room for the response only then.
  _, reader = Reader(model, model.init_cache(B, T)).read(prompt_BT, position_BT)
  return reader.replace(cache=[layer.padded(slots) for layer in reader.cache])
