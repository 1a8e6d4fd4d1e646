"""What is fetched from the hub for what, and what tells two models apart."""

import fnmatch
import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import UserError, models
from gakd_jax.models import hub, lora, peft

COMMIT = 'f' * 40
FILES = {
  'config': ['config.json', 'generation_config.json', 'tokenizer_config.json'],
  'tokenizer': [
    'tokenizer.json',
    'tokenizer.model',
    'vocab.json',
    'merges.txt',
    'special_tokens_map.json',
    'chat_template.jinja',
    'additional_chat_templates/tool_use.jinja',
  ],
  'weights': [
    'model-00001-of-00002.safetensors',
    'model.safetensors.index.json',
    'adapter_model.safetensors',
  ],
  'other': [
    'README.md',
    'modeling_odd.py',
    'tokenizer_odd.py',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'consolidated.safetensors',
    'original/consolidated.00.pth',
    'original/model.safetensors',
    'original/params.json',
    'original/tokenizer.model',
    'checkpoint-5/adapter_config.json',
    'checkpoint-5/adapter_model.safetensors',
    'model-q4.gguf',
    'onnx/model.onnx',
    'tf_model.h5',
    'flax_model.msgpack',
  ],
}


@pytest.fixture
def asked(monkeypatch, tmp_path, tiny_tokenizer_dir):
  """What the hub was asked for; it has one model, with a tokenizer."""
  calls = []
  snapshots = tmp_path / 'models--org--name' / 'snapshots'

  def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
    calls.append(
      (
        repo,
        revision,
        [
          [
            file
            for file in files
            if any(fnmatch.fnmatch(file, p) for p in allow_patterns)
            and not any(fnmatch.fnmatch(file, p) for p in ignore_patterns)
          ]
          for files in FILES.values()
        ],
      )
    )
    if not snapshots.exists():
      shutil.copytree(tiny_tokenizer_dir, snapshots / COMMIT)
    return str(snapshots / COMMIT)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  return calls


def test_only_what_is_needed_is_fetched(asked):
  config, tokenizer, weights, other = FILES.values()
  for ask, files in (
    (lambda name: models.resolve(name, '*config.json'), [config, [], [], []]),
    (models.tokenizer_dir, [config, tokenizer, [], []]),
    (models.resolve, [config, tokenizer, weights, []]),
    (models.resolve_base, [config, tokenizer, weights, []]),
  ):
    assert ask('org/name').name == COMMIT
    assert asked.pop() == ('org/name', None, files)
    assert not asked
  assert len(other) == 16


@pytest.mark.parametrize('revision', ['v1.0', 'refs/pr/1', COMMIT[:7]])
def test_a_revision_is_asked_for_and_its_commit_known(asked, revision):
  path = models.resolve(f'org/name@{revision}')
  assert asked[-1][:2] == ('org/name', revision)
  for name in (path, str(path), f'org/name@{revision}'):
    assert models.revision(name) == COMMIT
  assert hub.origin(path) == ('org/name', COMMIT)


def test_a_local_directory_is_of_no_commit(tmp_path, tiny_tokenizer_dir):
  assert models.revision(tiny_tokenizer_dir) is None
  (tmp_path / 'snapshots' / COMMIT).mkdir(parents=True)
  assert models.revision(tmp_path / 'snapshots' / COMMIT) is None


@pytest.mark.parametrize(
  'name',
  ['nowhere', './org/name', '/no/such', 'here/name', 'here/name@v1', 'a/b@'],
)
def test_what_is_no_hub_id_is_not_asked_for(asked, name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'here').mkdir()
  with pytest.raises(UserError, match=f'model {name}: no such directory'):
    models.resolve(name)
  assert not asked


def test_an_adapter_names_its_base_of_the_hub(asked, tiny_model_dir, tmp_path):
  """By id and commit, as PEFT does, not where it lies on this machine."""
  directory = models.resolve('org/name')
  shutil.copytree(tiny_model_dir(), directory, dirs_exist_ok=True)
  model = models.load(directory)
  lora.attach(model, lora.LoRAConfig(2, 4.0, 0.0, 'query'), 0)
  models.save(model, tmp_path / 'adapter')
  settings = json.loads((tmp_path / 'adapter' / peft.CONFIG).read_text())
  assert settings['base_model_name_or_path'] == 'org/name'
  assert settings['revision'] == COMMIT
  models.read_config(tmp_path / 'adapter')
  assert asked[-1][:2] == ('org/name', COMMIT)
  # A revision is one of the hub: a directory has none.
  settings['base_model_name_or_path'] = str(directory)
  (tmp_path / 'adapter' / peft.CONFIG).write_text(json.dumps(settings))
  assert models.resolve_base(tmp_path / 'adapter') == directory


def test_models_are_told_apart(tiny_model_dir, tmp_path):
  """By any tensor, also one amid a file, and by what makes their prompts."""
  path = tiny_model_dir()
  seen = {models.identity(path)}
  for file in ('config.json', 'tokenizer.json', 'chat_template.jinja'):
    other = shutil.copytree(path, tmp_path / file)
    assert models.identity(other) in seen
    with (other / file).open('a') as f:
      f.write('\n')
    seen.add(models.identity(other))
  other = shutil.copytree(path, tmp_path / 'named')
  (other / 'additional_chat_templates').mkdir()
  (other / 'additional_chat_templates' / 'tool_use.jinja').write_text('{{ x }}')
  seen.add(models.identity(other))
  tensors = safetensors.numpy.load_file(path / 'model.safetensors')
  # As merging an adapter changes a projection: all of it, the ends of the file
  # stay as they are.
  changed = sorted(
    n for n in tensors if n.endswith(('q_proj.weight', 'up_proj.weight'))
  )
  large = np.zeros((300, 1000), np.float32)
  tensors['a'] = tensors['z'] = large
  kinds = [
    {},
    {'a': large.reshape(1000, 300)},
    {'a': large.view(np.int32)},
    *({name: tensors[name] * 1.01} for name in changed),
  ]
  for kind in kinds:
    safetensors.numpy.save_file(tensors | kind, other / 'model.safetensors')
    seen.add(models.identity(other))
  assert len(seen) == 5 + 3 + 4


def test_an_adapter_is_told_apart_wherever_its_base_lies(
  tiny_model_dir, tmp_path
):
  base, seen = tiny_model_dir(), set()
  for seed in (0, 1):
    model = models.load(base)
    lora.attach(model, lora.LoRAConfig(2, 4.0, 0.0, 'query'), seed)
    models.save(model, tmp_path / 'adapter')
    seen.add(models.identity(tmp_path / 'adapter'))
  assert len(seen) == 2
  settings = json.loads((tmp_path / 'adapter' / peft.CONFIG).read_text())
  moved = {'base_model_name_or_path': str(base.rename(tmp_path / 'moved'))}
  (tmp_path / 'adapter' / peft.CONFIG).write_text(json.dumps(settings | moved))
  assert models.identity(tmp_path / 'adapter') in seen
  # Of another base, it is another model.
  tiny_model_dir(seed=1).rename(base)
  moved = {'base_model_name_or_path': str(base)}
  (tmp_path / 'adapter' / peft.CONFIG).write_text(json.dumps(settings | moved))
  assert models.identity(tmp_path / 'adapter') not in seen


def test_weights_that_are_no_safetensors_are_one_line(tiny_model_dir):
  path = tiny_model_dir()
  (path / 'model.safetensors').write_bytes(b'version https://git-lfs')
  with pytest.raises(UserError, match='not a readable safetensors file'):
    models.identity(path)
