"""The critic: tells a teacher's sequence of distributions from a student's.

For every position of a response it reads W z (z: logits [V], W: [V, C]), lets
the decoder's own blocks look at the positions so far, and puts out a scalar;
the score of a sequence is their mean, or the last.

W z is linear in the hidden states, so logits are never needed: with E the
vocabulary head, W z = h (E' W). `project` multiplies E' W once, V x D x C, and
then every token costs D x C instead of V x (D + C). With W centred over the
vocabulary, logits and log-probabilities are the same input: the log-sum-exp
that tells them apart is a shift that sums to zero.

A critic of text reads 'ids': W is its embedding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gakd_jax import UserError, models, sharding
from gakd_jax.data import segments
from gakd_jax.models import blocks, layers, scores, transformer

INPUTS = ('log_probs', 'logits', 'probs')


_SIZES = {'width': 128, 'layers': 2, 'heads': 2, 'ff_width': 256}


def check(settings):
  """Refuses settings of a critic (`config.critic`) that cannot be built."""
  wrong = sorted(settings.keys() - _SIZES.keys() - {'init_from'})
  if wrong:
    raise UserError(
      f'config.critic: no setting {wrong[0]!r}; known are init_from, '
      f'{", ".join(_SIZES)}'
    )
  if path := settings.get('init_from'):
    if models.read_config(path).learned_positions:
      raise UserError(
        f'config.critic.init_from={path}: its positions are learned, a part of '
        'its embedding, which a critic does not have; take a rotary model'
      )
    return
  sizes = _SIZES | settings
  for name in _SIZES:
    if sizes[name] < 1:
      raise UserError(f'config.critic: {name}={sizes[name]} must be 1 or more')
  if sizes['width'] % (2 * sizes['heads']):
    raise UserError(
      f'config.critic: width={sizes["width"]} is not a multiple of twice '
      f'heads={sizes["heads"]}'
    )


def config_of(settings, vocab_size):
  """The critic as a `DecoderConfig`: that of `init_from`, or of its sizes."""
  if path := settings.get('init_from'):
    return dataclasses.replace(models.read_config(path), vocab_size=vocab_size)
  sizes = {name: settings.get(name, size) for name, size in _SIZES.items()}
  return models.DecoderConfig(
    vocab_size=vocab_size,
    kv_heads=sizes['heads'],
    head_dim=sizes['width'] // sizes['heads'],
    tied_head=True,
    rope_theta=1e4,
    norm_eps=1e-6,
    max_length=0,
    **sizes,
  )


class Critic(nnx.Module):
  """`config.vocab_size` is V, `config.width` is C; `project` applies W."""

  def __init__(self, config, rngs, input='log_probs'):
    self.config = config
    # Logits add up over V entries; of probabilities, a few are not zero.
    std = config.vocab_size**-0.5
    std = {'probs': 0.02, 'ids': config.width**-0.5}.get(input, std)
    self.projection = nnx.Param(
      nnx.initializers.normal(std)(
        rngs.params(), (config.vocab_size, config.width)
      )
    )
    self.blocks = blocks.stack(config, rngs)
    self.final_norm = layers.make_norm(config)
    # Zero: a fresh critic has no opinion, and one that never sees a difference
    # between teacher and student never pushes the student anywhere.
    self.score = nnx.Param(jnp.zeros(config.width))

  def __call__(self, x_BTC, segments_BT, remat='none'):
    """A scalar for each position, [B, T] in fp32 or better.

    Positions see earlier ones of their own segment; where it is 0, what comes
    out means nothing.
    """
    # Gradients of gradients make many loops of each. Attention of a critic that
    # is small is nothing beside what else a step does, so there is one.
    groups = 1 if remat == 'none' else scores.GROUPS
    x_BTC = blocks.run(
      self.config, self.blocks, x_BTC, segments_BT, remat, groups=groups
    )
    x_BTC = at_least_fp32(self.final_norm(x_BTC))
    return x_BTC @ at_least_fp32(self.score[...])


def at_least_fp32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.cache
def definition(config):
  """The static part of a critic; `nnx.merge` it with its parameters."""
  critic = nnx.eval_shape(lambda: Critic(config, nnx.Rngs(0)))
  return transformer.split(critic)[0]


def init(config, rng, input):
  """Fresh parameters, fp32 nested dicts; jit it to place them on a mesh."""
  return transformer.split(Critic(config, nnx.Rngs(rng), input))[1]


def weight(projection_VC, input, dtype, valid=None):
  """W as it is applied in `dtype`, in fp32 or better.

  valid: ids from there on are no tokens, and not read; None: all are.

  Log-probabilities get it centred over V, once more after it was rounded: V
  rounding errors add up to a sum that is not zero, by which a shift of all
  logits would leak into the score.
  """
  # Gathered once; else each of what follows would be, for itself.
  w_VC = at_least_fp32(sharding.tie(projection_VC, ('tensor',), ()))
  is_token_V1 = None if valid is None else _is_token(w_VC, valid)

  def centred(w_VC):
    return w_VC - jnp.mean(w_VC, axis=0, keepdims=True, where=is_token_V1)

  if input == 'log_probs':
    w_VC = centred(w_VC)
  w_VC = _rounded(w_VC, dtype)
  if input == 'log_probs' and jnp.dtype(dtype) != w_VC.dtype:
    w_VC = centred(w_VC)
  return w_VC if valid is None else jnp.where(is_token_V1, w_VC, 0)


def _is_token(w_VC, valid):
  return jnp.arange(len(w_VC))[:, None] < valid


def _rounded(x, dtype):
  """x with the digits of a dtype; a cast there and back XLA may leave out."""
  info = jnp.finfo(dtype)
  if info.nmant >= jnp.finfo(x.dtype).nmant:
    return x
  return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def project(outputs, w_VC):
  """W z of every token as h (E' W); [B, T, C] in the dtype of h."""
  h_BTD, dtype = outputs.hidden_BTD, outputs.hidden_BTD.dtype
  # Under `fsdp` each device multiplies its columns of E, which stays in place.
  head_VD = sharding.tie(outputs.head.weight_VD, ('tensor',), ('fsdp',))
  rounded_VC = sharding.tie(_rounded(w_VC, dtype), ('tensor',), ())
  # [C, D] and not [D, C]: a quarter faster on a CPU.
  m_CD = layers.einsum32('vd,vc->cd', head_VD, rounded_VC.astype(dtype))
  m_CD = sharding.tie(m_CD, (), ('fsdp',))
  if dtype != w_VC.dtype:
    # What rounding adds to the columns' means goes off again, in fp32.
    is_token_V1 = _is_token(w_VC, outputs.head.valid or len(w_VC))
    added_C = jnp.mean(rounded_VC - w_VC, axis=0, where=is_token_V1)
    ones_V = is_token_V1[:, 0].astype(head_VD.dtype)
    sum_D = layers.einsum32('vd,v->d', head_VD, ones_V)
    m_CD -= added_C[:, None] * sum_D[None]
  return jnp.einsum('btd,cd->btc', h_BTD, m_CD.astype(dtype))


def sequence_score(score_BT, segments_BT, pooling):
  """The score of each sequence, [B, T]; read it where `segments.is_last` says.

  pooling: 'mean' over the positions of the segment, or 'last'.
  """
  if pooling == 'last':
    return score_BT
  length_BT = segments.total(jnp.ones_like(score_BT), segments_BT)
  return segments.total(score_BT, segments_BT) / jnp.maximum(length_BT, 1.0)
