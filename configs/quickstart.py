"""The quickstart: a tiny teacher, a tinier student, every method, one table.

  python -m gakd_jax.main --config=configs/quickstart.py

No download; 2:45 on two shared cores. The student is fine-tuned on a few gold
rows (sft). The teacher then answers many more prompts; from the same start and
for the same number of steps the student goes on with the gold rows
(sft_continued), with the teacher's texts (seqkd), with the teacher's
distributions on these texts (forward_kl, reverse_kl), and with a critic on top
of reverse KL (gakd; reverse_kl is its ablation, g = 0). All are scored on
held-out prompts: greedy and sampled ROUGE-L, cross-entropy, and KL both ways.
"""

from configs import base, tiny_teacher

GOLD = 'synthetic:train:600'
TEST = 'synthetic:test:240'
MIXED = (GOLD, 'stage:teacher')


OBJECTIVES = {
  'sft_continued': {'name': 'sft'},
  'seqkd': {'name': 'sft'},
  'forward_kl': {'name': 'kld', 'divergence': 'forward_kl'},
  'reverse_kl': {'name': 'kld', 'divergence': 'reverse_kl'},
  'gakd': {'name': 'gakd', 'kind': 'rgan', 'warmup_steps': 50},
}


def get_config(prompts=1600, steps=200, seeds=1):
  c = base.get_config()
  stages = [('teacher', teacher(prompts))]
  for seed in range(seeds):
    tag = f'-seed{seed}' if seeds > 1 else ''
    stages.append((f'sft{tag}', sft(steps, seed)))
    for name, objective in OBJECTIVES.items():
      data = GOLD if name == 'sft_continued' else MIXED
      stage = student(data, steps, seed, start=f'stage:sft{tag}')
      stage.objective = objective
      stages.append((name + tag, stage))
  c.stages = tuple(stages)
  return c


def _common():
  c = base.get_config()
  c.teacher.path = tiny_teacher.PATH
  c.teacher.dtype = 'float32'
  c.student.dtype = 'float32'
  c.student.remat = False
  c.critic.width, c.critic.layers = 64, 1
  c.critic.ff_width = 128
  c.data.template = 'chat'
  c.data.max_length = 128
  c.data.max_prompt_length = 80
  c.data.packing = True
  c.train.precision = 'float32'
  c.train.head_chunk = 1024
  c.train.batch_size = 8  # of about two rows of the data each
  c.eval_every = 0
  c.checkpoint.every = 0
  c.report.tensorboard = False
  answers = {
    'kind': 'generation',
    'data': TEST,
    'max_new_tokens': 72,
    'no_repeat_ngram': 0,
    'batch_size': 120,
    'seeds': (0,),
  }
  c.evals = {
    'loss': {'data': TEST, 'batch_size': 60},
    'greedy': answers | {'temperature': 0.0},
    'sampled': answers | {'temperature': 1.0},
  }
  return c


def teacher(prompts):
  """No training: the teacher's answers, and its scores."""
  c = _common()
  c.student.path = tiny_teacher.PATH
  c.data.train = f'synthetic:prompts:{prompts}'
  c.train.steps = 0
  c.rollout = {'writer': 'teacher', 'max_new_tokens': 72, 'batch_size': 256}
  return c


def student(data, steps, seed, start):
  c = _common()
  c.seed = seed
  c.student.path = start
  c.data.train = data
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.1
  c.train.steps = steps
  return c


def sft(steps, seed):
  """A fresh student of 0.37 M parameters on the gold rows."""
  c = student(GOLD, steps, seed, start=tiny_teacher.PATH)
  c.student.shape = {
    'width': 96,
    'layers': 3,
    'heads': 3,
    'kv_heads': 1,
    'ff_width': 256,
  }
  return c
