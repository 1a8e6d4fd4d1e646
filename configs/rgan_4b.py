"""GAKD (relativistic): Qwen3-8B to Qwen3-4B, on Dolly.

  python -m gakd_jax.main --config=configs/sft_8b.py
  python -m gakd_jax.main --config=configs/sft_4b.py
  python -m gakd_jax.main --config=configs/rgan_4b.py

Loss 0.5 CE + 0.5 x 15 reverse KL + 0.1 L_G, L_G from the second epoch on, LoRA
of rank 16.
Hardware: one 80 GB GPU; the teacher takes 16 GB.
The checkpoint is chosen by validation ROUGE-L. What to expect: no numbers are
published; the gain is the difference from `ablation_rgan_4b`, and a seed is
worth 0.2 to 0.6 ROUGE-L. Not yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'runs/sft_4b/best'
  c.student.lora = dolly.LORA
  c.teacher.path = 'runs/sft_8b/best'
  c.objective = {
    'name': 'gakd',
    'kind': 'rgan',
    'rkl_scale': 15.0,
    'g': 0.1,
  }
  c.optimizer.learning_rate = 1e-5
  c.train.epochs = 10
  c.train.microbatch_size = 8
  return c
