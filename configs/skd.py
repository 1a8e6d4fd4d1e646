"""Speculative knowledge distillation and its baselines, on its authors' tasks.

  python -m gakd_jax.main --config=configs/skd.py:gsm8k,all \\
    --workdir=runs/skd_gsm8k

SKD (arXiv 2410.11325): the student proposes tokens, and the teacher replaces
those that it does not rank among its first 25. `<task>,all` goes from
instruction-tuned models to a table: SFT of the teacher; SFT of the student; the
student by every kd_type, from the instruction-tuned model; all on the test set.
`<task>,<kd_type>` is one training, of whichever models:

  python -m gakd_jax.main --config=configs/skd.py:gsm8k,skd \\
    --config.student.path=STUDENT --config.teacher.path=TEACHER

By who writes what is trained on, with forward KL alone as the loss:

  supervised_kd  the data
  on-policy      the student
  mixed          the student half of the rows, the data the others (ImitKD)
  mixed_train    the data in the first half of the run, then the student
  skd            both, interleaved
  mixed_skd      skd half of the rows, the data the others
  seq_kd         the teacher, once, then SFT on it (Kim & Rush, 1606.07947); the
                 authors' code has SFT on the data under that name
  sft            the data; SFT

A third word names the pair: `gemma` (7B to 2B, the default) or `qwen2` (7B to
0.5B). Each public file takes one command:

  gsm8k (github.com/openai/grade-school-math)
  python tools/prepare_data.py train.jsonl data/gsm8k/train.jsonl --limit=1000
  python tools/prepare_data.py train.jsonl data/gsm8k/dev.jsonl --skip=7000
  python tools/prepare_data.py test.jsonl data/gsm8k/test.jsonl

  dialogsum (github.com/cylnlp/dialogsum)
  python tools/prepare_data.py dialogsum.train.jsonl \\
    data/dialogsum/train.jsonl --limit=1000
  python tools/prepare_data.py dialogsum.dev.jsonl data/dialogsum/dev.jsonl
  python tools/prepare_data.py dialogsum.test.jsonl data/dialogsum/test.jsonl

  translation (github.com/facebookresearch/flores, v1): of dev, train.jsonl;
  devtest makes dev.jsonl, with --limit=500, and test makes test.jsonl
  python tools/prepare_data.py wikipedia.dev.ne-en.ne \\
    data/flores_ne_en/train.jsonl --target=wikipedia.dev.ne-en.en \\
    --languages=Nepali,English --limit=1000

  math (GSM8K's train.jsonl once more), to be asked the other sets of
  github.com/AGI-Edgerunners/LLM-Adapters: its folder `dataset` as
  data/llm_adapters/dataset
  python tools/prepare_data.py train.jsonl data/math/train.jsonl --limit=7000
  python tools/prepare_data.py train.jsonl data/math/dev.jsonl --skip=7000

Lengths, rates, draws, the tests' stop strings and 1000 rows (`gsm_1k`) are
those of the authors' code. Not theirs: Nepali of FLORES v1 for Assamese of
FLORES-200, and GSM8K for UltraInteract, with half its lengths (LLM-Adapters'
own math_data.json has four fifths of its tests' questions); prompts, which are
a question or a task and its text; rollouts, which no stop string ends and which
`mixed` and `mixed_train` draw as the others do, not at T = 1; SFT as long as
distillation; and a number counts without `####`. The best checkpoint has the
lowest forward KL on validation text (SFT and seq_kd: cross-entropy).

Published, of Gemma-2B (COMET, ROUGE-L, GSM8K): SFT 72.5, 31.7, 18.7; supervised
KD 73.3, 34.1, 22.5; on-policy 36.1, 34.1, 25.3; SKD 75.3, 35.0, 29.1. Hardware:
theirs, eight 80 GB GPUs. Not yet run at full size.
"""

import dataclasses

from configs import base, eval_math
from gakd_jax import UserError

# Teacher and student.
PAIRS = {
  'gemma': ('google/gemma-7b-it', 'google/gemma-2b-it'),
  'qwen2': ('Qwen/Qwen2-7B-Instruct', 'Qwen/Qwen2-0.5B-Instruct'),
}


@dataclasses.dataclass(frozen=True)
class Task:
  folder: str  # of train.jsonl and dev.jsonl
  prompt: int  # tokens, at most
  response: int
  stop: tuple  # strings before which an answer ends
  tests: dict  # {set: (file, kind of scores)}
  epochs: int = 3


TASKS = {
  'gsm8k': Task(
    'data/gsm8k',
    prompt=256,
    response=512,
    stop=('\n\n',),
    tests={'gsm8k': ('data/gsm8k/test.jsonl', 'gsm8k')},
  ),
  'dialogsum': Task(
    'data/dialogsum',
    prompt=1024,
    response=128,
    stop=('\n',),
    tests={'dialogsum': ('data/dialogsum/test.jsonl', 'summary')},
  ),
  'translation': Task(
    'data/flores_ne_en',
    prompt=256,
    response=256,
    stop=('\n',),
    tests={'flores': ('data/flores_ne_en/test.jsonl', 'translation')},
    epochs=10,
  ),
  'math': Task(
    'data/math',
    prompt=512,
    response=512,
    stop=('\nSolve the following math problem step-by-step.', '\n\n\n\n'),
    tests={
      name: (f'{eval_math.ADAPTERS}/{folder}/test.json', kind)
      for name, (folder, kind) in eval_math.SETS.items()
      if kind == 'math'
    },
  ),
}

DATA = {'writer': 'dataset'}
STUDENT = {'writer': 'student', 'temperature': 0.5, 'top_p': 0.5}
INTERLEAVED = STUDENT | {
  'writer': 'speculative',
  'gamma': 5,
  'accept': 'rank',
  'k': 25,
  'teacher_temperature': 0.2,
  'teacher_top_p': 0.5,
}
# Who writes, by kd_type.
WRITERS = {
  'sft': DATA,
  'supervised_kd': DATA,
  'seq_kd': {'writer': 'teacher', 'temperature': 0.2, 'top_p': 0.5},
  'on-policy': STUDENT,
  'mixed': STUDENT | {'share': 0.5},
  'mixed_train': STUDENT | {'begin': 0.5},
  'skd': INTERLEAVED,
  'mixed_skd': INTERLEAVED | {'share': 0.5},
}


def get_config(argument='gsm8k,skd'):
  words = argument.split(',')
  if len(words) not in (2, 3):
    raise UserError(
      f'configs/skd.py:{argument}: expected <task>,<kd_type>[,<pair>], such as '
      'gsm8k,skd or gsm8k,all'
    )
  task, kd_type, pair = (*words, 'gemma')[:3]
  for kind, word, known in (
    ('task', task, TASKS),
    ('kd_type', kd_type, (*WRITERS, 'all')),
    ('pair', pair, PAIRS),
  ):
    if word not in known:
      raise UserError(
        f'configs/skd.py:{argument}: no {kind} {word!r}; known are '
        f'{", ".join(known)}'
      )
  teacher, student = PAIRS[pair]
  if kd_type == 'all':
    return _pipeline(TASKS[task], teacher, student)
  return _training(
    TASKS[task], kd_type, student, f'runs/skd_{task}/teacher/best'
  )


def _pipeline(task, teacher, student):
  """Both SFTs, every kd_type from the same student, and the test set."""
  stages = {'teacher': _training(task, 'sft', teacher, None)}
  for kd_type in WRITERS:
    stages[kd_type] = _training(task, kd_type, student, 'stage:teacher')
  tests = {f'test_{name}': _test(task, f'stage:{name}') for name in stages}
  c = base.get_config()
  c.stages = tuple((stages | tests).items())
  return c


def _common(task):
  c = base.get_config()
  c.data.template = 'chat'
  c.data.max_prompt_length = task.prompt
  c.data.max_length = task.prompt + task.response
  c.mesh.data, c.mesh.fsdp = 1, -1
  return c


def _training(task, kd_type, student, teacher):
  c = _common(task)
  c.student.path = student
  c.data.train = f'{task.folder}/train.jsonl'
  c.data.validation = f'{task.folder}/dev.jsonl'
  c.rollout = WRITERS[kd_type]
  if c.rollout.writer != 'dataset':
    c.rollout.max_new_tokens = task.response
  c.objective = {'name': 'sft'}
  c.checkpoint.best_metric = 'loss/ce'
  if kd_type != 'sft':
    c.teacher.path = teacher
  if kd_type not in ('sft', 'seq_kd'):
    c.objective = {'name': 'kld', 'divergence': 'forward_kl', 'kd': 1.0}
    c.checkpoint.best_metric = 'loss/forward_kl'
  c.optimizer.learning_rate = 1e-5
  c.optimizer.schedule = 'linear'
  c.optimizer.end = 0.0
  c.optimizer.weight_decay = 0.0
  c.train.batch_size = 8
  c.train.epochs = task.epochs
  c.evals = {'loss': {'batch_size': 8}}
  c.eval_every = 50
  c.eval_first = True
  return c


def _test(task, path):
  """The best model of a stage on the test sets, and how far it is from the
  teacher there.
  """
  c = _common(task)
  c.student.path = path
  c.teacher.path = 'stage:teacher'
  c.train.steps = 0
  first, *_ = task.tests.values()
  c.evals = {'loss': {'data': first[0], 'batch_size': 8}}
  for name, (file, kind) in task.tests.items():
    c.evals[name] = base.greedy(
      file,
      task=kind,
      max_new_tokens=task.response,
      stop=task.stop,
      batch_size=32,
    )
  if len(task.tests) > 1:
    c.report.averages = {'average': tuple(task.tests)}
  return c
