"""tools/convert_weights.py: there and back, bit for bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from gakd_jax import best, models
from gakd_jax.models import lora
from tools import convert_weights


def weights(path):
  return safetensors.numpy.load_file(path / 'model.safetensors')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip_keeps_every_bit(tiny_model_dir, tmp_path, dtype):
  source = tiny_model_dir(dtype=dtype, tied_head=dtype == 'float32')
  (source / best.RECORD).write_text('{}')  # how it is asked
  flax, back = tmp_path / 'flax', tmp_path / 'back'
  assert convert_weights.main(['to_flax', str(source), str(flax)]) == 0
  companions = {f.name for f in source.iterdir()} - {'model.safetensors'}
  assert {f.name for f in flax.iterdir()} == companions | {'params'}
  assert convert_weights.main(['to_hf', str(flax), str(back)]) == 0
  assert {f.name for f in back.iterdir()} == {f.name for f in source.iterdir()}
  before, after = weights(source), weights(back)
  assert before.keys() == after.keys()
  for name, x in before.items():
    assert str(x.dtype) == dtype
    assert x.dtype == after[name].dtype
    assert x.tobytes() == after[name].tobytes(), name
  assert sorted(f.name for f in tmp_path.iterdir()) == ['back', 'flax']


def test_the_checkpoint_is_a_plain_tree_in_the_dtype_asked_for(
  tiny_model_dir, tmp_path
):
  source, flax = tiny_model_dir(), tmp_path / 'flax'
  argv = ['to_flax', str(source), str(flax), '--dtype', 'bfloat16']
  assert convert_weights.main(argv) == 0
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(flax / 'params').item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
    params = checkpointer.restore(flax / 'params', restore_args=as_numpy)
  kernel = params['blocks']['mlp']['up']['kernel'][1]
  stored = weights(source)['model.layers.1.mlp.up_proj.weight']
  assert kernel.dtype == 'bfloat16'
  np.testing.assert_array_equal(kernel.T, stored.astype('bfloat16'))


def test_a_head_that_is_not_the_embedding_goes_there_and_back(
  tiny_model_dir, tmp_path
):
  """Though config.json says that it is."""
  source = tiny_model_dir(layers=1)
  before = weights(source)
  before['lm_head.weight'] = before['model.embed_tokens.weight'] + 1
  safetensors.numpy.save_file(before, source / 'model.safetensors')
  convert_weights.to_flax(source, tmp_path / 'flax')
  convert_weights.to_hf(tmp_path / 'flax', tmp_path / 'back')
  after = weights(tmp_path / 'back')
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(x, after[name], err_msg=name)


@pytest.mark.slow
def test_adapters_are_merged(tiny_model_dir, tmp_path):
  """Into either directory; how they are asked comes along."""
  model = models.load(tiny_model_dir())
  lora.attach(model, lora.LoRAConfig(rank=2), 0)
  for adapter in lora.adapters(model).values():
    adapter.b[...] = adapter.b[...] + 0.1
  source = tmp_path / 'adapter'
  models.save(model, source)
  (source / best.RECORD).write_text('{}')
  convert_weights.merge(source, tmp_path / 'merged')
  convert_weights.to_flax(source, tmp_path / 'flax')
  convert_weights.to_hf(tmp_path / 'flax', tmp_path / 'back')
  merged, back = weights(tmp_path / 'merged'), weights(tmp_path / 'back')
  assert merged.keys() == back.keys()
  for name, x in merged.items():
    np.testing.assert_array_equal(x, back[name], err_msg=name)
  plain = weights(Path(model.source))
  name = 'model.layers.0.self_attn.q_proj.weight'
  assert np.abs(merged[name] - plain[name]).max() > 0.01
  assert (tmp_path / 'merged' / best.RECORD).read_text() == '{}'


def test_a_checkpoint_of_another_shape_is_refused(
  tiny_model_dir, tmp_path, capsys
):
  flax = tmp_path / 'flax'
  convert_weights.to_flax(tiny_model_dir(), flax)
  config = tiny_model_dir(ff_width=40) / 'config.json'
  (flax / 'config.json').write_text(config.read_text())
  assert convert_weights.main(['to_hf', str(flax), str(tmp_path / 'x')]) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert 'does not match config.json in blocks/mlp/down/kernel, ' in error
  assert 'attention' not in error
  assert not (tmp_path / 'x').exists()


def test_mistakes_are_one_line_and_status_2(tiny_model_dir, tmp_path, capsys):
  source = str(tiny_model_dir())
  for argv, message in (
    (['to_flax', str(tmp_path / 'no'), str(tmp_path / 'x')], 'no such'),
    (['to_flax', source, str(tmp_path)], 'exists already'),
    (['to_hf', source, str(tmp_path / 'x')], 'params: not found'),
  ):
    assert convert_weights.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ')
    assert message in error


@pytest.fixture(scope='module')
def flax(tiny_model_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp('flax') / 'flax'
  convert_weights.to_flax(tiny_model_dir(layers=1), path)
  return path


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('_METADATA', None),
    ('_METADATA', b''),
    ('_METADATA', b'[]'),
    ('_METADATA', b'{"tree_metadata": 3}'),
    ('_sharding', b'hello'),
    ('embedding/.zarray', None),
    ('embedding/.zarray', b'{}'),
    ('embedding/.zarray', b'\x00'),
  ],
)
def test_a_damaged_checkpoint_is_one_line(
  flax, tmp_path, capsys, name, content
):
  path = shutil.copytree(flax, tmp_path / 'damaged')
  file = path / 'params' / name
  file.unlink()
  if content is not None:
    file.write_bytes(content)
  assert convert_weights.main(['to_hf', str(path), str(tmp_path / 'x')]) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith(f'error: {path / "params"}: ')
  assert [f.name for f in tmp_path.iterdir()] == ['damaged']


def test_whatever_orbax_says_is_one_line(flax, tmp_path, capsys, monkeypatch):
  def missing(*args):  # As of a part that is missing, whose others go on.
    raise ValueError('NOT_FOUND: chunk {0, 0}\nSource locations: ...')

  monkeypatch.setattr(convert_weights, '_restored', missing)
  assert convert_weights.main(['to_hf', str(flax), str(tmp_path / 'x')]) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'params: cannot be read (ValueError: NOT_FOUND: chunk' in error
  assert not (tmp_path / 'x').exists()


def test_numbers_that_are_no_weights_are_refused(flax, tmp_path, capsys):
  path = shutil.copytree(flax, tmp_path / 'flax')
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(path / 'params').item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
    params = checkpointer.restore(path / 'params', restore_args=as_numpy)
    for dtype, value in (('float32', np.nan), ('int32', 3)):
      norm = np.full(32, value, dtype)
      shutil.rmtree(path / 'params')
      checkpointer.save(
        path / 'params', params | {'final_norm': {'scale': norm}}
      )
      assert (
        convert_weights.main(['to_hf', str(path), str(tmp_path / 'x')]) == 2
      )
      error = capsys.readouterr().err.strip().splitlines()[-1]
      assert 'norm' in error
      assert not (tmp_path / 'x').exists()


def test_places_that_cannot_be_written_are_one_line(
  tiny_model_dir, flax, tmp_path, capsys
):
  (tmp_path / 'file').write_text('')
  sources = {'to_flax': tiny_model_dir(layers=1), 'to_hf': flax}
  for direction, source in sources.items():
    for name in ('file/x', 'x' * 300):
      argv = [direction, str(source), str(tmp_path / name)]
      assert convert_weights.main(argv) == 2
      error = capsys.readouterr().err.strip().splitlines()[-1]
      assert error.startswith(f'error: {tmp_path / name}')
  assert [f.name for f in tmp_path.iterdir()] == ['file']


def test_what_fails_midway_leaves_nothing(
  tiny_model_dir, tmp_path, monkeypatch
):
  def stops(*args):
    raise KeyboardInterrupt

  source = tiny_model_dir(layers=1)
  monkeypatch.setattr(models, 'copy_companions', stops)
  with pytest.raises(KeyboardInterrupt):
    convert_weights.to_flax(source, tmp_path / 'flax')
  assert not [*tmp_path.iterdir()]


def test_the_command_runs_as_documented(tmp_path):
  root = Path(__file__).parents[1]
  run = subprocess.run(
    [sys.executable, 'tools/convert_weights.py', 'to_hf', 'no', 'x'],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 2
  assert run.stderr.startswith('error: ')
  assert run.stderr.count('\n') == 1
