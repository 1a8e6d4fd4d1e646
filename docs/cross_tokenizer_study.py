"""A student with another tokenizer: the runs of cross_tokenizer_study.md.

  python -m gakd_jax.main --config=docs/cross_tokenizer_study.py

The quickstart's teacher, and a student of the quickstart's shape whose
tokenizer cuts most words in other places (tools/make_tiny_student.py). From the
seed's own SFT checkpoint every method takes as many steps on the same text: the
gold rows and the teacher's answers. Weights and temperatures are each method's
own default but where a stage's name says otherwise; projectors learn three
times as fast as the student. Three seeds; `:1` after the file is the first
alone.
"""

import os

from configs import quickstart as q

STUDENT = os.path.join(os.path.dirname(q.__file__), 'assets', 'tiny_student')
STEPS = 200  # about one pass over the text
RATE = 2e-3
# The stage: its objective.
METHODS = {
  'seqkd': {'name': 'sft'},
  'uld': {'name': 'uld'},
  'overlap': {'name': 'overlap'},
  'mined': {'name': 'mined'},
  'dskd_cma': {'name': 'dskd_cma'},
  'dskd_v2': {'name': 'dskd_v2'},
  'multilevel_ot': {'name': 'multilevel_ot'},
  'multilevel_ot_10x': {'name': 'multilevel_ot', 'weight': 1.5},
  'multilevel_ot_10x_no_ot': {
    'name': 'multilevel_ot',
    'weight': 1.5,
    'ot': 0.0,
  },
  'mcw': {'name': 'mcw', 'update_every': 50},
  'mcw_semi_dual': {'name': 'mcw', 'solver': 'semi_dual'},
  'mcw_reference': {'name': 'mcw', 'reference': True},
  'mcw_no_ot': {'name': 'mcw', 'ot_logits': 0.0, 'ot_hidden': 0.0},
  'gold': {'name': 'gold'},
  'gold_ce': {'name': 'gold', 'kd': 0.5},  # its default has no cross-entropy
  'alm': {'name': 'alm'},
  'alm_99': {'name': 'alm', 'kd': 0.99},
  'xtoken': {'name': 'xtoken'},
}


def get_config(seeds=3):
  c = q.base.get_config()
  stages = [('teacher', q.teacher(2400))]
  for seed in range(int(seeds)):
    stages += [(f'{k}-seed{seed}', stage) for k, stage in _students(seed)]
  c.stages = tuple(stages)
  return c


def _students(seed):
  sft = q.sft(seed)
  sft.student.path, sft.student.shape = STUDENT, {}
  yield 'sft', _adapted(sft)
  start = f'stage:sft-seed{seed}'
  yield 'sft_continued', _adapted(q.student(q.GOLD, STEPS, seed, start))
  yield 'seqkd_6e-3', _adapted(q.student(q.MIXED, STEPS, seed, start))
  for name, objective in METHODS.items():
    stage = q.student(q.MIXED, STEPS, seed, start, RATE)
    stage.objective = objective
    stage.optimizer.extra_learning_rate = 3 * RATE
    yield name, _adapted(stage)
  # As its authors mean it: on what the student writes, without cross-entropy.
  own = q.student(q.MIXED, STEPS, seed, start, RATE)
  own.objective = {'name': 'gold'}
  own = _adapted(own)
  own.rollout = {'writer': 'student', 'max_new_tokens': 88}
  own.data.max_length, own.data.buckets = 80 + 88, None
  yield 'gold_own', own


def _adapted(c):
  """For rows that are longer in the student's tokens, one in each slot."""
  if c.objective.name == 'sft':
    c.teacher.path = None
  c.data.packing = False  # MultiLevelOT ranks tokens within a row.
  c.train.batch_size = 16
  c.data.max_length, c.data.buckets = 136, (88, 136)
  for line in ('sampled', 'greedy'):
    c.evals[line].max_new_tokens = 88
  return c
