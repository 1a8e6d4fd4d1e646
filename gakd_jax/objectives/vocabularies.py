"""A teacher's logits over the ids of its student.

A map is [V], the teacher's id for each of the student's, -1 for none; it is one
of a method's `constants`, and absent where both have one vocabulary. The rows
of the teacher's head are what is brought into order, once, so that its logits
come out in it: no chunk of logits is ever gathered or scattered.
"""

import jax.numpy as jnp
import numpy as np

from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.objectives import head

# The logit of an id without a probability: finite, so that no product is NaN.
NEVER = -1e30


def shared(models):
  """`shared_of` the tokens of one string.

  models: `models.pair.Models`. {} where both vocabularies are the same.
  """
  if not _differ(models):
    return {}
  from gakd_jax.data import vocab_map

  student, teacher = models.tokenizers
  return shared_of(
    *vocab_map.shared(student, teacher),
    models.student_config.vocab_size,
    tokenizer_lib.size(teacher),
  )


def shared_of(s_ids, t_ids, V, U):
  """Constants 'teacher_id_V', of pairs of ids, each counting once.

  And 'teacher_rest_R', those of the teacher's U ids that are in no pair.
  """
  t_ids, first = np.unique(np.asarray(t_ids), return_index=True)
  t_id_V = _first(np.asarray(s_ids)[first], t_ids, V)
  return {
    'teacher_id_V': t_id_V,
    'teacher_rest_R': np.setdiff1d(np.arange(U), t_id_V).astype(np.int32),
  }


def nearest(models):
  """`nearest_of` the edit distance between tokens; {} as above."""
  if not _differ(models):
    return {}
  from gakd_jax.data import vocab_map

  student, teacher = models.tokenizers
  s_id_U = np.full(models.teacher_config.vocab_size, -1, np.int32)
  found_U = vocab_map.nearest(student, teacher)
  s_id_U[: len(found_U)] = found_U
  return nearest_of(s_id_U, models.student_config.vocab_size)


def nearest_of(s_id_U, V):
  """Constants 'student_id_U', the student's id of each of the teacher's.

  And 'teacher_id_V', the first of the teacher's that goes to the student's.
  """
  t_ids = np.flatnonzero(s_id_U >= 0)
  return {
    'student_id_U': s_id_U,
    'teacher_id_V': _first(s_id_U[t_ids], t_ids, V),
  }


def _differ(models):
  vocabs = [tokenizer.get_vocab() for tokenizer in models.tokenizers]
  return len(vocabs) == 2 and vocabs[0] != vocabs[1]


def _first(s_ids, t_ids, V):
  """The map of pairs of ids; the first of a student's counts."""
  t_id_V = np.full(V, -1, np.int32)
  t_id_V[np.asarray(s_ids)[::-1]] = np.asarray(t_ids)[::-1]
  return t_id_V


def over_students(teacher, t_id_V):
  """The teacher's `Outputs` over the student's ids.

  Where it has none the logit is that of another, to be `masked`.
  """
  ids_V = jnp.maximum(t_id_V, 0)
  weights = teacher.head
  gathered_RVD = weights.gathered_RVD
  if gathered_RVD is not None:
    gathered_RVD = gathered_RVD[:, ids_V]
  return teacher.replace(
    head=weights.replace(
      weight_VD=weights.weight_VD[ids_V],
      gathered_RVD=gathered_RVD,
      valid=None,
    )
  )


def masked(z_NV, t_id_V):
  """Logits, but of the ids that the teacher has, too."""
  return jnp.where(t_id_V >= 0, z_NV, NEVER)


def common(student, teacher, own):
  """`Outputs` of both over the same ids, and `masked` for their logits."""
  t_id_V = own.constants.get('teacher_id_V')
  if t_id_V is None:
    return head.shared((student, teacher)), lambda z_NV: z_NV
  return (student, over_students(teacher, t_id_V)), lambda z_NV: masked(
    z_NV, t_id_V
  )


def ordered(student, teacher, own):
  """`Outputs`, the teacher's over the student's ids and then its own others.

  And which of the student's ids the teacher has, too, [V].
  """
  t_id_V = own.constants.get('teacher_id_V')
  if t_id_V is None:
    outputs = head.shared((student, teacher))
    return outputs, jnp.ones(outputs[0].head.vocab_size, bool)
  order = jnp.concatenate([t_id_V, own.constants['teacher_rest_R']])
  return (student, over_students(teacher, order)), t_id_V >= 0


def spaces(models):
  """Constants 'space_s' and 'space_t': which tokens begin with a space.

  Or are special: with any of them, the word before has ended. [V] and [U].
  """
  return {
    f'space_{side}': _begins_with_space(tokenizer, config.vocab_size)
    for side, tokenizer, config in zip(
      'st', models.tokenizers, models.configs, strict=False
    )
  }


def _begins_with_space(tokenizer, size):
  is_space_V = np.zeros(size, bool)
  for token, i in tokenizer.get_vocab().items():
    # Blank, line feed, tab and return as byte-level tokenizers write them.
    is_space_V[i] = (
      token[:1] in ('Ġ', 'Ċ', 'ĉ', 'č', '▁') or token[:1].isspace()
    )
  is_space_V[list(tokenizer.all_special_ids)] = True
  return is_space_V
