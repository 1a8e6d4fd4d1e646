"""A teacher's logits over the ids of its student.

A map is [V], the teacher's id for each of the student's, -1 for none; it is one
of a method's `constants`, and absent where both have one vocabulary. The rows
of the teacher's head are what is brought into order, once, so that its logits
come out in it: no chunk of logits is ever gathered or scattered.
"""

import functools

import jax
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
  """Constants 'teacher_id_V' and 'student_id_U', of pairs of ids.

  And 'teacher_rest_O', those of the teacher's U ids that are in no pair.
  """
  t_id_V, s_id_U = np.full(V, -1, np.int32), np.full(U, -1, np.int32)
  t_id_V[s_ids] = t_ids
  s_id_U[t_ids] = s_ids
  rest_O = np.setdiff1d(np.arange(U, dtype=np.int32), t_ids)
  return {
    'teacher_id_V': t_id_V,
    'student_id_U': s_id_U,
    'teacher_rest_O': rest_O,
  }


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


def projection(models, decay):
  """`projection_of` what the tokens spell; {} as above."""
  if not _differ(models):
    return {}
  student, teacher = models.tokenizers
  spellings = [spelling_lib.of(x) for x in (student, teacher)]
  strings = spelling_lib.strings(*spellings)
  encoding = 'utf-8' if spellings[0].written == strings[0] else 'latin-1'
  # Others go by a name: those that spell nothing, or one byte.
  can_split = [
    string is not None and len(string.encode(encoding)) == n
    for string, n in zip(strings[0], spellings[0].lengths, strict=False)
  ]
  return projection_of(
    *strings,
    can_split,
    V=models.student_config.vocab_size,
    U=models.teacher_config.vocab_size,
    decay=decay,
    ends=(student.eos_token_id, teacher.eos_token_id),
  )


def projection_of(s_strings, t_strings, can_split, *, V, U, decay, ends=None):
  """Constants of X-Token: how the student's tokens are spelt in the teacher's.

  Args:
    s_strings, t_strings: what each id spells; None for no token.
    can_split: whether a token of the student may go to several pieces.
    V, U: how many ids the heads have.
    decay: the weight of a piece, of that of the piece before it.
    ends: ids that end a turn, a pair whatever they spell.

  Returns:
    'piece_s', 'piece_t', 'piece_weight' [P]: for every token of the student
    those of the teacher's that it is made of, the longest first from the left,
    their weights summing to 1; one, of one string, where there is such.
    'reached' [U]: ids of the teacher that are among them, weighing anything.
    'teacher_id_V', 'teacher_rest_O': as in `shared_of`; a token without an
    equal goes with its first piece, if no other does.
  """
  t_ids = {}
  for i, string in enumerate(t_strings):
    if string is not None:
      t_ids.setdefault(string, i)
  longest = max(map(len, t_ids))
  pieces = {}
  for i, string in enumerate(s_strings):
    if string in t_ids:
      pieces[i] = [t_ids[string]]
    elif can_split[i]:
      pieces[i] = _split(string, t_ids, longest)
  if ends and None not in ends:
    pieces[ends[0]] = [ends[1]]
  pieces = {i: found for i, found in pieces.items() if found}
  sizes = [len(x) for x in pieces.values()]
  weights = [decay ** np.arange(n) for n in sizes]
  weight_P = np.concatenate([w / w.sum() for w in weights], dtype=np.float32)
  t_P = np.concatenate(list(pieces.values())).astype(np.int32)
  reached_U = np.zeros(U, bool)
  reached_U[t_P[weight_P > 0]] = True
  partner = {}
  for i in sorted(pieces, key=lambda i: (len(pieces[i]), i)):
    partner.setdefault(pieces[i][0], i)
  return {
    'piece_s': np.repeat(list(pieces), sizes).astype(np.int32),
    'piece_t': t_P,
    'piece_weight': weight_P,
    'reached': reached_U,
    **shared_of(list(partner.values()), list(partner), V, len(t_strings)),
  }


def _split(string, t_ids, longest):
  """Ids of the longest tokens from the left; [] if some byte is in none."""
  ids, start = [], 0
  while start < len(string):
    for end in range(min(len(string), start + longest), start, -1):
      if string[start:end] in t_ids:
        ids.append(t_ids[string[start:end]])
        start = end
        break
    else:
      return []
  return ids


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


def common(student, teacher, constants):
  """`Outputs` of both over the same ids, and `masked` for their logits."""
  t_id_V = constants.get('teacher_id_V')
  if t_id_V is None:
    return head.shared((student, teacher)), lambda z_NV: z_NV
  return (student, over_students(teacher, t_id_V)), lambda z_NV: masked(
    z_NV, t_id_V
  )


def ordered(student, teacher, constants):
  """`Outputs` of the student, of the teacher over its ids, and over the others.

  The last is missing where there are none. They are apart since to slice logits
  would move them between devices that split the vocabulary, which those that
  have other rows wait for. And which of the student's ids the teacher has, [V].
  """
  t_id_V = constants.get('teacher_id_V')
  if t_id_V is None:
    outputs = head.shared((student, teacher))
    return outputs, jnp.ones(outputs[0].head.vocab_size, bool)
  rest_O = constants['teacher_rest_O']
  outputs = student, over_students(teacher, t_id_V)
  if rest_O.size:
    outputs += (over_students(teacher, rest_O),)
  return outputs, t_id_V >= 0


def log_softmax(z_NV, rest, shared_V):
  """Log-probabilities of what `ordered` has of the teacher: [N, V], ([N, O],).

  rest: of its others, a tuple of one or none.
  """
  z_NV = jnp.where(shared_V, z_NV, NEVER)
  total_N1 = functools.reduce(
    jnp.logaddexp,
    [jax.nn.logsumexp(z, axis=-1, keepdims=True) for z in (z_NV, *rest)],
  )
  return z_NV - total_N1, tuple(z - total_N1 for z in rest)
