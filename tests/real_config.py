"""configs/rkl_0p6b.py with evaluations that take seconds.

All weights are trained, as the pair is random and adapters have no base.
"""

from configs import rkl_0p6b


def get_config():
  c = rkl_0p6b.get_config()
  c.student.lora = None
  c.evals.loss['limit'] = 4
  c.evals.generation['limit'] = 2
  c.evals.generation['max_new_tokens'] = 4
  return c
