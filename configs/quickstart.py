"""The quickstart: a tiny teacher, a tinier student, and why to distil.

  python -m gakd_jax.main --config=configs/quickstart.py

No download; 3:30 on two shared cores. The student is fine-tuned on
600 gold rows (sft), and goes on with them until they are used up
(sft_continued: its best step by held-out loss). The teacher answers more
prompts, and says more of each token than one answer does: from the same start
the student learns from its texts (seqkd), from its distributions on them
(forward_kl), and then from what the teacher makes of text of which the student
writes half (on_policy: reverse KL, from the student of forward_kl). All are
scored on held-out prompts: cross-entropy, KL both ways, sampled and greedy
ROUGE-L.
"""

from configs import base, tiny_teacher

GOLD = 'python:tools.synthetic:rows:train:600'
TEST = 'python:tools.synthetic:rows:test:240'
MIXED = (GOLD, 'stage:teacher')
NEW_TOKENS = 72  # of an answer at most; a prompt has at most 80

STEPS = 450  # of distillation, and
ON_POLICY_STEPS = 100  # on the student's own text after them

OBJECTIVES = {
  'seqkd': {'name': 'sft'},
  'forward_kl': {'name': 'kld', 'divergence': 'forward_kl'},
  'reverse_kl': {'name': 'kld', 'divergence': 'reverse_kl'},
  'gakd': {'name': 'gakd', 'kind': 'rgan', 'warmup_steps': 50},
}
ON_POLICY = {'name': 'kld', 'divergence': 'reverse_kl', 'kd': 1.0}


def get_config(prompts=2400, seeds=1, methods=('seqkd', 'forward_kl')):
  c = base.get_config()
  stages = [('teacher', teacher(prompts))]
  for seed in range(seeds):
    tag = f'-seed{seed}' if seeds > 1 else ''
    stages += [
      (f'sft{tag}', sft(seed)),
      (f'sft_continued{tag}', sft_continued(seed, f'stage:sft{tag}')),
    ]
    for name in methods:
      stage = student(MIXED, STEPS, seed, f'stage:sft{tag}')
      stage.objective = OBJECTIVES[name]
      stages.append((name + tag, stage))
    start = f'stage:forward_kl{tag}'
    stages.append((f'on_policy{tag}', on_policy(seed, start)))
  c.stages = tuple(stages)
  return c


def _common():
  c = base.get_config()
  c.teacher.path = tiny_teacher.PATH
  c.teacher.dtype = 'float32'
  c.student.dtype = 'float32'
  c.student.remat = 'none'
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
  c.report.trackers = ()
  answers = {
    'kind': 'generation',
    'data': TEST,
    'max_new_tokens': NEW_TOKENS,
    'no_repeat_ngram': 0,
    'batch_size': 120,
    'seeds': (0,),
  }
  c.evals = {
    'loss': {'data': TEST, 'batch_size': 60},
    'sampled': answers | {'temperature': 1.0},
    'greedy': answers | {'temperature': 0.0},
  }
  return c


def teacher(prompts):
  """No training: the teacher's answers, and its scores."""
  c = _common()
  c.student.path = tiny_teacher.PATH
  c.data.train = f'python:tools.synthetic:rows:prompts:{prompts}'
  c.train.steps = 0
  c.rollout = {
    'writer': 'teacher',
    'max_new_tokens': NEW_TOKENS,
    'batch_size': 256,
  }
  return c


def student(data, steps, seed, start, rate=6e-3):
  c = _common()
  c.seed = seed
  c.student.path = start
  c.data.train = data
  c.optimizer.learning_rate = rate
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 0.1
  c.train.steps = steps
  return c


def sft(seed, steps=200, rate=6e-3):
  """A fresh student of 0.37 M parameters on the gold rows."""
  c = student(GOLD, steps, seed, tiny_teacher.PATH, rate)
  c.student.shape = {
    'width': 96,
    'layers': 3,
    'heads': 3,
    'kv_heads': 1,
    'ff_width': 256,
  }
  return c


def sft_continued(seed, start):
  """As many steps as any other takes; best/ is of the lowest held-out loss."""
  c = student(GOLD, STEPS + ON_POLICY_STEPS, seed, start)
  c.evals.validation = {
    'kind': 'loss',
    'data': 'python:tools.synthetic:rows:validation:240',
    'batch_size': 60,
    'every': 50,
  }
  c.checkpoint.best_metric = 'validation/ce'
  return c


def measured():
  """No training: how the students are measured."""
  c = _common()
  c.train.steps = 0
  return c


def on_policy(seed, start):
  """The student writes half of the answers, having learned the teacher's."""
  c = student(MIXED, ON_POLICY_STEPS, seed, start, rate=1e-3)
  c.objective = ON_POLICY
  return writes(c, writer='student', share=0.5)


def writes(c, **rollout):
  """A config whose text a model writes: rows are not packed then."""
  c.rollout = {'max_new_tokens': NEW_TOKENS} | rollout
  c.data.packing = False
  c.data.max_length = c.data.max_prompt_length + NEW_TOKENS
  c.train.batch_size = 16  # as many tokens as 8 packed rows
  return c
