"""Answers of all runs meet at their prompt, whatever wrote the files."""

import json

import pytest

from gakd_jax.page import answers


def _write(root, run, name, rows):
  path = root / run / 'answers' / f'{name}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  path.write_text(text, encoding='utf-8')
  return {run: root / run}


def _row(instruction, answer, **more):
  return {
    'instruction': instruction,
    'input': '',
    'references': ['r'],
    'answer': answer,
  } | more


def test_both_formats_meet_at_their_prompt(tmp_path):
  runs = _write(
    tmp_path,
    'old',
    'self-inst-10',
    [_row('p', 'a\u2028b', step=3, rouge_l=50.0), _row('q', 'c', rouge_l=1)],
  )
  scores = {'rouge_l': 1 / 3, 'bleu': 2.0, 'comet': float('nan')}
  new = {'tokens': 7, 'scores': scores}
  runs |= _write(
    tmp_path,
    'new',
    'self-inst-10',
    [_row('q', 'd', index=1, extracted=None, gold='4', cut_at='\n', **new)],
  )
  (one,) = answers.collect(runs)
  assert one['name'] == 'self-inst'
  assert one['seeds'] == ['10']
  assert one['models'] == ['old', 'new']
  assert one['metrics'] == ['rouge_l', 'bleu', 'comet']
  assert one['total'] == 2
  p, q = one['rows']
  assert p == {
    'index': 0,
    'prompt': 'p',
    'input': '',
    'references': ['r'],
    'answers': {
      '10': {'old': {'text': 'a\u2028b', 'scores': {'rouge_l': 50.0}}}
    },
  }
  assert q['gold'] == '4'
  assert q['answers']['10'] == {
    'old': {'text': 'c', 'scores': {'rouge_l': 1}},
    'new': {
      'text': 'd',
      'scores': {'rouge_l': 0.33, 'bleu': 2.0},
      'tokens': 7,
      'extracted': None,
      'cut_at': '\n',
    },
  }


def test_sets_and_seeds_are_told_apart_in_their_order(tmp_path):
  runs = {}
  for name in ('dolly-10', 'dolly-9', 'gsm8k-0'):
    runs |= _write(tmp_path, 'a', name, [_row('p', name)])
  dolly, gsm8k = answers.collect(runs)
  assert (dolly['name'], dolly['seeds']) == ('dolly', ['9', '10'])
  assert (gsm8k['name'], gsm8k['seeds']) == ('gsm8k', ['0'])
  (row,) = dolly['rows']
  assert row['answers']['9']['a']['text'] == 'dolly-9'


def test_what_is_asked_twice_stays_two_rows(tmp_path):
  rows = [_row('p', 'first'), _row('p', 'second')]
  runs = _write(tmp_path, 'a', 's-0', rows) | _write(tmp_path, 'b', 's-0', rows)
  (one,) = answers.collect(runs)
  got = [row['answers']['0']['b']['text'] for row in one['rows']]
  assert got == ['first', 'second']


def test_too_much_is_cut_at_the_same_row_of_all_sets(tmp_path):
  runs = {}
  for name, n in (('long-0', 40), ('short-0', 3)):
    rows = [_row(f'p{i}', 'é' * 500) for i in range(n)]
    runs |= _write(tmp_path, 'a', name, rows)
  long, short = answers.collect(runs, limit=12_000)
  # A row has 1 kB of answer and some more.
  assert 5 <= len(long['rows']) <= 9
  assert long['total'] == 40
  assert len(short['rows']) == short['total'] == 3
  assert long['rows'][4]['prompt'] == 'p4'
  long, short = answers.collect(runs)
  assert len(long['rows']) == 40
  long, short = answers.collect(runs, limit=10)
  assert len(long['rows']) == 1  # and so it is said that others were cut


def test_without_answers_there_are_no_sets(tmp_path):
  assert answers.collect({'a': tmp_path}) == []


@pytest.mark.parametrize(
  'text', ['</script><script>', '<!--<script>', '\u2028\u2029', '&lt;\\u003c']
)
def test_a_script_may_hold_any_text(text):
  script = answers.to_script({text: text})
  assert not set('<>&\u2028\u2029') & set(script)
  assert json.loads(script) == {text: text}
