"""The adversarial losses of GAKD's critic and student, and its penalties.

d_t and d_s are the critic's scores of the teacher's and the student's sequence
of one pair; losses and penalties are those of each pair, unreduced. The
formulas and their papers stand in `gakd.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gakd_jax import UserError, flops, models, sharding
from gakd_jax.models import lora, transformer

softplus = jax.nn.softplus


def _r1_r2(read, x_t, x_s, norm_t, norm_s, a_BT1):
  """Half of |dD/dz|^2 at the teacher's and the student's input (R3GAN)."""
  del read, x_t, x_s, a_BT1
  return 0.5 * (norm_t + norm_s)


def _unit_norm(read, x_t, x_s, norm_t, norm_s, a_BT1):
  """(|dD/dz| - 1)^2 at a random mixture of the two inputs (WGAN-GP)."""
  del norm_t, norm_s
  mixed = (a_BT1 * x_t + (1 - a_BT1) * x_s).astype(x_t.dtype)
  _, norm = read(mixed)
  return jnp.square(jnp.sqrt(jnp.maximum(norm, 1e-12)) - 1)


def _no_penalty(read, x_t, x_s, norm_t, norm_s, a_BT1):
  del read, x_t, x_s, norm_s, a_BT1
  return jnp.zeros_like(norm_t)


def mixtures(key, segments_BT):
  """Uniform on [0, 1) for each document, at all its positions; [B, T, 1]."""
  a_BS = jax.random.uniform(key, (len(segments_BT), segments_BT.shape[1] + 1))
  return jnp.take_along_axis(a_BS, segments_BT, axis=1)[:, :, None]


@dataclasses.dataclass(frozen=True)
class Variant:
  critic: Callable  # (d_t, d_s) -> loss of each pair
  generator: Callable
  penalty: Callable  # -> of each pair, to be multiplied by gamma


VARIANTS = {
  'rgan': Variant(
    critic=lambda d_t, d_s: softplus(d_s - d_t),
    generator=lambda d_t, d_s: softplus(d_t - d_s),
    penalty=_r1_r2,
  ),
  'gan': Variant(
    critic=lambda d_t, d_s: softplus(-d_t) + softplus(d_s),
    generator=lambda d_t, d_s: softplus(-d_s),
    penalty=_no_penalty,
  ),
  'wgan': Variant(
    critic=lambda d_t, d_s: d_s - d_t,
    generator=lambda d_t, d_s: -d_s,
    penalty=_unit_norm,
  ),
}


def with_warmup(objective, steps_per_epoch, total_steps):
  """An objective whose `warmup_steps` are those of its `warmup_epochs`."""
  steps = objective.warmup_steps
  if steps is None:
    steps = round(objective.warmup_epochs * steps_per_epoch)
  if objective.g and steps >= total_steps:
    raise UserError(
      f'config.objective: the critic warms up for {steps} steps, and the run '
      f'has {total_steps}: it would never teach; lower warmup_steps or '
      'warmup_epochs, or train longer'
    )
  return dataclasses.replace(objective, warmup_steps=steps)


def start(fresh, settings, key, mesh, reads_ids=False):
  """A critic's `Own` at the start, of `fresh(key)`, placed on a mesh.

  settings: `config.critic`; the trunk of its `init_from`, if it names one, and
    of a critic that reads ids its embedding, of the ids that both have.
  """
  places = None
  if mesh is not None:
    places = sharding.shardings(jax.eval_shape(fresh, key), mesh)
  own = jax.jit(fresh, out_shardings=places)(key)
  if not own.critic or not settings.get('init_from'):
    return own
  trunk = models.load(settings['init_from'], 'float32', mesh)
  lora.merge(trunk)
  trunk = transformer.split(trunk)[1]
  new = {name: trunk[name] for name in ('blocks', 'final_norm')}
  if reads_ids:
    projection_VC = own.critic['projection']
    V = min(len(projection_VC), len(trunk['embedding']))
    new['projection'] = projection_VC.at[:V].set(trunk['embedding'][:V])
  return own.replace(critic=own.critic | new)


def operations(objective, shapes, critic, rows, length, microbatches):
  """Operations of a step: W of both heads, W'W, the trunk; see `flops`.

  An update of the critic is a forward pass over both sequences and its gradient
  (6 passes over one), with a penalty a gradient's gradient (6 more; 2 where it
  is only logged). L_G is another forward pass over the student's, and with a
  relativistic loss the teacher's, and the gradient of the inputs.
  """
  n = rows * length
  V, C = critic['projection'].shape
  penalty = 0 if objective.kind == 'gan' else 2 if objective.reference else 6
  update, loss = 6 + penalty, 3 if objective.kind == 'rgan' else 2
  config = objective.critic_config(*shapes)
  trunk = 2 * flops.block_weights(critic) + flops.attention(config, length)

  def read(shape):
    """Of the critic's input, for all tokens of one model."""
    if not objective.is_linear(shape.head_cap):  # through logits
      return 2 * n * V * (shape.width + C)
    # E'W once a microbatch, then every token.
    return 2 * C * (V * microbatches + n) * shape.width

  student, teacher = map(read, shapes)
  # W'W is of the penalty, and has as many products as that has passes.
  gram = penalty * V * C * C * microbatches
  # Forward, and the gradient of W.
  per_update = n * update * trunk + 2 * (student + teacher) + gram
  # Of L_G: forward, of the teacher if its third pass is there, and the
  # gradients of the student's hidden states and head.
  per_loss = n * loss * trunk + (loss - 2) * teacher + 3 * student
  return objective.critic_steps * per_update + per_loss
