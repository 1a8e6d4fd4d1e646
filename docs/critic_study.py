"""Where a critic helps: the runs of critic_study.md, one argument a question.

  python -m gakd_jax.main --config=docs/critic_study.py:ladder
  python -m gakd_jax.main --config=docs/critic_study.py:dose
  python -m gakd_jax.main --config=docs/critic_study.py:late
  python -m gakd_jax.main --config=docs/critic_study.py:flawed
  python -m gakd_jax.main --config=docs/critic_study.py:length
  python -m gakd_jax.main --config=docs/critic_study.py:tokenizers

The quickstart's teacher and student, from the seed's own SFT on gold rows, and
(`late`, `flawed`) from what they are when they have learned a teacher's text.
Every row is there with and without a critic, or with D* in its place, with the
same text, in the same order, as many steps and one rate. Evaluations are of 240
prompts: accuracy by the facts of each answer, and KL(q || p) over the student's
own text.
"""

import os

from configs import quickstart as q
from gakd_jax import UserError

TINY_STUDENT = os.path.join(os.path.dirname(q.__file__), 'assets/tiny_student')
SEEDS = 3
STEPS, WARMUP = 300, 150
LATE = 5 * STEPS  # as long as a critic's run takes, which writes as well
RATE = 2e-3
PROMPTS = 8  # a step, with
SAMPLES = 4  # answers of the student to each
TEST = 'python:tools.synthetic:gradable:test:240'
CHECK = 'python:tools.synthetic:check'
G = 0.2


def get_config(which='ladder'):
  if which not in STUDIES:
    raise UserError(
      f'docs/critic_study.py:{which}: expected one of {", ".join(STUDIES)}'
    )
  c = q.base.get_config()
  c.stages = tuple(STUDIES[which]())
  return c


# What is known of the teacher: by its whole distribution, its k most likely
# tokens, or its text.
LEVELS = {
  'full': {},
  'top_20': {'cache': 'top_k', 'cache_size': 20},
  'top_5': {'cache': 'top_k', 'cache_size': 5},
  'top_1': {'cache': 'top_k', 'cache_size': 1},
  'text': None,
}


def ladder():
  """What is left for a critic to say, the less is known of a teacher."""
  yield 'teacher', teacher()
  for seed in range(SEEDS):
    yield f'sft-seed{seed}', measured(q.sft(seed))
    for level, known in LEVELS.items():
      kd = 0.0 if known is None else 1.0
      for mode in ('alone', 'critic', 'oracle'):
        if mode == 'oracle' and known:
          continue  # D* takes all of the teacher.
        c = student('stage:teacher', seed, f'stage:sft-seed{seed}')
        c.teacher.update(known or {})
        learns(c, mode, divergence='forward_kl', kd=kd)
        yield f'{level}{_tag(mode)}-seed{seed}', c
    c = student('stage:teacher', seed, f'stage:sft-seed{seed}')
    learns(c, 'alone', kd=0.0)
    c.train.steps = LATE
    yield f'text_5x-seed{seed}', c
    # By token what D* says of a whole answer: the gradient of KL(q, p) on the
    # student's text, as much as that of cross-entropy, in all steps.
    c = student('stage:teacher', seed, f'stage:sft-seed{seed}')
    learns(c, 'exact', kd=0.5, on='written', divergence='reverse_kl')
    yield f'text_exact-seed{seed}', c


# The ladder's critics are on while a cosine takes their student's rate down,
# for a fifth of its sum. Here the rate stays; they are on for two thirds.
DOSES = {
  'text': ('alone', {}),
  'text_critic': ('critic', {}),
  'text_critic_1': ('critic', {'g': 1.0}),
  'text_oracle_1': ('oracle', {'g': 1.0}),
  'text_token_1': ('oracle', {'g': 1.0, 'credit': 'token'}),
}


def dose():
  """Is a critic heard? Text again, with more of it."""
  yield 'teacher', teacher()
  for seed in range(SEEDS):
    yield f'sft-seed{seed}', measured(q.sft(seed))
    for name, (mode, settings) in DOSES.items():
      c = student('stage:teacher', seed, f'stage:sft-seed{seed}')
      learns(c, mode, kd=0.0, warmup_steps=STEPS // 3, **settings)
      c.optimizer.schedule, c.optimizer.learning_rate = 'constant', RATE / 2
      yield f'{name}-seed{seed}', c


def late():
  """The same where the likelihood has learned what the text has to say."""
  yield 'teacher', teacher()
  for seed in range(SEEDS):
    yield f'sft-seed{seed}', measured(q.sft(seed))
    c = student('stage:teacher', seed, f'stage:sft-seed{seed}')
    learns(c, 'alone', kd=0.0)
    c.train.steps = LATE
    yield f'late-seed{seed}', c
    for mode in ('alone', 'critic', 'oracle', 'exact'):
      c = student('stage:teacher', seed, f'stage:late-seed{seed}')
      kd = 0.5 if mode == 'exact' else 0.0
      learns(c, mode, divergence='reverse_kl', kd=kd, on='written')
      yield f'text{_tag(mode)}-seed{seed}', c


# How a teacher was spoilt: its config, and how it is loaded.
FLAWS = {
  'early': (lambda: _teacher_of('train', steps=800, fresh=True), {}),
  'nf4': (None, {'quantize': 'nf4'}),
  'permuted': (lambda: _teacher_of('permuted', steps=600, fresh=False), {}),
}
GOLD_ROWS = 400


def flawed():
  """Can a critic of few gold answers say what a flawed teacher cannot?

  The student has learned the teacher's text, and goes on by reverse KL on its
  own; from gold it learns by cross-entropy, by a critic, by both or not at all.
  """
  gold = f'python:tools.synthetic:rows:prompts:{GOLD_ROWS}'
  for flaw, (make, loaded) in FLAWS.items():
    path = q.tiny_teacher.PATH
    if make:
      yield f'{flaw}_trained', _disputed(make())
      path = f'stage:{flaw}_trained'
    text = teacher()
    text.student.path = text.teacher.path = path
    text.teacher.update(loaded)
    yield f'{flaw}_teacher', _disputed(text)
    for seed in range(SEEDS):
      sft = measured(q.sft(seed, LATE))
      sft.data.train = f'stage:{flaw}_teacher'
      start = f'{flaw}_sft-seed{seed}'
      yield start, _disputed(sft)
      for row, kd, mode in (
        ('nothing', 1.0, 'exact'),
        ('ce', 0.5, 'exact'),
        ('critic', 1.0, 'critic'),
        ('both', 0.5, 'critic'),
      ):
        c = student(gold, seed, f'stage:{start}')
        c.teacher.path = path
        c.teacher.update(loaded)
        learns(c, mode, kd=kd, on='written', divergence='reverse_kl')
        yield f'{flaw}_{row}-seed{seed}', _disputed(c)


def _disputed(c):
  """Also: how many answers have the fact that the permuted world changes, and
  how many that of this world.
  """
  for world in ('right', 'wrong'):
    c.evals[world] = {
      **c.evals.sampled,
      'data': f'python:tools.synthetic:disputed:test:120:{world}',
      'check': 'python:tools.synthetic:says',
    }
  return c


QUESTIONS = (1, 3, 6)  # in a prompt: answers of 30 to 180 tokens


# D* beside the text, for a whole answer, divided by its tokens, or by token.
CREDITS = {
  'text': ('alone', {}),
  'text_answer': ('oracle', {'g': 1.0}),
  'text_mean': ('oracle', {'g': 1.0, 'credit': 'mean'}),
  'text_token': ('oracle', {'g': 1.0, 'credit': 'token'}),
}


def length():
  """Does credit for a whole answer fade as answers grow?

  A step has as many questions at any length, and so about as many tokens.
  """
  yield 'able', _able_teacher()
  for k in QUESTIONS:
    c = _long(q.teacher(0), k)
    c.student.path = c.teacher.path = 'stage:able'
    c.data.train = f'python:tools.synthetic:joined:prompts:2400:{k}'
    c.rollout.update(max_new_tokens=60 * k + 12, batch_size=64)
    yield f'teacher_{k}', c
    for seed in range(SEEDS):
      sft = q.sft(seed)
      sft.teacher.path = 'stage:able'  # KL is to it
      sft.data.train = f'python:tools.synthetic:joined:train:600:{k}'
      sft.train.batch_size = 24 // k
      yield f'sft_{k}-seed{seed}', _long(sft, k)
      for name, (mode, settings) in CREDITS.items():
        c = student(f'stage:teacher_{k}', seed, f'stage:sft_{k}-seed{seed}')
        c.teacher.path = 'stage:able'
        learns(c, mode, kd=0.0, warmup_steps=0, **settings)
        c.train.steps, c.train.batch_size = 200, 12 // k
        c.optimizer.schedule, c.optimizer.learning_rate = 'constant', RATE / 2
        yield f'{name}_{k}-seed{seed}', _long(c, k)


def _able_teacher():
  """The quickstart's, which learns to answer several questions."""
  data = tuple(
    f'python:tools.synthetic:joined:train:6000:{k}:1' for k in QUESTIONS
  )
  c = q.student(data, 200, 0, q.tiny_teacher.PATH, 2e-3)
  c.teacher.path = None
  c = _long(c, max(QUESTIONS))
  c.data.packing, c.data.buckets = True, None  # rows of all three lengths
  return c


def _long(c, k):
  """For prompts of k questions."""
  c = _sized(measured(c), 60 * k + 20, 60 * k + 12)
  del c.evals.sampled_07, c.evals.sampled_05
  c.evals.sampled.seeds = (0, 1)
  for line in c.evals.values():
    if 'data' in line:
      line.data = f'python:tools.synthetic:joined:test:120:{k}'
  return c


def _sized(c, prompt, new):
  """For prompts and answers of so many tokens, at most."""
  c.data.packing = False
  c.data.max_prompt_length, c.data.max_length = prompt, prompt + new
  c.data.buckets = (c.data.max_length,)
  if c.rollout.writer == 'student':
    c.rollout.max_new_tokens, c.data.buckets = new, (prompt,)
  for line in c.evals.values():
    if 'max_new_tokens' in line:
      line.max_new_tokens = new
  return c


# A student of other tokens: its teacher by text alone, by sorted distributions
# (ULD, MultiLevelOT), by pieces of text of which both know the odds (ALM), and
# by a critic of the whole text or D*.
OTHER_TOKENS = {
  'text': {'name': 'sft'},
  'uld': {'name': 'uld'},
  'multilevel_ot': {'name': 'multilevel_ot'},
  'alm': {'name': 'alm'},
  'text_critic': 'critic',
  'text_oracle': 'oracle',
}
NEW_TOKENS = 88  # of an answer, in these tokens


def tokenizers():
  """Where tokens differ no likelihood has all that D* has."""
  yield 'teacher', teacher()
  for seed in range(SEEDS):
    sft = q.sft(seed)
    sft.student.path, sft.student.shape = TINY_STUDENT, {}
    sft.train.batch_size = 16  # as many as 8 packed rows hold
    yield f'sft-seed{seed}', _of_other_tokens(measured(sft))
    for name, objective in OTHER_TOKENS.items():
      c = student('stage:teacher', seed, f'stage:sft-seed{seed}')
      if isinstance(objective, str):
        learns(c, objective, kd=0.0)
      else:
        c.objective = objective
      yield f'{name}-seed{seed}', _of_other_tokens(c)


def _of_other_tokens(c):
  return _sized(c, c.data.max_prompt_length, NEW_TOKENS)


STUDIES = {
  'ladder': ladder,
  'dose': dose,
  'late': late,
  'flawed': flawed,
  'length': length,
  'tokenizers': tokenizers,
}


def teacher():
  """No training: the teacher's answers to 2400 prompts, and its scores."""
  return measured(q.teacher(2400))


def _teacher_of(rows, steps, fresh):
  """A teacher that is not what it should be."""
  start = q.tiny_teacher.PATH
  c = measured(q.student(_rows(rows, 20_000), steps, 0, start, rate=2e-3))
  c.teacher.path = None
  if fresh:
    c.student.shape = {}
  return c


def _rows(name, n):
  if name == 'permuted':
    return f'python:tools.synthetic:permuted:train:{n}'
  return f'python:tools.synthetic:rows:{name}:{n}'


def student(data, seed, start):
  c = measured(q.student(data, STEPS, seed, start, RATE))
  c.data.packing = False
  c.data.max_length = c.data.max_prompt_length + q.NEW_TOKENS
  # Of one length, batches have the same rows whoever writes to them.
  c.data.buckets = (c.data.max_length,)
  c.train.batch_size = PROMPTS
  return c


def learns(c, mode, **settings):
  """By a likelihood (`settings` of it), and by what a mode has beside it.

  alone   nothing: the student does not write
  critic  a critic of the student's text
  oracle  D* in its place
  exact   none: the likelihood is of the student's text too
  """
  if mode == 'alone':
    kept = {k: x for k, x in settings.items() if k in ('kd', 'divergence')}
    c.objective = {'name': 'kld'} | kept
    return
  q.writes(c, writer='student', samples=SAMPLES, beside=True)
  c.data.buckets = (c.data.max_prompt_length,)
  c.train.batch_size = PROMPTS
  c.critic_optimizer.learning_rate = 1e-3
  if mode == 'exact':
    critic = {'g': 0.0, 'warmup_steps': 0}
  else:
    critic = {'g': G, 'warmup_steps': WARMUP, 'oracle': mode == 'oracle'}
  c.objective = {'name': 'gad'} | critic | settings


def _tag(mode):
  return '' if mode == 'alone' else f'_{mode}'


def measured(c):
  """With the evaluations of this study."""
  sampled = {
    'kind': 'generation',
    'data': TEST,
    'check': CHECK,
    'max_new_tokens': q.NEW_TOKENS,
    'no_repeat_ngram': 0,
    'batch_size': 120,
  }
  few = sampled | {'seeds': (0, 1)}
  c.evals = {
    'loss': {'data': TEST, 'batch_size': 60},
    'sampled': sampled | {'seeds': (0, 1, 2, 3)},
    'sampled_07': few | {'temperature': 0.7},
    'sampled_05': few | {'temperature': 0.5},
    'greedy': sampled | {'temperature': 0.0, 'seeds': (0,)},
  }
  if c.teacher.path:
    c.evals.own_text = {'kind': 'fidelity', 'of': 'sampled', 'batch_size': 60}
  return c
