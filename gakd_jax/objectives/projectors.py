"""Affine maps between the widths of two models, a method's own parameters."""

import jax
import jax.numpy as jnp

from gakd_jax import sharding
from gakd_jax.objectives import base


def init(key, sizes, mesh=None, bias=True):
  """`Own` of {name: (in, out)}, uniform within the root of 1 / in."""

  def fresh(key):
    extra = {}
    for name, (n, m) in sizes.items():
      key, *keys = jax.random.split(key, 3)
      limit = n**-0.5
      extra[name] = {
        part: jax.random.uniform(k, shape, jnp.float32, -limit, limit)
        for part, k, shape in zip(
          ('kernel', 'bias'), keys, ((n, m), (m,)), strict=True
        )
        if bias or part == 'kernel'
      }
    return base.Own(extra=extra)

  shapes = jax.eval_shape(fresh, key)
  places = None if mesh is None else sharding.shardings(shapes, mesh)
  return jax.jit(fresh, out_shardings=places)(key)


def apply(parameters, x_BTD):
  """In the dtype of x."""
  y_BTD = x_BTD @ parameters['kernel'].astype(x_BTD.dtype)
  if 'bias' not in parameters:
    return y_BTD
  return y_BTD + parameters['bias'].astype(x_BTD.dtype)[None, None]
