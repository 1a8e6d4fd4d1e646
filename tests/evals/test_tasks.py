"""Tasks: which scores count."""

import random

import pytest
import sacrebleu
from rouge_score import rouge_scorer

from gakd_jax import UserError
from gakd_jax.data import sources
from gakd_jax.evals import extract, scores, tasks

ROW = sources.Row('Add.', references=('It is 4.', 'four'), where='f:1')


def test_instruct_takes_the_best_reference_or_the_first():
  best = tasks.score('instruct', ROW, 'four')
  assert best == {'rouge_l': 100, 'bleu': 100, 'exact_match': 100}
  first = tasks.score('instruct', ROW, 'four', first_only=True)
  assert first == {'rouge_l': 0, 'bleu': 0, 'exact_match': 0}
  row = sources.Row('Add.', references=('no', 'it must be four or so'))
  text = row.references[1]
  corpus = tasks.corpus_scores('instruct', [row], [text])
  assert corpus['corpus_bleu'] == pytest.approx(100)
  assert corpus['distinct_1'] == 100
  first = tasks.corpus_scores('instruct', [row], [text], first_only=True)
  assert first['corpus_bleu'] == 0


def test_math_compares_numbers_and_prefers_the_rows_answer():
  assert tasks.score('math', ROW, 'The sum: 4.0') == {'accuracy': 100}
  assert tasks.score('math', ROW, 'The sum: 5') == {'accuracy': 0}
  assert tasks.score('math', ROW, '') == {'accuracy': 0}
  row = sources.Row('Add.', references=('It is 4.',), answer='5.0')
  assert tasks.score('math', row, 'is 5') == {'accuracy': 100}


def test_rules_of_protocols_differ_from_the_fields():
  row = sources.Row('Add.', references=('the cat',), where='f:1')
  assert tasks.score('instruct', row, 'A cat!')['exact_match'] == 100
  assert tasks.score('minillm', row, 'A cat!')['minillm_exact_match'] == 0
  assert tasks.score('minillm', row, 'The cat!')['minillm_exact_match'] == 100
  row = sources.Row('Add.', references=('3 * 4\n#### 12',), where='f:1')
  for name, text, right in (
    ('math', 'It is 12 m^2', True),
    ('llm_adapters_math', 'It is 12 m^2', False),
    ('gsm8k', 'It is 12', True),
    ('lm_eval_gsm8k', 'It is 12', False),
    ('lm_eval_gsm8k', 'It is #### 12', True),
  ):
    assert tasks.score(name, row, text) == {'accuracy': 100.0 * right}
  row = sources.Row('Add.', answer='12.0', references=('12',), where='f:1')
  assert tasks.gold('lm_eval_gsm8k', row) == 12


def test_examples_answer_as_their_task_reads():
  for task in tasks.TASKS.values():
    for question, answer in task.examples:
      assert question.endswith('?')
      number = answer.rsplit('#### ')[-1]
      assert task.rule(answer) == float(number)
      assert extract.number(answer.partition('####')[0].rstrip('.')) is not None


def test_examples_stand_before_a_row_as_text_or_as_turns():
  row = sources.Row('How many?', 'Of 3.', ('3',), where='f:1')
  assert tasks.asked('gsm8k', row, turns=True) is row
  (first, answer), *_ = examples = tasks.TASKS['gsm8k_few_shot'].examples
  text = tasks.asked('gsm8k_few_shot', row, turns=False)
  assert text.instruction.startswith(f'Q: {first}\nA: {answer}\n\nQ: ')
  assert text.instruction.endswith('\n\nQ: How many?\nOf 3.\nA:')
  assert (text.input, text.references, text.messages) == ('', ('3',), None)
  shown = tasks.asked('gsm8k_few_shot', row, turns=True).messages
  assert len(shown) == 2 * len(examples) + 1
  assert shown[0] == {'role': 'user', 'content': first}
  assert shown[1] == {'role': 'assistant', 'content': answer}
  assert shown[-1] == {'role': 'user', 'content': 'How many?\nOf 3.'}
  system = {'role': 'system', 'content': 'Be brief.'}
  row = sources.Row('', messages=(system, shown[-1]))
  turns = tasks.asked('gsm8k_few_shot', row, turns=True).messages
  assert turns == (system, *shown)


def test_a_row_without_an_answer_is_named():
  row = sources.Row('Add.', references=('No idea.',), where='f:7')
  with pytest.raises(UserError, match=r"f:7: nothing that task 'math' could"):
    tasks.score('math', row, '4')
  with pytest.raises(UserError, match='no task'):
    tasks.get('maths')


@pytest.fixture(scope='module')
def answered(shared_dir):
  """1694 rows of S-NI, and for each the answer to another."""
  rows, _ = sources.load(str(shared_dir / 'data/sinst_11/test.jsonl'))
  assert len(rows) == 1694
  answers = [row.references[0] for row in rows]
  random.Random(0).shuffle(answers)
  # Some are right, some long, some blank.
  for i in range(0, len(rows), 7):
    answers[i] = rows[i].references[-1]
    answers[i + 1] = rows[i].instruction + rows[i].input
  answers[3] = ' '
  return rows, answers


@pytest.mark.slow
def test_scores_are_those_of_the_packages_row_by_row(answered):
  rouge = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)
  bleu = sacrebleu.BLEU(effective_order=True, force=True)
  chrf = sacrebleu.CHRF()
  packages = {
    'rouge_l': lambda text, ref: (
      100 * rouge.score(ref, text)['rougeL'].fmeasure
    ),
    'bleu': lambda text, ref: bleu.sentence_score(text, [ref]).score,
    'chrf': lambda text, ref: chrf.sentence_score(text, [ref]).score,
  }
  for row, answer in zip(*answered, strict=True):
    for metric, score in packages.items():
      if metric == 'chrf' and len(answer) > 300:  # Slow, and all the same.
        continue
      expected = max(score(answer, ref) for ref in row.references)
      expected *= bool(answer.strip())
      found = getattr(scores, metric)(answer, row.references)
      assert found == pytest.approx(expected, abs=1e-9), (row.where, metric)
