"""SFT of Qwen3-0.6B on Dolly: the student that distillation starts from.

  python -m gakd_jax.main --config=configs/sft_0p6b.py

Hardware: one 80 GB GPU.
The checkpoint is chosen by validation loss. Not yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'Qwen/Qwen3-0.6B'
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 1e-4
  c.train.epochs = 20
  c.train.microbatch_size = 8
  c.checkpoint.best_metric = 'loss/ce'
  c.checkpoint.best_mode = 'min'
  return c
