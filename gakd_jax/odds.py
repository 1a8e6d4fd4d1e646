"""What a model could have said in place of each token of an answer.

Made for files: `data.logprobs` reads them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gakd_jax import sharding, streaming
from gakd_jax.data import encoding, pipeline
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow
from gakd_jax.models import decoding, transformer
from gakd_jax.objectives import few

_CHUNK = 512  # tokens whose logits exist at a time
_LENGTHS = 64  # Texts are padded to a multiple of these: fewer compilations.


class Odds:
  """A function of rows and their prompts' ids: the `logprobs` of each row.

  They are of its first reference, in the tokens that a student will read, which
  need not be those that the model drew. None for a row that no student can
  read, or whose prompt was shortened for the answer.
  """

  def __init__(self, model, tokenizer, template, size, batch_size):
    """model: of `decoding.unstack`. size: ids of each token."""
    definition, self._params = transformer.split(model)
    self._mesh, ways = streaming.mesh_of(self._params)
    self._batch_size = -(-batch_size // ways) * ways
    self._reader = tokenizer, template
    self._settings = definition, size, tokenizer_lib.size(tokenizer)

  def __call__(self, rows, prompts):
    tokenizer, template = self._reader
    texts = encoding.encode_batch(tokenizer, rows, template, 'keep')
    found = [None] * len(rows)
    good = [
      i
      for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
      if not isinstance(text, BadRow) and list(text[0]) == list(prompt)
    ]
    for start in range(0, len(good), self._batch_size):
      some = good[start : start + self._batch_size]
      said = self._ask([texts[i] for i in some])
      for b, i in enumerate(some):
        found[i] = _as_json(texts[i], {k: x[b] for k, x in said.items()})
    return found

  def _ask(self, texts):
    """{name: [B, T, ...]} of (prompt ids, response ids)."""
    length = max(len(p) + len(r) for p, r in texts)
    bins = [[x] for x in texts] + [[]] * (self._batch_size - len(texts))
    pad_id = tokenizer_lib.pad_id(self._reader[0])
    tokens = pipeline.collate(bins, -(-length // _LENGTHS) * _LENGTHS, pad_id)
    if self._mesh:
      place = NamedSharding(self._mesh, P(sharding.BATCH_AXES))
      tokens = sharding.put_whole(tokens, place)
    said = _ask(self._params, tokens, self._settings)
    # A process reads what it has whole.
    whole = self._mesh and sharding.replicated(self._mesh)
    return jax.tree.map(np.asarray, jax.device_put(said, whole))


@functools.partial(jax.jit, static_argnames='settings')
def _ask(params, tokens, settings):
  definition, size, vocab = settings
  model = nnx.merge(definition, params)
  model.cache_kind = None  # Nothing of it is kept: it need not be small.
  B, T = tokens.ids_BT.shape
  reader = decoding.Reader(model, model.init_cache(B, T))
  hidden_BTD, _ = reader.read(
    tokens.ids_BT, jnp.broadcast_to(jnp.arange(T), (B, T))
  )
  outputs = transformer.Outputs(hidden_BTD, model.head.replace(valid=vocab))
  return few.ask(
    *('top_k', size, outputs, tokens.predicts_BT),
    temperature=1.0,
    chunk=_CHUNK,
  )


def _as_json(text, said):
  """`logprobs` of a text, of what was said at all positions of its row."""
  prompt, response = text
  first = len(prompt) - 1  # A prompt has a token at least.
  these = slice(first, first + len(response))
  numbers = {
    name: np.round(said[name][these].astype(float), 5).tolist()
    for name in ('log_probs', 'rest')
  }
  return {
    'tokens': response,
    'ids': said['ids'][these].tolist(),
    'values': numbers['log_probs'],
    'rest': numbers['rest'],
  }
