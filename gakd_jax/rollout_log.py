"""What a person sees of rollouts: the same prompts over training, and warnings.

<workdir>/rollouts.jsonl has a line for each prompt and time: `step` (optimizer
steps of the student that wrote), `index`, `instruction`, `input`, `pieces`
([text, whether it is the teacher's] in order), `tokens` and `finished`.
"""

import collections
import itertools

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import inputs, keys, log, rundir, sharding, stopping
from gakd_jax.data import pipeline
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import answers

_TIMES = 8  # in a run that a prompt is written to, beside its end
_WINDOW = 20  # rollouts that a warning looks at
_COLLAPSES = (
  ('empty', 0.5, 'are empty: the student ends before it says anything'),
  (
    'unfinished',
    0.75,
    'run into the limit: the student does not end; raise '
    'config.rollout.max_new_tokens, or fine-tune the student first',
  ),
)


class RolloutLog:
  """Writes rollouts.jsonl; a run that goes on keeps what is before its step."""

  def __init__(self, run, start, total):
    self._run = run
    self._path = run.workdir / 'rollouts.jsonl'
    self._every = max(1, total // _TIMES)
    self._total = total
    self._prompts, self._rows = [], []
    if run.writer.room:
      n = run.config.report.rollouts
      texts = run.texts if len(run.reading) == 1 else run.texts.student
      self._prompts = [texts[i][0] for i in range(min(n, len(texts)))]
      self._rows = inputs.rows(run.config, run.writer, run.texts.places[:n])
    if self._prompts and jax.process_index() == 0:
      lines = rundir.read_rollouts(run.workdir)
      self._replace([x for x in lines if x['step'] < start])

  def is_due(self, step):
    is_time = step % self._every == 0 or step == self._total
    return is_time and bool(self._prompts)

  def write(self, params, step):
    """Has the student of `step` write, if it is due."""
    if not self.is_due(step):
      return
    run = self._run
    tokens, by_teacher_BT = run.writer.sample(
      run.models, params, self._batch(), keys.of(run.config.seed, 'writer')
    )
    whole = NamedSharding(run.mesh, P())
    tokens, by_teacher_BT = stopping.fetch(
      jax.device_put((tokens, by_teacher_BT), whole)
    )
    lines = []
    for i, row in enumerate(self._rows):
      response_T = tokens.mask_BT[i]
      ids = tokens.ids_BT[i][response_T]
      line = answers.prompt(i, row, step)
      del line['references']
      lines.append(
        line
        | {
          'pieces': pieces(
            run.models.tokenizer, ids, by_teacher_BT[i][response_T]
          ),
          'tokens': len(ids),
          'finished': bool(ids[-1] in run.writer.ends.eos_ids),
        }
      )
    if jax.process_index() == 0:
      self._replace(rundir.read_rollouts(run.workdir) + lines)

  def _batch(self):
    """The prompts on the mesh; empty rows fill the batch up."""
    ways = sharding.batch_ways(self._run.mesh)
    n = -(-len(self._prompts) // ways) * ways
    length = max(map(len, self._prompts))
    bins = [[(ids, [])] for ids in self._prompts]
    bins += [[]] * (n - len(bins))
    tokens = pipeline.collate(
      bins,
      length + self._run.writer.room,
      tokenizer_lib.pad_id(self._run.models.tokenizer),
    )
    rows_B = np.where(np.arange(n) < len(self._prompts), np.arange(n), -1)
    batch = pipeline.Batch(tokens, tokens, rows_B=rows_B.astype(np.int32))
    own = sharding.own_rows(n, self._run.mesh)
    return sharding.put_batch(
      jax.tree.map(lambda x: x[own], batch), self._run.mesh
    )

  def _replace(self, lines):
    text = ''.join(log.to_json(x) + '\n' for x in lines)
    log.write_atomically(self._path, text)


def pieces(tokenizer, ids, by_teacher):
  """[text, whether it is the teacher's]: a text in order, of its token ids.

  A character of several tokens belongs to who wrote its last one.
  """
  found, n, before = [], 0, ''
  for is_teachers, group in itertools.groupby(by_teacher.tolist()):
    n += len([*group])
    text = tokenizer.decode(
      ids[:n].tolist(), clean_up_tokenization_spaces=False
    )
    whole = text.rstrip('\ufffd') if n < len(ids) else text
    if len(whole) > len(before):
      found.append([whole[len(before) :], is_teachers])
      before = whole
  return found


class Watch:
  """Notices when responses collapse."""

  def __init__(self):
    self._seen = collections.defaultdict(
      lambda: collections.deque(maxlen=_WINDOW)
    )
    self._warned = set()

  def warnings(self, metrics):
    """New lines to show, of a step's metrics; each kind once in a run."""
    lines = []
    for name, most, meaning in _COLLAPSES:
      if f'rollout/{name}' not in metrics:
        continue
      seen = self._seen[name]
      seen.append(float(metrics[f'rollout/{name}']))
      share = sum(seen) / len(seen)
      if len(seen) == _WINDOW and share > most and name not in self._warned:
        self._warned.add(name)
        lines.append(
          f"warning: {share:.0%} of the last {_WINDOW} steps' responses "
          f'{meaning}'
        )
    return lines
