"""GAD: a teacher of which there is only text, and a critic that reads text.

  python -m gakd_jax.generate --model=runs/sft_8b/best --template=qwen3 \\
    --dataset=data/dolly/train.jsonl --output=data/dolly/answers.jsonl
  python -m gakd_jax.main --config=configs/gad.py:0p6b,gad

The answers may be anyone's. `<size>,<method>`, of 0p6b, 1p7b and 4b:

  seqkd   cross-entropy on the answers, three epochs
  gad     an epoch of that, in which the critic warms up; then its reward alone
          (arXiv 2511.10643: eight answers to a prompt, the critic's trunk and
          embedding are those of the student)
  gad_ce  cross-entropy beside the reward, which `likelihood` weighs
  oracle  D* in the critic's place: what the best of critics could say. It takes
          the teacher, runs/sft_8b/best, and says whether a critic can help

The students are those of the SFT runs of configs/gakd.py, with its adapters.
Rates are a tenth of its own, as after SFT a policy gradient takes. What to
expect at small size: docs/critic_study.md. Hardware: one 80 GB GPU. Not yet run
at full size.
"""

from configs import gakd
from gakd_jax import UserError

SIZES = ('0p6b', '1p7b', '4b')
METHODS = {
  'seqkd': None,
  'gad': {'likelihood': 0.0},
  'gad_ce': {'likelihood': 1.0},
  'oracle': {'likelihood': 0.0, 'oracle': True},
}
SAMPLES = 8


def get_config(which='0p6b,gad'):
  size, _, method = which.partition(',')
  if size not in SIZES or method not in METHODS:
    raise UserError(
      f'configs/gad.py:{which}: expected <size>,<method>, of '
      f'{", ".join(SIZES)} and {", ".join(METHODS)}'
    )
  c = gakd.get_config(f'rkl,{size}')
  c.data.train = 'data/dolly/answers.jsonl'
  c.optimizer.learning_rate = gakd.RATES['rkl'][size] / 10
  c.train.epochs = 3.0
  if method != 'oracle':
    c.teacher.path = None
  # One bucket, so that all have the same batches: those that are written to
  # are bucketed by their prompts, others by their whole length.
  c.data.buckets = (c.data.max_length,)
  if method == 'seqkd':
    c.objective = {'name': 'sft'}
    return c
  c.data.buckets = (c.data.max_prompt_length,)
  c.objective = {'name': 'gad', 'warmup_epochs': 1.0, **METHODS[method]}
  c.rollout = {
    'writer': 'student',
    'samples': SAMPLES,
    'beside': True,
    'max_new_tokens': 256,
  }
  c.train.microbatch_size = 2  # prompts, of nine rows each
  if method != 'oracle':
    c.critic.init_from = c.student.path
    c.critic_optimizer.learning_rate = 1e-6
  return c
