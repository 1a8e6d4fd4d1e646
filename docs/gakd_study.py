"""What the critic does at the quickstart's size: the runs of gakd_study.md.

  python -m gakd_jax.main --config=docs/gakd_study.py

The quickstart's pair and methods, at half its rate and 200 steps, and variants
of the stage `gakd`. A critic's optimizer belongs to its kind (wgan: RMSprop;
gan: three steps), and the authors' variant reads unpacked rows. About an hour
and a half on two cores.
"""

from configs import quickstart

STEPS = 200
RATE = 3e-3
SEEDS = 3
# The stage: what differs from `gakd` in the objective.
VARIANTS = {
  'gan': {'kind': 'gan', 'critic_steps': 3},
  'wgan': {'kind': 'wgan'},
  'g_0.3': {'g': 0.3},
  'g_1': {'g': 1.0},
  'gold_g_0': {'g': 0.0},
  'gold_gakd': {},
  'student_text_g_0': {'g': 0.0, 'kd': 1.0},
  'student_text_gakd': {'kd': 1.0},
  'input_probs': {'input': 'probs'},
  'input_logits': {'input': 'logits'},
  'pooling_last': {'pooling': 'last'},
  'slow_critic': {},
  'reference': {'reference': True},
}


def get_config():
  c = quickstart.base.get_config()
  stages = [('teacher', quickstart.teacher(2400))]
  for seed in range(SEEDS):
    stages.append((f'sft-seed{seed}', quickstart.sft(seed, STEPS, RATE)))
    stages.append((f'sft_continued-seed{seed}', _stage(quickstart.GOLD, seed)))
    for name, objective in quickstart.OBJECTIVES.items():
      stage = _stage(quickstart.MIXED, seed)
      stage.objective = objective
      stages.append((f'{name}-seed{seed}', stage))
  stages += [(f'student_text-seed{s}', _student_text(s)) for s in range(SEEDS)]
  for name in VARIANTS:
    stages += [(f'{name}-seed{s}', _variant(name, s)) for s in range(SEEDS)]
  c.stages = tuple(stages)
  return c


def _stage(data, seed):
  start = f'stage:sft-seed{seed}'
  return quickstart.student(data, STEPS, seed, start, RATE)


def _student_text(seed):
  """The SFT student answers the prompts itself."""
  c = quickstart.teacher(2400)
  c.seed = seed
  c.student.path = c.teacher.path = f'stage:sft-seed{seed}'
  c.evals = {}
  return c


def _variant(name, seed):
  data = quickstart.MIXED
  if name.startswith('gold'):
    data = quickstart.GOLD
  if name.startswith('student_text'):
    data = (quickstart.GOLD, f'stage:student_text-seed{seed}')
  c = _stage(data, seed)
  c.objective = quickstart.OBJECTIVES['gakd'] | VARIANTS[name]
  if name == 'wgan':
    c.critic_optimizer.name, c.critic_optimizer.b2 = 'rmsprop', 0.99
    c.critic_optimizer.weight_decay = 1e-5
  if name == 'slow_critic':
    c.critic_optimizer.learning_rate = 2e-5
  if name == 'reference':
    c.critic.init_from = f'stage:sft-seed{seed}'
    c.data.packing, c.data.buckets = False, (128,)
    c.train.batch_size = 16
  return c
