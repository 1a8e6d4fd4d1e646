"""Fidelity: does the student behave like its teacher?

Token by token, on three texts for the same prompts (gold references, the
teacher's answers, the student's own): everything that `loss` measures, as in
`agreement_gold`, `reverse_kl_teacher`, `ece_student`. Answers are the token ids
that were written, after the prompt that they were written to, and have an end
only if one was written. Answer by answer, as in
"Generalization vs Fidelity" (ACL 2025): `answer_agreement`, the percentage of
prompts on which both answer the same, right or wrong, and `rationale_bleu` and
`rationale_rouge_l` of the student's whole answer against the teacher's.
"""

import dataclasses
import statistics
from typing import ClassVar

from gakd_jax import UserError, hosts
from gakd_jax.evals import answers, extract, loss, scores, tasks
from gakd_jax.evals import statistics as statistics_lib
from gakd_jax.evals.generation import Generation
from gakd_jax.settings import Count


@dataclasses.dataclass(frozen=True)
class Fidelity:
  teacher_reads_student_ids: ClassVar[bool] = True

  name: str
  of: Generation  # the answers to compare; it is evaluated before
  batch_size: Count = 16

  def metrics(self, has_teacher):
    """While training, when no answers of the teacher are there."""
    if not has_teacher:
      return []
    return [
      *(f'{x}_{text}' for x in loss.METRICS for text in ('gold', 'student')),
      'sequence_kl_student',
    ]

  def run(self, subject, params, tag):
    """See `evaluator`; no metric of a subject without a teacher.

    What is measured of the teacher's answers needs `subject.teacher_workdir`.
    Log-probabilities are of the answers to the first seed, but for
    `sequence_kl_student`, KL(q || p) of a whole answer in nats, of all.
    """
    del tag
    if subject.models.teacher_definition is None:
      return {'metrics': {}}
    student = self._answers(subject.workdir)
    result, written = {}, []
    if subject.teacher_workdir is not None:
      teacher = self._answers(subject.teacher_workdir)
      written = [('teacher', self._ids(teacher[0]))]
      pairs = {
        seed: self._compare(*([x['answer'] for x in lines] for lines in pair))
        for seed, *pair in zip(self.of.seeds, student, teacher, strict=True)
      }
      result = statistics_lib.all_over_seeds(pairs)
    texts = self.of.texts(subject)

    def measure(name, responses):
      """Of one text for each prompt; and how long they are."""
      shown = [
        (prompt, response[: subject.max_length - len(prompt)])
        for prompt, response in zip(texts.prompts, responses, strict=True)
        if response
      ]
      if not shown:
        return {}, 0
      found = loss.measure(subject, params, shown, self.batch_size)
      for value in found.values():
        if isinstance(value, dict) and 'by_row' in value:
          known = iter(value['by_row'])
          value['by_row'] = [next(known) if x else None for x in responses]
      length = sum(len(response) for _, response in shown) / len(shown)
      return {f'{key}_{name}': value for key, value in found.items()}, length

    nats = {}
    for name, responses in (('gold', texts.references), *written):
      result |= measure(name, responses)[0]
    for seed, lines in zip(self.of.seeds, student, strict=True):
      found, length = measure('student', self._ids(lines))
      if seed == self.of.seeds[0]:
        result |= found
      if found:
        nats[seed] = length * found['reverse_kl_student']['mean']
    if nats:
      result['sequence_kl_student'] = statistics_lib.over_seeds(nats)
    return {
      'shortened': texts.shortened,
      'truncated': texts.truncated,
      'metrics': result,
    }

  def _answers(self, workdir):
    """The lines of all prompts, for each seed."""
    return hosts.of_first(
      lambda: [answers.read(workdir, self.of, seed) for seed in self.of.seeds]
    )

  def _ids(self, lines):
    """The token ids of each answer."""
    if not all('ids' in line for line in lines):
      raise UserError(
        f'config.evals.{self.name}: the answers to {self.of.name!r} have no '
        'token ids: they are of an earlier version; use another --workdir'
      )
    return [line['ids'] for line in lines]

  def _compare(self, student, teacher):
    task = self.of.task
    agree, bleu, rouge = [], [], []
    for row, a, b in zip(self.of.rows, student, teacher, strict=True):
      if tasks.TASKS[task].rule:
        x, y = (tasks.extracted(task, row, text) for text in (a, b))
        # Two answers from which nothing can be read agree on nothing.
        agree.append(100.0 * extract.same(x, y))
      else:
        agree.append(scores.exact_match(a, b))
      bleu.append(scores.bleu(a, b))
      rouge.append(scores.rouge_l(a, b))
    return {
      'answer_agreement': statistics.fmean(agree),
      'rationale_bleu': statistics.fmean(bleu),
      'rationale_rouge_l': statistics.fmean(rouge),
    }
