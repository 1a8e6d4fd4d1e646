"""Positions of logits that are compared, in packed rows as well."""

import numpy as np

from gakd_jax.data.pipeline import Batch, collate
from gakd_jax.models.transformer import Outputs
from gakd_jax.objectives import pairs


def _packed(*documents, length=16):
  """One row of documents with a prompt and a response of some tokens."""
  bins = [[(range(p), range(r)) for p, r in documents]]
  return collate(bins, length, 0)


STUDENT = _packed((2, 3), (1, 4))  # responses at 2, 3, 4 and 6, 7, 8, 9
TEACHER = _packed((4, 2), (2, 5))  # at 4, 5 and 8, 9, 10, 11, 12


def _found(index_1T, mask_1T):
  """{student's position: the teacher's}."""
  at_T = np.flatnonzero(mask_1T[0])
  return dict(
    zip(at_T.tolist(), np.asarray(index_1T)[0, at_T].tolist(), strict=True)
  )


def test_by_rank_within_each_document():
  want = {1: 3, 2: 4, 5: 7, 6: 8, 7: 9, 8: 10}
  assert _found(*pairs.by_rank(STUDENT, TEACHER)) == want
  assert _found(*pairs.by_rank(TEACHER, STUDENT)) == {
    t: s for s, t in want.items()
  }


def test_exact_pairs_stand_before_their_tokens():
  align = {'pairs_t': np.full((1, 16), -1, np.int32)}
  align['pairs_t'][0, [2, 4, 9, 1]] = [4, 5, 12, 3]
  # Token 1 is of the prompt.
  found = _found(*pairs.exact(Batch(STUDENT, TEACHER, align)))
  assert found == {1: 3, 3: 4, 8: 11}


def test_with_one_tokenizer_every_token_is_its_own_partner():
  batch = Batch(STUDENT, STUDENT)
  same = {t: t for t in (1, 2, 3, 5, 6, 7, 8)}
  assert _found(*pairs.exact(batch)) == same
  assert _found(*pairs.warped(batch)) == same
  assert _found(*pairs.ends(*pairs.spans(batch))) == same


def test_spans_meet_at_their_last_and_first_tokens():
  span_s, span_t = (np.full((1, 16), -1, np.int32) for _ in range(2))
  span_s[0, [2, 3, 4, 6, 7, 8]] = [0, 0, 1, 2, 3, 3]
  span_t[0, [4, 5, 8, 9, 10, 11]] = [0, 1, 2, 2, 2, 3]
  align = {'span_s': span_s, 'span_t': span_t}
  s_BT, t_BR = pairs.spans(Batch(STUDENT, TEACHER, align))
  assert _found(*pairs.ends(s_BT, t_BR)) == {2: 3, 3: 4, 5: 9, 7: 10}
  assert _found(*pairs.begins(s_BT, t_BR)) == {1: 3, 3: 4, 5: 7, 6: 10}
  hidden_BTD = np.arange(16, dtype=np.float32)[None, :, None]
  means = pairs.span_means(Outputs(hidden_BTD, None), s_BT).hidden_BTD
  want = np.zeros(16)
  want[[1, 2, 3, 5, 6, 7]] = [1.5, 1.5, 3, 5, 6.5, 6.5]
  np.testing.assert_allclose(means[0, :, 0], want)
