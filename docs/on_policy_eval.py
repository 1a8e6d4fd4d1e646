"""Measures the runs of on_policy_study.py on three texts.

  python -m gakd_jax.evaluate --config=docs/on_policy_eval.py \\
    --model=$(ls -d runs/on_policy_study/*-seed* | paste -sd,) \\
    --workdir=runs/on_policy_eval

Held-out loss and KL both ways on gold answers, on the teacher's and on the
student's own (`fidelity`), beside sampled and greedy scores.
"""

from configs import quickstart


def get_config():
  c = quickstart.measured()
  c.evals.fidelity = {'of': 'sampled', 'batch_size': 60}
  return c
