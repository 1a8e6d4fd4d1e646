"""COMET of translations (Rei et al., arXiv 2009.09025), an optional extra.

It reads the source text as well as answer and reference, with a model of half
a billion parameters: `pip install 'gakd_jax[comet]'`, which brings PyTorch, and
a checkpoint from the hub, or its file.
"""

import dataclasses
import os
from typing import ClassVar

from gakd_jax import UserError, hosts
from gakd_jax.evals import answers, statistics
from gakd_jax.evals.generation import Generation
from gakd_jax.settings import Count, Text


@dataclasses.dataclass(frozen=True)
class Comet:
  teacher_reads_student_ids: ClassVar[bool] = False

  name: str
  of: Generation  # whose answers; a row's `input` is the text to translate
  model: Text = 'Unbabel/wmt22-comet-da'  # or the file of a checkpoint
  batch_size: Count = 16

  def __post_init__(self):
    _package()

  def metrics(self, has_teacher):
    del has_teacher
    return ('comet',)

  def run(self, subject, params, tag):
    """'comet', 0 to 100, mean over rows and seeds, by the first reference."""
    del params, tag
    return {'metrics': {'comet': hosts.of_first(lambda: self._score(subject))}}

  def _score(self, subject):
    comet = _package()
    path = self.model
    if not os.path.exists(path):
      path = comet.download_model(path)
    model = comet.load_from_checkpoint(path)
    means = {}
    for seed in self.of.seeds:
      texts = [
        {'src': x['input'], 'mt': x['answer'], 'ref': x['references'][0]}
        for x in answers.read(subject.workdir, self.of, seed)
      ]
      output = model.predict(texts, batch_size=self.batch_size, gpus=0)
      means[seed] = 100 * output.system_score
    return statistics.over_seeds(means)


def _package():
  try:
    import comet
  except ImportError as e:
    raise UserError(
      "config.evals: COMET is not installed: pip install 'gakd_jax[comet]' "
      '(it brings PyTorch), or take the evaluator out'
    ) from e
  return comet
