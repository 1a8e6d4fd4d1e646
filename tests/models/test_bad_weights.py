"""Weights that cannot be: their numbers, their files, and their index.

Each case is a directory that is good but for one thing.
"""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import models, sharding
from gakd_jax.models import weight_files
from tests.refused import refusal
from tests.test_json_file import SOME

pytestmark = pytest.mark.slow  # Many.

WHOLE, INDEX = weight_files.WHOLE, weight_files.INDEX
NORM, DOWN = 'model.norm.weight', 'model.layers.1.mlp.down_proj.weight'
EMBEDDING = 'model.embed_tokens.weight'


@pytest.fixture(scope='module')
def good(tiny_model_dir):
  return tiny_model_dir(dtype='bfloat16')


@pytest.fixture
def model(good, tmp_path):
  """A copy, to be spoilt."""
  return shutil.copytree(good, tmp_path / 'model')


def read(path):
  return safetensors.numpy.load_file(path / WHOLE)


def write(tensors, path):
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})


# Weights that are no numbers.


@pytest.mark.parametrize(
  ('name', 'dtype', 'value'),
  [
    (EMBEDDING, 'float32', np.nan),
    (EMBEDDING, 'bfloat16', np.inf),
    (EMBEDDING, 'float16', -np.inf),
    (NORM, 'float32', np.inf),
    (NORM, 'bfloat16', -np.inf),
    (NORM, 'float16', np.nan),
    (DOWN, 'float32', -np.inf),
    (DOWN, 'bfloat16', np.nan),
    (DOWN, 'float16', np.inf),
  ],
)
def test_weights_that_are_not_finite_are_named(model, name, dtype, value):
  tensors = {n: x.astype(dtype) for n, x in read(model).items()}
  tensors[name].flat[-2] = value
  write(tensors, model / WHOLE)
  message = refusal(models.load, model)
  assert message.startswith(f'{model / WHOLE}: {name} has values that are not')


@pytest.mark.parametrize(
  'settings',
  [{'quantize': 'int8'}, {'quantize': 'nf4'}, {'dtype': 'float32'}],
)
def test_whatever_they_become(model, settings):
  tensors = read(model)
  tensors[DOWN].flat[7] = np.nan
  write(tensors, model / WHOLE)
  assert f'{DOWN} has values' in refusal(models.load, model, **settings)


def test_each_device_reads_its_part_of_it(model):
  mesh = sharding.make_mesh(data=1, fsdp=8)
  tensors = read(model)
  assert models.load(model, mesh=mesh)
  tensors[DOWN][-1, -1] = np.nan  # Of the last one's alone.
  write(tensors, model / WHOLE)
  assert f'{DOWN} has values' in refusal(models.load, model, mesh=mesh)


def test_what_a_dtype_cannot_hold_is_not_finite(model):
  tensors = {n: x.astype('float32') for n, x in read(model).items()}
  tensors[NORM][3] = 1e30
  write(tensors, model / WHOLE)
  message = refusal(models.load, model, 'float16')
  assert f'{NORM} has values that are not finite in float16' in message
  assert models.load(model).final_norm.scale[3] == np.float32(1e30)


def test_the_file_of_several_is_named(model, tmp_path):
  """Each is looked at as it is read: of the others, no more is."""
  models.save(models.load(model), tmp_path / 'parts', max_shard_bytes=20_000)
  files = json.loads((tmp_path / 'parts' / INDEX).read_text())['weight_map']
  file = tmp_path / 'parts' / files[DOWN]
  tensors = safetensors.numpy.load_file(file)
  tensors[DOWN][0, 0] = -np.inf
  write(tensors, file)
  assert refusal(models.load, file.parent).startswith(f'{file}: {DOWN} has')


def test_nothing_that_is_not_finite_is_saved(model, tmp_path):
  for name in ('final_norm/scale', 'blocks/mlp/down/kernel'):
    loaded = models.load(model)
    place = loaded.final_norm.scale
    if name != 'final_norm/scale':
      place = loaded.blocks.mlp.down.kernel
    place[...] = place[...].at[..., 3].set(np.nan)
    message = refusal(models.save, loaded, tmp_path / 'out')
    assert 'is not written' in message
    assert [f.name for f in tmp_path.iterdir()] == ['model']


def test_what_cannot_be_made_is_one_line(model, tmp_path):
  (tmp_path / 'file').write_text('')
  for path in (tmp_path / 'file' / 'out', tmp_path / ('x' * 300)):
    assert 'cannot be written' in refusal(models.save, models.load(model), path)
  assert {f.name for f in tmp_path.iterdir()} == {'model', 'file'}


# Files of weights.


def header(model):
  content = (model / WHOLE).read_bytes()
  size = int.from_bytes(content[:8], 'little')
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(new, data=b''):
  text = new if isinstance(new, bytes) else json.dumps(new).encode()
  return len(text).to_bytes(8, 'little') + text + data


@pytest.mark.parametrize(
  'cut',
  [
    lambda x: b'',
    lambda x: x[:7],
    lambda x: x[:100],
    lambda x: x[:-1],
    lambda x: x[: len(x) // 2],
    lambda x: x + b'more',
    lambda x: bytes(len(x)),
    lambda x: b'version https://git-lfs.github.com/spec/v1\noid sha256:0',
    lambda x: (2**63).to_bytes(8, 'little') + x[8:],
    lambda x: (2**64 - 1).to_bytes(8, 'little') + x[8:],
    lambda x: (10**8 + 1).to_bytes(8, 'little') + x[8:],
    lambda x: (len(x)).to_bytes(8, 'little') + x[8:],
    lambda x: (1).to_bytes(8, 'little') + x[8:],
    lambda x: x[:8] + b'[' + x[9:],
    lambda x: x[:8] + b'\xff' + x[9:],
    lambda x: x.replace(b'"BF16"', b'"XF16"', 1),
    lambda x: x.replace(b'"shape"', b'"sharp"', 1),
  ],
)
def test_a_damaged_file_is_named(model, cut):
  content = (model / WHOLE).read_bytes()
  (model / WHOLE).write_bytes(cut(content))
  for function in (models.load, models.identity):
    message = refusal(function, model)
    assert message.startswith(f'{model / WHOLE}: not a readable safetensors')


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('dtype', 'F99'),
    ('dtype', 3),
    ('dtype', 'F32'),  # Of the bytes of another one.
    ('shape', [-32]),
    ('shape', [2**63]),
    ('shape', [2**62, 4]),
    ('shape', [16]),
    ('shape', '32'),
    ('shape', None),
    ('data_offsets', [0, 64]),  # Where another one lies.
    ('data_offsets', [0]),
    ('data_offsets', [-64, 0]),
    ('data_offsets', [64, 0]),
    ('data_offsets', [10**15, 10**15 + 64]),
    ('data_offsets', None),
  ],
)
def test_a_header_that_cannot_be_is_refused(model, key, value):
  tensors, data = header(model)
  tensors[NORM][key] = value
  (model / WHOLE).write_bytes(with_header(tensors, data))
  assert 'not a readable safetensors file' in refusal(models.load, model)


@pytest.mark.parametrize(
  'tensors', [b'[]', b'null', b'{}', b'{"a": 1}', b'[' * 999, b'']
)
def test_a_header_of_other_things_is_refused(model, tensors):
  (model / WHOLE).write_bytes(with_header(tensors))
  assert refusal(models.load, model).startswith(str(model))


@pytest.mark.parametrize('name', ['a\nb', 'x' * 10_000, '\x1b[31m', '\u2028'])
def test_names_that_no_line_holds_are_refused(model, name):
  write(read(model) | {name: np.ones(3, np.float32)}, model / WHOLE)
  assert 'is no name of a tensor' in refusal(models.load, model)


def _directory(file):
  file.mkdir()


def _itself(file):
  file.symlink_to(file)


@pytest.mark.parametrize('make', [_directory, os.mkfifo, _itself])
@pytest.mark.parametrize('name', [WHOLE, INDEX, 'config.json'])
def test_what_is_no_file_is_refused_and_not_waited_for(model, name, make):
  if name == INDEX:
    (model / WHOLE).unlink()
  else:
    (model / name).unlink()
  make(model / name)
  assert refusal(models.load, model).startswith(str(model))


# The index of several files.


@pytest.mark.parametrize(
  'name',
  [
    *('a.safetensors\n', 'a\x00b', 'x' * 5000, '', '.', 'none.safetensors'),
    *('a.safetensors/b', 'directory', 3, None, [], {}, True),
  ],
)
def test_an_index_of_files_that_are_none_is_refused(model, name):
  names = dict.fromkeys(read(model), 'a.safetensors')
  (model / WHOLE).rename(model / 'a.safetensors')
  (model / 'directory').mkdir()
  (model / INDEX).write_text(json.dumps({'weight_map': names | {NORM: name}}))
  assert refusal(models.load, model).startswith(str(model))


@pytest.mark.parametrize('content', SOME.values(), ids=SOME)
def test_a_broken_index_is_refused(model, content):
  (model / WHOLE).rename(model / 'a.safetensors')
  (model / INDEX).write_bytes(content)
  assert refusal(models.load, model).startswith(f'{model / INDEX}: ')


def test_a_tensor_in_two_files_is_named(model):
  tensors = read(model)
  names = dict.fromkeys(tensors, 'a.safetensors') | {NORM: 'b.safetensors'}
  (model / WHOLE).rename(model / 'a.safetensors')
  write({NORM: tensors[NORM]}, model / 'b.safetensors')
  (model / INDEX).write_text(json.dumps({'weight_map': names}))
  message = refusal(models.load, model)
  assert message.startswith(f'{model / "b.safetensors"}: {NORM} is in a.safe')
