"""Maps between vocabularies, as constants of methods."""

import types

import numpy as np
import pytest

from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.objectives import vocabularies


@pytest.fixture
def models(tiny_tokenizer_dir, bytes_tokenizer):
  """A student with whole words, and a teacher with bytes."""
  tokenizers = (
    tokenizer_lib.load(tiny_tokenizer_dir),
    bytes_tokenizer('{{ messages }}', '</s>'),
  )
  configs = tuple(
    types.SimpleNamespace(vocab_size=tokenizer_lib.size(x) + 4)
    for x in tokenizers
  )
  return types.SimpleNamespace(
    tokenizers=tokenizers,
    configs=configs,
    student_config=configs[0],
    teacher_config=configs[1],
  )


def test_one_vocabulary_needs_no_map(models):
  models.tokenizers = models.tokenizers[:1] * 2
  assert vocabularies.shared(models) == {}
  assert vocabularies.nearest(models) == {}
  assert vocabularies.projection(models, 0.1) == {}


def test_shared_tokens_are_those_of_one_string_and_the_ends(models):
  student, teacher = (x.get_vocab() for x in models.tokenizers)
  constants = vocabularies.shared(models)
  t_id_V = constants['teacher_id_V']
  assert t_id_V.shape == (models.student_config.vocab_size,)
  assert t_id_V[student['a']] == teacher['a']
  assert t_id_V[student['<|im_end|>']] == teacher['</s>']
  assert t_id_V[student['Ġteacher']] == -1
  assert (t_id_V[-4:] == -1).all()
  both = [*t_id_V[t_id_V >= 0], *constants['teacher_rest_O']]
  assert sorted(both) == list(range(tokenizer_lib.size(models.tokenizers[1])))


def test_the_nearest_of_the_students_tokens(models):
  student, teacher = (x.get_vocab() for x in models.tokenizers)
  constants = vocabularies.nearest(models)
  assert constants['student_id_U'][teacher['q']] == student['q']
  assert constants['teacher_id_V'][student['q']] == teacher['q']
  assert (constants['student_id_U'][-4:] == -1).all()


def test_tokens_that_end_a_word(models):
  student, teacher = (x.get_vocab() for x in models.tokenizers)
  constants = vocabularies.spaces(models)
  for token, ends in {'Ġteacher': True, 'Ċ': True, 'e': False}.items():
    assert constants['space_s'][student[token]] == ends
  assert constants['space_s'][student['<|im_end|>']]
  assert constants['space_t'][teacher['Ġ']]
  assert not constants['space_t'][-4:].any()


def test_tokens_are_spelt_in_the_longest_pieces():
  constants = vocabularies.projection_of(
    ['</s>', 'a', 'the', 'then', '12', 'é', None],
    ['<e>', '1', '2', 'th', 'the', 'a', 'n', 'z'],
    [False, *[True] * 5, False],
    V=9,
    U=9,
    decay=0.5,
    ends=(0, 0),
  )
  pieces = {}
  for s, t, w in zip(
    *(constants[f'piece_{x}'] for x in ('s', 't', 'weight')), strict=True
  ):
    pieces.setdefault(int(s), []).append((int(t), round(float(w), 4)))
  assert pieces == {
    0: [(0, 1.0)],
    1: [(5, 1.0)],
    2: [(4, 1.0)],
    3: [(4, 0.6667), (6, 0.3333)],
    4: [(1, 0.6667), (2, 0.3333)],
  }
  reached = [0, 1, 2, 4, 5, 6]
  assert np.flatnonzero(constants['reached']).tolist() == reached
  # `then` begins with what `the` is already paired with; `12` is alone.
  assert constants['teacher_id_V'].tolist() == [0, 5, 4, -1, 1, -1, -1, -1, -1]
  assert constants['teacher_rest_O'].tolist() == [2, 3, 6, 7]


def test_what_weighs_nothing_is_not_reached():
  strings = ['ab', 'c'], ['a', 'b', 'c']
  settings = {'can_split': [True] * 2, 'V': 2, 'U': 3}
  constants = vocabularies.projection_of(*strings, **settings, decay=0.0)
  assert constants['reached'].tolist() == [True, False, True]


def test_special_tokens_are_not_spelt(models):
  student, teacher = (x.get_vocab() for x in models.tokenizers)
  constants = vocabularies.projection(models, 0.1)
  of = {
    token: constants['piece_t'][constants['piece_s'] == i]
    for token, i in student.items()
  }
  assert of['<|im_end|>'].tolist() == [teacher['</s>']]
  assert of['<|im_start|>'].size == 0
  assert of['Ġteacher'].tolist() == [teacher[c] for c in 'Ġteacher']
  weights = np.bincount(constants['piece_s'], constants['piece_weight'])
  np.testing.assert_allclose(weights[weights > 0], 1, rtol=1e-6)
