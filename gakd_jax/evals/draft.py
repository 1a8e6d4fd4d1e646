"""Draft acceptance: what a student is worth in its teacher's own decoding.

In speculative decoding (arXiv 2211.17192) a small model drafts gamma tokens,
the large one reads them in one pass, lets stand what could be its own, and adds
one token. The text is the teacher's, exactly. Here it is written so, and of
every token is known whether the student's draft stood; by that, for each gamma:

  accepted                the percentage of drafts that stand
  tokens_per_pass_<gamma> tokens of the text to a pass of the teacher
  speedup_<gamma>         that, beside a pass for every token: divided by
                          gamma c + 1, c being the cost of a pass of the student
                          beside the teacher's, by default the numbers of their
                          weights: that of reading them, which is all where few
                          texts are written at a time
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import numpy as np

from gakd_jax import flops, sharding, speculative, stopping
from gakd_jax.data import pipeline, templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import encoded
from gakd_jax.evals import statistics as statistics_lib
from gakd_jax.models import convert, decoding
from gakd_jax.sampler import Sampler
from gakd_jax.settings import (
  Count,
  Counts,
  Length,
  NotNegative,
  Positive,
  Seeds,
)

_BLOCK = 4  # drafts that are read together here; the text does not depend on it


@dataclasses.dataclass(frozen=True)
class Draft:
  teacher_reads_student_ids: ClassVar[bool] = True

  name: str
  rows: tuple
  temperature: NotNegative = 1.0  # of both; 0: both are greedy
  gammas: Counts = (1, 2, 3, 4, 5, 6, 7, 8)
  cost: Positive | None = None  # c; None: by the numbers of weights
  max_new_tokens: Length = 128
  batch_size: Count = 32
  seeds: Seeds = (0,)
  about: dict = dataclasses.field(default_factory=dict)  # see `evaluator`

  def metrics(self, has_teacher):
    if not has_teacher:
      return []
    kinds = ('tokens_per_pass', 'speedup')
    return ['accepted', *(f'{x}_{g}' for x in kinds for g in self.gammas)]

  def run(self, subject, params, tag):
    """See `evaluator`; no metric of a subject without a teacher."""
    del tag
    models = subject.models
    if models.teacher_definition is None:
      return {'metrics': {}}
    texts = encoded.encode(subject, self.rows)
    cost = self.cost or _cost(models, params)
    by_seed = {}
    for seed in self.seeds:
      stood = self._write(subject, params, texts.prompts, seed)
      found = {'accepted': 100.0 * np.concatenate(stood).mean()}
      for gamma in self.gammas:
        passes = sum(passes_of(x, gamma) for x in stood)
        tokens = sum(map(len, stood)) / passes
        found[f'tokens_per_pass_{gamma}'] = tokens
        found[f'speedup_{gamma}'] = tokens / (gamma * cost + 1)
      by_seed[seed] = {k: float(x) for k, x in found.items()}
    return {
      'shortened': texts.shortened,
      'cost': cost,
      'metrics': statistics_lib.all_over_seeds(by_seed),
    }

  def _write(self, subject, params, prompts, seed):
    """Of each prompt's text, which tokens are the student's; bool arrays."""
    tokenizer, mesh = subject.models.tokenizer, subject.mesh
    ways = sharding.batch_ways(mesh)
    size = -(-self.batch_size // ways) * ways
    sampler = Sampler(
      temperature=self.temperature or 1.0,
      top_k=0 if self.temperature else 1,
      valid_vocab=tokenizer_lib.size(tokenizer),
    )
    settings = speculative.Drafting(
      student=sampler,
      teacher=sampler,
      rule=speculative.Mixture(1.0),  # All of the text is the teacher's.
      gamma=_BLOCK,
      max_new_tokens=min(
        self.max_new_tokens, subject.max_length - subject.max_prompt_length
      ),
      eos_ids=templates.stop_ids(subject.template, tokenizer),
    )
    length = -(-max(map(len, prompts)) // 16) * 16
    place = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
    found = []
    for start in range(0, len(prompts), size):
      some = prompts[start : start + size]
      bins = [[(x, [])] for x in some] + [[]] * (size - len(some))
      tokens = pipeline.collate(bins, length, tokenizer_lib.pad_id(tokenizer))
      ids_BT, lengths_B = tokens.ids_BT, (tokens.segments_BT > 0).sum(1)
      places_B = start + np.arange(size, dtype=np.uint32)
      given = sharding.put_whole((ids_BT, lengths_B, places_B), place)
      key = jax.random.key(seed)
      written = _write(subject.models, params, *given, key, settings, mesh)
      end_B, by_teacher_BS = stopping.fetch(
        jax.device_put(written, sharding.replicated(mesh))
      )
      found += [
        ~by_teacher_BS[b, lengths_B[b] : end_B[b]] for b in range(len(some))
      ]
    return found


@functools.partial(jax.jit, static_argnames=('settings', 'mesh'))
def _write(models, params, ids_BT, length_B, place_B, key, settings, mesh):
  key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, place_B)
  both = [
    decoding.unstack(model, models.dtype)
    for model in (models.student(params), models.teacher())
  ]
  _, end_B, trace = speculative.decode_batch(
    both, ids_BT, length_B, key_B, settings, mesh
  )
  return end_B, trace.by_teacher_BS


def passes_of(stood, gamma):
  """Passes of the teacher that a text takes.

  A block begins at each token that is not drafted in the one before: what is
  drafted stands up to the first that does not, or gamma; the token after these
  is the teacher's, of the same pass.
  """
  at, passes = 0, 0
  while at < len(stood):
    block = stood[at : at + gamma]
    at += (len(block) if block.all() else int(np.argmin(block))) + 1
    passes += 1
  return passes


def _cost(models, params):
  """Weights that a pass of the student reads, to those of the teacher's."""
  student, teacher = models.configs
  student_weights, teacher_weights = (
    flops.block_weights(_decoded(x)) + config.vocab_size * config.width
    for x, config in (
      (models.whole(params), student),
      (models.frozen['teacher'], teacher),
    )
  )
  return student_weights / teacher_weights


def _decoded(params):
  """What decoding reads: adapters are merged, but into what is quantized."""
  flat = convert.flatten(params)
  if not any(name.endswith('_scale') for name in flat):
    flat = {name: x for name, x in flat.items() if '/lora/' not in name}
  return convert.unflatten(flat)
