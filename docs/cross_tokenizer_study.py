"""A student with another tokenizer: the runs of cross_tokenizer_study.md.

  python -m gakd_jax.main --config=docs/cross_tokenizer_study.py

The quickstart's teacher, and a student of the quickstart's shape whose
tokenizer cuts most words in other places (tools/make_tiny_student.py). From the
seed's own SFT checkpoint every method takes as many steps on the same text: the
gold rows and the teacher's answers. Weights and temperatures are each method's
own default, but for one more run of GOLD. Three seeds; `:1` after the file is
the first alone.
"""

import os

from configs import quickstart as q

STUDENT = os.path.join(os.path.dirname(q.__file__), 'assets', 'tiny_student')
STEPS = 200  # about one pass over the text
# The stage: its objective.
METHODS = {
  'seqkd': {'name': 'sft'},
  'uld': {'name': 'uld'},
  'overlap': {'name': 'overlap'},
  'mined': {'name': 'mined'},
  'dskd_cma': {'name': 'dskd_cma'},
  'gold': {'name': 'gold'},
  'alm': {'name': 'alm'},
  'multilevel_ot': {'name': 'multilevel_ot'},
  'gold_ce': {'name': 'gold', 'kd': 0.5},  # its default has no cross-entropy
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
  for name, objective in METHODS.items():
    stage = q.student(q.MIXED, STEPS, seed, start)
    stage.objective = objective
    yield name, _adapted(stage)


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
