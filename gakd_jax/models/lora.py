"""LoRA: low-rank adapters of a model's projections (arXiv 2106.09685).

A projection x W becomes x W + (alpha / rank) dropout(x) A B, with A of
[in, rank] and B of [rank, out]; training makes no merged copy. Only A and B are
trained: `partition` cuts the parameter tree, and the rest is the frozen base,
which keeps its own dtype, has no gradient and is in no checkpoint.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import UserError, keys
from gakd_jax import settings as settings_lib
from gakd_jax.models import convert, layers
from gakd_jax.settings import BelowOne, Count, Positive, Regex


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  rank: Count = 16
  alpha: Positive = 32.0
  dropout: BelowOne = 0.0  # of what the adapter reads, in training
  # Regex of projections: attention/{query,key,value,out}, mlp/{gate,up,down}.
  targets: Regex = '.*'


def make_config(settings):
  """`LoRAConfig` of `config.student.lora`; one line for what is misspelt."""
  known = settings_lib.types_of(LoRAConfig)
  prefix = 'config.student.lora.'
  return LoRAConfig(**settings_lib.checked(prefix, settings, known, 'LoRA'))


class LoRA(nnx.Module):
  """The adapter of one projection; of stacked layers, a leading L."""

  def __init__(self, a, b, scale, dropout=0.0, index=0, uneven=False):
    self.a = nnx.Param(a)
    self.b = nnx.Param(b)
    self.scale = scale  # alpha / rank
    self.dropout = dropout
    self.index = index  # tells the dropout of one projection from another's
    self.uneven = uneven  # layers had ranks and scales of their own: see `peft`

  def __call__(self, x, key=None):
    if self.dropout and key is not None:
      x = _drop(x, self.dropout, jax.random.fold_in(key, self.index))
    return self.scale * ((x @ self.a[...]) @ self.b[...])


def _drop(x, share, key):
  """Zeros for a share of x, in 256ths; what is kept makes up for it.

  A random byte decides, and four come from one word of the generator.
  """
  share = min(max(round(256 * share), 1), 255)
  *shape, n = x.shape
  words = jax.random.bits(key, (*shape, -(-n // 4)), jnp.uint32)
  random = jax.lax.bitcast_convert_type(words, jnp.uint8)
  random = random.reshape(*shape, -1)[..., :n]
  # In fp32: rounded to bf16, the factor would be off by the same for all.
  kept = (x * jnp.float32(256 / (256 - share))).astype(x.dtype)
  return jnp.where(random >= share, kept, 0)


def projections(model):
  """{'attention/query': its `Linear`} of a model's (stacked) blocks."""
  return {
    '/'.join(map(str, path)): module
    for path, module in sorted(nnx.iter_modules(model.blocks))
    if isinstance(module, layers.Linear)
  }


def adapters(model):
  """{'attention/query': its `LoRA`} of the projections that have one."""
  found = projections(model).items()
  return {name: linear.lora for name, linear in found if linear.lora}


def attach(model, config, seed, place=None):
  """Puts fresh adapters on a model, in place: fp32, B zero.

  A is drawn as PEFT does: uniform within 1 / sqrt(in). `place` is a sharding.

  Raises:
    UserError: if no projection matches `config.targets`.
  """
  linears = projections(model)
  matching = [n for n in linears if re.search(config.targets, n)]
  if not matching:
    raise UserError(
      f'config.student.lora: targets={config.targets!r} matches no projection; '
      f'they are {", ".join(linears)}'
    )
  key_of = jax.random.split(keys.of(seed, 'adapters'), len(matching))
  for i, name in enumerate(matching):
    *stack, n_in, n_out = linears[name].kernel.shape
    shape = (*stack, n_in, config.rank)
    a = jax.random.uniform(key_of[i], shape, minval=-1, maxval=1) * n_in**-0.5
    b = jnp.zeros((*stack, config.rank, n_out))
    if place is not None:
      a, b = jax.device_put((a, b), place)
    scale = config.alpha / config.rank
    linears[name].lora = LoRA(a, b, scale, config.dropout, i)


def resume(model, config, path):
  """Goes on with a model's adapters, under the dropout of `config`.

  Raises:
    UserError: if their ranks, scales or places are not those of `config`, or
      differ by layer.
  """
  linears, found = projections(model), adapters(model)
  for name, linear in linears.items():
    wanted = bool(re.search(config.targets, name))
    if wanted != (name in found):
      problem = f'{name} has {"none" if wanted else "one"}'
    elif wanted and linear.lora.uneven:
      problem = f'{name} has other ranks or alphas in some layers, or none'
    elif wanted and linear.lora.a.shape[-1] != config.rank:
      problem = f'rank {linear.lora.a.shape[-1]}, not {config.rank}'
    elif wanted and linear.lora.scale != config.alpha / config.rank:
      problem = f'alpha {linear.lora.scale * config.rank:g}, not {config.alpha}'
    else:
      continue
    raise UserError(
      f'{path}: its adapters are not those of config.student.lora: {problem}; '
      'change that, or merge them first (tools/convert_weights.py to_hf '
      '--merge)'
    )
  for adapter in found.values():
    adapter.dropout = config.dropout


def merge(model):
  """Folds adapters into their projections and removes them, in place.

  Raises:
    UserError: if a projection is quantized.
  """
  for linear in projections(model).values():
    if linear.lora:
      if linear.is_quantized:
        raise UserError(
          f'{model.source}: its projections are quantized; to merge adapters, '
          'load it without `quantize`'
        )
      fold(linear)


def fold(linear):
  """Adds a projection's adapter, if any, to its kernel, and removes it."""
  if linear.lora:
    kernel = linear.kernel[...]
    added = linear.lora.scale * jnp.einsum(
      '...ir,...ro->...io',
      linear.lora.a[...].astype(jnp.float32),
      linear.lora.b[...].astype(jnp.float32),
    )
    merged = kernel.astype(jnp.float32) + added
    linear.kernel[...] = merged.astype(kernel.dtype)
    del linear.lora


def partition(params):
  """A parameter tree as (adapters, base); `combine` joins them again."""
  flat = convert.flatten(params)
  trained = {name: x for name, x in flat.items() if '/lora/' in name}
  base = {name: x for name, x in flat.items() if name not in trained}
  return convert.unflatten(trained), convert.unflatten(base)


def combine(params, base):
  """Trained parameters and their frozen base (None: there is none) as one."""
  if base is None:
    return params
  return convert.unflatten(convert.flatten(base) | convert.flatten(params))
