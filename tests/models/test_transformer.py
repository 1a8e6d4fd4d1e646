"""The decoder: sizes, packing, rematerialisation, cached decoding, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models
from gakd_jax.models import decoding, families
from gakd_jax.models.transformer import split

# Fields that differ between the checkpoints' config.json files.
_QWEN3 = {
  'model_type': 'qwen3',
  'head_dim': 128,
  'num_key_value_heads': 8,
  'max_position_embeddings': 40960,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000,
  'vocab_size': 151936,
  'attention_bias': False,
  'hidden_act': 'silu',
  'use_sliding_window': False,
}
_SIZES = {  # width, feed-forward, layers, heads, tied, parameters
  '0.6B': (1024, 3072, 28, 16, True, 596_049_920),
  '1.7B': (2048, 6144, 28, 16, True, 1_720_574_976),
  '4B': (2560, 9728, 36, 32, True, 4_022_468_096),
  '8B': (4096, 12288, 36, 32, False, 8_190_735_360),
}


@pytest.mark.parametrize('size', _SIZES)
def test_full_size_models_have_the_published_number_of_parameters(size):
  width, ff_width, layers, heads, tied, want = _SIZES[size]
  hf = _QWEN3 | {
    'hidden_size': width,
    'intermediate_size': ff_width,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'tie_word_embeddings': tied,
  }
  model = models.abstract(families.config_from_hf(hf, 'config.json'))
  leaves = jax.tree.leaves(split(model)[1])
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  assert sum(x.size for x in leaves) == want


@pytest.fixture(scope='module')
def model(tiny_model_dir):
  return models.load(tiny_model_dir(layers=3))


@pytest.fixture(scope='module')
def hidden(model):
  """ids_BT, segments_BT -> hidden_BTD, compiled once per shape."""
  definition, params = split(model)

  @jax.jit
  def run(ids_BT, segments_BT):
    return nnx.merge(definition, params)(ids_BT, segments_BT).hidden_BTD

  return run


def call(model, f, *args):
  """f(model, *args), compiled: op by op would take seconds."""
  definition, params = split(model)
  return jax.jit(lambda p, *a: f(nnx.merge(definition, p), *a))(params, *args)


def _ids(seed, *shape):
  return np.random.default_rng(seed).integers(0, 300, shape, np.int32)


def test_packed_segments_equal_separate_rows(hidden):
  lengths, ids_BT = (5, 4, 3), _ids(0, 3, 12)
  packed_1T = np.concatenate(
    [row[:n] for row, n in zip(ids_BT, lengths, strict=True)]
  )[None]
  segments_1T = np.repeat([7, 2, 9], lengths)[None]
  # Rows of another shape would compile once more: repeat the packed one.
  packed_BT, segments_BT = (
    np.tile(x, (3, 1)) for x in (packed_1T, segments_1T)
  )
  packed_BTD = hidden(packed_BT, segments_BT)
  alone_BTD = hidden(ids_BT, np.ones_like(ids_BT))
  start = 0
  for row_TD, n in zip(alone_BTD, lengths, strict=True):
    got_TD = packed_BTD[0, start : start + n]
    np.testing.assert_allclose(got_TD, row_TD[:n], atol=1e-5)
    start += n


def test_padding_on_either_side_does_not_matter(hidden):
  text_BT, other_BT = _ids(1, 3, 12), _ids(2, 3, 12)
  want_BTD = hidden(text_BT, np.ones_like(text_BT))
  segments_BT = np.ones_like(text_BT)
  segments_BT[0, 8:] = segments_BT[1, :4] = 0
  padded_BT = other_BT.copy()
  padded_BT[0, :8] = text_BT[0, :8]
  padded_BT[1, 4:] = text_BT[1, :8]
  got_BTD = hidden(padded_BT, segments_BT)
  assert jnp.all(jnp.isfinite(got_BTD))
  np.testing.assert_allclose(got_BTD[0, :8], want_BTD[0, :8], atol=1e-5)
  np.testing.assert_allclose(got_BTD[1, 4:], want_BTD[1, :8], atol=1e-5)


def test_a_token_does_not_see_the_future(hidden):
  ids_BT, segments_BT = _ids(3, 3, 12), np.ones((3, 12), np.int32)
  changed_BT = ids_BT.copy()
  changed_BT[:, 6] = (ids_BT[:, 6] + 1) % 300
  a_BTD, b_BTD = (hidden(x, segments_BT) for x in (ids_BT, changed_BT))
  np.testing.assert_array_equal(a_BTD[:, :6], b_BTD[:, :6])
  assert np.abs(a_BTD[:, 7:] - b_BTD[:, 7:]).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize(
  'remat', ['products', pytest.param('blocks', marks=pytest.mark.slow)]
)
def test_remat_recomputes_and_gives_the_same_gradients(model, remat):
  definition, params = split(model)
  ids_BT = _ids(4, 2, 8)

  def loss(params, remat):
    outputs = nnx.merge(definition, params)(ids_BT, remat=remat)
    return jnp.sum(jnp.sin(outputs.hidden_BTD))

  plain, remade = (
    jax.jit(lambda p, r=remat: jax.grad(loss)(p, r)).trace(params)
    for remat in ('none', remat)
  )
  # The option does something: there are more products to compute.
  count_plain, count_remade = (
    str(traced.jaxpr).count('dot_general') for traced in (plain, remade)
  )
  assert count_plain < count_remade
  plain, remade = (t.lower().compile()(params) for t in (plain, remade))
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(plain))
  # rtol: some are in the hundreds, where fp32 has no more than five digits.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
    plain,
    remade,
  )


def test_cached_decoding_equals_the_full_forward(model, hidden):
  """Rows of different length: prompts padded on the right, then one by one."""
  definition, params = split(decoding.unstack(model))
  ids_BT, lengths_B = _ids(5, 3, 12), np.array([2, 5, 3])
  want_BTD = hidden(ids_BT, np.ones_like(ids_BT))

  @jax.jit
  def decode(params, ids_BT, positions_BT, cache):
    model = nnx.merge(definition, params)
    outputs, cache = model.decode(ids_BT, positions_BT, cache)
    return outputs.hidden_BTD, cache

  cache = model.init_cache(3, 12)
  # Past its prompt a row holds rubbish, which its own tokens overwrite.
  is_prompt_BT = np.arange(5)[None] < lengths_B[:, None]
  prompt_BT = np.where(is_prompt_BT, ids_BT[:, :5], 299)
  positions_BT = np.broadcast_to(np.arange(5), (3, 5))
  got_BTD, cache = decode(params, prompt_BT, positions_BT, cache)
  for b, n in enumerate(lengths_B):
    np.testing.assert_allclose(got_BTD[b, :n], want_BTD[b, :n], atol=1e-5)

  rows_B, at_B = np.arange(3), lengths_B
  for _ in range(7):
    token_B1 = ids_BT[rows_B, at_B][:, None]
    got_B1D, cache = decode(params, token_B1, at_B[:, None], cache)
    np.testing.assert_allclose(got_B1D[:, 0], want_BTD[rows_B, at_B], atol=1e-5)
    at_B = at_B + 1


def test_slots_past_the_end_of_the_cache_are_dropped(model):
  cache, positions_BT = model.init_cache(1, 2), np.array([[0, 1, 2]])
  unstacked = decoding.unstack(model)

  @jax.jit
  def fill(ids_BT):
    return unstacked.decode(ids_BT, positions_BT, cache)[1]

  a, b = fill(np.array([[3, 4, 5]])), fill(np.array([[3, 4, 6]]))
  assert all(np.all(x != 0) for x in jax.tree.leaves(a))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bf16_weights_compute_in_bf16_with_fp32_logits(model):
  definition, params = split(model)
  half = nnx.merge(
    definition, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  )
  ids_BT = _ids(7, 2, 8)
  outputs = jax.eval_shape(half, ids_BT)
  assert outputs.hidden_BTD.dtype == jnp.bfloat16
  assert half.init_cache(1, 2)[0][0].dtype == jnp.bfloat16
  logits_BTV = call(half, models.Decoder.logits, ids_BT)
  assert logits_BTV.dtype == jnp.float32
  # More than bf16's 8 bits: the head accumulates and answers in fp32.
  assert jnp.any(logits_BTV != logits_BTV.astype(jnp.bfloat16))
  want_BTV = call(model, models.Decoder.logits, ids_BT)
  np.testing.assert_allclose(logits_BTV, want_BTV, atol=0.02)


def test_an_untied_head_is_its_own_weight(tiny_model_dir):
  untied = models.load(tiny_model_dir(tied_head=False))
  params = split(untied)[1]
  np.testing.assert_array_equal(untied.head.weight_VD, params['head_weight'])
  assert np.any(params['head_weight'] != params['embedding'])


@pytest.mark.parametrize('family', ['tied', 'untied', 'learned', 'scaled'])
def test_a_fresh_model_starts_well(family):
  """Logits of size 1, whatever the family; branches that shrink with depth."""
  config = models.DecoderConfig(
    vocab_size=500,
    width=96,
    layers=8,
    heads=4,
    kv_heads=2,
    head_dim=24,
    ff_width=192,
    tied_head=family != 'untied',
    rope_theta=1e4,
    norm_eps=1e-6,
    max_length=16,
    learned_positions=family == 'learned',
    scaled_embedding=family == 'scaled',
  )
  model = models.Decoder(config, nnx.Rngs(0))
  params = split(model)[1]
  tables = [params[n] for n in params if n.endswith(('embedding', 'weight'))]
  assert len(tables) == 1 + (family in ('untied', 'learned'))
  for table in tables:
    assert jnp.std(table) == pytest.approx(96**-0.5, rel=0.05)
  for part, kernel, n_in in (('attention', 'out', 96), ('mlp', 'down', 192)):
    kernel_LIO = params['blocks'][part][kernel]['kernel']
    std = (n_in * 2 * 8) ** -0.5
    assert jnp.std(kernel_LIO) == pytest.approx(std, rel=0.05)
  up_LIO = params['blocks']['mlp']['up']['kernel']
  assert jnp.std(up_LIO) == pytest.approx(96**-0.5, rel=0.05)
  # But of the tokens that are read, which a tied head knows again.
  ids_BT = _ids(0, 4, 16)
  logits_BTV = np.array(call(model, models.Decoder.logits, ids_BT))
  logits_BTV[:, :, ids_BT] = np.nan
  assert np.nanstd(logits_BTV) == pytest.approx(1, rel=0.1)
