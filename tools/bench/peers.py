"""The same steps by others: plain PyTorch, torch.compile, TRL's trainers.

  pip install -e '.[bench]'

Models are read from the directories that this project's own were saved to, so
that losses can be compared before times are.
"""

import tempfile


def model(path, **settings):
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype='float32', **settings
  )


def eager(student, teacher, ids_BT, mask_BT, objective, compiled=False):
  """A function that takes a step on full logits, and returns its loss.

  objective: 'sft', 'forward_kl' or 'reverse_kl'. compiled: by torch.compile.
  """
  import torch

  student = model(student).train()
  teacher = None if objective == 'sft' else model(teacher).eval()
  optimizer = torch.optim.AdamW(student.parameters(), 1e-4, weight_decay=0.01)
  ids = torch.tensor(ids_BT, dtype=torch.long)
  mask = torch.tensor(mask_BT[:, 1:])

  def loss_of():
    log_q = student(ids).logits[:, :-1].log_softmax(-1)
    if objective == 'sft':
      per_token = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
    else:
      with torch.no_grad():
        log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
      if objective == 'reverse_kl':
        per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
      else:
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (per_token * mask).sum() / mask.sum()

  loss_of = torch.compile(loss_of) if compiled else loss_of

  def take():
    loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return take


def _settings(**more):
  return {
    'output_dir': tempfile.gettempdir(),  # to which nothing is written
    'use_cpu': True,
    'bf16': False,
    'gradient_checkpointing': False,
    'learning_rate': 1e-4,
    'weight_decay': 0.01,
    'beta': 1.0,
    'temperature': 1.0,
    'report_to': 'none',
    **more,
  }


def _tokenizer():
  """One that has to be there: no text is tokenized."""
  import tokenizers
  import transformers

  words = tokenizers.models.WordLevel({'<pad>': 0, '<eos>': 1}, '<pad>')
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words),
    pad_token='<pad>',
    eos_token='<eos>',
    padding_side='left',
  )


def gkd_trainer(student, teacher, attention='sdpa', **settings):
  """TRL's GKDTrainer, reverse KL over full logits."""
  import datasets
  from trl.experimental.gkd import GKDConfig, GKDTrainer

  return GKDTrainer(
    model(student, attn_implementation=attention),
    model(teacher, attn_implementation=attention),
    GKDConfig(**_settings(**settings)),
    train_dataset=datasets.Dataset.from_dict({'messages': ['unused']}),
    processing_class=_tokenizer(),
  )


def distillation_trainer(student, teacher, **settings):
  """TRL's DistillationTrainer: reverse KL over tiles of the vocabulary."""
  import datasets
  from trl import DistillationConfig, DistillationTrainer

  return DistillationTrainer(
    model=model(student),
    teacher_model=model(teacher),
    args=DistillationConfig(**_settings(**settings)),
    train_dataset=datasets.Dataset.from_dict({'prompt': ['unused']}),
    processing_class=_tokenizer(),
  )


def on_given_text(trainer, ids_BT, mask_BT):
  """A function that takes the trainer's step on text that is there.

  `mask_BT` is 0, then 1: a prompt and a response in every row.
  """
  import torch

  ids = torch.tensor(ids_BT, dtype=torch.long)
  mask = torch.tensor(mask_BT)
  ones = torch.ones_like(ids)
  prompt = int((~mask[0]).sum())
  batch = {
    'input_ids': ids,
    'attention_mask': ones,
    'labels': ids.masked_fill(~mask, -100),
    'prompts': ids[:, :prompt],
    'prompt_attention_mask': ones[:, :prompt],
    'prompt_ids': ids[:, :prompt],
    'prompt_mask': ones[:, :prompt],
    'completion_ids': ids[:, prompt:],
    'completion_mask': ones[:, prompt:],
    'num_items_in_batch': mask.sum(),
  }
  # Of its own text, DistillationTrainer makes a batch there.
  trainer._prepare_inputs = lambda inputs: inputs
  trainer.current_gradient_accumulation_steps = 1
  optimizer = trainer.create_optimizer()

  def take():
    loss = trainer.training_step(
      trainer.model, batch, num_items_in_batch=mask.sum()
    )
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return take
