"""Answers to held-out prompts, scored against their references.

Defaults are the field's protocol for instruction sets (MiniLLM, arXiv
2306.08543): sampling at temperature 1, no top-p or top-k, no repeated 6-gram,
at most 256 new tokens, five seeds; ROUGE-L is the maximum over references.
With temperature 0 one seed is enough.

An answer ends before the first of the `stop` strings that it holds (leading
blanks and thinking do not count as answer). That is done to its text: decoding
goes on to EOS or `max_new_tokens`, as what the text is is not known before.
"""

import bisect
import contextlib
import dataclasses
import time
from typing import ClassVar, Literal

import jax
import numpy as np

from gakd_jax import (
  UserError,
  fingerprint,
  grouping,
  log,
  partial,
  rundir,
  settings,
  streaming,
)
from gakd_jax.data import encoding, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import answers as answers_lib
from gakd_jax.evals import encoded, scores, summary, tasks
from gakd_jax.models import caches, decoding
from gakd_jax.settings import (
  Count,
  Length,
  Mass,
  Natural,
  NotNegative,
  Seeds,
  Text,
)


@dataclasses.dataclass(frozen=True)
class Generation:
  teacher_reads_student_ids: ClassVar[bool] = False

  name: str
  rows: tuple
  # What makes an answer good, see `tasks`.
  task: Literal[*tasks.TASKS] = 'instruct'
  max_new_tokens: Length = 256
  stop: tuple[Text, ...] | None = None  # its ends; None: those of the task
  temperature: NotNegative = 1.0
  top_k: Natural = 0
  top_p: Mass = 1.0
  no_repeat_ngram: Natural = 6
  cache: Literal[*caches.KINDS] | None = None  # keys and values in int8
  seeds: Seeds = (10, 20, 30, 40, 50)
  batch_size: Count = 32
  first_reference: bool = False  # scored against it alone, not the best of all
  # python:<module>:<function> of (`data.sources.Row`, answer): how right it is,
  # 0 to 1. Answers have an accuracy then.
  check: Text | None = None
  about: dict = dataclasses.field(default_factory=dict)  # see `evaluator`

  def __post_init__(self):
    if tasks.get(self.task).rule:  # Bad rows come up before any work.
      for row in self.rows:
        tasks.gold(self.task, row)
    if self.check is not None:
      tasks.checker(self.check)
      if 'accuracy' in tasks.get(self.task).scores:
        raise UserError(
          f'config.evals.{self.name}: check={self.check!r}, and the task '
          f"{self.task!r} has its own; take the task 'instruct'"
        )

  @property
  def scores(self):
    """Those of each answer; by the first, models are compared."""
    own = () if self.check is None else ('accuracy',)
    return own + tasks.get(self.task).scores

  def metrics(self, has_teacher):
    del has_teacher
    return summary.names(self)

  def run(self, subject, params, tag):
    """Metrics of the answers, see `summary` and `evaluator`.

    Answers go to <workdir>/answers/<name>-<seed>.jsonl, with the `ids`
    that were written: thoughts included, and the EOS if there was one, which
    `tokens` does not count. An answer that ended at a stop string is there as
    far as it counts, and `cut_at` is the string.
    """
    texts = self.texts(subject)
    model = decoding.unstack(
      subject.models.student(params), subject.models.dtype, self.cache
    )
    n = len(self.rows) * len(self.seeds)
    progress = contextlib.nullcontext()
    if subject.identity is not None:
      progress = log.Progress(n, 0, f'{subject.workdir.name}: {self.name}')
    with progress:
      lines = {
        seed: self._one_seed(subject, model, texts.prompts, seed, tag, progress)
        for seed in self.seeds
      }
    return {
      'shortened': texts.shortened,
      'metrics': summary.of(self, lines, self._buckets(subject)),
    }

  def texts(self, subject):
    """`encoded.Encoded`, in which the task's examples stand before each prompt.

    Raises:
      UserError: if the task has examples that do not fit.
    """
    texts = encoded.encode(subject, self.rows)
    if not tasks.get(self.task).examples:
      return texts
    prompts = [self._with_examples(subject, row) for row in self.rows]
    return dataclasses.replace(texts, prompts=prompts, shortened=0)

  def _with_examples(self, subject, row):
    template, most = subject.template, subject.max_prompt_length
    shown = tasks.asked(self.task, row, turns=templates.has_turns(template))
    ids, _ = encoding.encode(
      subject.models.tokenizer,
      dataclasses.replace(shown, references=()),
      template,
    )
    if len(ids) > most:
      raise UserError(
        f'config.evals.{self.name}: the examples of task {self.task!r} and '
        f'{row.where or "a row"} take {len(ids)} tokens, and '
        f'config.data.max_prompt_length is {most}; raise it'
      )
    return ids

  def _buckets(self, subject):
    """Of each row, in which bucket of `scores.length_bucket` it is."""
    ids = subject.models.tokenizer(
      [row.references[0] for row in self.rows],
      add_special_tokens=False,
      verbose=False,
    ).input_ids
    return np.array([scores.length_bucket(len(x)) for x in ids])

  def _one_seed(self, subject, model, prompts, seed, tag, progress):
    """The lines of the answers to one seed; they are written."""
    answers = self._answers(subject, model, prompts, seed, progress)
    lines = []
    for i, row in enumerate(self.rows):
      line = answers_lib.prompt(i, row, tag) | answers[i]
      text = line['answer']
      if tasks.TASKS[self.task].rule:
        line['extracted'] = tasks.extracted(self.task, row, text)
        line['gold'] = tasks.gold(self.task, row)
      line['scores'] = tasks.score(self.task, row, text, self.first_reference)
      if self.check is not None:
        line['scores'] |= tasks.checked(self.check, row, text)
      lines.append(line)
    answers_lib.write(subject.workdir, self.name, seed, lines)
    return lines

  def _answers(self, subject, model, prompts, seed, progress):
    """{index: {'answer', 'tokens', ...}}.

    Those that an interrupted evaluation has written are not written again.
    """
    kept, answers = None, {}
    if subject.identity is not None:
      path = answers_lib.path_of(subject.workdir, self.name, seed)
      kept = partial.Partial(
        path.with_suffix('.partial'),
        self._settings()
        | {
          'weights': subject.identity,
          'template': subject.template,
          'prompts': fingerprint.digest(prompts),
        },
        subject.force,
      )
      answers = kept.read(_taken)
      if answers:
        progress.advance(len(answers))

    ends = templates.stop_ids(subject.template, subject.models.tokenizer)
    start, new_tokens = time.perf_counter(), 0
    for indices, written in streaming.stream(
      model,
      prompts,
      max_new_tokens=self.max_new_tokens,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      no_repeat_ngram=self.no_repeat_ngram,
      eos_ids=ends,
      seed=seed,
      batch_size=self.batch_size,
      valid_vocab=tokenizer_lib.size(subject.models.tokenizer),
      done=set(answers),
      keep_end=True,
    ):
      new = {
        i: self._answer(subject.models.tokenizer, ids, ends)
        for i, ids in zip(indices, written, strict=True)
      }
      answers |= new
      if kept:
        kept.append([{'index': i} | x for i, x in new.items()])
        new_tokens += sum(map(len, written))
        speed = new_tokens / (time.perf_counter() - start)
        progress.advance(len(new), tokens_per_second=speed)
    if kept and new_tokens:
      _record_speed(
        subject.workdir,
        f'{self.name}-{seed}',
        {
          'tokens_per_second': speed,
          'seconds': time.perf_counter() - start,
          'padding': grouping.padding(prompts, self.batch_size),
        },
      )
    return answers

  def _answer(self, tokenizer, ids, ends):
    """What is kept of the answer that ids spell."""
    text = encoding.decode(tokenizer, ids)
    tokens = len(ids) - bool(ids and ids[-1] in ends)
    found = [(text.find(x), x) for x in self._stops() if x in text]
    if not found:
      return {'answer': text, 'tokens': tokens, 'ids': ids}
    end, stop = min(found)
    text = text[:end].rstrip()
    # The first that spell it; the last of them may go on into the stop string.
    tokens = bisect.bisect_left(
      range(tokens),
      True,
      key=lambda n: encoding.decode(tokenizer, ids[:n]).startswith(text),
    )
    kept = {'answer': text, 'tokens': tokens, 'ids': ids[:tokens]}
    return kept | {'cut_at': stop}

  def _stops(self):
    return tasks.get(self.task).stop if self.stop is None else self.stop

  def _settings(self):
    """What an answer depends on, but for its seed."""
    other = ('name', 'rows', 'about', 'task', 'seeds', 'first_reference')
    other += ('check',)
    settings = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in (*other, 'batch_size')
    }
    return settings | {'stop': self._stops()}


_KEPT = {'index': Natural, 'answer': str, 'tokens': Natural, 'ids': list}


def _taken(line):
  """What is made of a line that was kept: an index, and its answer."""
  settings.check_row('', line, _KEPT)
  return line.pop('index'), line


def _record_speed(workdir, name, speed):
  """Adds to speed.json: no result, as it is never twice the same."""
  if jax.process_index() == 0:  # Nobody reads it in the run.
    text = log.to_json(rundir.read_speed(workdir) | {name: speed}, indent=2)
    log.write_atomically(workdir / 'speed.json', text)
