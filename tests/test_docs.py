"""What the documentation says is there is there, and its commands work."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import eval_instruct, tiny_teacher
from gakd_jax import binary, config_file, objectives
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
  r'|databricks/|tools/report\.py|smollm2\.model|smollm2\.py'
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


@pytest.fixture
def world(tmp_path):
  """A checkout in which a reader has two models and some data."""
  for name in ('tools', 'docs', 'gakd_jax'):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / 'configs').mkdir()
  for file in (ROOT / 'configs').iterdir():
    (tmp_path / 'configs' / file.name).symlink_to(file)
  (tmp_path / 'configs/mine.py').write_text(shown('tutorials/your_own.md'))
  models = ['STUDENT', 'TEACHER', 'runs/rgan_0p6b']
  models += [f'runs/{x}/best' for x in ('sft_0p6b', 'sft_8b')]
  for name in models:
    shutil.copytree(tiny_teacher.PATH, tmp_path / name)
  case = make_goldens.CASES['qwen2_tied']
  llama_cpp.write(case, make_goldens.tensors(case), tmp_path / 'FILE.gguf')
  rows = synthetic.rows('train', 12)
  text = '\n'.join(map(json.dumps, rows)) + '\n'
  sets = ('dolly', 'self_inst', 'vicuna', 'sinst_11', 'uinst_11')
  files = [
    f'data/{x}/{y}.jsonl' for x in sets for y in ('train', 'dev', 'test')
  ]
  for name in (*files, 'prompts.jsonl', 'some/data.jsonl'):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(text * 50 if name.startswith('some') else text)
  return tmp_path


def shown(page):
  """The Python that a page shows."""
  text = (ROOT / 'docs' / page).read_text()
  return re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]


# What keeps a command short: answers are few, devices small.
SHORT = {
  '--plan_memory_gb': ['--plan_memory_gb=0.1'],
  'gakd_jax.generate': ['--max_new_tokens=48'],
  'evaluate --config=configs/mine.py': [
    '--config.evals.generation.max_new_tokens=2'
  ],
  'configs/eval_instruct.py': [
    f"'--config.evals.{name}.{x}'"
    for name in eval_instruct.SETS
    for x in ('limit=2', 'max_new_tokens=2', 'seeds=(1,)')
  ],
}


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_can_be_followed(page, world):
  """Its commands, one after another, but for ELSEWHERE's.

  Trainings are checked instead of run, and their models are there then.
  """
  if page.name == 'README.md':  # What it says in three lines is a tutorial.
    shutil.copytree(world / 'data/dolly', world / 'data/mine')
  for command in commands(page):
    shows = '--plan' in command or '--check' in command
    trains = command.startswith('python -m gakd_jax.main') and not shows
    if trains and '...' not in command:
      leave_models(command, world)
    if ELSEWHERE.search(command):
      continue
    if trains:  # Elsewhere: what it would write, others have made.
      command += ' --check --workdir=checked'
    for part, more in SHORT.items():
      if part in command:
        command = ' '.join([command, *more])
    done = subprocess.run(
      command.replace('python ', f'{sys.executable} '),
      shell=True,
      cwd=world,
      env=os.environ
      | {
        'PYTHONPATH': str(world),
        'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
      },
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      check=False,
      timeout=600,
    )
    said = done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0, f'{command}\n{said}'


def leave_models(command, world):
  """What a training would leave, for the commands after it."""
  spec = re.search(r'--config=(\S+)', command)[1]
  workdir = re.search(r'--workdir=(\S+)', command)
  where = world / (workdir[1] if workdir else binary.default_workdir(spec))
  stages = config_file.load(str(world / spec)).stages
  for folder in [where / x for x, _ in stages] or [where]:
    for model in (folder, folder / 'best'):
      model.mkdir(parents=True, exist_ok=True)
      for file in Path(tiny_teacher.PATH).iterdir():
        if not (model / file.name).exists():
          (model / file.name).symlink_to(file)


# Those that stand within a sentence.
INLINE = {
  x for p in PAGES for x in re.findall(r'`(python [^`]+)`', p.read_text())
}


@pytest.mark.parametrize('command', sorted({*ALL, *INLINE}))
def test_what_a_command_names_is_there(command):
  for module in re.findall(r'python -m ([\w.]+)', command):
    assert importlib.util.find_spec(module), module
  for file in re.findall(r'python ([\w/]+\.py)', command):
    assert (ROOT / file).exists()
  for file in re.findall(r'launch/[\w.]+', command):
    assert (ROOT / file).exists()
  for spec in re.findall(r'--config=([\w/.:,=]+)', command):
    if '...' not in spec and spec != 'configs/mine.py':  # the reader's own
      config_file.load(str(ROOT / spec))


def test_commands_are_found():
  assert 'pip install -e .' in ALL
  assert len([x for x in ALL if not ELSEWHERE.search(x)]) > 15
  assert not [x for x in ALL if not re.match(r'[\w/=]', x)]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  """To files, and to their headings."""
  for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if not link.startswith(('http', '#')):
      file, _, heading = link.partition('#')
      assert (page.parent / file).exists(), link
      if heading:
        text = (page.parent / file).read_text()
        titles = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
        slugs = [re.sub(r'[^\w -]', '', x).replace(' ', '-') for x in titles]
        modules = re.findall('^::: (.*)$', text, re.MULTILINE)
        assert heading in [x.lower() for x in slugs] + modules, link


def test_code_that_is_named_is_there():
  """Modules behind `:::`, and files in backticks."""
  for page in PAGES:
    text = page.read_text()
    for module in re.findall(r'^::: ([\w.]+)', text, re.MULTILINE):
      assert importlib.util.find_spec(module), module
    for file in re.findall(
      r'`((?:gakd_jax|configs|tools|tests)/(?!(?:[\w/]*/)?(?:yours|mine)\.py)[\w/]+\.py)',
      text,
    ):
      assert (ROOT / file).exists(), (page, file)


def test_every_method_has_a_page():
  text = ''.join(p.read_text() for p in (ROOT / 'docs/methods').glob('*.md'))
  make = (ROOT / 'gakd_jax/objectives/__init__.py').read_text()
  names = re.findall(r"^    '(\w+)': \w+\.\w+,$", make, re.MULTILINE)
  assert 'gakd' in names
  for name in names:
    assert re.search(rf'^::: gakd_jax.objectives.{name}$', text, re.M), name


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
  readme = (ROOT / 'README.md').read_text()
  tutorial = (ROOT / 'docs/tutorials/quickstart.md').read_text()
  scores = set(re.findall(r'\d\d\.\d ± \d\.\d', readme))
  assert len(scores) > 4
  assert scores <= {*re.findall(r'\d\d\.\d ± \d\.\d', tutorial)}
  [(_, bars)] = charts['quickstart']
  assert [x[1] for x in bars][:2] == [87.2, 42.0]


def test_docstrings_become_pages():
  griffe = pytest.importorskip('griffe', reason='the `docs` extra')
  from tools import site_docstrings

  package = griffe.load(
    'gakd_jax',
    search_paths=[ROOT],
    extensions=griffe.load_extensions(site_docstrings.Pages),
  )
  kld = package['objectives.kld.KLD'].docstring.value
  assert '| `kd` | `0.5` | weight of the divergence, 0 to 1 | `Share` |' in kld
  speculative = package['rollout.Speculative'].docstring.value
  assert '| `gamma` |' in speculative
  assert '| `share` |' in speculative  # of the student's writer
  text = 'Of <name>.\n\n  a < b\n    c\n\nIn `<x>`.'
  expected = 'Of &lt;name>.\n\n```text\na < b\n  c\n```\n\nIn `<x>`.'
  assert site_docstrings.as_markdown(text) == expected


def test_the_page_of_settings_has_them_all():
  """By a block of its own, which no formatter takes for Python."""
  text = (ROOT / 'docs/guide/settings.md').read_text()
  assert '```python\n--8<--\nconfigs/base.py\n--8<--\n```' in text
