"""Every config, shrunk, trains; and what is wrong is said in one line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base, tiny_teacher
from gakd_jax import main, train

FOLDER = Path(base.__file__).parent
EXPERIMENTS = sorted(
  path.stem
  for path in FOLDER.glob('*.py')
  if path.stem not in ('__init__', 'base', 'dolly')
)


DATA = 'synthetic:train:9'


def shrunk(name):
  """The shrunk config; numbers that are compiled in are one for all."""
  config = importlib.import_module(f'configs.{name}').get_config()
  config = base.shrink(config, model=tiny_teacher.PATH, data=DATA)
  for c in (config, *(stage for _, stage in config.stages)):
    c.optimizer.learning_rate = 1e-3
    if 'rkl_scale' in c.objective:
      c.objective.rkl_scale = 1.0
  return config


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_config_trains(name, tmp_path):
  if name == 'quickstart_full':
    # But for the names of its stages it is what is trained anyway.
    full = str(shrunk(name)).replace('-seed0', '')
    assert full == str(shrunk('quickstart'))
    return
  config = shrunk(name)
  if config.stages:
    train.run_stages(config, tmp_path)
    last = tmp_path / config.stages[-1][0]
  else:
    train.run(config, tmp_path)
    last = tmp_path
  assert (last / 'best' / 'model.safetensors').exists()
  assert (tmp_path / 'report.html').exists()


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_docstring_has_its_command(name):
  doc = importlib.import_module(f'configs.{name}').__doc__
  assert name in doc
  assert 'python ' in doc


def run_main(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'gakd_jax.main', *flags],
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ([], 'error: --config is missing'),
    (['--config=configs/nothing.py'], 'configs/nothing.py'),
    (['--config=configs/rkl_0p6b.py', '--config.trian.steps=1'], 'trian'),
    (['--config=configs/rkl_0p6b.py', '--config.train.step=1'], 'step'),
    (['--config=configs/rkl_0p6b.py', '--confg=1'], 'confg'),
    (
      ['--config=configs/rkl_0p6b.py', '--config.train.steps=many'],
      'train.steps',
    ),
  ],
)
def test_wrong_flags_are_one_line(flags, expected):
  done = run_main(*flags)
  assert done.returncode == 2
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith('error: ')
  assert expected in lines[0]


@pytest.fixture
def broken(tiny_model_dir, tmp_path, capsys):
  """Runs a shrunk recipe with one setting changed; the one line it prints."""
  config = importlib.import_module('configs.rkl_0p6b').get_config()
  config = base.shrink(config, model=str(tiny_model_dir()), data=DATA)

  def run(**settings):
    with config.unlocked():
      config.update_from_flattened_dict(settings)
    with pytest.raises(SystemExit) as stopped:
      main.guarded(lambda argv: train.run(config, tmp_path / 'run'), ['x'])
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert '\n' not in text
    return text

  return run


def test_model_path_missing(broken):
  text = broken(**{'student.path': 'no/such/model'})
  assert text.startswith('error: model no/such/model: no such directory')


def test_tokenizers_differ(broken, tiny_model_dir, shared_dir):
  other = tiny_model_dir(
    vocab_size=50257, tokenizer_dir=shared_dir / 'tokenizers' / 'gpt2'
  )
  assert 'tokenizer' in broken(**{'teacher.path': str(other)})


def test_vocabulary_mismatch(broken, tiny_model_dir):
  other = tiny_model_dir(vocab_size=290)
  assert 'only 290 embedding rows' in broken(**{'teacher.path': str(other)})


def test_data_missing(broken):
  assert 'nothing.jsonl' in broken(**{'data.train': 'nothing.jsonl'})


def test_data_empty(broken, tmp_path):
  empty = tmp_path / 'empty.jsonl'
  empty.touch()
  assert 'empty.jsonl' in broken(**{'data.train': str(empty)})


def test_batch_does_not_divide(broken):
  text = broken(**{'train.batch_size': 12, 'mesh.data': 8})
  assert '12 rows' in text
  assert 'multiple of 8' in text


def test_no_teacher(broken):
  assert 'config.teacher.path is not set' in broken(**{'teacher.path': None})


def test_unknown_method(broken):
  assert "no method 'klld'" in broken(**{'objective.name': 'klld'})


def test_unknown_evaluator_setting(broken):
  text = broken(**{'evals.generation.temprature': 1.0})
  assert "did you mean 'temperature'" in text


def test_disk_full_while_saving(broken, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('gakd_jax.models.convert.save_params', full)
  assert 'the disk is full' in broken()
