"""The student writes: Qwen3-8B to 0.6B, 1.7B or 4B, on Dolly's prompts.

  python -m gakd_jax.main --config=configs/on_policy.py:0p6b,gkd

  gkd            JSD (beta 0.5) on text of the student and the data, half each
                 (arXiv 2306.13649, lambda 0.5)
  imitkd         forward KL on the same mixture (arXiv 2009.07253)
  reverse_kl     reverse KL on the student's text alone: on-policy distillation
                 as of Qwen3's report, MiniLLM's single-step term (2306.08543)
  entropy_gated  and forward KL where the teacher is uncertain (2603.07079)
  distillm       skewed reverse KL on the mixture (arXiv 2402.03898)
  distillm2      skewed forward KL on the teacher's text, skewed reverse KL on
                 the student's (arXiv 2503.07067); the teacher's is a file:
                   python -m gakd_jax.generate --model=runs/sft_8b/best \\
                     --dataset=data/dolly/train.jsonl --template=qwen3 \\
                     --output=data/dolly/answers.jsonl
  rgan, gan, wgan  GAKD with a critic of the student's text, and rgan_g0,
                 gan_g0, wgan_g0 without it

Pure divergences: `--config.objective.kd=0.5` adds half cross-entropy, of what
the data wrote. Rates, epochs and adapters are those of configs/gakd.py (of its
`rkl`, or of the critic's kind), whose SFT runs come first. Hardware: one 80 GB
GPU. Not yet run at full size.
"""

from configs import gakd
from gakd_jax import UserError

SIZES = ('0p6b', '1p7b', '4b')

# The objective, and the share of rows that the student writes.
METHODS = {
  'gkd': ({'name': 'kld', 'divergence': 'jsd', 'beta': 0.5}, 0.5),
  'imitkd': ({'name': 'kld', 'divergence': 'forward_kl'}, 0.5),
  'reverse_kl': ({'name': 'kld', 'divergence': 'reverse_kl'}, 1.0),
  'entropy_gated': ({'name': 'kld', 'divergence': 'entropy_gated'}, 1.0),
  'distillm': ({'name': 'kld', 'divergence': 'skew_reverse'}, 0.5),
  'distillm2': ({'name': 'distillm2'}, 0.5),
  **{
    kind + twin: ({'name': 'gakd', 'kind': kind, 'g': g}, 1.0)
    for kind in ('rgan', 'gan', 'wgan')
    for twin, g in (('', 0.1), ('_g0', 0.0))
  },
}


def get_config(which='0p6b,gkd'):
  size, _, method = which.partition(',')
  if size not in SIZES or method not in METHODS:
    raise UserError(
      f'configs/on_policy.py:{which}: expected <size>,<method>, of '
      f'{", ".join(SIZES)} and {", ".join(METHODS)}'
    )
  objective, share = METHODS[method]
  recipe = objective.get('kind', 'rkl')
  c = gakd.get_config(f'{recipe},{size}')
  if objective['name'] == 'gakd':
    c.objective.update(objective)
  else:
    c.objective = objective
  if objective['name'] != 'distillm2':
    c.objective.kd = 1.0
  else:
    c.data.train = 'data/dolly/answers.jsonl'
  c.rollout = {'writer': 'student', 'share': share, 'max_new_tokens': 256}
  return c
