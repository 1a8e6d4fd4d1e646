"""Whatever a model's files hold: what was meant, or one line that says what."""

import math
import tempfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from gakd_jax import UserError, models
from gakd_jax.models import (
  convert,
  families,
  peft_settings,
  tensor_names,
  transformer,
  weight_files,
)

pytestmark = pytest.mark.slow  # Many.

KINDS = sorted(families.FAMILIES)


def some(n, *phases):
  """So many examples, always the same; phases beside making them."""
  return hypothesis.settings(
    max_examples=n,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate, *phases],
  )


SHRINK = hypothesis.Phase.shrink  # Where an example takes milliseconds.


def assert_one_line(error, start):
  assert str(error).startswith(str(start))
  assert '\n' not in str(error)
  assert len(str(error)) < 1000


# A file of weights.

TENSORS = {
  'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b': np.arange(4, dtype=np.float16),
  'c': np.float32([[7.0]]),
}
WHOLE = safetensors.numpy.save(TENSORS, metadata={'format': 'pt'})
HEADER = int.from_bytes(WHOLE[:8], 'little')


@st.composite
def edited(draw):
  """The bytes of a file of `TENSORS`, of which a few are changed."""
  content = bytearray(WHOLE)
  for _ in range(draw(st.integers(1, 3))):
    # Most of them in the header.
    end = draw(st.sampled_from([8, 8 + HEADER, 8 + HEADER, len(WHOLE)]))
    at = draw(st.integers(0, end))
    new = draw(
      st.binary(max_size=4)
      | st.sampled_from(
        [
          *(b'0', b'1', b'8', b'99', b'-1', b'1e9', b'4294967296', b'null'),
          *(b'"', b',', b'[', b']', b'{}', b'"b":1,', bytes(8)),
          *(b'F16', b'F64', b'I8'),
        ]
      )
    )
    content[at : at + draw(st.sampled_from([0, len(new), len(new), 40]))] = new
  cut = draw(st.sampled_from([None] * 4 + [-1, -20, HEADER, 9, 8, 3, 0]))
  return bytes(content[:cut])


def assert_read_or_refused(content):
  """As the library reads it, if it does. It is what counts for others."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / 'model.safetensors'
    file.write_bytes(content)
    try:
      found = weight_files.tensors(file)
    except UserError as error:
      assert_one_line(error, f'{file}: ')
      return
    with safetensors.safe_open(file, framework='numpy') as theirs:
      assert set(found) == set(theirs.keys())
      for name, tensor in found.items():
        part = theirs.get_slice(name)
        assert (tensor.dtype, list(tensor.shape)) == (
          part.get_dtype(),
          part.get_shape(),
        )
        if tensor.dtype in ('F32', 'F16') and math.prod(tensor.shape):
          want = theirs.get_tensor(name)
          assert tensor.mapped().tobytes() == want.tobytes()


@some(200, SHRINK)
@hypothesis.given(edited())
def test_an_edited_file_of_weights_is_read_as_it_is_or_refused(content):
  assert_read_or_refused(content)


@some(60, SHRINK)
@hypothesis.given(st.binary(max_size=200))
def test_any_bytes_are_no_weights_or_read_as_such(content):
  assert_read_or_refused(content)


@some(60, SHRINK)
@hypothesis.given(
  st.sampled_from(['float32', 'bfloat16', 'float16']),
  st.integers(0, 9),
  st.sampled_from([float('nan'), float('inf'), -float('inf'), -math.nan]),
)
def test_every_number_is_looked_at(dtype, at, value):
  x = jax.numpy.finfo(dtype).max * np.float32([1, -1] * 5).astype(dtype)
  x[3] = jax.numpy.finfo(dtype).smallest_subnormal
  assert weight_files.is_finite(x.reshape(5, 2))
  x[at] = value
  assert not weight_files.is_finite(x.reshape(5, 2))


# config.json.

_NUMBERS = st.sampled_from(
  [
    *(0, 1, -1, 2, 3, 8, 10**6, 2**31, 10**12, 10**400, True, False),
    *(0.5, -0.0, 1e-6, 1e38, math.inf, math.nan),
  ]
)
_WORDS = st.sampled_from(
  [
    *('', '8', 'silu', 'gelu', 'full_attention', 'sliding_attention'),
    *('llama3', 'default', 'yarn', 'bfloat16', 'x' * 500, 'a\nb', '\ud800'),
  ]
)
_VALUES = st.recursive(
  st.none() | _NUMBERS | _WORDS,
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(['rope_type', 'type', 'rope_theta', 'factor', 'a'])
      | st.sampled_from(
        ['low_freq_factor', 'high_freq_factor', 'full_attention']
      )
      | st.sampled_from(['original_max_position_embeddings']),
      inner,
      max_size=4,
    )
  ),
  max_leaves=6,
)
_SMALL = {
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'n_embd': 16,
  'n_layer': 2,
  'n_head': 4,
}


@st.composite
def configs(draw):
  """A small config.json of a family, a few fields of it anything."""
  kind = draw(st.sampled_from(KINDS))
  names = [*families.FAMILIES[kind].fields, *_SMALL, 'model_type', 'odd']
  changes = draw(
    st.dictionaries(st.sampled_from(names), _VALUES, min_size=1, max_size=3)
  )
  hf = {'model_type': kind} | _SMALL | changes
  for name in draw(st.sets(st.sampled_from(names), max_size=2)):
    hf.pop(name, None)
  return hf


@some(200, SHRINK)
@hypothesis.given(configs())
def test_any_config_is_one_or_refused(hf):
  try:
    config = families.config_from_hf(hf, 'config.json')
  except UserError as error:
    assert_one_line(error, 'config.json: ')
    return
  # Of no size that does not fit in memory where there are no weights yet.
  assert len(tensor_names.LLAMA) * config.layers < 10**6
  assert all(math.isfinite(x) for x in (config.norm_eps, config.rope_theta))
  written = families.config_to_hf(config, hf)
  assert families.config_from_hf(written, 'config.json') == config


@some(100, SHRINK)
@hypothesis.given(
  st.dictionaries(
    st.sampled_from(
      [*peft_settings.COMPUTED, *peft_settings.ONLY, 'use_dora', 'odd']
    ),
    _VALUES
    | st.dictionaries(
      st.sampled_from(['q_proj', '(', '']), _NUMBERS, max_size=2
    )
    | st.sampled_from(['q_proj', 'all-linear', ['q_proj', 'v_proj'], '(', [1]]),
    max_size=3,
  )
)
def test_any_adapter_config_is_one_or_refused(changes):
  hf = {'peft_type': 'LORA', 'target_modules': ['q_proj'], 'r': 2}
  module = 'model.layers.1.self_attn.q_proj'
  try:
    settings = peft_settings.check(hf | changes, 'adapter_config.json')
    peft_settings.is_target(settings, module, 1)
    rank, scale = peft_settings.rank_and_scale(settings, module)
  except UserError as error:
    assert_one_line(error, 'adapter_config.json: ')
    return
  assert rank >= 1
  assert 0 < scale < math.inf


# Names and layouts of tensors.


@st.composite
def shapes(draw, kind):
  """A `DecoderConfig` of a family, of small sizes that need not fit."""
  size = st.integers(1, 5)
  kv_heads = draw(size)
  hf = {
    'model_type': kind,
    'vocab_size': draw(size),
    'hidden_size': draw(size),
    'intermediate_size': draw(size),
    'num_hidden_layers': draw(st.integers(1, 3)),
    'num_attention_heads': kv_heads * draw(st.integers(1, 2)),
    'num_key_value_heads': kv_heads,
    'head_dim': 2 * draw(size),
    'tie_word_embeddings': draw(st.booleans()),
    'max_position_embeddings': draw(size),
  }
  if kind == 'gpt2':
    hf['num_attention_heads'] = kv_heads
    hf |= {'hidden_size': kv_heads * draw(size), 'n_inner': draw(size)}
  return families.config_from_hf(hf, 'config.json')


@pytest.mark.parametrize('kind', KINDS)
@some(2)
@hypothesis.given(st.data())
def test_tensors_of_any_shape_come_back_bit_for_bit(kind, data):
  config = data.draw(shapes(kind))
  abstract = transformer.split(models.abstract(config))[1]
  family = families.FAMILIES[config.family]
  bits = np.random.default_rng(data.draw(st.integers(0, 2**32)))
  dtype = data.draw(st.sampled_from(['float32', 'bfloat16', 'float16']))
  tensors = {}
  for name, x in convert.flatten(abstract).items():
    for part in convert._stored(family, name, x.shape):
      values = bits.standard_normal(part.shape).astype(dtype)
      tensors.setdefault(part.tensor, values)
  limit = data.draw(st.sampled_from([1, 100, 10**6]))  # bytes of a file
  with tempfile.TemporaryDirectory() as folder:
    source, out = Path(folder) / 'a', Path(folder) / 'b'
    source.mkdir()
    out.mkdir()
    safetensors.numpy.save_file(tensors, source / weight_files.WHOLE)
    params = convert.load_params(source, config, abstract)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)
    convert.save_params(params, config, out, max_shard_bytes=limit)
    found = {}
    for file in out.glob('*.safetensors'):
      found |= safetensors.numpy.load_file(file)
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    assert found[name].dtype == x.dtype
    assert found[name].shape == x.shape
    assert found[name].tobytes() == x.tobytes(), name
