"""What compiled models hold and move on a mesh: rows stay on their device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import hlo, models, sharding
from gakd_jax.data.pipeline import Tokens
from gakd_jax.models import critic as critic_lib
from gakd_jax.models import transformer

# No size is another's, nor what the mesh leaves of one: B and its half are
# rows of several devices, T is in activations alone.
B, T, D, V, C = 72, 28, 32, 304, 16
CONFIG = models.DecoderConfig(
  vocab_size=V,
  width=D,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=16,
  ff_width=80,
  tied_head=True,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=T,
)
CRITIC = critic_lib.config_of({'width': C, 'heads': 2, 'ff_width': 40}, V)
MESHES = {
  'fsdp': {'data': 1, 'fsdp': 8},
  'all': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
_COLLECTIVE = re.compile(
  r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all'
  r'|collective-permute)(?:-start)?\('
)


def _decoder(config, ids_BT):
  """A function of parameters to a scalar, and the parameters."""
  definition, params = transformer.split(models.Decoder(config, nnx.Rngs(0)))
  tokens = Tokens(ids_BT, jnp.ones_like(ids_BT), ids_BT > 0)

  def loss(params):
    hidden_BTD = transformer.apply(definition, params, tokens, 'float32')
    return jnp.sum(jnp.sin(hidden_BTD))

  return loss, params


def _critic(ids_BT):
  """As `_decoder`, with second derivatives; what it reads is parameters, too."""
  params = critic_lib.init(CRITIC, jax.random.key(0), 'log_probs')
  params['score'] = jnp.ones(C)
  params['head_weight'] = jnp.ones((V, D))

  def loss(params):
    params = dict(params)
    head = transformer.Head(params.pop('head_weight'))
    w_VC = critic_lib.weight(params['projection'], 'log_probs', jnp.float32)
    hidden_BTD = jnp.sin(ids_BT[..., None] * jnp.ones((1, 1, D)))
    x_BTC = critic_lib.project(transformer.Outputs(hidden_BTD, head), w_VC)
    model = nnx.merge(critic_lib.definition(CRITIC), params)
    u_BTC = jax.grad(lambda x: jnp.sum(model(x, jnp.ones_like(ids_BT))))(x_BTC)
    return jnp.sum(u_BTC**2)

  return loss, params


def _compiled(make, mesh):
  """HLO of the gradient, parameters and rows placed as in training."""
  ids_BT = np.random.default_rng(0).integers(0, V, (B, T), np.int32)
  params = make(ids_BT)[1]
  places = sharding.shardings(params, mesh)
  with jax.set_mesh(mesh):
    gradient = jax.jit(
      lambda params, ids_BT: jax.grad(make(ids_BT)[0])(params),
      out_shardings=places,
    )
    args = jax.device_put(params, places), sharding.put_batch(ids_BT, mesh)
    return gradient.lower(*args).compile().as_text()


def _float_shapes(text):
  found = re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', text)
  return [tuple(map(int, dims.split(','))) for dims in found]


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('part', ['decoder', 'critic'])
def test_rows_stay_on_their_device(part, mesh, capfd):
  make = {'decoder': lambda ids: _decoder(CONFIG, ids), 'critic': _critic}
  text = _compiled(make[part], sharding.make_mesh(**MESHES[mesh]))
  ways = 8 if mesh == 'fsdp' else 4
  activations = [s for s in _float_shapes(text) if T in s]
  assert B // ways in {s[0] for s in activations}
  # A product flattens rows and tokens.
  together = {B // n * t for n in range(1, ways) if B % n == 0 for t in (1, T)}
  # But for the columns that `sharding.look_up` exchanges for rows.
  exchanged = D // MESHES[mesh]['fsdp']
  assert not [
    s for s in _float_shapes(text) if s[0] in together and s[-1] != exchanged
  ]
  moved = [m.groups() for m in _COLLECTIVE.finditer(text)]
  assert moved
  flat = {B // n * T for n in (1, 2, 4, 8)}
  summed = [
    s
    for shapes, kind in moved
    if kind == 'all-reduce'
    for s in _float_shapes(shapes)
    if T in s or s[0] in flat
  ]
  if mesh == 'fsdp':
    assert not summed
  else:  # Over `tensor`: two in each block, and as many gradients.
    assert {s[0] for s in summed} == {B // ways * T}
  # What XLA cannot split it makes whole, and says so.
  assert 'rematerialization' not in capfd.readouterr().err


@pytest.mark.slow
def test_recomputed_blocks_do_not_sum_over_tensor_again():
  """What attention put out is kept."""

  def decoder(ids_BT):
    definition, params = transformer.split(models.Decoder(CONFIG, nnx.Rngs(0)))
    tokens = Tokens(ids_BT, jnp.ones_like(ids_BT), ids_BT > 0)

    def loss(params):
      hidden_BTD = transformer.apply(
        definition, params, tokens, 'float32', remat='blocks'
      )
      return jnp.sum(jnp.sin(hidden_BTD))

    return loss, params

  text = _compiled(decoder, sharding.make_mesh(data=2, fsdp=2, tensor=2))
  sums = [
    t.name
    for t in hlo.transfers(text)
    for shape in t.shapes
    if t.kind == 'all-reduce' and shape == ('f32', (B // 4 * T, D))
  ]
  # Two, and the gradients of what five projections read.
  assert len(sums) == 7


@pytest.mark.slow
def test_values_are_those_of_one_device():
  """With learned positions: a second table to look up in."""
  config = dataclasses.replace(CONFIG, learned_positions=True)
  ids_BT = np.random.default_rng(0).integers(0, V, (8, T), np.int32)
  loss, params = _decoder(config, ids_BT)
  want = jax.jit(jax.grad(loss))(params)
  mesh = sharding.make_mesh(**MESHES['all'])
  places = sharding.shardings(params, mesh)
  with jax.set_mesh(mesh):
    got = jax.jit(
      lambda params, ids_BT: jax.grad(_decoder(config, ids_BT)[0])(params)
    )(jax.device_put(params, places), sharding.put_batch(ids_BT, mesh))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max()
    ),
    got,
    want,
  )
