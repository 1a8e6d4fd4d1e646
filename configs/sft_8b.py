"""SFT of Qwen3-8B on Dolly: the teacher of all Qwen3 recipes.

  python -m gakd_jax.main --config=configs/sft_8b.py

All weights are trained: eight 80 GB GPUs (fsdp), 12 bytes a parameter for
weights and AdamW. The checkpoint is chosen by validation ROUGE-L. Not yet run
at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'Qwen/Qwen3-8B'
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 5e-6
  c.train.epochs = 20
  c.train.batch_size = 128
  c.train.microbatch_size = 32
  c.mesh.data, c.mesh.fsdp = 1, -1
  return c
