"""GAKD's recipes and what they are compared with: Qwen3-8B to 0.6B, 1.7B or 4B.

  python -m gakd_jax.main --config=configs/sft_8b.py
  python -m gakd_jax.main --config=configs/gakd.py:sft,4b --workdir=runs/sft_4b
  python -m gakd_jax.main --config=configs/gakd.py:rgan,4b
  python -m gakd_jax.main --config=configs/gakd.py:rgan,4b,g=0

On Dolly, from the SFT of both, which is looked for in runs/sft_<size>.
`<kind>,<size>`, the latter of 0p6b, 1p7b, 4b and, for the teacher, `sft,8b`;
sft_8b.py, and the *_0p6b.py that there are, stand for theirs:

  sft             from the pretrained model
  fkl, rkl        0.5 CE + 0.5 forward or reverse KL
  rgan, gan, wgan 0.5 CE + 0.5 x rkl_scale reverse KL + 0.1 L_G of a critic,
                  relativistic, standard or WGAN-GP; L_G from the second epoch
                  on. `,g=0` is the ablation: no critic, all else the same
  reference_rgan  rgan as its authors ran it, where that differs from the
                  method (see gakd_jax/objectives/gakd.py): the critic's trunk
                  is Qwen3-0.6B, all of it trained; it reads raw logits of whole
                  rows, padded to 512 tokens, in bf16, is scored at the last
                  position, and updated after every microbatch; penalties have
                  no gradient

LoRA of rank 16, but for SFT of 0.6B and 1.7B. The checkpoint is chosen by
validation ROUGE-L; of students' SFT, by validation loss. What to expect of a
critic: no numbers are published; the gain is the difference from `,g=0`, and a
seed is worth 0.2 to 0.6 ROUGE-L. Hardware: one 80 GB GPU; the teacher takes 16
GB of it, the trunk of reference_rgan with AdamW 7 GB. Not yet run at full size.
"""

from configs import dolly
from gakd_jax import UserError

MODELS = {
  '0p6b': 'Qwen/Qwen3-0.6B',
  '1p7b': 'Qwen/Qwen3-1.7B',
  '4b': 'Qwen/Qwen3-4B',
  '8b': 'Qwen/Qwen3-8B',
}
EPOCHS = {'0p6b': 20, '1p7b': 10, '4b': 10, '8b': 20}
RATES = {
  'sft': {'0p6b': 1e-4, '1p7b': 1e-5, '4b': 5e-6, '8b': 5e-6},
  'fkl': {'0p6b': 1e-4, '1p7b': 5e-6, '4b': 1e-5},
  'rkl': {'0p6b': 1e-4, '1p7b': 5e-6, '4b': 1e-5},
  'rgan': {'0p6b': 5e-5, '1p7b': 5e-6, '4b': 1e-5},
  'gan': {'0p6b': 5e-4, '1p7b': 1e-5, '4b': 1e-5},
  'wgan': {'0p6b': 5e-4, '1p7b': 1e-5, '4b': 1e-5},
}
RATES['reference_rgan'] = RATES['rgan']
DIVERGENCES = {'fkl': 'forward_kl', 'rkl': 'reverse_kl'}
RKL_SCALES = {
  'rgan': {'0p6b': 1.0, '1p7b': 10.0, '4b': 15.0},
  'gan': {'0p6b': 1.0, '1p7b': 1.0, '4b': 15.0},
  'wgan': {'0p6b': 1.0, '1p7b': 10.0, '4b': 15.0},
}

ARGUMENTS = tuple(
  f'{kind},{size}{twin}'
  for kind, sizes in RATES.items()
  for size in sizes
  for twin in (('', ',g=0') if kind in RKL_SCALES else ('',))
)


def get_config(which='rgan,0p6b'):
  if which not in ARGUMENTS:
    raise UserError(
      f'configs/gakd.py:{which}: expected <kind>,<size>, of {", ".join(RATES)} '
      f'and {", ".join(RATES["rgan"])}; or sft,8b; and g=0 as a third word of '
      f'{", ".join(RKL_SCALES)}'
    )
  kind, size, *twin = which.split(',')
  c = dolly.get_config()
  c.student.lora = dolly.LORA
  c.optimizer.learning_rate = RATES[kind][size]
  c.train.epochs = EPOCHS[size]
  c.train.microbatch_size = 8
  if kind == 'sft':
    return _sft(c, size)
  c.student.path = f'runs/sft_{size}/best'
  c.teacher.path = 'runs/sft_8b/best'
  if kind in DIVERGENCES:
    c.objective = {
      'name': 'kld',
      'divergence': DIVERGENCES[kind],
      'kd': 0.5,
    }
    return c
  _gakd(c, kind.removeprefix('reference_'), size)
  if kind == 'reference_rgan':
    c.objective.reference = True
    c.critic.init_from = MODELS['0p6b']
    c.data.buckets = (512,)
  if twin:
    c.objective.g = 0.0
  return c


def _sft(c, size):
  c.student.path = MODELS[size]
  c.objective = {'name': 'sft'}
  if size in ('0p6b', '1p7b'):
    c.student.lora = None
  if size == '8b':
    c.train.batch_size = 128
  else:
    c.checkpoint.best_metric = 'loss/ce'
  return c


def _gakd(c, kind, size):
  c.objective = {
    'name': 'gakd',
    'kind': kind,
    'rkl_scale': RKL_SCALES[kind][size],
    'g': 0.1,
  }
  if kind == 'gan':
    c.objective.critic_steps = 3
  if kind == 'wgan':
    c.critic_optimizer.name = 'rmsprop'
    c.critic_optimizer.b2 = 0.99
    # It joins the gradient: the authors' 0.01 goes with a loss times 1000.
    c.critic_optimizer.weight_decay = 1e-5
