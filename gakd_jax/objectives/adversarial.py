"""The adversarial losses of GAKD's critic and student, and its penalties.

d_t and d_s are the critic's scores of the teacher's and the student's sequence
of one pair; losses and penalties are those of each pair, unreduced. The
formulas and their papers stand in `gakd.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

softplus = jax.nn.softplus


def _r1_r2(read, x_t, x_s, norm_t, norm_s, rng):
  """Half of |dD/dz|^2 at the teacher's and the student's input (R3GAN)."""
  del read, x_t, x_s, rng
  return 0.5 * (norm_t + norm_s)


def _unit_norm(read, x_t, x_s, norm_t, norm_s, rng):
  """(|dD/dz| - 1)^2 at a random mixture of the two inputs (WGAN-GP)."""
  del norm_t, norm_s
  dtype = jnp.promote_types(x_t.dtype, jnp.float32)
  a_B11 = jax.random.uniform(rng, (x_t.shape[0], 1, 1), dtype)
  _, norm = read((a_B11 * x_t + (1 - a_B11) * x_s).astype(x_t.dtype))
  return jnp.square(jnp.sqrt(jnp.maximum(norm, 1e-12)) - 1)


def _no_penalty(read, x_t, x_s, norm_t, norm_s, rng):
  del read, x_t, x_s, norm_s, rng
  return jnp.zeros_like(norm_t)


@dataclasses.dataclass(frozen=True)
class Variant:
  critic: Callable  # (d_t, d_s) -> loss of each pair
  generator: Callable
  penalty: Callable  # -> of each pair, to be multiplied by gamma


VARIANTS = {
  'rgan': Variant(
    critic=lambda d_t, d_s: softplus(d_s - d_t),
    generator=lambda d_t, d_s: softplus(d_t - d_s),
    penalty=_r1_r2,
  ),
  'gan': Variant(
    critic=lambda d_t, d_s: softplus(-d_t) + softplus(d_s),
    generator=lambda d_t, d_s: softplus(-d_s),
    penalty=_no_penalty,
  ),
  'wgan': Variant(
    critic=lambda d_t, d_s: d_s - d_t,
    generator=lambda d_t, d_s: -d_s,
    penalty=_unit_norm,
  ),
}
