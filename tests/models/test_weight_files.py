"""Weights as they lie in the world: files, names, heads and dtypes."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import UserError, models
from gakd_jax.models import convert, decoding
from gakd_jax.models.transformer import split
from tools import make_goldens

HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'


def tensors_of(path):
  return safetensors.numpy.load_file(path / 'model.safetensors')


def write(tensors, file):
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})


@pytest.fixture
def source(tiny_model_dir):
  return tiny_model_dir(layers=1)


def params_of(path):
  return convert.flatten(split(models.load(path))[1])


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def refusal(path):
  with pytest.raises(UserError) as e:
    models.load(path)
  message = str(e.value)
  assert '\n' not in message
  assert len(message) < 900 + len(str(path))
  return message


def test_other_files_beside_the_weights_are_not_read(source):
  want = params_of(source)
  write(
    {'tok_embeddings.weight': np.ones(3)}, source / 'consolidated.safetensors'
  )
  assert_same(params_of(source), want)
  # An index that was left there is no longer true.
  index = {'weight_map': {EMBEDDING: 'model-00001-of-00002.safetensors'}}
  (source / convert.INDEX).write_text(json.dumps(index))
  assert_same(params_of(source), want)


def test_files_that_nothing_names_are_named(source):
  (source / 'model.safetensors').rename(source / 'weights.safetensors')
  message = refusal(source)
  assert 'weights.safetensors' in message
  assert convert.INDEX in message
  assert models.read_config(source).tied_head  # All that it is asked for.


@pytest.mark.parametrize(
  'index',
  [
    [],
    {},
    {'weight_map': None},
    {'weight_map': {}},
    {'weight_map': ['a']},
    {'weight_map': {EMBEDDING: 3}},
    {'weight_map': {EMBEDDING: '/etc/a.safetensors'}},
    {'weight_map': {EMBEDDING: '../model/a.safetensors'}},
    {'weight_map': {EMBEDDING: ''}},
  ],
)
def test_an_index_that_names_no_files_is_one_line(source, index):
  (source / 'model.safetensors').rename(source / 'a.safetensors')
  (source / convert.INDEX).write_text(json.dumps(index))
  assert refusal(source).startswith(str(source))


@pytest.mark.parametrize(
  'prefix', ['module.', '_orig_mod.', 'language_model.', 'model.language_']
)
def test_names_with_a_prefix_are_told_from_others(source, prefix):
  tensors = {prefix + name: x for name, x in tensors_of(source).items()}
  write(tensors, source / 'model.safetensors')
  message = refusal(source)
  assert f"names begin with '{prefix}model.' instead of 'model.'" in message
  assert 'more' in message


@pytest.mark.parametrize(
  ('ending', 'dtype'),
  [
    ('.qweight', 'int32'),
    ('.weight', 'int8'),
    ('.weight_scale_inv', 'float32'),
  ],
)
def test_quantized_weights_are_called_so(source, ending, dtype):
  tensors = {
    name.replace('proj.weight', 'proj' + ending): x.astype(dtype)
    for name, x in tensors_of(source).items()
  }
  write(tensors, source / 'model.safetensors')
  assert 'is of quantized weights' in refusal(source)


@pytest.mark.parametrize('case', ['qwen3_tied', 'gpt2'])
def test_the_head_of_a_tied_model_may_stand_for_both(case, tmp_path):
  path = make_goldens.write_directory(make_goldens.CASES[case], tmp_path)
  want, tensors = params_of(path), tensors_of(path)
  embedding = next(
    n for n in tensors if n.endswith(('embed_tokens.weight', 'wte.weight'))
  )
  tensors[HEAD] = tensors.pop(embedding)
  write(tensors, path / 'model.safetensors')
  assert_same(params_of(path), want)


def test_a_head_that_is_not_the_embedding_is_kept(source, tmp_path):
  tensors = tensors_of(source)
  other = np.array(tensors[EMBEDDING])
  other[-1, -1] += 1e-3
  write(tensors | {HEAD: other}, source / 'model.safetensors')
  model = models.load(source)
  assert models.read_config(source) == model.config
  assert not model.config.tied_head
  np.testing.assert_array_equal(model.head.weight_VD, other)
  models.save(model, tmp_path / 'out')
  saved = json.loads((tmp_path / 'out/config.json').read_text())
  assert saved['tie_word_embeddings'] is False
  assert_same(tensors_of(tmp_path / 'out'), tensors | {HEAD: other})


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_head_that_is_the_embedding_is_tied(source, dtype):
  tensors = tensors_of(source)
  tensors[EMBEDDING] = tensors[EMBEDDING].astype('float16')
  tensors[HEAD] = tensors[EMBEDDING].astype(dtype)
  write(tensors, source / 'model.safetensors')
  assert models.read_config(source).tied_head
  assert 'head_weight' not in params_of(source)


def test_a_head_of_another_shape_is_named(source):
  tensors = tensors_of(source) | {HEAD: np.ones((3, 3), np.float32)}
  write(tensors, source / 'model.safetensors')
  assert f'{HEAD} has shape [3, 3], expected' in refusal(source)


def narrow(name, x, kind):
  """The weights of a model that was rounded to `kind`, not all of it."""
  kind, _, kept = kind.partition(' but ')
  dtype = {'bf16': ml_dtypes.bfloat16, 'fp16': np.float16}[kind]
  return x if kept and kept in name else x.astype(dtype)


@pytest.mark.parametrize(
  ('kind', 'computed'),
  [
    ('fp16', 'float16'),
    ('bf16 but norm', 'bfloat16'),
    ('bf16 but input_layernorm', 'bfloat16'),
    ('bf16 but layers.1.', 'float32'),
    ('bf16 but lm_head', 'bfloat16'),
  ],
)
def test_dtypes_may_differ(tiny_model_dir, tmp_path, kind, computed):
  path = tiny_model_dir(tied_head=False)
  want_BTV = logits(models.load(path))
  tensors = {n: narrow(n, x, kind) for n, x in tensors_of(path).items()}
  write(tensors, path / 'model.safetensors')
  model = models.load(path)
  assert model.dtype == computed
  np.testing.assert_allclose(logits(model), want_BTV, atol=0.05, rtol=0)
  single = decoding.unstack(model)
  assert single.dtype == computed
  assert single.init_cache(1, 4)[0][0].dtype == computed
  models.save(model, tmp_path / 'out')
  saved = json.loads((tmp_path / 'out/config.json').read_text())
  assert saved['dtype'] == computed
  # Layers of one parameter have the widest dtype of theirs; all others stay.
  for name, x in tensors_of(tmp_path / 'out').items():
    kept = 'layers.1.' in kind and '.layers.' in name
    assert x.dtype == ('float32' if kept else tensors[name].dtype), name
    np.testing.assert_array_equal(x.astype('f4'), tensors[name].astype('f4'))


def logits(model):
  ids_BT = np.arange(16).reshape(2, 8)
  return jax.jit(lambda m, ids: m.logits(ids))(model, ids_BT)


def test_directories_beside_the_weights_are_no_obstacle(source, tmp_path):
  for name in ('tokenizer', 'vocab', 'additional_chat_templates'):
    (source / name).mkdir()
    (source / name / 'tool_use.jinja').write_text('{{ messages }}')
  (source / 'tokenizer.gone').symlink_to(tmp_path / 'nowhere')
  models.save(models.load(source), tmp_path / 'out')
  out = {f.name for f in (tmp_path / 'out').iterdir()}
  assert 'additional_chat_templates' in out
  assert not {'tokenizer', 'vocab', 'tokenizer.gone'} & out
  assert (tmp_path / 'out/additional_chat_templates/tool_use.jinja').exists()
