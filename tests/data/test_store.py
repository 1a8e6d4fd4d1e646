import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gakd_jax import UserError
from gakd_jax.data import store


class Maker:
  """Makes two chunks of two arrays, and counts how often."""

  def __init__(self):
    self.made = 0

  def __call__(self, add):
    self.made += 1
    add(ids=np.array([1, 2], np.int32), flags=np.array([True]))
    add(ids=np.array([3], np.int32), flags=np.array([], bool))
    return {'bad': {'x': 2}}


def test_arrays_are_made_once(tmp_path):
  make = Maker()
  for _ in range(2):
    arrays, facts = store.load(tmp_path, {'a': 1}, make)
    assert arrays['ids'].tolist() == [1, 2, 3]
    assert arrays['ids'].dtype == np.int32
    assert arrays['flags'].tolist() == [True]
    assert facts.pop('digest')
    assert facts == {'bad': {'x': 2}}
    assert isinstance(arrays['ids'], np.memmap)
    with pytest.raises(ValueError, match='read-only'):
      arrays['ids'][0] = 5
  assert make.made == 1
  store.load(tmp_path, {'a': 2}, make)
  assert make.made == 2


def test_the_digest_is_of_the_contents(tmp_path):
  def digest(key, *chunks):
    def make(add):
      for chunk in chunks:
        add(ids=np.array(chunk, np.int32))
      return {}

    return store.load(tmp_path, key, make)[1]['digest']

  first = digest(1, [1, 2, 3])
  assert digest(2, [1], [2, 3]) == first
  assert digest(3, [1, 2, 4]) != first


@pytest.mark.parametrize('damage', ['cut', 'gone', 'half'])
def test_what_is_damaged_is_made_again(tmp_path, damage):
  make = Maker()
  store.load(tmp_path, 'key', make)
  (directory,) = [p for p in tmp_path.iterdir() if p.is_dir()]
  if damage == 'cut':
    os.truncate(directory / 'ids.bin', 8)
  elif damage == 'gone':
    (directory / 'flags.bin').unlink()
  else:
    about = (directory / 'about.json').read_text()
    (directory / 'about.json').write_text(about[:40])
  arrays, _ = store.load(tmp_path, 'key', make)
  assert arrays['ids'].tolist() == [1, 2, 3]
  assert make.made == 2


def test_a_look_removes_what_is_damaged(tmp_path):
  """So that who looks only whether it is there knows."""
  assert not store.is_good(tmp_path, 'key')
  store.load(tmp_path, 'key', Maker())
  assert store.is_good(tmp_path, 'key')
  (file,) = tmp_path.glob('*/ids.bin')
  file.write_bytes(b'x' + file.read_bytes()[1:])
  assert store.has(tmp_path, 'key')
  assert not store.is_good(tmp_path, 'key')
  assert not store.has(tmp_path, 'key')


def test_what_fails_leaves_nothing(tmp_path):
  def make(add):
    add(ids=np.arange(5))
    raise UserError('row 3 is bad')

  with pytest.raises(UserError, match='row 3'):
    store.load(tmp_path, 'key', make)
  assert [p.suffix for p in tmp_path.iterdir()] == ['.lock']


def test_what_a_killed_process_left_is_in_nobody_s_way(tmp_path, monkeypatch):
  """A container that starts again has its name and its number."""
  store.load(tmp_path / 'a', 'key', Maker())
  (made,) = [p for p in (tmp_path / 'a').iterdir() if p.is_dir()]
  name = f'{made.name}.{os.uname().nodename}.{os.getpid()}.tmp'
  (tmp_path / 'b' / name).mkdir(parents=True)
  (tmp_path / 'b' / name / 'ids.bin').write_bytes(b'half')
  arrays, _ = store.load(tmp_path / 'b', 'key', Maker())
  assert arrays['ids'].tolist() == [1, 2, 3]
  assert not [*(tmp_path / 'b').glob('*.tmp')]


def test_a_place_that_cannot_be_written_to(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'below: .*config\.data\.cache'):
    store.load(tmp_path / 'file/below', 'key', Maker())


@pytest.mark.slow
def test_processes_share_what_the_first_makes(tmp_path):
  code = """
import sys, time, numpy as np
from gakd_jax.data import store
def make(add):
  print('made')
  time.sleep(1)
  add(ids=np.arange(3))
  return {}
print(store.load(sys.argv[1], 'key', make)[0]['ids'].tolist())
"""
  command = [sys.executable, '-c', code, str(tmp_path)]
  runs = [
    subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  said = sorted(run.communicate()[0] for run in runs)
  assert said == ['[0, 1, 2]\n', 'made\n[0, 1, 2]\n']
  (about,) = tmp_path.glob('*/about.json')
  assert json.loads(about.read_text())['key'] == 'key'
