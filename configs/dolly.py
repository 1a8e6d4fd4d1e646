"""What all Dolly experiments share: MiniLLM's split and protocol.

`python tools/prepare_data.py` puts the data where this looks for it.
"""

from configs import base

# The authors' adapters, on all projections (GAKD's recipes).
LORA = {'rank': 16, 'alpha': 32.0, 'dropout': 0.1, 'targets': '.*'}


def get_config():
  c = base.get_config()
  c.data.train = 'data/dolly/train.jsonl'
  c.data.validation = 'data/dolly/dev.jsonl'
  c.data.template = 'qwen3'
  c.data.max_length = 512
  c.data.max_prompt_length = 256
  c.train.batch_size = 32
  c.evals = {
    'loss': {'batch_size': 32},
    'generation': {'seeds': (10,), 'batch_size': 128},
  }
  c.eval_first = True
  c.checkpoint.best_metric = 'generation/rouge_l'
  return c


def pipeline(teacher, student, methods, one_tokenizer=True):
  """Teacher SFT, student SFT, each method from both, and all on the test set.

  teacher, student: SFT configs. methods: {name: config}, whose models become
  those stages. one_tokenizer: whether both read the same ids, so that the
  teacher can be asked about the student's.
  """
  c = base.get_config()
  stages = [('teacher', teacher), ('sft', student)]
  for name, stage in methods.items():
    stage.student.path = 'stage:sft'
    stage.teacher.path = 'stage:teacher'
    stages.append((name, stage))
  for name in ('teacher', 'sft', *methods):
    test = _test(name, teacher.data.template)
    if one_tokenizer:
      test.teacher.path = 'stage:teacher'
    stages.append((f'test_{name}', test))
  c.stages = tuple(stages)
  return c


def _test(name, template):
  """The best model of a stage on the test set, with the field's protocol."""
  c = get_config()
  c.data.template = template
  c.student.path = f'stage:{name}'
  c.train.steps = 0
  c.data.train = None
  c.evals = {
    'loss': {'data': 'data/dolly/test.jsonl', 'batch_size': 32},
    'generation': {'data': 'data/dolly/test.jsonl', 'batch_size': 128},
  }
  c.checkpoint.best_metric = None
  return c


def stage(path, objective, *, template, lora, learning_rate, epochs):
  """A training of a pipeline."""
  c = get_config()
  c.student.path, c.student.lora = path, lora
  c.data.template = template
  c.objective = objective
  c.optimizer.learning_rate = learning_rate
  c.train.epochs = epochs
  c.train.microbatch_size = 8
  return c


def pair(teacher, student, *, template, teacher_sft, student_sft, rate):
  """`pipeline` of two models with one tokenizer: forward and reverse KL, GAKD
  and its ablation.

  teacher, student: HF directories or hub ids. teacher_sft, student_sft: dicts
  of `lora` (None: all weights), `learning_rate` and `epochs`. rate: of
  distillation, which trains what the student's SFT trained, as long.
  """

  settings = {'template': template, **student_sft}
  first = stage(student, {'name': 'sft'}, **settings)
  first.checkpoint.best_metric = 'loss/ce'
  rgan = {'name': 'gakd', 'kind': 'rgan', 'g': 0.1}
  objectives = {
    'forward_kl': {'name': 'kld', 'divergence': 'forward_kl'},
    'reverse_kl': {'name': 'kld', 'divergence': 'reverse_kl'},
    'rgan': rgan,
    'rgan_without_critic': rgan | {'g': 0.0},
  }
  return pipeline(
    stage(teacher, {'name': 'sft'}, template=template, **teacher_sft),
    first,
    {
      name: stage(None, objective, **settings | {'learning_rate': rate})
      for name, objective in objectives.items()
    },
  )
