"""SFT of Qwen3-4B on Dolly: the student that distillation starts from.

  python -m gakd_jax.main --config=configs/sft_4b.py

Hardware: four 80 GB GPUs (fsdp).
The checkpoint is chosen by validation loss. Not yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'Qwen/Qwen3-4B'
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 5e-6
  c.train.epochs = 10
  c.train.microbatch_size = 32
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.checkpoint.best_metric = 'loss/ce'
  c.checkpoint.best_mode = 'min'
  return c
