from configs import base
def get_config():
  c = base.get_config()
  c.student.path='runs/sft_0p6b/best'; c.teacher.path='runs/sft_8b/best'
  c.data.train='data/dolly/train.jsonl'; c.data.validation='data/dolly/dev.jsonl'
  c.objective={'name':'kld','divergence':'reverse_kl','kd':0.5}
  c.train.epochs=20
  return c
