"""What makes an answer good: the scores of each kind of data set."""

import dataclasses
import importlib

from gakd_jax import UserError
from gakd_jax.evals import extract, scores


@dataclasses.dataclass(frozen=True)
class Task:
  """What is asked, and which answers are good.

  Scores lie in [0, 100] and are means over rows, but for `corpus`.
  """

  scores: tuple[str, ...]  # of each answer; by the first, models are compared
  corpus: tuple[str, ...] = ()  # of all answers at once
  rule: extract.Rule | None = None  # what an answer says
  gold: extract.Rule | None = None  # and a reference, if that is another
  stop: tuple[str, ...] = ()  # strings before which an answer ends
  examples: tuple[tuple[str, str], ...] = ()  # (question, answer) before each
  version: int = 1  # higher where an answer may have got another score


# For models that were never told how to answer; of no published protocol.
_WORD_PROBLEMS = (
  (
    'A baker has 3 trays of 12 rolls and sells 20 of them. How many are left?',
    'On 3 trays there are 3 * 12 = 36 rolls. Of these 36 - 20 = 16 are left.\n'
    '#### 16',
  ),
  (
    'Mia saves $4 a week. After 6 weeks she spends half of it. How much does '
    'she have?',
    'In 6 weeks she saves 6 * 4 = $24. Half of it is 24 / 2 = $12.\n#### 12',
  ),
  (
    'A train of 5 cars has 48 seats in each. 30 seats are broken. How many '
    'people can sit?',
    'There are 5 * 48 = 240 seats. Without those that are broken, 240 - 30 = '
    '210 are left.\n#### 210',
  ),
  (
    'Ben is 7 years old, and his sister is twice as old as he will be in 2 '
    'years. How old is she?',
    'In 2 years Ben will be 7 + 2 = 9. His sister is 2 * 9 = 18.\n#### 18',
  ),
)

TASKS = {
  # Dolly, SelfInst, Vicuna, S-NI, UnNI.
  'instruct': Task(
    ('rouge_l', 'bleu', 'exact_match'),
    ('corpus_bleu', 'distinct_1', 'distinct_2'),
  ),
  'summary': Task(('rouge_l', 'bleu'), ('corpus_bleu',)),
  'translation': Task(
    ('bleu', 'chrf'),
    ('corpus_bleu', 'corpus_chrf'),
  ),
  # AddSub, MultiArith, SingleEq, SVAMP, MAWPS.
  'math': Task(('accuracy',), rule=extract.number, version=2),
  'gsm8k': Task(('accuracy',), rule=extract.gsm8k, version=2),
  'gsm8k_few_shot': Task(
    ('accuracy',),
    rule=extract.gsm8k,
    stop=('\nQ:',),
    examples=_WORD_PROBLEMS,
  ),
  'aqua': Task(('accuracy',), rule=extract.letter, version=2),
  # BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OBQA.
  'choice': Task(('accuracy',), rule=extract.choice),
  # As the authors of a protocol compute it, see `extract` and `scores`.
  'minillm': Task(('rouge_l', 'minillm_exact_match')),
  'llm_adapters_math': Task(('accuracy',), rule=extract.llm_adapters_math),
  'llm_adapters_aqua': Task(('accuracy',), rule=extract.llm_adapters_aqua),
  'llm_adapters_choice': Task(('accuracy',), rule=extract.llm_adapters_choice),
  'lm_eval_gsm8k': Task(
    ('accuracy',),
    rule=extract.lm_eval_gsm8k,
    gold=extract.gsm8k,
    stop=('Question:',),
  ),
}


def get(name):
  if name not in TASKS:
    raise UserError(
      f'config.evals: no task {name!r}; known are {", ".join(TASKS)}'
    )
  return TASKS[name]


def extracted(name, row, text):
  """What a text answers; None for tasks that compare whole texts."""
  return _read(TASKS[name].rule, row, text)


def _read(rule, row, text):
  return rule and rule(text, extract.labels(row) if rule.has_labels else ())


def gold(name, row):
  """What should have been answered: extracted from the reference.

  Raises:
    UserError: if there is nothing.
  """
  text = row.answer or row.references[0]
  right = _read(TASKS[name].gold or TASKS[name].rule, row, text)
  if right is None:
    raise UserError(
      f'{row.where}: nothing that task {name!r} could extract from {text!r}'
    )
  return right


def asked(name, row, *, turns):
  """The row whose prompt a model is given: the task's examples, then its own.

  Args:
    name: of a task.
    row: `data.sources.Row`.
    turns: whether examples are turns of a conversation, or text.
  """
  examples = TASKS[name].examples
  if not examples:
    return row
  if turns:
    own = row.messages or ({'role': 'user', 'content': row.text},)
    system = [turn for turn in own[:1] if turn['role'] == 'system']
    shown = [
      {'role': role, 'content': text}
      for example in examples
      for role, text in zip(('user', 'assistant'), example, strict=True)
    ]
    messages = (*system, *shown, *own[len(system) :])
    return dataclasses.replace(row, messages=messages)
  texts = [f'Q: {asks}\nA: {answer}\n\n' for asks, answer in examples]
  return dataclasses.replace(
    row, instruction=f'{"".join(texts)}Q: {row.text}\nA:', input=''
  )


def score(name, row, answer, first_only=False):
  """{metric: score} of one answer.

  Args:
    name: of a task.
    row: `data.sources.Row`.
    answer: text.
    first_only: score against the first reference, not the best of all.

  Raises:
    UserError: if a row's reference does not hold what the task asks for.
  """
  if TASKS[name].rule:
    correct = extract.same(extracted(name, row, answer), gold(name, row))
    return {'accuracy': 100.0 * correct}
  references = row.references[:1] if first_only else row.references
  return {
    metric: getattr(scores, metric)(answer, references)
    for metric in TASKS[name].scores
  }


def checked(spec, row, answer):
  """{'accuracy'}: 100 times what a function of a config says of an answer.

  Args:
    spec: 'python:<module>:<function>', of a function of (`data.sources.Row`,
      answer) to a number of 0 to 1.
    row, answer: see `score`.

  Raises:
    UserError: if there is no such function, or it does not do that.
  """
  try:
    right = float(checker(spec)(row, answer))
  except Exception as error:  # It may raise anything.
    raise UserError(
      f'{spec}: {type(error).__name__}: {error}; of {row.where or "a row"}'
    ) from error
  if not 0 <= right <= 1:
    raise UserError(
      f'{spec}: says {right} of {row.where or "a row"}; expected 0 to 1'
    )
  return {'accuracy': 100.0 * right}


def checker(spec):
  """The function that a spec of `checked` names."""
  try:
    kind, module, name = spec.split(':')
    found = getattr(importlib.import_module(module), name)
    if kind != 'python' or not callable(found):
      raise ValueError('not python:<module>:<function>')
  except (Exception, SystemExit) as error:  # A module may raise anything.
    raise UserError(
      f'{spec}: {type(error).__name__}: {error}; expected '
      'python:<module>:<function> of (row, answer), which gives 0 to 1'
    ) from error
  return found


def corpus_scores(name, rows, answers, first_only=False):
  """{metric: score} of all answers at once."""
  references = [r.references[:1] if first_only else r.references for r in rows]
  return {
    metric: getattr(scores, metric)(answers, references)
    for metric in TASKS[name].corpus
  }
