"""Weights in and out of Hugging Face directories, bit for bit or not at all."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec as P

from gakd_jax import UserError, models, sharding
from gakd_jax.models import convert
from gakd_jax.models.transformer import split


def read_files(path):
  """All tensors of a directory's safetensors files."""
  tensors = {}
  for file in sorted(path.glob('*.safetensors')):
    tensors |= safetensors.numpy.load_file(file)
  return tensors


def edit(path, **changes):
  """Replaces tensors of a one-file directory; None removes."""
  file = path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file) | {
    name.replace('__', '.'): value for name, value in changes.items()
  }
  tensors = {k: v for k, v in tensors.items() if v is not None}
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})


def assert_same_bits(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    assert a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture
def source(tiny_model_dir):
  return tiny_model_dir()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('tied_head', [True, False])
def test_round_trip_keeps_every_bit(tiny_model_dir, tmp_path, dtype, tied_head):
  source = tiny_model_dir(dtype=dtype, tied_head=tied_head)
  models.save(models.load(source), tmp_path / 'out')
  before, after = read_files(source), read_files(tmp_path / 'out')
  assert ('lm_head.weight' in after) != tied_head
  assert str(after['model.norm.weight'].dtype) == dtype
  assert_same_bits(before, after)
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert config['dtype'] == config['torch_dtype'] == dtype


def test_kernels_are_the_transpose_of_what_is_stored(source):
  params = split(models.load(source))[1]
  stored = read_files(source)['model.layers.1.mlp.up_proj.weight']
  np.testing.assert_array_equal(
    params['blocks']['mlp']['up']['kernel'][1].T, stored
  )


def test_a_head_alone_computes_in_what_is_stored(tiny_model_dir):
  model = models.load(tiny_model_dir(dtype='bfloat16'), blocks=False)
  assert model.dtype == 'bfloat16'


def test_dtype_casts_on_loading(source):
  params = split(models.load(source, dtype='bfloat16'))[1]
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {'bfloat16'}
  stored = read_files(source)['model.embed_tokens.weight']
  np.testing.assert_array_equal(
    params['embedding'], stored.astype(params['embedding'].dtype)
  )


def test_each_parameter_keeps_its_own_dtype(source, tmp_path):
  tensors = read_files(source)
  norm_D = tensors['model.norm.weight'].astype('float16')
  edit(source, model__norm__weight=norm_D)
  models.save(models.load(source), tmp_path / 'out')
  assert_same_bits(
    tensors | {'model.norm.weight': norm_D}, read_files(tmp_path / 'out')
  )


def test_reports_add_up_to_the_bytes_of_the_parameters(source, tmp_path):
  read, written = [], []
  model = models.load(source, report=read.append)
  models.save(model, tmp_path / 'out', 20_000, report=written.append)
  want = sum(x.nbytes for x in jax.tree.leaves(split(model)[1]))
  assert sum(read) == sum(written) == want
  assert len(read) > 1
  assert len(written) > 1


def test_several_files_with_an_index(source, tmp_path):
  out = tmp_path / 'out'
  models.save(models.load(source), out, max_shard_bytes=30_000)
  files = sorted(f.name for f in out.glob('*.safetensors'))
  n = len(files)
  assert n > 2
  assert files[0] == f'model-00001-of-{n:05d}.safetensors'
  index = json.loads((out / convert.INDEX).read_text())
  tensors = read_files(out)
  assert index['metadata']['total_size'] == sum(
    x.nbytes for x in tensors.values()
  )
  for name, file in index['weight_map'].items():
    assert name in safetensors.numpy.load_file(out / file)
  assert_same_bits(tensors, read_files(source))
  # And back: what was cut in several files loads as one.
  models.save(models.load(out), tmp_path / 'again')
  assert_same_bits(tensors, read_files(tmp_path / 'again'))

  (out / files[1]).unlink()
  with pytest.raises(UserError, match=f'{files[1]}: missing'):
    models.load(out)


def test_a_tied_model_may_carry_its_head_and_old_buffers(source, tmp_path):
  before = read_files(source)
  edit(
    source,
    lm_head__weight=before['model.embed_tokens.weight'],
    model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(8, np.float32),
  )
  model = models.load(source)
  assert 'head_weight' not in split(model)[1]
  models.save(model, tmp_path / 'out')
  assert_same_bits(before, read_files(tmp_path / 'out'))


def test_one_error_lists_all_tensors_that_do_not_match(source):
  edit(
    source,
    model__norm__weight=None,
    model__layers__1__mlp__up_proj__weight=None,
    model__layers__0__self_attn__q_proj__bias=np.ones(3, np.float32),
    model__layers__0__mlp__down_proj__weight=np.ones((5, 7), np.float32),
    model__layers__1__mlp__down_proj__weight=np.ones((32, 48), np.int8),
  )
  with pytest.raises(UserError) as e:
    models.load(source)
  message = str(e.value)
  assert message.startswith(f'{source}: ')
  assert '\n' not in message
  for problem in (
    'model.norm.weight is missing',
    'model.layers.1.mlp.up_proj.weight is missing',
    'model.layers.0.self_attn.q_proj.bias is not expected',
    'model.layers.0.mlp.down_proj.weight has shape [5, 7], expected [32, 48]',
    'model.layers.1.mlp.down_proj.weight is stored as I8, not as one of F32, ',
  ):
    assert problem in message


def test_a_truncated_file_is_named(source):
  file = source / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match=f'{file}: not a readable safetensors'):
    models.load(source)


@pytest.mark.parametrize(
  ('file', 'content', 'message'),
  [
    ('config.json', None, r'config.json: not found'),
    ('config.json', '{', r'config.json: not valid JSON'),
    ('model.safetensors', None, r'no \*.safetensors file'),
    (convert.INDEX, '{"weight', r'index.json: not valid JSON'),
  ],
)
def test_a_broken_directory_says_what_is_wrong(source, file, content, message):
  (source / file).unlink(missing_ok=True)
  if content:
    (source / file).write_text(content)
  with pytest.raises(UserError, match=message):
    models.load(source)


def test_a_missing_directory_is_not_looked_up_on_the_hub(tmp_path):
  with pytest.raises(UserError, match='no such directory'):
    models.load(tmp_path / 'nowhere')


def test_companions_and_unknown_fields_come_along(source, tmp_path):
  import transformers

  config = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps(config | {'eos_token_id': 2}))
  (source / 'generation_config.json').write_text('{"temperature": 0.6}')
  (source / 'README.md').write_text('not a part of the model')
  models.save(models.load(source), tmp_path / 'out')
  names = {f.name for f in (tmp_path / 'out').iterdir()}
  assert {'tokenizer.json', 'generation_config.json'} <= names
  assert 'README.md' not in names
  out = json.loads((tmp_path / 'out/config.json').read_text())
  assert out['eos_token_id'] == 2
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert tokenizer.eos_token == '<|im_end|>'
  assert tokenizer.chat_template


def test_saving_replaces_a_model_only_when_complete(
  source, tmp_path, monkeypatch
):
  out = tmp_path / 'out'
  model = models.load(source)
  models.save(model, out)
  (out / 'stale.model').write_text('of the old one')
  before = {f.name: f.read_bytes() for f in out.iterdir()}

  def stops_midway(params, config, path, *args):
    (path / 'model.safetensors').write_bytes(b'half of it')
    raise OSError('disk full')

  with monkeypatch.context() as m:
    m.setattr(convert, 'save_params', stops_midway)
    with pytest.raises(OSError, match='disk full'):
      models.save(model, out)
  assert {f.name: f.read_bytes() for f in out.iterdir()} == before

  changed = jax.tree.map(lambda x: x + 1, split(model)[1])
  models.save(nnx.merge(split(model)[0], changed), out)
  assert not (out / 'stale.model').exists()
  assert [f.name for f in tmp_path.iterdir()] == ['out']
  np.testing.assert_array_equal(
    read_files(out)['model.norm.weight'],
    read_files(source)['model.norm.weight'] + 1,
  )


def test_saving_over_its_own_source(source):
  before = read_files(source)
  models.save(models.load(source), source)
  assert_same_bits(before, read_files(source))
  assert (source / 'tokenizer.json').exists()


def test_saving_refuses_to_replace_what_is_not_a_model(source, tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  (tmp_path / 'config.json').write_text('{"run": 7}')
  model = models.load(source)
  for path in (tmp_path, tmp_path / 'thesis.tex'):
    with pytest.raises(UserError, match='not a model that could be replaced'):
      models.save(model, path)
  assert (tmp_path / 'thesis.tex').read_text() == 'years of work'
  (tmp_path / 'empty').mkdir()
  models.save(model, tmp_path / 'empty')
  assert models.load(tmp_path / 'empty').config == model.config


def test_init_takes_the_architecture_of_a_directory(source, tmp_path):
  model = models.init(source, seed=4, dtype='bfloat16', layers=1)
  assert model.config.layers == 1
  assert model.embedding[...].dtype == 'bfloat16'
  models.save(model, tmp_path / 'out')
  assert models.load(tmp_path / 'out').config == model.config
  assert (tmp_path / 'out/tokenizer.json').exists()
  with pytest.raises(UserError, match='unknown model shape depth; known are'):
    models.init(source, seed=1, depth=3)


@pytest.mark.parametrize(
  ('shape', 'said'),
  [
    ({'heads': 3}, 'num_attention_heads=3 is not a multiple of'),
    ({'head_dim': 15}, 'head_dim=15 must be even'),
    ({'bias': True, 'gated': False}, 'has bias=True, gated=False; leave that'),
    ({'windows': (4,)}, 'for each of 2 layers'),
    ({'family': 'gpt2'}, 'no gpt2 model has'),
  ],
)
def test_a_shape_is_one_of_the_family(source, shape, said):
  with pytest.raises(UserError, match=f'with other .*{said}'):
    models.read_config(source, **shape)


def test_a_mesh_places_parameters_and_changes_no_number(
  tiny_model_dir, tmp_path
):
  # 305 and 49 do not divide by 2: those dimensions stay whole.
  source = tiny_model_dir(vocab_size=305, ff_width=49, tied_head=False)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model = models.load(source, mesh=mesh)
  definition, params = split(model)
  specs = {k: x.sharding.spec for k, x in convert.flatten(params).items()}
  assert specs['embedding'] == specs['head_weight'] == P(None, 'fsdp')
  attention, mlp = 'blocks/attention/', 'blocks/mlp/'
  assert specs[attention + 'query/kernel'] == P(None, 'fsdp', 'tensor')
  assert specs[attention + 'out/kernel'] == P(None, 'tensor', 'fsdp')
  assert specs[attention + 'query_norm/scale'] == P()
  assert specs[mlp + 'up/kernel'] == P(None, 'fsdp', None)
  assert specs[mlp + 'down/kernel'] == P(None, None, 'fsdp')
  query = params['blocks']['attention']['query']['kernel']
  assert query.addressable_shards[0].data.shape == (2, 16, 32)

  whole = models.load(source)
  jax.tree.map(np.testing.assert_array_equal, params, split(whole)[1])
  ids_BT = np.random.default_rng(0).integers(0, 300, (4, 8), np.int32)
  logits = jax.jit(lambda p, ids: nnx.merge(definition, p).logits(ids))
  np.testing.assert_allclose(
    logits(params, sharding.put_batch(ids_BT, mesh)),
    logits(split(whole)[1], ids_BT),
    atol=1e-5,
  )
  models.save(model, tmp_path / 'out')
  assert_same_bits(read_files(source), read_files(tmp_path / 'out'))


def test_random_weights_depend_on_the_seed_and_not_on_the_mesh(source):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  placed, alone, other = (
    split(models.init(source, seed, mesh=m, layers=1))[1]
    for seed, m in ((3, mesh), (3, None), (5, None))
  )
  assert placed['embedding'].sharding.spec == P('tensor', 'fsdp')
  jax.tree.map(np.testing.assert_array_equal, placed, alone)
  assert np.any(alone['embedding'] != other['embedding'])
