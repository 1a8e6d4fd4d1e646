"""SFT of Qwen3-4B on Dolly: the student that distillation starts from.

  python -m gakd_jax.main --config=configs/sft_4b.py

LoRA of rank 16. Hardware: one 80 GB GPU.
The checkpoint is chosen by validation loss. Not yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'Qwen/Qwen3-4B'
  c.student.lora = dolly.LORA
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 5e-6
  c.train.epochs = 10
  c.train.microbatch_size = 8
  c.checkpoint.best_metric = 'loss/ce'
  c.checkpoint.best_mode = 'min'
  return c
