"""What the student writes in the run, as a teacher with other tokens reads it.

Between the writing and the step, on the host: the bytes that the student's
tokens spell are the text (those that are no text are left out, and have no
partner), which the teacher's tokenizer reads, and both are aligned as the rows
of the data are, see `data.aligned`.
"""

import dataclasses
import functools

import jax
import numpy as np

from gakd_jax import sharding, writing
from gakd_jax.data import aligned, encoding, pipeline, spelling
from gakd_jax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads batches of two tokenizers again, once they are written.

  readers: (tokenizer, template) of the student, and of the teacher.
  kinds: of `aligned.KINDS`.
  """

  readers: tuple
  kinds: tuple

  @functools.cached_property
  def _spellings(self):
    return [spelling.of(tokenizer) for tokenizer, _ in self.readers]

  def read(self, given, written, metrics, mesh):
    """The batch to train on, and metrics.

    Args:
      given: `pipeline.Batch` of the data, this process's rows on the host.
      written, metrics: what the run's writer made of it.
    """
    given = writing.grouped(given, written.group)
    is_new_B = sharding.local_rows(written.written_B)
    tokens = jax.tree.map(sharding.local_rows, written.student)
    new = np.flatnonzero(is_new_B)
    bins = [[] for _ in is_new_B]
    for b, row in zip(new, self._rows(given, tokens, new), strict=True):
      bins[b] = [row]
    pads = [tokenizer_lib.pad_id(tokenizer) for tokenizer, _ in self.readers]
    length = tokens.ids_BT.shape[1]
    read = pipeline.collate_aligned(bins, length, pads, sorted(given.align))
    teacher, align = jax.tree.map(
      lambda new, old: np.where(is_new_B[:, None], new, old),
      (read.teacher, read.align),
      (given.teacher, given.align),
    )
    metrics = metrics | pipeline.coverage(
      pipeline.Batch(tokens, teacher, align)
    )
    teacher, align = sharding.put_batch((teacher, align), mesh)
    return written.replace(teacher=teacher, align=align), metrics

  def _rows(self, given, tokens, new):
    """Rows as of `aligned.Aligned`, of some of the batch."""
    s_spelling, _ = self._spellings
    responses = [tokens.ids_BT[b][tokens.mask_BT[b]] for b in new]
    readings = [spelling.read(s_spelling, ids) for ids in responses]
    texts = [
      reading.without_blank().text.decode(errors='ignore')
      for reading in readings
    ]
    ended = [reading.ended for reading in readings]
    found = encoding.encode_responses(
      self.readers[1][0], texts, ended, self.readers[1][1]
    )
    for b, response, ids in zip(new, responses, found, strict=True):
      s_prompt, t_prompt = (_prompt(x, b) for x in (tokens, given.teacher))
      s, t = (s_prompt, response), (t_prompt, np.array(ids, np.int32))
      parts = aligned.relate(self.kinds, self._spellings, s, t)
      room = given.teacher.ids_BT.shape[1] - len(t_prompt)
      yield aligned.kept(s, (t_prompt, t[1][:room]), parts)


def _prompt(tokens, b):
  return tokens.ids_BT[b][(tokens.segments_BT[b] > 0) & ~tokens.mask_BT[b]]
