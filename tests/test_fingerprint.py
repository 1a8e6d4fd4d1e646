import json
import subprocess
import sys

import pytest

from configs import base
from gakd_jax import UserError, fingerprint


@pytest.fixture
def config():
  c = base.get_config()
  c.objective = {'name': 'kld'}
  c.evals = {'loss': {'batch_size': 8}, 'g': {'kind': 'generation'}}
  return c


def read(workdir):
  return json.loads((workdir / 'config.json').read_text())


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('mesh.fsdp', 4),
    ('data.cache', 'there'),
    ('student.remat', False),
    ('train.microbatch_size', 2),
    ('train.head_chunk', 64),
    ('checkpoint.every', 7),
    ('eval_every', 7),
    ('evals.loss.batch_size', 2),
    ('report.answers', 0),
    ('attention', 'xla'),
  ],
)
def test_how_it_is_carried_out_may_change(config, tmp_path, capsys, key, value):
  fingerprint.record(config, tmp_path)
  config.update_from_flattened_dict({key: value})
  fingerprint.record(config, tmp_path)
  said = capsys.readouterr().out
  assert said.startswith(f'{tmp_path}: {key} was ')
  assert said.endswith(f' and is {value!r}\n')
  assert fingerprint.flatten(read(tmp_path)['config'])[key] == value
  fingerprint.record(config, tmp_path)
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('seed', 1),
    ('train.batch_size', 2),
    ('optimizer.learning_rate', 1.0),
    ('objective.kd', 0.3),
    ('data.template', 'raw'),
    ('checkpoint.best_metric', 'loss/ce'),
    ('evals.g.max_new_tokens', 3),
    ('student.path', 'elsewhere'),
  ],
)
def test_what_is_computed_may_not(config, tmp_path, capsys, key, value):
  fingerprint.record(config, tmp_path)
  before = (tmp_path / 'config.json').read_bytes()
  with config.unlocked():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=f'{key} was .* or --force'):
    fingerprint.record(config, tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before
  fingerprint.record(config, tmp_path, force=True)
  assert f'forced: {key} was' in capsys.readouterr().out
  fingerprint.record(config, tmp_path)


def test_a_finished_run_keeps_what_it_was_made_with(config, tmp_path):
  fingerprint.record(config, tmp_path)
  (tmp_path / 'results.json').write_text('{}')
  before = (tmp_path / 'config.json').read_bytes()
  config.report.answers = 0
  fingerprint.record(config, tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before


def test_versions_are_recorded_and_what_changed_is_said(
  config, tmp_path, monkeypatch, capsys
):
  fingerprint.record(config, tmp_path)
  versions = read(tmp_path)['versions']
  assert versions['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert versions.keys() >= {'gakd_jax', 'jax', 'tokenizers', 'sacrebleu'}
  newer = versions | {'numpy': '99.1'}
  monkeypatch.setattr(fingerprint, '_versions', lambda: newer)
  fingerprint.record(config, tmp_path)
  assert capsys.readouterr().out == (
    f"{tmp_path}: version of numpy was {versions['numpy']!r} and is '99.1'\n"
  )


def test_contents_are_compared_by_name(config, tmp_path, capsys):
  fingerprint.record(config, tmp_path)
  fingerprint.check_contents(tmp_path, {'data': 'a', 'student': 'b'})
  fingerprint.check_contents(tmp_path, {'data': 'a', 'student': 'b'})
  with pytest.raises(UserError, match='than there are now: data; use'):
    fingerprint.check_contents(tmp_path, {'data': 'c', 'student': 'b'})
  other = {'data': 'c', 'student': 'b'}
  fingerprint.check_contents(tmp_path, other, force=True)
  assert capsys.readouterr().out == (
    f'{tmp_path}: forced: other contents of data\n'
  )
  assert read(tmp_path)['contents'] == other


def test_a_lock_is_let_go_of(tmp_path):
  with fingerprint.lock(tmp_path):
    code = (
      'import sys; from gakd_jax import fingerprint\n'
      'with fingerprint.lock(sys.argv[1]): pass\n'
    )
    command = [sys.executable, '-c', code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert 'another process works there' in done.stderr
  with fingerprint.lock(tmp_path):
    pass


def test_the_commit_of_somebody_elses_repository_is_not_ours(
  tmp_path, monkeypatch
):
  git = ['git', '-c', 'user.name=x', '-c', 'user.email=x@y', '-C']
  where = tmp_path / 'theirs'
  package = where / 'env/gakd_jax'
  package.mkdir(parents=True)
  for arguments in (['init', '-q'], ['commit', '-qm', 'x', '--allow-empty']):
    subprocess.run([*git, str(where), *arguments], check=True)
  monkeypatch.setattr(fingerprint, '__file__', str(package / 'fingerprint.py'))
  assert fingerprint.commit() is None
  ours = where / 'gakd_jax'
  monkeypatch.setattr(fingerprint, '__file__', str(ours / 'fingerprint.py'))
  assert len(fingerprint.commit()) == 40
