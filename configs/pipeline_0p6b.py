"""From pretrained Qwen3-8B and 0.6B to a table of distilled students, on Dolly.

  python -m gakd_jax.main --config=configs/pipeline_0p6b.py

Teacher SFT; student SFT, chosen by validation loss; from it forward KL, reverse
KL, GAKD and its ablation, chosen by validation ROUGE-L; then each best model
on the test set, five seeds. A stage that has finished is skipped on restart.
Hardware: one 80 GB GPU. Not yet run at full size.
"""

from configs import dolly, gakd

METHODS = {
  'forward_kl': 'fkl,0p6b',
  'reverse_kl': 'rkl,0p6b',
  'rgan': 'rgan,0p6b',
  'rgan_without_critic': 'rgan,0p6b,g=0',
}


def get_config():
  return dolly.pipeline(
    gakd.get_config('sft,8b'),
    gakd.get_config('sft,0p6b'),
    {name: gakd.get_config(which) for name, which in METHODS.items()},
  )
