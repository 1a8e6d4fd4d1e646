"""Who should write the text? The runs of on_policy_study.md.

  python -m gakd_jax.main --config=docs/on_policy_study.py

The quickstart's teacher and student; from the seed's own SFT checkpoint, every
row takes as many optimizer steps, on the same prompts. About an hour on two
cores. Then `on_policy_eval.py` measures all of them on gold, teacher's and
student's text.
"""

from configs import quickstart as q

SEEDS = 3
STEPS = 300
KL = {'name': 'kld', 'divergence': 'reverse_kl', 'kd': 1.0}
GAKD = {'name': 'gakd', 'kind': 'rgan', 'kd': 1.0, 'warmup_steps': 50}
# The rate of given text (SFT, forward KL) is the quickstart's; 2e-3 is better
# than that, by held-out cross-entropy, where the loss is a reverse KL or
# a model writes.
GIVEN, GENTLE = 6e-3, 2e-3
# The stage: its objective, its rate, and who writes (None: gold and the
# teacher).
ROWS = {
  'sft_continued': ({'name': 'sft'}, GIVEN, None),
  'seqkd': ({'name': 'sft'}, GIVEN, None),
  'forward_kl': (KL | {'divergence': 'forward_kl'}, GIVEN, None),
  'reverse_kl': (KL, GENTLE, None),
  'gkd': (
    KL | {'divergence': 'jsd'},
    GENTLE,
    {'writer': 'student', 'share': 0.5},
  ),
  'on_policy': (KL, GENTLE, {'writer': 'student'}),
  'skd': (
    KL | {'divergence': 'forward_kl'},
    GENTLE,
    {'writer': 'speculative'},
  ),
  'on_policy_gakd': (GAKD, GENTLE, {'writer': 'student'}),
  'on_policy_gakd_g_0': (GAKD | {'g': 0.0}, GENTLE, {'writer': 'student'}),
  'two_stage': (KL, GENTLE, {'writer': 'student', 'begin': 0.5}),
}


def get_config():
  c = q.base.get_config()
  stages = [('teacher', q.teacher(2400))]
  for seed in range(SEEDS):
    sft = f'sft-seed{seed}'
    stages.append((sft, q.sft(seed)))
    for name, (objective, rate, rollout) in ROWS.items():
      data = q.GOLD if name == 'sft_continued' else q.MIXED
      stage = q.student(data, STEPS, seed, f'stage:{sft}', rate)
      if rollout:
        q.writes(stage, **rollout)
      stage.objective = objective
      stages.append((f'{name}-seed{seed}', stage))
  c.stages = tuple(stages)
  return c
