"""From pretrained Qwen3-8B and 0.6B to a table of distilled students, on Dolly.

  python -m gakd_jax.main --config=configs/pipeline_0p6b.py

Teacher SFT; student SFT, chosen by validation loss; from it forward KL, reverse
KL, GAKD and its ablation, chosen by validation ROUGE-L; then each best model
on the test set, five seeds. A stage that has finished is skipped on restart.
Hardware: one 80 GB GPU. Not yet run at full size.
"""

from configs import (
  ablation_rgan_0p6b,
  dolly,
  fkl_0p6b,
  rgan_0p6b,
  rkl_0p6b,
  sft_0p6b,
  sft_8b,
)

METHODS = {
  'forward_kl': fkl_0p6b,
  'reverse_kl': rkl_0p6b,
  'rgan': rgan_0p6b,
  'rgan_without_critic': ablation_rgan_0p6b,
}


def get_config():
  stages = {name: module.get_config() for name, module in METHODS.items()}
  return dolly.pipeline(sft_8b.get_config(), sft_0p6b.get_config(), stages)
