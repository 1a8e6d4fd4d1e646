"""Imports point down only, and use what is public only."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / 'gakd_jax').rglob('*.py'))
ALL = PACKAGE + [
  file
  for folder in ('configs', 'tools', 'tests')
  for file in sorted((ROOT / folder).rglob('*.py'))
]

# From the top; what stands on one line may import each other, in no circle.
LEVELS = (
  ('main', 'evaluate', 'generate'),
  ('train', 'planning', 'check'),
  ('plan',),
  ('loop',),
  ('rollout_log', 'skip_log', 'chosen'),
  ('build', 'inputs', 'readers', 'best'),
  ('fields',),
  ('training',),
  (
    'step',
    'skips',
    'rollout',
    'writers',
    'rereading',
    'writing',
    'answering',
    'odds',
    'teacher_cache',
    'evals',
  ),
  (
    'objectives',
    'speculative',
    'streaming',
    'sampling',
    'sampler',
    'flops',
  ),
  ('binary',),
  ('models', 'data'),
  (
    'keys',
    'grouping',
    'optim',
    'sharding',
    'hlo',
    'targets',
    'checkpoint',
    'fingerprint',
    'rundir',
    'results',
    'page',
    'log',
    'trackers',
    'json_file',
    'json_lines',
    'settings',
    'config_file',
    'partial',
    'hosts',
    'stopping',
    'rollcall',
  ),
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def imported(file):
  """Dotted names that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{file}:{node.lineno}: write gakd_jax.<module>'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def component(file):
  """'models' for gakd_jax/models/lora.py; '' for the package itself."""
  name = file.relative_to(ROOT / 'gakd_jax').parts[0].removesuffix('.py')
  return '' if name == '__init__' else name


def test_imports_point_down_and_in_no_circle():
  graph = {name: set() for name in LEVEL}
  for file in PACKAGE:
    here = component(file)
    assert not here or here in LEVEL, f'{file}: give it a level in this test'
    for name in imported(file):
      package, _, there = name.partition('.')
      there = there.partition('.')[0]
      if package == 'gakd_jax' and there in LEVEL and there != here:
        assert here, f'{file} imports {name}: the root is below everything'
        assert LEVEL[here] <= LEVEL[there], f'{file} imports {name}: upwards'
        graph[here].add(there)
  graphlib.TopologicalSorter(graph).prepare()  # raises on a circle


@pytest.mark.parametrize('top', ['torch', 'tools', 'configs', 'tests'])
def test_the_package_never_imports(top):
  for file in PACKAGE:
    assert top not in {name.partition('.')[0] for name in imported(file)}, file


def test_what_is_slow_to_import_waits_until_it_is_needed():
  found = subprocess.run(
    [sys.executable, '-c', 'import sys, gakd_jax.main; print(*sys.modules)'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  slow = {'transformers', 'datasets', 'pyarrow', 'matplotlib', 'qwix'}
  slow |= {'orbax.checkpoint', 'rouge_score', 'nltk', 'sacrebleu', 'PIL'}
  slow |= {'jax.experimental.pallas', 'tensorboardX', 'torch'}
  assert not slow & set(found)


@pytest.mark.slow
def test_nothing_private_of_other_libraries_is_used():
  for file in ALL:
    for name in imported(file):
      private = [p for p in name.split('.') if p[0] == '_' and p[1] != '_']
      assert not private, f'{file} imports {name}'
      assert not name.startswith('flax.nnx.') or name.count('.') == 2, (
        f'{file} imports {name}: only what flax.nnx itself exports'
      )
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Attribute) and node.attr.startswith('_'):
        root = ast.unparse(node.value).partition('.')[0]
        is_library = root in {'jax', 'jnp', 'nnx', 'flax', 'optax', 'ocp'}
        assert not is_library or node.attr.startswith('__'), (
          f'{file}:{node.lineno}: {ast.unparse(node)} is private'
        )
