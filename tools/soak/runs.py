"""Small runs of every kind, some seconds each, that a soak disturbs.

  python -m gakd_jax.main --config=tools/soak/runs.py:gakd

Several epochs; a checkpoint every 3 steps, an evaluation every 7.
"""

from configs import base, tiny_teacher
from gakd_jax import UserError

KINDS = {
  'sft': {},
  'kd': {'objective': {'name': 'kld', 'divergence': 'forward_kl'}},
  'gakd': {'objective': {'name': 'gakd', 'kind': 'rgan', 'warmup_steps': 5}},
  'on_policy': {
    'objective': {'name': 'kld', 'divergence': 'reverse_kl', 'kd': 1.0},
    'rollout': {
      'writer': 'student',
      'share': 0.5,
      'every': 2,
      'max_new_tokens': 12,
    },
  },
  'cross': {'objective': {'name': 'uld'}},
}


def get_config(argument='kd'):
  """argument: of `KINDS`, or 'teacher'; after a comma, a model's directory.

  That of a teacher; or of the 'teacher' that is made there, which has the
  architecture and tokenizer of the directory, and random weights.
  """
  kind, _, path = argument.partition(',')
  if kind == 'teacher':
    return _teacher(path)
  if kind not in KINDS:
    raise UserError(f'{kind}: no kind of run; known are {", ".join(KINDS)}')
  c = base.get_config()
  c.student.path = tiny_teacher.PATH
  c.student.shape = {
    'width': 32,
    'layers': 2,
    'heads': 2,
    'kv_heads': 1,
    'ff_width': 64,
  }
  c.teacher.path = path or tiny_teacher.PATH
  c.student.dtype = c.teacher.dtype = c.train.precision = 'float32'
  c.student.remat = 'none'
  c.critic.width, c.critic.layers, c.critic.ff_width = 32, 1, 64
  c.data.train = 'python:tools.synthetic:rows:train:60'
  c.data.validation = 'python:tools.synthetic:rows:test:8'
  c.data.template = 'chat'
  c.data.max_length = 128
  c.data.max_prompt_length = 96
  c.data.packing = kind in ('sft', 'kd')
  c.train.batch_size = 4
  c.train.steps = 40
  c.train.head_chunk = 512
  c.optimizer.learning_rate = 3e-3
  c.eval_every = 7
  c.checkpoint.every = 3
  c.checkpoint.best_metric = 'loss/ce'
  c.mesh.data = 1
  c.evals = {
    'loss': {'batch_size': 8},
    'sampled': {
      'kind': 'generation',
      'max_new_tokens': 8,
      'batch_size': 4,
      'no_repeat_ngram': 0,
      'seeds': (0,),
    },
  }
  for part, settings in KINDS[kind].items():
    c[part] = settings
  return c


def _teacher(path):
  c = base.get_config()
  c.student.path, c.student.shape = path, {}
  c.student.dtype = 'float32'
  c.train.steps = 0
  c.evals = {}
  return c
