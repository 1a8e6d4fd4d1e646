"""Keys and values in int8, beside exact ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import sharding, speculative, streaming
from gakd_jax.models import caches, decoding, transformer
from gakd_jax.sampler import Sampler

V, B, T = 300, 3, 24
CONFIG = transformer.DecoderConfig(
  vocab_size=V,
  width=64,
  layers=3,
  heads=8,
  kv_heads=2,
  head_dim=16,
  ff_width=96,
  tied_head=True,
  rope_theta=1e4,
  norm_eps=1e-6,
  max_length=64,
)
SHAPES = {
  'grouped': {},
  'windows': {
    'windows': (5, 0, 5),
    'attention_cap': 5.0,
    'head_cap': 8.0,
    'norm_from_one': True,
    'post_norms': True,
  },
  'learned': {
    'kv_heads': 8,
    'qk_norm': False,
    'learned_positions': True,
    'layer_norm': True,
    'gated': False,
  },
}
IDS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def make_model(shape='grouped', seed=0, kind=None, dtype=None):
  config = dataclasses.replace(CONFIG, **SHAPES[shape])
  model = transformer.Decoder(config, nnx.Rngs(seed))
  model.final_norm.scale[...] += 1.0  # Logits that spread over some nats.
  return decoding.unstack(model, dtype, kind)


def test_a_token_is_rounded_to_its_own_largest():
  x_BTKH = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
  x_BTKH *= 10.0 ** jnp.arange(-2, 3)[None, :, None, None]
  x_BTKH = x_BTKH.at[1, 4, 2].set(0.0)
  integers_BTKH, scale_BTK = caches.rounded(x_BTKH.astype(jnp.float32))
  assert integers_BTKH.dtype == jnp.int8
  largest_BTK = np.abs(integers_BTKH.astype(int)).max(axis=-1)
  assert (largest_BTK == 127).sum() == 2 * 5 * 3 - 1
  assert largest_BTK[1, 4, 2] == scale_BTK[1, 4, 2] == 0
  error_BTKH = np.abs(integers_BTKH * scale_BTK[..., None] - x_BTKH)
  assert (error_BTKH <= 0.501 * scale_BTK[..., None]).all()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_its_memory_is_that_of_integers_and_a_scale_a_head(dtype):
  def size(kind):
    model = make_model(kind=kind, dtype=jnp.dtype(dtype))
    reader = jax.eval_shape(lambda: decoding.prefill(model, IDS_BT, 40))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(reader.cache))

  exact = jnp.dtype(dtype).itemsize
  assert size(None) == 2 * 3 * B * 2 * 16 * 40 * exact
  assert size('int8') == size(None) * (1 + 4 / 16) / exact


@jax.jit
def at_once(model):
  reader = decoding.Reader(model, model.init_cache(B, T))
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  return jax.vmap(model.head)(reader.read(IDS_BT, positions_BT)[0])[:, 4:]


@jax.jit
def one_by_one(model):
  """After four tokens; of each place, a wrong token is read first."""

  def read(reader, t):
    ids_B1 = jax.lax.dynamic_slice_in_dim(IDS_BT, t, 1, axis=1)
    position_B1 = jnp.full((B, 1), t)
    _, reader = reader.read((ids_B1 + 7) % V, position_B1)
    hidden_B1D, reader = reader.read(ids_B1, position_B1)
    return reader, model.head(hidden_B1D[:, 0])

  reader = decoding.prefill(model, IDS_BT[:, :4], T)
  return jax.lax.scan(read, reader, jnp.arange(4, T))[1].swapaxes(0, 1)


@pytest.mark.parametrize(
  'shape',
  [
    'windows',
    *(pytest.param(x, marks=pytest.mark.slow) for x in ('grouped', 'learned')),
  ],
)
def test_logits_are_close_to_the_exact_ones(shape):
  """Half a level is 0.4 % of the largest of a head, 1 % of most of them.

  That makes 4.6 % of the logits' deviation at most, and 0.8 % on average.
  """
  exact_BTV = at_once(make_model(shape))
  model = make_model(shape, kind='int8')
  spread = float(jnp.std(exact_BTV))
  for logits_BTV in at_once(model), one_by_one(model):
    error_BTV = np.abs(logits_BTV - exact_BTV)
    assert 0 < error_BTV.max() / spread < 0.1
    assert error_BTV.mean() / spread < 0.015


PROMPTS = [IDS_BT[n % B, : 3 + 2 * n].tolist() for n in range(8)]


def greedy(model):
  return streaming.generate(
    model, PROMPTS, max_new_tokens=16, temperature=0, batch_size=4
  )


@pytest.mark.slow
def test_greedy_texts_are_mostly_the_same():
  exact, got = greedy(make_model()), greedy(make_model(kind='int8'))
  assert np.mean(np.array(got) == np.array(exact)) > 0.9


@pytest.mark.slow
def test_devices_have_their_own():
  model = make_model(kind='int8')
  definition, params = transformer.split(model)
  mesh = sharding.make_mesh(data=2, tensor=2)
  params = jax.device_put(params, sharding.shardings(params, mesh))
  assert greedy(nnx.merge(definition, params)) == greedy(model)


@pytest.mark.slow
def test_what_a_teacher_takes_back_leaves_nothing():
  """A text does not depend on how far is drafted."""
  models = [make_model(seed=n, kind='int8') for n in range(2)]
  prompt_BT, length_B = IDS_BT[:, :6], jnp.array([6, 4, 5])
  keys = jax.random.split(jax.random.key(0), B)

  def write(gamma):
    settings = speculative.Drafting(
      student=Sampler(0.9),
      teacher=Sampler(0.9),
      rule=speculative.Rank(40),
      gamma=gamma,
      max_new_tokens=16,
      eos_ids=(),
    )
    return jax.jit(speculative.decode_batch, static_argnums=4)(
      models, prompt_BT, length_B, keys, settings
    )

  (want, _, trace), (got, *_) = write(1), write(4)
  np.testing.assert_array_equal(got, want)
  assert 0.2 < trace.by_teacher_BS.sum() / (16 * B) < 0.8
