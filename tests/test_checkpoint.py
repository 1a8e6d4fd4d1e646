"""Checkpoints: verified, made up for by older ones, kept and deleted."""

import errno
import json
import logging
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gakd_jax import UserError, checkpoint


def state(step):
  """Small and large arrays: files of their own, and shared ones."""
  return {
    'w': jnp.arange(40_000, dtype=jnp.float32) + step,
    'b': jnp.full((3, 5), step, jnp.bfloat16),
    'step': jnp.int32(step),
    'none': {},
  }


def save(directory, steps=(10, 20, 30), best=(), **settings):
  saved = checkpoint.Checkpoints(directory, **({'keep': 9} | settings))
  for step in steps:
    host = {'data': {'step': step}, 'is_best': step in best}
    saved.save(step, state(step), host)
  saved.close()
  return directory


def restore(directory, **settings):
  """The step and all arrays, compared; None if there is nothing."""
  saved = checkpoint.Checkpoints(directory, **settings)
  try:
    found = saved.restore(lambda host: state(0))
  finally:
    saved.close()
  if found is None:
    return None
  got, host = found
  step = int(got['step'])
  for name, x in state(step).items():
    np.testing.assert_array_equal(got[name], x)
  assert host['data'] == {'step': step}
  return step


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def files(directory, step):
  return sorted(p for p in (directory / str(step)).rglob('*') if p.is_file())


def truncate(path):
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


def empty(path):
  path.write_bytes(b'')


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def remove(path):
  path.unlink()


def replace_by_directory(path):
  path.unlink()
  path.mkdir()


DAMAGES = [truncate, empty, flip, remove, replace_by_directory]


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  return save(tmp_path_factory.mktemp('written') / 'checkpoints')


@pytest.fixture
def saved(written, tmp_path):
  return shutil.copytree(written, tmp_path / 'checkpoints')


def test_the_newest_is_restored(saved):
  assert restore(saved) == 30
  assert names(saved) == ['10', '20', '30']


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda x: x.__name__)
def test_what_is_damaged_is_named_and_the_one_before_taken(
  written, tmp_path, damage, capsys
):
  for i, path in enumerate(files(written, 30)):
    copy = shutil.copytree(written, tmp_path / str(i))
    hurt = copy / path.relative_to(written)
    damage(hurt)
    assert restore(copy) == 20, path
    out = capsys.readouterr().out
    assert out.count('\n') == 1
    assert str(hurt) in out
    if damage in (truncate, empty) and hurt.name != 'manifest.json':
      assert ' bytes instead of ' in out
    assert 'going on from step 20, 10 steps are lost' in out
    assert names(copy) == ['10', '20', '30.damaged']
    assert restore(copy) == 20  # Said once.
    assert capsys.readouterr().out == ''


def test_a_refusal_names_it_and_changes_nothing(saved):
  truncate(saved / '30/manifest.json')
  with pytest.raises(UserError, match=r'30/manifest\.json .*on from step 20'):
    restore(saved, strict=True)
  assert names(saved) == ['10', '20', '30']


def test_what_the_host_remembers_is_verified(saved):
  path = saved / '30/manifest.json'
  manifest = json.loads(path.read_text())
  manifest['host']['data']['step'] = 31
  path.write_text(json.dumps(manifest))
  assert restore(saved) == 20


def test_a_manifest_of_another_step_is_none(saved):
  shutil.rmtree(saved / '30')
  shutil.copytree(saved / '10', saved / '30')
  assert restore(saved) == 20


def test_several_are_damaged(saved, capsys):
  for step in (20, 30):
    flip(files(saved, step)[-1])
  assert restore(saved) == 10
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  assert 'going on from step 10, 20 steps are lost' in out
  truncate(saved / '10/manifest.json')
  assert restore(saved) is None
  assert 'from the beginning, 10 steps are lost' in capsys.readouterr().out
  assert names(saved) == ['10.damaged', '20.damaged', '30.damaged']


def test_a_step_that_was_damaged_is_saved_again(saved):
  empty(saved / '30/manifest.json')
  assert restore(saved) == 20
  save(saved, steps=[30])
  assert restore(saved) == 30


def test_what_was_half_saved_or_deleted_is_cleared_away(saved):
  (saved / '30').rename(saved / '30.saving')
  (saved / '10').rename(saved / '10.deleted')
  assert restore(saved) == 20
  assert names(saved) == ['20']


@pytest.mark.parametrize(
  ('settings', 'best', 'stay'),
  [
    ({'keep': 1}, (), [6]),
    ({'keep': 2}, (), [5, 6]),
    ({'keep': 1}, (2, 3), [3, 6]),
    ({'keep': 1, 'keep_every': 2}, (), [2, 4, 6]),
    ({'keep': 2, 'keep_every': 3}, (2,), [2, 3, 5, 6]),
  ],
)
def test_what_stays(tmp_path, settings, best, stay):
  save(tmp_path / 'c', range(1, 7), best, **settings)
  assert names(tmp_path / 'c') == [str(step) for step in stay]


def test_an_amendment_is_as_good_as_what_was_saved(saved):
  checkpoints = checkpoint.Checkpoints(saved, keep=9)
  checkpoints.save(40, state(40), {'data': None})
  checkpoints.amend(40, {'data': {'step': 40}})
  checkpoints.close()
  assert restore(saved) == 40


def full(*_):
  raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('fails', ['_write_manifest', '_digests', '_sync'])
def test_a_disk_that_fills_up_leaves_those_before(tmp_path, monkeypatch, fails):
  directory = save(tmp_path / 'c', steps=[10], keep=1)
  checkpoints = checkpoint.Checkpoints(directory, keep=1)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, fails, full)
    checkpoints.save(20, state(20), {'data': {'step': 20}})
    with pytest.raises(OSError, match='No space'):
      checkpoints.wait()
  checkpoints.close()
  assert restore(directory) == 10


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
  directory = save(tmp_path / 'c', steps=[10], keep=1)
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(UserError, match='the disk is full'):
    save(directory, steps=[20])
  assert restore(directory) == 10


def test_another_state_is_one_line(saved):
  checkpoints = checkpoint.Checkpoints(saved)
  other = state(0) | {'w': jnp.zeros(7), 'more': jnp.zeros(2)}
  with pytest.raises(UserError, match='of another state') as error:
    checkpoints.restore(lambda host: other)
  assert '\n' not in str(error.value)
  checkpoints.close()


def test_what_is_saved_may_be_changed_at_once(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c')
  step = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
  now, host = state(10), {'data': {'step': 10}}
  checkpoints.save(10, now, host)
  host['data']['step'] = 11
  for _ in range(20):
    now = step(now)
  checkpoints.close()
  assert restore(tmp_path / 'c') == 10


def test_half_deleted_is_not_damaged(tmp_path, monkeypatch, capsys):
  directory = save(tmp_path / 'c', steps=[10, 20], keep=2)
  checkpoints = checkpoint.Checkpoints(directory, keep=2)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, 'rmtree', full)
    checkpoints._keep = 1
    with pytest.raises(OSError, match='No space'):
      checkpoints._retire()
  checkpoints.close()
  assert names(directory) == ['10.deleted', '20']
  assert restore(directory) == 20
  assert capsys.readouterr().out == ''


def test_what_fails_behind_our_back_is_said_once(tmp_path, caplog):
  """In the line that `wait` raises."""
  checkpoint.Checkpoints(tmp_path).close()
  absl = logging.getLogger('absl')
  for place in ('x/orbax/future.py', 'x/other.py'):
    error = OSError('No space left on device')
    record = absl.makeRecord(
      'absl', logging.ERROR, place, 1, place, (), (OSError, error, None)
    )
    absl.handle(record)
  assert [record.pathname for record in caplog.records] == ['x/other.py']


def test_a_step_has_its_name_once_all_of_it_is_on_the_disk(
  tmp_path, monkeypatch
):
  """Its files, the manifest, then the name; and then the name itself."""
  done, sync, rename = [], checkpoint._sync, pathlib.Path.rename

  def synced(path):
    done.append(('sync', str(path)))
    sync(path)

  def renamed(path, target):
    if path.suffix == '.saving':
      files = {p.name for p in path.iterdir()}
      done.append(('rename', files))
    return rename(path, target)

  monkeypatch.setattr(checkpoint, '_sync', synced)
  monkeypatch.setattr(pathlib.Path, 'rename', renamed)
  directory = save(tmp_path / 'c', steps=[10])
  at = done.index(('rename', {'manifest.json', 'state'}))
  before = {path.replace('.saving', '') for _, path in done[:at]}
  state_files = {str(p) for p in files(directory, 10) if 'state' in p.parts}
  assert state_files <= before
  assert done[at + 1 :] == [('sync', str(directory))]


def test_what_is_synced_is_on_the_disk(tmp_path, monkeypatch):
  found, fsync = [], os.fsync

  def synced(fd):
    found.append(os.fstat(fd).st_ino)
    fsync(fd)

  monkeypatch.setattr(os, 'fsync', synced)
  checkpoint._sync(tmp_path)
  assert found == [tmp_path.stat().st_ino]
