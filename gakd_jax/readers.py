"""Who reads the texts of a run: the student, and a teacher in other tokens."""

from gakd_jax import UserError, best
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib


def of(config, objective, writer, tokenizers, paths):
  """[(tokenizer, template)] of a run's models.

  The student's alone, if the teacher reads the same tokens.

  Raises:
    UserError: for two tokenizers where there must be one.
  """
  student = tokenizers[0], config.data.template
  if len(paths) == 1:
    return (student,)
  if objective.one_tokenizer and objective.needs_teacher:
    tokenizer_lib.check_same(*tokenizers, *paths)
  are_same = tokenizer_lib.are_same(*tokenizers)
  if objective.one_tokenizer and are_same:
    _tell_ends(config.data.template, tokenizers, paths)
    return (student,)
  template = config.teacher.template or best.template_of(
    config.teacher.path, default=config.data.template
  )
  if template == student[1] and are_same:
    return (student,)
  if writer.one_tokenizer:
    raise UserError(
      f'{paths[0]} and {paths[1]} have different tokenizers, and the writer '
      f'{config.rollout.writer!r} needs one: the teacher corrects tokens of '
      "the student; set config.rollout.writer to 'student', 'dataset' or "
      "'teacher'"
    )
  return student, (tokenizers[1], template)


def reading(readers, objective):
  """Those of a run's readers that read the texts which are trained on."""
  return readers if objective.needs_teacher else readers[:1]


def _tell_ends(template, tokenizers, paths):
  """Says so if a student learns to end its turns as its teacher never does."""
  end = templates.eos_id(template, tokenizers[0])
  if end not in templates.stop_ids(template, tokenizers[1]):
    end, *others = tokenizers[0].convert_ids_to_tokens(
      [end, *templates.stop_ids(template, tokenizers[1])]
    )
    print(
      f'{paths[0]} is trained to end its turns in {end!r}, and {paths[1]} ends '
      f'them in {" or ".join(map(repr, others))}: it will not teach that end',
      flush=True,
    )
