"""Scores against hand-computed values and independent small references."""

import math
import random

import pytest

from gakd_jax import UserError
from gakd_jax.evals import scores

CAT = 'the cat sat on the mat'


def _lcs(a, b):
  """Longest common subsequence by its textbook recursion."""
  if not a or not b:
    return 0
  if a[-1] == b[-1]:
    return 1 + _lcs(a[:-1], b[:-1])
  return max(_lcs(a[:-1], b), _lcs(a, b[:-1]))


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
  rng = random.Random(0)
  words = ['red', 'dog', 'pin', 'sun', 'map']  # none changes when stemmed
  for _ in range(20):
    a, b = (rng.choices(words, k=rng.randint(1, 7)) for _ in range(2))
    want = 100 * 2 * _lcs(a, b) / (len(a) + len(b))
    assert scores.rouge_l(' '.join(a), ' '.join(b)) == pytest.approx(want)


def test_rouge_l_stems_and_ignores_case_and_punctuation():
  assert scores.rouge_l('Running, QUICKLY!', 'runs quickly') == 100
  # Precision 3/4, recall 3/6: F1 = 2 * 3 / (4 + 6).
  assert scores.rouge_l('the cat on mats', CAT) == pytest.approx(80)
  assert scores.rouge_l('cat the on dog', CAT) == pytest.approx(40)


def test_exact_match_normalises_as_squad():
  assert scores.exact_match(' The  Eiffel Tower. ', 'eiffel tower') == 100
  assert scores.exact_match('an apple-pie', 'applepie') == 100
  assert scores.exact_match('theatre', 'atre') == 0
  assert scores.exact_match('pizza', 'pizz') == 0
  assert scores.exact_match('eiffel', 'eiffel tower') == 0


def test_sentence_bleu_by_hand():
  # n-gram precisions 5/6, 3/5, 1/4, and 0/3 smoothed to 1/(2 * 3).
  want = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
  assert scores.bleu('the cat sat in the mat', CAT) == pytest.approx(want)
  # All precisions 1 (no 4-gram to count); brevity exp(1 - 6/3).
  assert scores.bleu('the cat sat', CAT) == pytest.approx(100 * math.exp(-1))


def test_corpus_bleu_pools_counts_and_references():
  predictions = [CAT, 'a b c d x']
  # Pooled matches 6+4, 5+3, 4+2, 3+1 of 6+5, 5+4, 4+3, 3+2; equal lengths.
  want = 100 * (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25
  got = scores.corpus_bleu(predictions, [CAT, 'a b c d e'])
  assert got == pytest.approx(want)
  # Rows may have different numbers of references.
  got = scores.corpus_bleu(predictions, [[CAT], ['a b c d e', 'c d x y z']])
  pooled = 100 * (4 / 5) ** 0.25  # all but the 4-gram b c d x
  assert got == pytest.approx(pooled)
  with pytest.raises(ValueError, match='2 predictions, 1 ref'):
    scores.corpus_bleu(predictions, [CAT])


@pytest.mark.parametrize('name', ['rouge_l', 'exact_match', 'bleu'])
def test_the_best_reference_counts(name):
  score = getattr(scores, name)
  assert score(CAT, ['no', CAT, 'dogs bark']) == 100
  assert score(CAT, ('no', 'dogs bark')) < 10
  assert score(CAT, 'no') == score(CAT, ['no'])


@pytest.mark.parametrize('name', ['rouge_l', 'exact_match', 'bleu'])
def test_blank_texts_score_zero(name):
  score = getattr(scores, name)
  for prediction in ('', ' \n'):
    assert score(prediction, CAT) == 0
    assert score(prediction, ['', CAT]) == 0
  assert score(CAT, '') == 0
  with pytest.raises(UserError, match='no reference'):
    score(CAT, [])


def test_corpus_bleu_of_blank_texts():
  assert scores.corpus_bleu(['', ' '], ['a', 'b']) == 0
  assert scores.corpus_bleu([], []) == 0
  assert 0 < scores.corpus_bleu(['', CAT], ['a', CAT]) < 100
  assert scores.corpus_bleu([CAT], ['']) == 0


def test_no_advice_is_logged(caplog):
  rows = [f'{CAT} .'] * 200
  scores.corpus_bleu(rows, rows)
  for row in rows:
    assert scores.bleu(row, row) == 100
  assert not caplog.records


def test_distinct_words_and_pairs_of_all_words():
  # a b a | A b . c: of seven words a, b, ".", c; of pairs ab, ba, b., .c.
  answers = ['a b a', 'A  b. c']
  assert scores.distinct_1(answers) == pytest.approx(100 * 4 / 7)
  assert scores.distinct_2(answers) == pytest.approx(100 * 4 / 7)
  assert scores.distinct_2(['a b', 'b a']) == 50  # None across answers.
  assert scores.distinct_1(['', ' ']) == 0


def test_length_buckets():
  edges = {0: '0-10', 10: '0-10', 11: '11-50', 50: '11-50', 51: '51-100'}
  edges |= {100: '51-100', 101: '101+', 4096: '101+'}
  assert {n: scores.length_bucket(n) for n in edges} == edges
