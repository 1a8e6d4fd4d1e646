"""SFT of Qwen3-1.7B on Dolly: the student that distillation starts from.

  python -m gakd_jax.main --config=configs/sft_1p7b.py

Hardware: one 80 GB GPU.
The checkpoint is chosen by validation loss. Not yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'Qwen/Qwen3-1.7B'
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 1e-5
  c.train.epochs = 10
  c.train.microbatch_size = 8
  c.checkpoint.best_metric = 'loss/ce'
  c.checkpoint.best_mode = 'min'
  return c
