"""A teacher's logits over the ids of its student.

A map is [V], the teacher's id for each of the student's, -1 for none; it is one
of a method's `constants`, and absent where both have one vocabulary. The rows
of the teacher's head are what is brought into order, once, so that its logits
come out in it: no chunk of logits is ever gathered or scattered.
"""

import jax.numpy as jnp
import numpy as np

from gakd_jax.data import spelling as spelling_lib
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data import vocab_map
from gakd_jax.objectives import head

# The logit of an id without a probability: finite, so that no product is NaN.
NEVER = -1e30


def shared(models):
  """`shared_of` the tokens that spell the same, and of both ends of a turn.

  models: `models.pair.Models`. {} where both vocabularies are the same.
  """
  if not _differ(models):
    return {}
  student, teacher = models.tokenizers
  ends = student.eos_token_id, teacher.eos_token_id
  return shared_of(
    *vocab_map.shared(student, teacher, None if None in ends else ends),
    models.student_config.vocab_size,
    tokenizer_lib.size(teacher),
  )


def shared_of(s_ids, t_ids, V, U):
  """Constants 'teacher_id_V', of pairs of ids, one for each of the student's.

  And 'teacher_rest_R', those of the teacher's U ids that are in no pair.
  """
  t_id_V = np.full(V, -1, np.int32)
  t_id_V[s_ids] = t_ids
  rest_R = np.setdiff1d(np.arange(U, dtype=np.int32), t_ids)
  return {'teacher_id_V': t_id_V, 'teacher_rest_R': rest_R}


def nearest(models):
  """`nearest_of` the edit distance between tokens; {} as above."""
  if not _differ(models):
    return {}
  s_id_U = np.full(models.teacher_config.vocab_size, -1, np.int32)
  found_U = vocab_map.nearest(*models.tokenizers)
  s_id_U[: len(found_U)] = found_U
  return nearest_of(s_id_U, models.student_config.vocab_size)


def nearest_of(s_id_U, V):
  """Constants 'student_id_U', the student's id of each of the teacher's.

  And 'teacher_id_V', the first of the teacher's that goes to the student's.
  """
  return {
    'student_id_U': s_id_U,
    'teacher_id_V': vocab_map.inverse(s_id_U, V),
  }


def spaces(models):
  """Constants 'space_s' and 'space_t': which tokens begin with a space.

  Or spell nothing, as the end of a turn: with any, the word before has ended.
  """
  return {
    f'space_{side}': _ends_word(tokenizer, config.vocab_size)
    for side, tokenizer, config in zip(
      'st', models.tokenizers, models.configs, strict=False
    )
  }


def _ends_word(tokenizer, V):
  """Bool [V]; of ids without a token, False."""
  spelling = spelling_lib.of(tokenizer)
  ends_V = np.zeros(V, bool)
  for i, string in enumerate(spelling.strings):
    if string is not None:
      n = spelling.lengths[i]
      ends_V[i] = not n or chr(spelling.bytes[spelling.starts[i]]).isspace()
  return ends_V


def _differ(models):
  vocabs = [tokenizer.get_vocab() for tokenizer in models.tokenizers]
  return len(vocabs) == 2 and vocabs[0] != vocabs[1]


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
