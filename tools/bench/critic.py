"""The critic through the re-associated head, beside full logits; and its price.

  python -m tools.bench.critic

V = 151936, 4 rows of 256 tokens, widths 256 and 512, C = 128, fp32. `critic` is
one rgan update of the critic (loss, R1, R2, second-order gradient, AdamW) from
hidden states, `direct` the same from logits of (B, T, V), penalties by
differentiating with respect to these. `rgan` and `rkl` are whole train steps
(kd_step.py) with and without the critic, of `--rows` rows: what a critic adds
is mostly products of both heads with its projection, which a step has once,
whatever the number of its tokens.
"""

import argparse
import json

from tools.bench import kd_step, side_by_side

V, B, T = kd_step.V, kd_step.B, kd_step.T
WIDTHS = (256, 512)


def critic_step(from_logits):
  """A function that takes one step of the critic and returns its loss."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax
  from flax import nnx

  from gakd_jax import objectives, optim
  from gakd_jax.data import segments
  from gakd_jax.data.pipeline import Batch, Tokens
  from gakd_jax.models import DecoderConfig
  from gakd_jax.models import critic as critic_lib
  from gakd_jax.models.transformer import Head, Outputs
  from gakd_jax.objectives.base import Own

  objective = objectives.make('gakd', kind='rgan')
  shape = DecoderConfig(V, 0, 0, 0, 0, 0, 0, True, 0, 0, 0)
  critic = objective.init(jax.random.key(0), shape, shape).critic
  optimizer = optim.make(lambda _: 2e-4, weight_decay=0.01)
  opt_state = optimizer.init(critic)
  rng = np.random.default_rng(0)
  student, teacher = (
    Outputs(
      jnp.asarray(rng.standard_normal((B, T, D), np.float32)),
      Head(jnp.asarray(0.1 * rng.standard_normal((V, D), np.float32))),
    )
    for D in WIDTHS
  )
  ids_BT, mask_BT = kd_step.inputs(response=1.0)
  tokens = Tokens(ids_BT, ids_BT * 0 + 1, mask_BT)
  batch = jax.device_put(
    Batch(
      tokens, tokens, totals={'tokens': mask_BT.sum(), 'sequences': float(B)}
    )
  )

  def ours(critic, student, teacher):
    loss, _ = objective.critic_loss(
      student, teacher, batch, Own(critic=critic), jax.random.key(0)
    )
    return loss

  def direct(critic, student, teacher):
    segments_BT = batch.student.predicts_BT.astype(jnp.int32)
    is_last_BT = segments.is_last(segments_BT)
    w_VC = critic_lib.weight(
      critic['projection'], objective.reads, student.hidden_BTD.dtype
    )
    config = critic_lib.config_of(objective.critic, V)
    model = nnx.merge(critic_lib.definition(config), critic)

    def total(z_BTV):
      d_BT = critic_lib.sequence_score(
        model(z_BTV @ w_VC, segments_BT), segments_BT, 'mean'
      )
      d_B = jnp.sum(d_BT, axis=1, where=is_last_BT)
      return jnp.sum(d_B), d_B

    def read(outputs):
      z_BTV = jnp.einsum(
        'btd,vd->btv', outputs.hidden_BTD, outputs.head.weight_VD
      )
      gradient_BTV, d_B = jax.grad(total, has_aux=True)(z_BTV)
      return d_B, jnp.sum(gradient_BTV**2, axis=(1, 2))

    (d_t, r1), (d_s, r2) = read(teacher), read(student)
    return jnp.mean(
      jax.nn.softplus(d_s - d_t) + objective.gamma / 2 * (r1 + r2)
    )

  @jax.jit
  def update(critic, opt_state, student, teacher):
    loss, grads = jax.value_and_grad(direct if from_logits else ours)(
      critic, student, teacher
    )
    updates, opt_state = optimizer.update(grads, opt_state, critic)
    return loss, optax.apply_updates(critic, updates), opt_state

  def take():
    nonlocal critic, opt_state
    loss, critic, opt_state = update(critic, opt_state, student, teacher)
    return float(loss)

  return take


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', type=int, default=B)
  side_by_side.add_arguments(parser, ('critic', 'direct', 'rgan', 'rkl'))
  args = parser.parse_args()
  whole = {'response': 1.0, 'chunk': 256, 'rows': args.rows}
  sides = {
    'critic': lambda: critic_step(from_logits=False),
    'direct': lambda: critic_step(from_logits=True),
    'rgan': lambda: kd_step.jax_step(
      **whole, name='gakd', kind='rgan', warmup_steps=0
    ),
    'rkl': lambda: kd_step.jax_step(**whole, name='kld'),
  }
  if args.rows != B:  # The critic alone is of no rows but these.
    sides = {name: sides[name] for name in ('rgan', 'rkl')}
  if results := side_by_side.run(args, sides):
    ratios = {
      'times faster than from logits': ('seconds', 'direct', 'critic'),
      'memory of that from logits': ('peak_gb', 'critic', 'direct'),
      'rgan step to reverse-KL step': ('seconds', 'rgan', 'rkl'),
      'its memory': ('peak_gb', 'rgan', 'rkl'),
    }
    print(json.dumps(side_by_side.summary(results, ratios)))


if __name__ == '__main__':
  main()
