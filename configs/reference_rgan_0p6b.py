"""`rgan_0p6b` as GAKD's authors ran it, where that differs from the method.

  python -m gakd_jax.main --config=configs/reference_rgan_0p6b.py

The critic's trunk is Qwen3-0.6B, all of it trained; it reads raw logits of
whole rows, padded to 512 tokens, in bf16, is scored at the last position, and
updated after every microbatch; penalties have no gradient. See
gakd_jax/objectives/gakd.py. Hardware: one 80 GB GPU: the critic's weights and
AdamW take 7 GB, the teacher 16 GB. Not yet run at full size.
"""

from configs import rgan_0p6b


def get_config():
  c = rgan_0p6b.get_config()
  c.objective.reference = True
  c.critic.init_from = 'Qwen/Qwen3-0.6B'
  c.data.buckets = (512,)
  return c
