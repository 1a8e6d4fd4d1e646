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
import collections
import contextlib
import dataclasses
import json
import statistics
import time
from typing import ClassVar

import jax

from gakd_jax import UserError, partial, report, sampling
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import answers as answers_lib
from gakd_jax.evals import scores, tasks
from gakd_jax.evals import statistics as statistics_lib
from gakd_jax.models import decoding


@dataclasses.dataclass(frozen=True)
class Generation:
  teacher_reads_student_ids: ClassVar[bool] = False

  name: str
  rows: tuple
  task: str = 'instruct'  # what makes an answer good, see `tasks`
  max_new_tokens: int = 256
  stop: tuple[str, ...] | None = None  # its ends; None: those of the task
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  no_repeat_ngram: int = 6
  seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
  batch_size: int = 32
  first_reference: bool = False  # scored against it alone, not the best of all
  left_out: int = 0

  def __post_init__(self):
    if isinstance(self.stop, str) or not all(
      x and isinstance(x, str) for x in self.stop or ()
    ):
      raise UserError(
        f'config.evals.{self.name}: stop={self.stop!r} is no tuple of texts '
        r"such as ('\n\n',)"
      )
    if tasks.get(self.task).rule:  # Bad rows come up before any work.
      for row in self.rows:
        tasks.gold(self.task, row)

  def run(self, subject, params, tag):
    """{metric: value} of the answers, means over rows and seeds.

    Metrics are those of the task (0 to 100), `answer_tokens`, and `unfinished`,
    the percentage that was cut off at `max_new_tokens`. `rouge_l_11-50` and the
    like are of the prompts whose first reference has so many tokens. With
    several seeds, `<metric>_std` is the deviation over them, and of tasks with
    right and wrong `pass_at_<k>` that of k answers to a prompt one is right (a
    percentage); with one, `<metric>_stderr` is the standard error over rows.
    Answers go to <workdir>/answers/<name>-<seed>.jsonl, those of the last
    evaluation, with the `ids` that were written: thoughts included, and the EOS
    if there was one, which `tokens` does not count. An answer that ended at a
    stop string is there as far as it counts, and `cut_at` is the string.
    """
    prompts = self.prompts(subject)
    buckets = [
      scores.length_bucket(
        len(
          subject.models.tokenizer.encode(
            r.references[0], add_special_tokens=False
          )
        )
      )
      for r in self.rows
    ]
    model = decoding.unstack(
      subject.models.student(params), subject.models.dtype
    )
    n = len(self.rows) * len(self.seeds)
    pool = tasks.Pool(self.task, expected=n, first_only=self.first_reference)
    progress = contextlib.nullcontext()
    if subject.identity is not None:
      progress = report.Progress(n, 0, f'{subject.workdir.name}: {self.name}')
    with pool, progress:
      metrics, scored = zip(
        *(
          self._one_seed(
            subject, model, prompts, buckets, seed, tag, pool, progress
          )
          for seed in self.seeds
        ),
        strict=True,
      )
    result = {}
    for key in metrics[0]:
      values = [m[key] for m in metrics]
      result[key] = statistics.fmean(values)
      if len(values) > 1:
        result[f'{key}_std'] = statistics.stdev(values)
    return result | self._over_rows(scored)

  def prompts(self, subject):
    """The ids that each row's answer begins after.

    Raises:
      UserError: if the task has examples that do not fit.
    """
    return [self._prompt(subject, row) for row in self.rows]

  def _prompt(self, subject, row):
    tokenizer, template = subject.models.tokenizer, subject.template
    most = subject.max_prompt_length
    if not tasks.get(self.task).examples:
      return tokenizer_lib.fit_prompt(tokenizer, row, template, most)
    shown = tasks.asked(self.task, row, turns=templates.has_turns(template))
    ids, _ = tokenizer_lib.encode(
      tokenizer, dataclasses.replace(shown, references=()), template
    )
    if len(ids) > most:
      raise UserError(
        f'config.evals.{self.name}: the examples of task {self.task!r} and '
        f'{row.where or "a row"} take {len(ids)} tokens, and '
        f'config.data.max_prompt_length is {most}; raise it'
      )
    return ids

  def _over_rows(self, scored):
    """Metrics of each row's scores, [seeds][rows] of {metric: score}."""
    if len(scored) == 1:
      rows = scored[0]
      return {
        f'{key}_stderr': statistics_lib.standard_error([x[key] for x in rows])
        for key in rows[0]
      }
    if not tasks.TASKS[self.task].rule:
      return {}
    passed = [
      statistics_lib.pass_at(sum(x['accuracy'] > 0 for x in row), len(row))
      for row in zip(*scored, strict=True)
    ]
    return {
      f'pass_at_{k}': 100 * statistics.fmean(row[k] for row in passed)
      for k in passed[0]
    }

  def _one_seed(
    self, subject, model, prompts, buckets, seed, tag, pool, progress
  ):
    answers = self._answers(subject, model, prompts, seed, pool, progress)
    scored = pool.results()
    lines = []
    for i, row in enumerate(self.rows):
      line = answers_lib.prompt(i, row, tag) | answers[i]
      if tasks.TASKS[self.task].rule:
        line['extracted'] = tasks.extracted(self.task, row, line['answer'])
        line['gold'] = tasks.gold(self.task, row)
      lines.append(line | {'scores': scored[i]})
    answers_lib.write(subject.workdir, self.name, seed, lines)
    return self._summary(lines, buckets), [line['scores'] for line in lines]

  def _answers(self, subject, model, prompts, seed, pool, progress):
    """{index: {'answer', 'tokens', ...}}; on their way they go to `pool`.

    Those that an interrupted evaluation has written are not written again.
    """
    log, answers = None, {}
    if subject.identity is not None:
      path = answers_lib.path_of(subject.workdir, self.name, seed)
      log = partial.Partial(
        path.with_suffix('.partial'),
        self._settings()
        | {
          'weights': subject.identity,
          'template': subject.template,
          'prompts': partial.digest(prompts),
        },
      )
      answers = {line.pop('index'): line for line in log.read()}
      if answers:
        progress.advance(len(answers))

    def add(new):
      pool.add({i: (self.rows[i], x['answer']) for i, x in new.items()})

    add(answers)
    ends = templates.stop_ids(subject.template, subject.models.tokenizer)
    start, new_tokens = time.perf_counter(), 0
    for indices, written in sampling.stream(
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
      # Of a batch that was half written, some were counted before.
      fresh = len(new.keys() - answers.keys())
      answers |= new
      add(new)
      if log:
        log.append([{'index': i} | x for i, x in new.items()])
        new_tokens += sum(map(len, written))
        speed = new_tokens / (time.perf_counter() - start)
        progress.advance(fresh, tokens_per_second=speed)
    if log and new_tokens:
      _record_speed(
        subject.workdir,
        f'{self.name}-{seed}',
        {
          'tokens_per_second': speed,
          'seconds': time.perf_counter() - start,
          'padding': sampling.padding(prompts, self.batch_size),
        },
      )
    return answers

  def _answer(self, tokenizer, ids, ends):
    """What is kept of the answer that ids spell."""
    text = tokenizer_lib.decode(tokenizer, ids)
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
      key=lambda n: tokenizer_lib.decode(tokenizer, ids[:n]).startswith(text),
    )
    kept = {'answer': text, 'tokens': tokens, 'ids': ids[:tokens]}
    return kept | {'cut_at': stop}

  def _stops(self):
    return tasks.get(self.task).stop if self.stop is None else self.stop

  def _settings(self):
    """What an answer depends on, but for its seed."""
    scored = ('name', 'rows', 'left_out', 'task', 'seeds', 'first_reference')
    settings = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in scored
    }
    return settings | {'stop': self._stops()}

  def _summary(self, lines, buckets):
    metrics = collections.defaultdict(list)
    for line, bucket in zip(lines, buckets, strict=True):
      for metric, value in line['scores'].items():
        metrics[metric].append(value)
        metrics[f'{metric}_{bucket}'].append(value)
      metrics['answer_tokens'].append(line['tokens'])
      cut = line['tokens'] >= self.max_new_tokens
      metrics['unfinished'].append(100.0 * cut)
    means = {key: statistics.fmean(metrics[key]) for key in sorted(metrics)}
    return means | tasks.corpus_scores(
      self.task,
      self.rows,
      [line['answer'] for line in lines],
      self.first_reference,
    )


def _record_speed(workdir, name, speed):
  """Adds to speed.json: no result, as it is never twice the same."""
  if jax.process_index() == 0:
    file = workdir / 'speed.json'
    known = json.loads(file.read_text()) if file.exists() else {}
    report.write_atomically(
      file, report.to_json(known | {name: speed}, indent=2)
    )
