"""SFT of Qwen3-8B on Dolly: the teacher of all Qwen3 recipes.

  python -m gakd_jax.main --config=configs/sft_8b.py

LoRA of rank 16: best/ is an adapter, which the students' configs take as it
is. Hardware: one 80 GB GPU. The checkpoint is chosen by validation ROUGE-L. Not
yet run at full size.
"""

from configs import dolly


def get_config():
  c = dolly.get_config()
  c.student.path = 'Qwen/Qwen3-8B'
  c.student.lora = dolly.LORA
  c.objective = {'name': 'sft'}
  c.optimizer.learning_rate = 5e-6
  c.train.epochs = 20
  c.train.batch_size = 128
  c.train.microbatch_size = 8
  return c
