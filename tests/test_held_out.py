"""No config trains on what it is scored with, nor is chosen by a test set."""

import contextlib
import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from configs import eval_all, gakd, on_policy, skd
from gakd_jax.data import sources
from tools import prepare_data

ROOT = Path(skd.__file__).parents[1]
ARGUMENTS = {
  'gakd': gakd.ARGUMENTS,
  'skd': [
    f'{task},{kd_type},{pair}'
    for task in skd.TASKS
    for kd_type in (*skd.WRITERS, 'all')
    for pair in skd.PAIRS
  ],
  'on_policy': [
    f'{size},{method}'
    for size in on_policy.SIZES
    for method in on_policy.METHODS
  ],
  'eval_instruct': ['field', 'reference'],
  'eval_translation': ['', 'comet'],
}
ALL = [
  f'{file.relative_to(ROOT)}:{argument}'.rstrip(':')
  for folder in ('configs', 'docs')
  for file in sorted((ROOT / folder).glob('*.py'))
  if file.stem != '__init__'
  for argument in ARGUMENTS.get(file.stem, [''])
]
# What is reported of any model, by whichever config it was trained.
SUITES = {x.data for x in eval_all.get_config().evals.values() if 'data' in x}

# Rows of the second file whose prompts are in the first as well, as MiniLLM
# split Dolly and DialogSum's authors theirs.
KNOWN = {
  'data/dolly/train.jsonl': {
    'data/dolly/dev.jsonl': 31,
    'data/dolly/test.jsonl': 10,
  },
  'data/dolly/dev.jsonl': {'data/dolly/test.jsonl': 1},
  'data/dialogsum/dev.jsonl': {'data/dialogsum/test.jsonl': 7},
}
# Answers to the prompts of another file.
ANSWERS = {'data/dolly/answers.jsonl': 'data/dolly/train.jsonl'}


@functools.cache
def uses(name):
  """What a config's stages (train on, are scored with, are chosen by).

  And what tests are to it: of every suite, and of stages that do not train.
  """
  file, _, argument = name.partition(':')
  found = importlib.util.spec_from_file_location('config', ROOT / file)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  config = module.get_config(*[argument] if argument else [])
  stages = dict(config.stages) or {'': config}

  def trained_on(c):
    specs = c.data.train or ()
    for spec in (specs,) if isinstance(specs, str) else specs:
      if spec.startswith('stage:'):  # It answered these.
        yield from trained_on(stages[spec.removeprefix('stage:')])
      else:
        yield ANSWERS.get(spec, spec)

  trained, scored, chosen, tests = set(), set(), set(), set(SUITES)
  for c in stages.values():
    trained |= {*trained_on(c)}
    data = {
      key: line.get('data') or c.data.validation
      for key, line in c.evals.items()
      if 'of' not in line
    }
    scored |= {*data.values(), c.data.validation} - {None}
    if c.checkpoint.best_metric:
      chosen.add(data[c.checkpoint.best_metric.partition('/')[0]])
    if c.train.steps == 0:
      tests |= {*data.values()}
  return trained, scored, chosen, tests


def source(spec):
  """A split is one source, however many of its rows are taken."""
  return re.sub(r'(python:tools.synthetic:rows:\w+):.*', r'\1', spec)


@pytest.mark.parametrize('name', ALL)
def test_files_are_for_one_purpose(name):
  trained, scored, chosen, tests = (
    {source(x) for x in specs if x} for specs in uses(name)
  )
  assert not trained & (scored | tests)
  assert not chosen & tests


@pytest.fixture(scope='module')
def prepared(shared_dir, tmp_path_factory):
  """Where the commands in the docstring of configs/skd.py put the real files.

  Returns (a directory, {file: rows}).
  """
  public = {
    'gsm8k': 'gsm8k',
    'math': 'gsm8k',
    'dialogsum': 'dialogsum',
    'flores_ne_en': 'flores_v1',
  }
  doc = skd.__doc__.replace('\\\n', '')
  commands = re.findall(r'python tools/prepare_data.py (.*)', doc)
  # Of the translations, the docstring has one command of three.
  (train,) = (x for x in commands if '--target' in x)
  commands += [
    train.replace('.dev.', f'.{one}.').replace('train.jsonl', f'{other}.jsonl')
    for one, other in (('devtest', 'dev'), ('test', 'test'))
  ]
  made = {}
  directory = tmp_path_factory.mktemp('prepared')
  with contextlib.chdir(directory):
    for command in commands:
      text, file, *options = shlex.split(command)
      # The train split of DialogSum is not there; dev is of the same form.
      text = text.replace('dialogsum.train', 'dialogsum.dev')
      folder = shared_dir / 'data' / public[Path(file).parent.name]
      options = [x.replace('--target=', f'--target={folder}/') for x in options]
      assert prepare_data.main([f'{folder}/{text}', file, *options]) == 0
      made[file] = len(Path(file).read_text().split('\n')) - 1
  return directory, made


def test_commands_of_skd_make_what_it_reads(prepared):
  _, made = prepared
  assert made['data/gsm8k/dev.jsonl'] == made['data/math/dev.jsonl'] == 473
  assert made['data/gsm8k/train.jsonl'] == 1000
  assert made['data/flores_ne_en/train.jsonl'] == 1000
  for task in skd.TASKS.values():
    named = {f'{task.folder}/{part}.jsonl' for part in ('train', 'dev')}
    named |= {file for file, _ in task.tests.values()}
    assert {x for x in named if 'llm_adapters' not in x} <= made.keys()


@pytest.fixture(scope='module')
def prompts_of(prepared, shared_dir):
  """`prompts_of(spec)`: its prompts' words, in lower case; None without it."""
  directory, _ = prepared

  @functools.cache
  def read(spec):
    if not spec.startswith('python:tools.synthetic:rows:'):
      part = spec.replace('test.', 'test_partial.')  # of UnNI
      places = (directory / spec, shared_dir / spec, shared_dir / part)
      spec = next((x for x in places if x.exists()), None)
      if spec is None:
        return None
    found = []
    for row in sources.load(spec, need_response=False)[0]:
      turns = [turn['content'] for turn in row.messages or ()]
      text = ' '.join(turns or (row.instruction, row.input))
      found.append(tuple(re.findall(r'\w+', text.lower())))
    return found

  return read


@pytest.mark.parametrize(
  'spec',
  [
    pytest.param(x, marks=[pytest.mark.slow] * ('synthetic' in x))
    for x in sorted(
      {
        x
        for name in ALL
        for trained, _, chosen, _ in [uses(name)]
        for x in trained | chosen
      }
    )
  ],
)
def test_no_row_is_on_both_sides(spec, prompts_of):
  """Of what a config trains on or is chosen by, none is a row of its tests."""
  if spec == 'data/dialogsum/train.jsonl' or prompts_of(spec) is None:
    pytest.skip(f'{spec} is not among the shared data')
  others = set()
  for trained, scored, chosen, tests in map(uses, ALL):
    if spec in trained:
      others |= scored | tests
    if spec in chosen:
      others |= tests
  here = set(prompts_of(spec))
  rows = {x: sum(p in here for p in prompts_of(x) or ()) for x in others}
  assert len(rows) > 10
  assert {x: n for x, n in rows.items() if n} == KNOWN.get(spec, {})
