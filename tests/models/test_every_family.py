"""What must hold for every family: sizes, files, cached decoding."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from gakd_jax import UserError, models, sharding
from gakd_jax.models import convert, decoding, families
from gakd_jax.models.transformer import split
from tools import make_goldens

CASES = sorted(make_goldens.CASES)


def _llama_like(kind, width, ff_width, layers, heads, kv_heads, vocab, **more):
  return {
    'model_type': kind,
    'hidden_size': width,
    'intermediate_size': ff_width,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'vocab_size': vocab,
    **more,
  }


def _gpt2(width, layers, heads):
  return {
    'model_type': 'gpt2',
    'vocab_size': 50257,
    'n_positions': 1024,
    'n_embd': width,
    'n_layer': layers,
    'n_head': heads,
  }


TIED = {'tie_word_embeddings': True}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
# The fields of published config.json files that make the shape, and the number
# of parameters of the published weights.
PUBLISHED = {
  'Qwen1.5-1.8B': (
    _llama_like('qwen2', 2048, 5504, 24, 16, 16, 151936),
    1_836_828_672,
  ),
  'Qwen2.5-0.5B': (
    _llama_like('qwen2', 896, 4864, 24, 14, 2, 151936, **TIED),
    494_032_768,
  ),
  'Qwen2.5-1.5B': (
    _llama_like('qwen2', 1536, 8960, 28, 12, 2, 151936, **TIED),
    1_543_714_304,
  ),
  'Qwen2.5-3B': (
    _llama_like('qwen2', 2048, 11008, 36, 16, 2, 151936, **TIED),
    3_085_938_688,
  ),
  'Qwen2.5-7B': (
    _llama_like('qwen2', 3584, 18944, 28, 28, 4, 152064),
    7_615_616_512,
  ),
  'Qwen2.5-14B': (
    _llama_like('qwen2', 5120, 13824, 48, 40, 8, 152064),
    14_770_033_664,
  ),
  'GPT2-120M': (_gpt2(768, 12, 12), 124_439_808),
  'GPT2-1.5B': (_gpt2(1600, 48, 25), 1_557_611_200),
  'Llama-2-7B': (
    _llama_like('llama', 4096, 11008, 32, 32, 32, 32000),
    6_738_415_616,
  ),
  'TinyLlama-1.1B': (
    _llama_like('llama', 2048, 5632, 22, 32, 4, 32000),
    1_100_048_384,
  ),
  'Llama-3.2-1B': (
    _llama_like(
      'llama', 2048, 8192, 16, 32, 8, 128256, rope_scaling=LLAMA3, **TIED
    ),
    1_235_814_400,
  ),
  'Llama-3.2-3B': (
    _llama_like(
      'llama', 3072, 8192, 28, 24, 8, 128256, rope_scaling=LLAMA3, **TIED
    ),
    3_212_749_824,
  ),
  'Llama-3.1-8B': (
    _llama_like('llama', 4096, 14336, 32, 32, 8, 128256, rope_scaling=LLAMA3),
    8_030_261_248,
  ),
  'Mistral-7B': (
    _llama_like('mistral', 4096, 14336, 32, 32, 8, 32000, sliding_window=4096),
    7_241_732_096,
  ),
  'Gemma-2B': (
    _llama_like('gemma', 2048, 16384, 18, 8, 1, 256000, head_dim=256),
    2_506_172_416,
  ),
  'Gemma-7B': (
    _llama_like('gemma', 3072, 24576, 28, 16, 16, 256000, head_dim=256),
    8_537_680_896,
  ),
  'Gemma-2-2B': (
    _llama_like('gemma2', 2304, 9216, 26, 8, 4, 256000, head_dim=256),
    2_614_341_888,
  ),
  'Gemma-2-9B': (
    _llama_like('gemma2', 3584, 14336, 42, 16, 8, 256000, head_dim=256),
    9_241_705_984,
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_full_size_models_have_the_published_number_of_parameters(name):
  hf, want = PUBLISHED[name]
  config = families.config_from_hf(hf, 'config.json')
  leaves = jax.tree.leaves(split(models.abstract(config))[1])
  assert sum(x.size for x in leaves) == want


@pytest.fixture
def directory(request, tmp_path):
  return make_goldens.write_directory(
    make_goldens.CASES[request.param], tmp_path / 'model'
  )


@pytest.mark.parametrize('directory', CASES, indirect=True)
def test_round_trip_keeps_every_bit_and_the_config(directory, tmp_path):
  model = models.load(directory)
  models.save(model, tmp_path / 'out')
  before, after = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (directory, tmp_path / 'out')
  )
  assert before.keys() == after.keys()
  for name, x in before.items():
    assert x.dtype == after[name].dtype
    np.testing.assert_array_equal(x, after[name], err_msg=name)
  assert models.read_config(tmp_path / 'out') == model.config
  # What is written does not lean on what was kept of the source's file.
  hf = families.FAMILIES[model.config.family].to_hf(model.config)
  assert families.config_from_hf(hf, '') == model.config


@pytest.mark.slow
@pytest.mark.parametrize('directory', CASES, indirect=True)
def test_cached_decoding_equals_the_full_forward(directory):
  """A prompt of five tokens, the rest one by one, past every window."""
  model = models.load(directory)
  definition, params = split(model)
  ids_BT = make_goldens.IDS_BT[:2]
  want_BTD = jax.jit(lambda p: nnx.merge(definition, p)(ids_BT).hidden_BTD)(
    params
  )
  definition, params = split(decoding.unstack(model))

  @jax.jit
  def decode(params, ids_BT, positions_BT, cache):
    model = nnx.merge(definition, params)
    outputs, cache = model.decode(ids_BT, positions_BT, cache)
    return outputs.hidden_BTD, cache

  B, T = ids_BT.shape
  got, cache = [], model.init_cache(B, T)
  for start, end in [(0, 5), *((t, t + 1) for t in range(5, T))]:
    positions_BT = np.broadcast_to(np.arange(start, end), (B, end - start))
    hidden_BTD, cache = decode(
      params, ids_BT[:, start:end], positions_BT, cache
    )
    got.append(hidden_BTD)
  np.testing.assert_allclose(
    np.concatenate(got, axis=1), want_BTD, atol=2e-5, rtol=0
  )


def test_gpt2_as_it_is_published(tmp_path):
  """Without the prefix of its names, with buffers that are computed."""
  case = make_goldens.CASES['gpt2']
  directory = make_goldens.write_directory(case, tmp_path)
  tensors = {
    name.removeprefix('transformer.'): x
    for name, x in make_goldens.tensors(case).items()
  }
  want = split(models.load(directory))[1]
  mask = np.tril(np.ones((1, 1, 64, 64), np.float32))
  safetensors.numpy.save_file(
    tensors | {'h.0.attn.bias': mask}, directory / 'model.safetensors'
  )
  got = split(models.load(directory))[1]
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_part_of_a_tensor_can_be_sharded(tmp_path):
  """Columns of queries, keys and values, of one tensor on eight devices."""
  directory = make_goldens.write_directory(make_goldens.CASES['gpt2'], tmp_path)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  got, want = (
    convert.flatten(split(models.load(directory, mesh=m))[1])
    for m in (mesh, None)
  )
  assert not got['blocks/attention/key/kernel'].sharding.is_fully_replicated
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)


@pytest.mark.parametrize(
  ('case', 'changes', 'word'),
  [
    ('llama_untied', {'attention_bias': True}, 'attention_bias=True'),
    ('llama_untied', {'mlp_bias': True}, 'mlp_bias=True'),
    ('qwen2_tied', {'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ('mistral_window', {'hidden_act': 'relu'}, "hidden_act='relu'"),
    ('gemma', {'hidden_act': 'silu'}, "hidden_act='silu'"),
    ('gemma2', {'hidden_activation': 'silu'}, "hidden_activation='silu'"),
    ('gemma2', {'layer_types': ['linear'] * 3}, 'layer_types'),
    ('gpt2', {'activation_function': 'relu'}, "activation_function='relu'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'inverse_layer_idx'),
  ],
)
def test_switches_that_are_not_computed_are_refused(case, changes, word):
  with pytest.raises(UserError, match=word):
    families.config_from_hf(make_goldens.CASES[case] | changes, 'config.json')


def test_gemmas_gelu_is_the_approximation_under_either_name():
  """The first config.json files said 'gelu' and meant the other."""
  case = make_goldens.CASES['gemma']
  a, b = (
    families.config_from_hf(case | {'hidden_act': act}, '')
    for act in ('gelu', 'gelu_pytorch_tanh')
  )
  assert a == b
  assert a.gelu
