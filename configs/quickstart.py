"""The quickstart: a tiny teacher, a tinier student, every method, one table.

  python -m gakd_jax.main --config=configs/quickstart.py

No download; 5:54 on two shared cores. The student is fine-tuned on a few gold
rows (sft). The teacher then answers many more prompts; from the same start and
for the same number of steps the student goes on with the gold rows
(sft_continued), with the teacher's texts (seqkd), and with the teacher's
distributions on these texts (forward_kl, reverse_kl). All are scored on
held-out prompts: greedy and sampled ROUGE-L, cross-entropy, and KL both ways.
"""

from configs import base, tiny_teacher

GOLD = 'synthetic:train:600'
TEST = 'synthetic:test:240'
MIXED = (GOLD, 'stage:teacher')


def get_config(prompts=1800, steps=240, seeds=1):
  c = base.get_config()
  stages = [('teacher', _teacher(prompts))]
  for seed in range(seeds):
    tag = f'-seed{seed}' if seeds > 1 else ''
    sft = _student(GOLD, steps, seed)
    sft.student.path = tiny_teacher.PATH
    sft.student.shape = {
      'width': 96,
      'layers': 3,
      'heads': 3,
      'kv_heads': 1,
      'ff_width': 256,
    }
    stages.append((f'sft{tag}', sft))
    for name, data, objective in (
      ('sft_continued', GOLD, {'name': 'sft'}),
      ('seqkd', MIXED, {'name': 'sft'}),
      ('forward_kl', MIXED, {'name': 'kld', 'divergence': 'forward_kl'}),
      ('reverse_kl', MIXED, {'name': 'kld', 'divergence': 'reverse_kl'}),
      ('gakd', MIXED, {'name': 'gakd', 'kind': 'rgan'}),
    ):
      stage = _student(data, steps, seed)
      stage.student.path = f'stage:sft{tag}'
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
  c.critic.width, c.critic.layers, c.critic.ff_width = 64, 1, 128
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


def _teacher(prompts):
  c = _common()
  c.student.path = tiny_teacher.PATH
  c.data.train = f'synthetic:prompts:{prompts}'
  c.train.steps = 0
  c.rollout = {'writer': 'teacher', 'max_new_tokens': 72, 'batch_size': 256}
  return c


def _student(data, steps, seed):
  c = _common()
  c.seed = seed
  c.data.train = data
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.1
  c.train.steps = steps
  return c
