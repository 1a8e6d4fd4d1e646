"""The key-value cache of a layer: exact, or in int8.

'int8' rounds each token's key and value of each head to 255 levels, with a
scale of its own: half of the memory of bf16, and the scales, 4 bytes for each
head_dim ones. The scale of a key is that of its scores, and the scale of a
value that of its weights, so the integers go into products as they are.

It is memory that this saves. On a CPU, whose compiler converts the integers
before each product, a token takes 5 % more time than in fp32 with 192 slots,
and half more with 1024 (6 layers x 384, 32 rows; 8 % more than in bf16).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

KINDS = ('int8',)


class Cache(NamedTuple):
  """Keys and values of a layer; each as the product that reads it takes it.

  k_BKHS, v_BKSH: in the compute dtype, or int8.
  k_scale_BKS, v_scale_BKS: fp32, times which integers are what they stand for;
    None: they are exact.
  """

  k_BKHS: Any
  v_BKSH: Any
  k_scale_BKS: Any = None
  v_scale_BKS: Any = None

  def write(self, slots_BT, k_BTKH, v_BTKH):
    """With tokens in slots of each row; past the end they are dropped."""
    k_scale_BTK = v_scale_BTK = None
    if self.k_scale_BKS is not None:
      k_BTKH, k_scale_BTK = rounded(k_BTKH)
      v_BTKH, v_scale_BTK = rounded(v_BTKH)
    rows_B1 = jnp.arange(len(slots_BT))[:, None]

    def put(x_BKS, new_BTK):
      if x_BKS is None:
        return None
      return x_BKS.at[rows_B1, :, slots_BT].set(new_BTK, mode='drop')

    return Cache(
      self.k_BKHS.at[rows_B1, :, :, slots_BT].set(k_BTKH, mode='drop'),
      put(self.v_BKSH, v_BTKH),
      put(self.k_scale_BKS, k_scale_BTK),
      put(self.v_scale_BKS, v_scale_BTK),
    )

  def padded(self, slots):
    """With room for so many tokens."""
    n = slots - self.v_BKSH.shape[2]

    def pad(x, *widths):
      return None if x is None else jnp.pad(x, ((0, 0), (0, 0), *widths))

    return Cache(
      pad(self.k_BKHS, (0, 0), (0, n)),
      pad(self.v_BKSH, (0, n), (0, 0)),
      pad(self.k_scale_BKS, (0, n)),
      pad(self.v_scale_BKS, (0, n)),
    )


def empty(batch, kv_heads, head_dim, slots, dtype, kind=None):
  """A `Cache` of zeros; kind: one of `KINDS`, None: exact."""
  k_BKHS = jnp.zeros(
    (batch, kv_heads, head_dim, slots), jnp.int8 if kind == 'int8' else dtype
  )
  cache = Cache(k_BKHS, k_BKHS.swapaxes(2, 3))
  if kind is None:
    return cache
  scale_BKS = jnp.zeros((batch, kv_heads, slots))
  return cache._replace(k_scale_BKS=scale_BKS, v_scale_BKS=scale_BKS)


def rounded(x_BTKH):
  """int8 of a token and head, and the scale that its largest is 127 times."""
  x_BTKH = x_BTKH.astype(jnp.float32)
  scale_BTK = jnp.max(jnp.abs(x_BTKH), axis=-1) / 127
  # Of zeros, whatever the scale.
  safe_BTK = jnp.where(scale_BTK > 0, scale_BTK, 1)
  return jnp.round(x_BTKH / safe_BTK[..., None]).astype(jnp.int8), scale_BTK
