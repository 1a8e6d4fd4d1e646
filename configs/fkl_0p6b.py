"""Forward KL from an SFT Qwen3-8B to an SFT Qwen3-0.6B, on Dolly.

  python -m gakd_jax.main --config=configs/sft_8b.py
  python -m gakd_jax.main --config=configs/sft_0p6b.py
  python -m gakd_jax.main --config=configs/fkl_0p6b.py

Loss 0.5 CE + 0.5 forward KL, LoRA of rank 16. Hardware: one 80 GB GPU; the
teacher takes 16 GB of it. The checkpoint is chosen by validation ROUGE-L.
Not yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'runs/sft_0p6b/best'
  c.student.lora = dolly.LORA
  c.teacher.path = 'runs/sft_8b/best'
  c.objective = {'name': 'kld', 'divergence': 'forward_kl', 'kd': 0.5}
  c.optimizer.learning_rate = 1e-4
  c.train.epochs = 20
  c.train.microbatch_size = 8
  return c
