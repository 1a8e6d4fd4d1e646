"""A student that is cut from a larger model: fewer layers, narrower blocks.

Cutting, then distilling, is how small models are made of large ones
(Minitron, arXiv 2407.14679; ShortGPT, 2403.03853). What is kept is
`config.student.keep`; what goes is chosen by place, or by what it does on some
texts:

  layers    1 - the cosine between what goes into a layer and what comes out,
            a mean over tokens (ShortGPT's block influence)
  ff_width  the Euclidean norm of a neuron's activations, what `down` reads
  kv_heads  that of what a key-value head puts out, with all its queries

Neurons and heads are chosen in each layer by itself.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gakd_jax import UserError, sharding
from gakd_jax import settings as settings_lib
from gakd_jax.data import segments
from gakd_jax.models import attention, blocks, convert, families, transformer
from gakd_jax.settings import Count, Natural, Only

_Places = Annotated[
  tuple[Natural, ...],
  Only('one at least, in order', lambda x: x and [*x] == sorted({*x})),
]


@dataclasses.dataclass(frozen=True)
class Keep:
  layers: Count | _Places | None = None  # how many, or which; None: all
  # Which of so many: 'even', from the first to the last, or the most important.
  by: Literal['even', 'importance'] = 'even'
  ff_width: Count | None = None  # neurons of each layer, the most important
  kv_heads: Count | None = None  # heads with their queries, likewise
  rows: Count = 64  # of the data, to measure importance on

  @property
  def asks_data(self):
    """Whether importance is asked for."""
    by_data = self.by == 'importance' and isinstance(self.layers, int)
    return by_data or bool(self.ff_width or self.kv_heads)

  def places(self, config, influence_L=None):
    """The layers that are kept, in order."""
    n = config.layers
    if self.layers is None:
      return [*range(n)]
    if not isinstance(self.layers, int):
      return [*self.layers]
    if self.by == 'importance' and influence_L is None:
      if len(set(config.windows)) > 1:
        raise UserError(
          "config.student.keep.by='importance': layers of this model differ in "
          'their windows, and a student whose shape is known later cannot be '
          'planned; name the layers'
        )
    elif self.by == 'importance':
      best = np.argsort(-np.asarray(influence_L), kind='stable')
      return sorted(best[: self.layers].tolist())
    return np.round(np.linspace(0, n - 1, self.layers)).astype(int).tolist()

  def shape(self, config, influence_L=None):
    """The `DecoderConfig` of what is kept.

    Raises:
      UserError: if there is not as much, or no model of the family is so.
    """
    most = {
      'layers': config.layers,
      'ff_width': config.ff_width,
      'kv_heads': config.kv_heads,
    }
    for name, n in most.items():
      asked = getattr(self, name)
      last = asked[-1] + 1 if isinstance(asked, tuple) else asked
      if last is not None and last > n:
        raise UserError(
          f'config.student.keep.{name}={asked}: the model has {n} {name}'
        )
    places = self.places(config, influence_L)
    kv_heads = self.kv_heads or config.kv_heads
    windows = tuple(config.windows[l] for l in places if config.windows)
    found = dataclasses.replace(
      config,
      layers=len(places),
      windows=windows if any(windows) else (),
      ff_width=self.ff_width or config.ff_width,
      kv_heads=kv_heads,
      heads=config.heads // config.kv_heads * kv_heads,
    )
    families.check(found, 'config.student.keep')
    return found


def make(settings):
  """`Keep` of `config.student.keep`; one line for what is misspelt."""
  known = settings_lib.types_of(Keep)
  return Keep(
    **settings_lib.checked('config.student.keep.', settings, known, 'a cut')
  )


def cut(model, keep, batches=(), mesh=None):
  """A model with what `keep` keeps; its weights are those of `model`.

  Args:
    model: a `Decoder`, not quantized and without adapters.
    keep: a `Keep`.
    batches: (ids_BT, segments_BT) of texts, where importance is asked for.
    mesh: where its weights are; None is one device.
  """
  config = model.config
  measured = importance(model, batches, mesh) if keep.asks_data else {}
  influence_L = measured.get('layers')
  smaller = keep.shape(config, influence_L)
  places = keep.places(config, influence_L)
  flat = convert.flatten(transformer.split(model)[1])
  for name in flat:
    if name.startswith('blocks/'):
      flat[name] = flat[name][jnp.array(places)]
  for size, axes in (('ff_width', _NEURONS), ('kv_heads', _HEADS)):
    n = getattr(keep, size)
    if n is None:
      continue
    score_LN = np.asarray(measured[size])[places]
    kept_LN = np.sort(np.argsort(-score_LN, axis=1, kind='stable')[:, :n])
    for name, axis in axes.items():
      if name in flat:
        flat[name] = _take(flat[name], kept_LN, score_LN.shape[1], axis)
  if mesh is not None:
    flat = jax.device_put(flat, sharding.shardings(flat, mesh))
  new = nnx.eval_shape(
    lambda: transformer.Decoder(
      smaller, nnx.Rngs(0), model.source, model.companions
    )
  )
  return nnx.merge(transformer.split(new)[0], convert.unflatten(flat))


_TINY = np.finfo(np.float32).tiny
# Of parameters without their leading L: along which axis neurons lie, and heads
# in as many equal parts as there are key-value heads.
_NEURONS = {
  'blocks/mlp/gate/kernel': 1,
  'blocks/mlp/gate/bias': 0,
  'blocks/mlp/up/kernel': 1,
  'blocks/mlp/up/bias': 0,
  'blocks/mlp/down/kernel': 0,
}
_HEADS = {
  **{
    f'blocks/attention/{part}/{kind}': axis
    for part in ('query', 'key', 'value')
    for kind, axis in (('kernel', 1), ('bias', 0))
  },
  'blocks/attention/out/kernel': 0,
}


def _take(x_L, kept_LN, parts, axis):
  """Of each layer those of the equal parts along an axis that are kept."""

  def take(x, kept_N):
    x = jnp.moveaxis(x, axis, 0)
    taken = x.reshape(parts, -1, *x.shape[1:])[kept_N]
    return jnp.moveaxis(taken.reshape(-1, *x.shape[1:]), 0, axis)

  return jax.vmap(take)(x_L, jnp.array(kept_LN))


class _Watched:
  """A projection, and the squares of what it reads, summed over texts."""

  def __init__(self, linear, is_text_BT):
    self._linear = linear
    self._is_text_BT = is_text_BT

  def __call__(self, x_BTD, key=None):
    square_BTD = jnp.square(x_BTD.astype(jnp.float32))
    self.seen_D = jnp.sum(
      square_BTD, axis=(0, 1), where=self._is_text_BT[..., None]
    )
    return self._linear(x_BTD, key)


def importance(model, batches, mesh=None):
  """{'layers': [L], 'ff_width': [L, F], 'kv_heads': [L, K]} on some texts."""
  totals, tokens = None, 0
  for ids_BT, segments_BT in batches:
    found = _importance(model, ids_BT, segments_BT)
    # A process reads what it has whole.
    found = jax.device_put(found, mesh and sharding.replicated(mesh))
    found = jax.tree.map(np.asarray, found)
    totals = found if totals is None else jax.tree.map(np.add, totals, found)
    tokens += int(np.sum(segments_BT > 0))
  if not tokens:
    raise UserError('config.student.keep: there is no text to measure it on')
  return {
    'layers': 1 - totals['cosine'] / tokens,
    'ff_width': totals['ff_width'] ** 0.5,
    'kv_heads': totals['kv_heads'] ** 0.5,
  }


@jax.jit
def _importance(model, ids_BT, segments_BT):
  c = model.config
  positions_BT = segments.positions(segments_BT)
  is_text_BT = segments_BT > 0
  T = ids_BT.shape[1]
  context = attention.Context(
    rope=blocks.rope(c, positions_BT),
    segments_BT=segments_BT,
    backend='chunked',
  )
  blocks_def, params_L = nnx.split(model.blocks)

  def body(x_BTD, scanned):
    params, window = scanned
    block = nnx.merge(blocks_def, params)
    down = block.mlp.down = _Watched(block.mlp.down, is_text_BT)
    out = block.attention.out = _Watched(block.attention.out, is_text_BT)
    y_BTD, _ = block(x_BTD, context._replace(window=window))
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    norms_BT = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    # The embedding of a token that was never trained may be 0.
    cosine_BT = jnp.sum(x * y, -1) / jnp.maximum(norms_BT, _TINY)
    return y_BTD, {
      'cosine': jnp.sum(cosine_BT, where=is_text_BT),
      'ff_width': down.seen_D,
      'kv_heads': out.seen_D.reshape(c.kv_heads, -1).sum(1),
    }

  x_BTD = model.embed(ids_BT, positions_BT)
  windows = jnp.array([w or T for w in c.windows or [0] * c.layers])
  return jax.lax.scan(body, x_BTD, (params_L, windows))[1]
