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


def record(config, workdir, force=False):
  fingerprint.begin(workdir, force, config=fingerprint.as_json(config))


def read(workdir):
  return json.loads((workdir / 'config.json').read_text())


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('mesh.fsdp', 4),
    ('data.cache', 'there'),
    ('student.remat', 'none'),
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
  record(config, tmp_path)
  config.update_from_flattened_dict({key: value})
  record(config, tmp_path)
  said = capsys.readouterr().out
  assert said.startswith(f'{tmp_path}: config.{key} was ')
  assert said.endswith(f' and is {value!r}\n')
  assert fingerprint.flatten(read(tmp_path)['config'])[key] == value
  record(config, tmp_path)
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
  record(config, tmp_path)
  before = (tmp_path / 'config.json').read_bytes()
  with config.unlocked():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=f'{key} was .* or --force'):
    record(config, tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before
  record(config, tmp_path, force=True)
  assert f'forced: config.{key} was' in capsys.readouterr().out
  record(config, tmp_path)


def test_what_a_reference_does_by_microbatch_is_no_means(config, tmp_path):
  recipes = []
  for is_reference in (False, True):
    config.objective = {'name': 'gakd', 'reference': is_reference}
    config.train.microbatch_size = None
    record(config, tmp_path / str(is_reference))
    config.train.microbatch_size = 2
    as_json = fingerprint.as_json(config)
    recipes.append(fingerprint.recipe(as_json, {})['recipe'])
    as_json['train']['microbatch_size'] = 4
    recipes.append(fingerprint.recipe(as_json, {})['recipe'])
  config.objective.reference = False
  record(config, tmp_path / 'False')
  config.objective.reference = True
  with pytest.raises(UserError, match='microbatch_size was None and is 2; go'):
    record(config, tmp_path / 'True')
  assert recipes[0] == recipes[1]
  assert recipes[2] != recipes[3]


def test_a_finished_run_keeps_what_it_was_made_with(config, tmp_path):
  record(config, tmp_path)
  (tmp_path / 'results.json').write_text('{}')
  before = (tmp_path / 'config.json').read_bytes()
  config.report.answers = 0
  record(config, tmp_path)
  assert (tmp_path / 'config.json').read_bytes() == before


def test_versions_are_recorded_and_what_changed_is_said(
  config, tmp_path, monkeypatch, capsys
):
  record(config, tmp_path)
  versions = read(tmp_path)['versions']
  assert versions['python'] == '.'.join(map(str, sys.version_info[:3]))
  assert versions.keys() >= {'gakd_jax', 'jax', 'tokenizers', 'sacrebleu'}
  newer = versions | {'numpy': '99.1'}
  monkeypatch.setattr(fingerprint, '_versions', lambda: newer)
  record(config, tmp_path)
  assert capsys.readouterr().out == (
    f"{tmp_path}: versions.numpy was {versions['numpy']!r} and is '99.1'\n"
  )
  assert read(tmp_path)['versions'] == versions  # Those it began with.


def test_contents_are_compared_by_name(config, tmp_path, capsys):
  def begin(force=False, **contents):
    fingerprint.begin(tmp_path, force, contents=contents)

  record(config, tmp_path)
  begin(data='a', student='b')
  begin(data='a', student='b')
  with pytest.raises(
    UserError, match=r"something else: contents.data was 'a' and is 'c'; go on"
  ):
    begin(data='c', student='b')
  with pytest.raises(UserError, match=r"contents.more was None and is 'd'; go"):
    begin(data='a', student='b', more='d')
  begin(force=True, data='c', student='b')
  assert capsys.readouterr().out == (
    f"{tmp_path}: forced: contents.data was 'a' and is 'c'\n"
  )
  assert read(tmp_path)['contents'] == {'data': 'c', 'student': 'b'}
  assert read(tmp_path)['config'] == fingerprint.as_json(config)


def test_what_is_forced_to_change_has_not_finished(config, tmp_path):
  record(config, tmp_path)
  (tmp_path / 'results.json').write_text('{}')
  config.mesh.fsdp = 4
  record(config, tmp_path, force=True)
  assert (tmp_path / 'results.json').exists()
  config.seed = 1
  with pytest.raises(UserError, match=r'config.seed was 0 and is 1'):
    record(config, tmp_path)
  record(config, tmp_path, force=True)
  assert not (tmp_path / 'results.json').exists()
  assert read(tmp_path)['config']['seed'] == 1


def test_a_recipe_is_what_runs_share_but_for_their_seed():
  def of(origins=(), **config):
    config = {'seed': 0, 'train': {'steps': 3}} | config
    return fingerprint.recipe(config, dict(origins))

  assert of(mesh={'data': 8}) == of(mesh={'data': 1})
  assert of(train={'steps': 4}) != of()
  assert of(seed=1)['recipe'] == of()['recipe']
  assert of(seed=1)['seed'] == 1
  # What they start from counts by its own recipe, whatever it is called.
  one, other = of(start='sft-seed0'), of(start='sft-seed1', seed=1)
  assert one['recipe'] != other['recipe']
  names = {'sft-seed0': 'sft', 'sft-seed1': 'sft'}
  one = of(names, data=['sft-seed0', 'x'])
  other = of(names, data=['sft-seed1', 'x'], seed=1)
  assert one['recipe'] == other['recipe'] != of(names, data=['x'])['recipe']


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
