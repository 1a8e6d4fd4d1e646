"""Models with single layers, and readers with a cache of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models, sharding
from gakd_jax.models import decoding, lora
from gakd_jax.models.transformer import split

# Of another width, layers and heads, with the same tokens.
OTHER = {'width': 48, 'layers': 3, 'heads': 6, 'kv_heads': 3, 'head_dim': 8}
B, T = 2, 10
IDS_BT = np.random.default_rng(0).integers(0, 300, (B, T)).astype(np.int32)


@pytest.fixture(scope='module')
def model(tiny_model_dir):
  return models.load(tiny_model_dir())


@pytest.fixture(scope='module')
def other(tiny_model_dir):
  return models.load(tiny_model_dir(seed=1, **OTHER))


def with_adapters(model):
  """Another model with the same weights, and adapters that do something."""
  model = nnx.merge(*split(model))
  lora.attach(model, lora.LoRAConfig(rank=2, targets='query|down'), seed=0)
  for adapter in lora.adapters(model).values():
    adapter.b[...] = jax.random.normal(jax.random.key(1), adapter.b.shape)
  return model


def full(model):
  return jax.jit(lambda m: m(IDS_BT).hidden_BTD)(model)


def span_BT(n):
  return jnp.broadcast_to(jnp.arange(n), (B, n))


@functools.partial(jax.jit, static_argnames='prompt')
def read_a_draft_twice(readers, ids_BT, prompt):
  """The prompt, three wrong tokens, then the right ones in their place.

  Row 0 is right by two tokens more: rows go back by different numbers.
  """
  first_B1 = prompt + np.array([[2], [0]])
  hiddens = []
  for reader in readers:
    _, reader = reader.read(ids_BT[:, :prompt], span_BT(prompt))
    draft_BT = (ids_BT[:, prompt : prompt + 3] + 1) % 300
    draft_BT = draft_BT.at[0, :2].add(-1)
    _, reader = reader.read(draft_BT, prompt + span_BT(3))
    positions_BT = first_B1 + span_BT(3)
    right_BT = jnp.take_along_axis(ids_BT, positions_BT, axis=1)
    hiddens.append(reader.read(right_BT, positions_BT)[0])
  return positions_BT, hiddens


@pytest.mark.slow
def test_readers_go_back_and_do_not_disturb_each_other(model, other):
  """A student and its teacher: each with its own layers, heads and cache."""
  readers = [
    decoding.Reader(decoding.unstack(m), m.init_cache(B, T))
    for m in (model, other)
  ]
  positions_BT, got = read_a_draft_twice(readers, jnp.array(IDS_BT), 4)
  for m, hidden_BTD in zip((model, other), got, strict=True):
    want_BTD = np.take_along_axis(full(m), positions_BT[:, :, None], axis=1)
    np.testing.assert_allclose(hidden_BTD, want_BTD, atol=1e-5)


def test_a_prompt_is_read_and_has_room_for_a_response(model):
  reader = jax.jit(decoding.prefill, static_argnums=2)(
    decoding.unstack(model), IDS_BT[:, :6], T
  )
  positions_BT = np.broadcast_to(np.arange(6, T), (B, T - 6))
  hidden_BTD, reader = jax.jit(decoding.Reader.read)(
    reader, IDS_BT[:, 6:], positions_BT
  )
  np.testing.assert_allclose(hidden_BTD, full(model)[:, 6:], atol=1e-5)
  k_BKHS, v_BKSH, *_ = reader.cache[0]
  assert k_BKHS.shape == (B, 2, 16, T)
  assert v_BKSH.shape == (B, 2, T, 16)


def test_layers_are_those_of_the_stack_and_the_rest_is_shared(model):
  stacked, single = split(model)[1], split(decoding.unstack(model))[1]
  assert single['embedding'] is stacked['embedding']
  for l, layer in single.pop('blocks').items():
    jax.tree.map(
      lambda x_L, x, l=l: np.testing.assert_array_equal(x_L[l], x),
      stacked['blocks'],
      layer,
    )
  assert isinstance(model.blocks, nnx.Module), 'the model stays as it was'


def test_on_a_mesh_parameters_lie_as_they_did(model):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  definition, params = split(with_adapters(model))
  params = jax.device_put(params, sharding.shardings(params, mesh))
  _, single = split(decoding.unstack(nnx.merge(definition, params)))
  for layer in single['blocks'].values():
    for path, x in jax.tree_util.tree_leaves_with_path(layer):
      stacked = params['blocks']
      for key in path:
        stacked = stacked[key.key]
      want = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*stacked.sharding.spec[1:])
      )
      assert x.sharding.is_equivalent_to(want, x.ndim), path


def test_adapters_are_merged(model):
  adapted = with_adapters(model)
  single = decoding.unstack(adapted)
  assert len(lora.adapters(adapted)) == 2, 'the model stays as it was'
  lora.merge(adapted)
  for l, block in enumerate(single.blocks):
    np.testing.assert_allclose(
      block.mlp.down.kernel[...], adapted.blocks.mlp.down.kernel[l], atol=1e-6
    )
  plain = decoding.unstack(model)
  assert jax.tree.structure(split(single)[1]) == jax.tree.structure(
    split(plain)[1]
  )


def test_what_is_merged_is_rounded_once(model):
  """Not base and adapter first: small changes would be lost between them."""
  adapted = with_adapters(model)
  single = decoding.unstack(adapted, 'bfloat16')
  params = split(single)[1]
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'bfloat16'}
  lora.merge(adapted)
  for l, block in enumerate(single.blocks):
    np.testing.assert_array_equal(
      block.mlp.down.kernel[...],
      adapted.blocks.mlp.down.kernel[l].astype('bfloat16'),
    )


def test_of_quantized_projections_adapters_stay(tiny_model_dir):
  model = with_adapters(models.load(tiny_model_dir(), quantize='int8'))
  single = decoding.unstack(model)
  for l, block in enumerate(single.blocks):
    np.testing.assert_array_equal(
      block.mlp.down.lora.b[...], model.blocks.mlp.down.lora.b[l]
    )
  reader = decoding.Reader(single, single.init_cache(B, T))
  positions_BT = np.broadcast_to(np.arange(T), (B, T))
  hidden_BTD, _ = jax.jit(decoding.Reader.read)(reader, IDS_BT, positions_BT)
  np.testing.assert_allclose(hidden_BTD, full(model), atol=1e-5)
