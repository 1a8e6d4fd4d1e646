"""What is summed in fp32 whatever the compute dtype, and what that costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models
from gakd_jax.data.pipeline import Batch, Tokens
from gakd_jax.models import critic, layers, pair, scores, transformer

SPEC = 'vd,vc->cd'


def _operands(dtype, V=300, D=5, C=3):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.standard_normal((V, n), np.float32), dtype) for n in (D, C)
  ]


def _scalar(einsum):
  """A function of two arrays whose second derivatives are not zero."""
  return lambda a, b: jnp.sum(jnp.sin(einsum(SPEC, a, b)))


def _second(f):
  def norm(a, b):
    d_a, d_b = jax.grad(f, argnums=(0, 1))(a, b)
    return sum(jnp.sum(d.astype(jnp.float32) ** 2) for d in (d_a, d_b))

  return jax.grad(norm, argnums=(0, 1))


def _product_dtypes(f, *args):
  """Of what all products of a function are made."""
  found = set()

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == 'dot_general':
        found.update(x.aval.dtype.name for x in eqn.invars)
      for inner in jax.tree.leaves(list(eqn.params.values())):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          walk(inner)

  walk(jax.make_jaxpr(f)(*args).jaxpr)
  return found


def test_of_fp32_it_is_the_einsum_to_the_bit():
  a, b = _operands(jnp.float32)
  ours, plain = map(_scalar, (layers.einsum32, jnp.einsum))
  for f, g in (
    (ours, plain),
    (jax.grad(ours, argnums=(0, 1)), jax.grad(plain, argnums=(0, 1))),
    (_second(ours), _second(plain)),
  ):
    jax.tree.map(np.testing.assert_array_equal, f(a, b), g(a, b))


def test_of_bf16_sums_are_fp32_and_no_product_is_of_fp32():
  a, b = _operands(jnp.bfloat16)
  got = layers.einsum32(SPEC, a, b)
  assert got.dtype == jnp.float32
  exact = [x.astype(jnp.float32) for x in (a, b)]
  np.testing.assert_allclose(got, jnp.einsum(SPEC, *exact), rtol=1e-5)
  ours, plain = map(_scalar, (layers.einsum32, jnp.einsum))
  for f, g in (
    (jax.grad(ours, argnums=(0, 1)), jax.grad(plain, argnums=(0, 1))),
    (_second(ours), _second(plain)),
  ):
    # Half a dozen roundings to 8 bits.
    for x, y in zip(f(a, b), g(*exact), strict=True):
      assert x.dtype == jnp.bfloat16
      np.testing.assert_allclose(x, y, rtol=0, atol=0.02 * jnp.abs(y).max())
    assert _product_dtypes(f, a, b) == {'bfloat16'}


def test_the_gradient_of_a_head_that_is_projected_is_never_fp32():
  V, D, C, T = 300, 5, 3, 7
  head_VD, projection_VC = _operands(jnp.bfloat16, V, D, C)

  def project(head_VD):
    w_VC = critic.weight(projection_VC, 'log_probs', jnp.bfloat16)
    outputs = transformer.Outputs(
      jnp.ones((1, T, D), jnp.bfloat16), transformer.Head(head_VD)
    )
    return jnp.sum(jnp.sin(critic.project(outputs, w_VC)))

  text = str(jax.make_jaxpr(jax.grad(project))(head_VD))
  assert f'bf16[{V},{D}]' in text
  assert f'f32[{V},{D}]' not in text


@pytest.mark.slow
def test_scores_under_a_soft_cap_have_gradients_of_bf16_products():
  rng = np.random.default_rng(0)
  q_BTNH, k_BKHS, v_BKSH = (
    jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    for shape in ((1, 6, 4, 8), (1, 2, 8, 6), (1, 2, 6, 8))
  )
  mask_BTS = jnp.tril(jnp.ones((1, 6, 6), bool))

  def loss(*args):
    return jnp.sum(jnp.sin(scores.attend(*args, mask_BTS, 0.3, 5.0)))

  gradient = jax.grad(loss, argnums=(0, 1, 2))
  args = q_BTNH, k_BKHS, v_BKSH
  assert _product_dtypes(gradient, *args) == {'bfloat16'}
  exact = [x.astype(jnp.float32) for x in args]
  for x, y in zip(gradient(*args), gradient(*exact), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=0.05 * np.abs(y).max())


CONFIG = models.DecoderConfig(
  vocab_size=40,
  width=16,
  layers=1,
  heads=2,
  kv_heads=1,
  head_dim=8,
  ff_width=24,
  tied_head=False,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=2,
  learned_positions=True,
)


@pytest.mark.slow
def test_a_token_that_is_everywhere_keeps_its_gradient_in_bf16():
  """4096 equal terms: a sum in bf16 stops where the next is below its digits."""
  ids_BT = np.full((2048, 2), 7, np.int32)
  tokens = Tokens(ids_BT, np.ones_like(ids_BT), ids_BT > 0)
  definition, params = transformer.split(models.Decoder(CONFIG, nnx.Rngs(0)))

  def gradient(dtype):
    def loss(params):
      hidden_BTD = transformer.apply(definition, params, tokens, dtype)
      assert hidden_BTD.dtype == dtype
      return jnp.sum(jnp.sin(hidden_BTD.astype(jnp.float32)))

    return jax.jit(jax.grad(loss))(params)

  got, want = gradient(jnp.bfloat16), gradient(jnp.float32)
  for name in ('embedding', 'position_embedding'):
    assert got[name].dtype == jnp.float32
    np.testing.assert_allclose(
      got[name], want[name], rtol=0, atol=0.05 * np.abs(want[name]).max()
    )


@pytest.mark.parametrize('tied_head', [True, False])
def test_the_head_computes_in_the_compute_dtype(tied_head):
  config = dataclasses.replace(CONFIG, tied_head=tied_head)
  decoder = models.Decoder(config, nnx.Rngs(0))
  both, params = pair.make(decoder, dtype=jnp.bfloat16)
  ids_BT = np.ones((1, 2), np.int32)
  tokens = Tokens(ids_BT, ids_BT, ids_BT > 0)
  outputs, _ = jax.eval_shape(both.outputs, params, Batch(tokens, tokens))
  assert outputs.head.weight_VD.dtype == jnp.bfloat16
  assert outputs.hidden_BTD.dtype == jnp.bfloat16


@pytest.mark.parametrize('input', ['log_probs', 'logits'])
def test_a_shift_of_all_logits_is_seen_in_raw_logits_only(input):
  """In bf16: the critic reads h E' and (h (E + a)'), all of them exact."""
  V, D, C = 4000, 6, 4
  rng = np.random.default_rng(0)
  # Integers that have 8 bits, with the shift as well.
  head_VD = jnp.asarray(rng.integers(-3, 4, (V, D)), jnp.bfloat16)
  shift_D = jnp.asarray(120 * rng.choice([-1, 1], D), jnp.bfloat16)
  projection_VC = jnp.asarray(0.1 + rng.standard_normal((V, C)) / V**0.5)
  hidden_BTD = jnp.eye(D, dtype=jnp.bfloat16)[None]

  @jax.jit  # Where XLA may leave out a cast there and back.
  def read(head_VD):
    w_VC = critic.weight(projection_VC, input, jnp.bfloat16)
    outputs = transformer.Outputs(hidden_BTD, transformer.Head(head_VD))
    return critic.project(outputs, w_VC).astype(jnp.float32), w_VC

  x_BTC, w_VC = read(head_VD)
  shifted_BTC, _ = read(head_VD + shift_D[None])
  # The weight is what was applied.
  want_TC = head_VD.astype(jnp.float32).T @ w_VC
  np.testing.assert_allclose(x_BTC[0], want_TC, rtol=2**-8)
  sum_1C = jnp.sum(w_VC, axis=0, keepdims=True)
  if input == 'logits':
    added_TC = shift_D.astype(jnp.float32)[:, None] * sum_1C
    np.testing.assert_allclose(shifted_BTC[0], want_TC + added_TC, rtol=2**-8)
  else:
    np.testing.assert_allclose(sum_1C, 0, atol=1e-4)
    # The last digit of bf16, and sums of 120 V fp32 terms.
    np.testing.assert_allclose(
      shifted_BTC, x_BTC, rtol=2**-7, atol=1e-3 * jnp.abs(x_BTC).max()
    )
