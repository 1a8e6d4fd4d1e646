"""MCW-KD: DSKD, and transport between two texts at several costs at once.

ce CE + kd KD + ot_logits OT + ot_hidden OT ("Multi-Cost Wasserstein Knowledge
Distillation"): KD are the terms of `dskd_cma`, with forward KL; each OT moves
the teacher's tokens of a text, prompt and response, to the student's, at a cost
that is a weighted sum of three (`mcw_costs`):

  logits  of the `top` largest, ranked, at temperature 2: |p - q|_2, KL(p, q),
          and the difference of a learnt salience of the hidden states; p is of
          the teacher's logits, mixed with the student's at the same position,
          whose share falls from 0.9 to 0 over the run
  hidden  edit distance along the warping path; |x - y|_2 over its largest, and
          1 - cos, of means over 9 positions, the teacher's projected into the
          student's space

Weights of the costs are those of the paper until `update_every` steps; then,
as often, the point of the simplex, .01 at least each, that minimises
w'c + sigma |w - 1/3|^2, c what each costs under the plan: 1/3 - c / (2 sigma)
projected on it.

Solvers, all at entropy 0.1 (`epsilon`) between uniform marginals:
  sinkhorn   the entropic value <P, C> + eps KL(P | a b'), whose gradient is the
             plan, as a mean over texts
  semi_dual  a potential of the teacher's tokens, a small network (the critic;
             `critic_steps` ascents a step, by `config.critic_optimizer`; the
             authors' are plain ascent at 0.01 with gradients within 1); its
             c-transform for each cost apart, all weighing 1/3; costs at most 1

`reference=True` is as released. Sinkhorn: entropy 10, 100 iterations, where the
plan is nearly a b', and the loss <P, C>, with the gradient through them. Both
OTs are means over texts that are added to *sums* over tokens, so that they
weigh 1 / tokens. Semi-dual: 4 ascents for every text in turn, which go on from
one text to the next, and begin anew with each batch (`config.critic_optimizer`
does nothing). DSKD is its own `reference`, and teachers are mixed with
what the student has at padding, too.

A row holds one text: no packing.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gakd_jax import UserError
from gakd_jax.data import segments
from gakd_jax.objectives import (
  base,
  dskd_cma,
  head,
  mcw_costs,
  ot,
  projectors,
)
from gakd_jax.settings import Count, Natural, NotNegative, Positive

_WEIGHTS = {'logits': (0.2, 0.5, 0.3), 'hidden': (0.3, 0.5, 0.2)}
_SIGMA, _LEAST = 2.0, 0.01
_RELEASED_EPSILON = 10.0
_ASCENTS, _RATE = 4, 0.01  # of the reference


@dataclasses.dataclass(frozen=True)
class MCW(base.Objective):
  ce: NotNegative = 1.0  # weight of cross-entropy
  kd: NotNegative = 0.5  # weight of the terms of DSKD
  ot_logits: NotNegative = 1.0  # weight of transport between logits
  ot_hidden: NotNegative = 1.0  # and between hidden states
  temperature: Positive = 2.0  # of DSKD
  top: Count = 300  # logits of a token that are compared
  solver: Literal['sinkhorn', 'semi_dual'] = 'sinkhorn'
  epsilon: Positive = 0.1  # entropy of the plan
  iterations: Count = 50  # of Sinkhorn
  update_every: Natural = 1000  # steps between updates of weights; 0: none
  potential: Count = 256  # width of the potential's network
  critic_steps: Count = 4  # ascents of the potential in one step
  total_steps: Natural | None = None  # of the run, which knows it
  reference: bool = False  # as the authors ran it

  one_tokenizer = False
  reads_prompts = True
  align = ('path',)
  more_head_passes = 5, 3  # of DSKD; the largest logits, and back

  def __post_init__(self):
    if self.reference and self.solver == 'sinkhorn':
      for name in ('epsilon', 'iterations'):
        if getattr(self, name) != getattr(MCW, name):
          raise UserError(
            f'config.objective: reference=True has its own {name}; leave out '
            f'{name}={getattr(self, name)}'
          )

  def check(self, config):
    if config.data.packing:
      raise UserError(
        'config.data.packing: mcw transports between whole rows, one text '
        'each; set it to False'
      )

  def for_run(self, steps_per_epoch, total_steps):
    return dataclasses.replace(self, total_steps=total_steps)

  def init(self, key, student, teacher, mesh=None):
    D, E = student.width, teacher.width
    own = projectors.init(
      key,
      {
        't2s': (E, D),
        's2t': (D, E),
        'query': (2 * D, 2 * E),
        'ot': (E, D),
        'salience': (D, 1),
      },
      mesh,
    )
    K = min(self.top, student.vocab_size, teacher.vocab_size)
    if self.solver == 'semi_dual':
      critic = {
        name: projectors.init(
          jax.random.fold_in(key, i),
          {
            'context': (width, self.potential),
            'token': (width, self.potential),
            'combine': (2 * self.potential, 1),
          },
          mesh,
        ).extra
        for i, (name, width) in enumerate((('logits', K), ('hidden', D)))
      }
      return own.replace(critic=critic)
    return own.replace(
      memory={name: jnp.array(w) for name, w in _WEIGHTS.items()}
    )

  def count(self, batch):
    texts = (batch.student.segments_BT > 0).any(axis=1)
    return super().count(batch) | {'texts': jnp.maximum(jnp.sum(texts), 1)}

  def loss(self, student, teacher, batch, own, key):
    rate = self.kd / max(self.ce + self.kd, 1e-9)
    dskd = dskd_cma.DSKD(
      head_chunk=self.head_chunk,
      kd=rate,
      temperature=self.temperature,
      reference=self.reference,
    )
    loss, metrics = dskd.loss(student, teacher, batch, own, key)
    loss *= self.ce + self.kd
    sides, branches = self._branches(student, teacher, batch, own)
    solve = self._semi_dual if own.critic else self._sinkhorn
    per_text = batch.totals['texts']
    for name, (costs_KBMN, features) in branches.items():
      value_B, costs = solve(name, costs_KBMN, features, sides, own)
      weight = getattr(self, f'ot_{name}')
      value = jnp.sum(value_B) / per_text
      loss += weight * value / (batch.totals['tokens'] if self.reference else 1)
      metrics[f'ot_{name}'] = value
      for i, cost_B in enumerate(costs):
        metrics[f'cost_{name}_{i + 1}'] = jnp.sum(cost_B) / per_text
    return loss, metrics

  def critic_loss(self, student, teacher, batch, own, key):
    """What the potential ascends, negated."""
    del key
    sides, branches = self._branches(student, teacher, batch, own)
    value = sum(
      jnp.sum(self._semi_dual(name, *branch, sides, own)[0])
      for name, branch in branches.items()
    )
    value /= batch.totals['texts']
    return -value, {'value': value}

  def remember(self, own, metrics):
    if not own.memory or not self.update_every:
      return own.memory
    is_due = (own.step + 1) % self.update_every == 0

    def updated(name, w_K):
      c_K = jnp.stack(
        [metrics[f'cost_{name}_{i + 1}'] for i in range(w_K.size)]
      )
      new_K = ot.onto_simplex(1 / w_K.size - c_K / (2 * _SIGMA), _LEAST)
      return jnp.where(is_due, new_K, w_K)

    return {name: updated(name, w_K) for name, w_K in own.memory.items()}

  def _branches(self, student, teacher, batch, own):
    """`Sides`, and of logits and hidden states three costs, and features."""
    sides = mcw_costs.Sides(*map(_has_next, (batch.teacher, batch.student)))
    bounded = self.solver == 'semi_dual'
    t_BMD = projectors.apply(own.extra['ot'], teacher.hidden_BTD)
    t_BMD, s_BND = (x.astype(jnp.float32) for x in (t_BMD, student.hidden_BTD))
    t_scores_BM, s_scores_BN = (
      jax.nn.sigmoid(projectors.apply(own.extra['salience'], x))[:, :, 0]
      for x in (t_BMD, s_BND)
    )
    K = min(self.top, student.head.vocab_size, teacher.head.vocab_size)
    s_mask_BN = sides.s_BN | self.reference
    t_BMK, s_BNK = (
      head.largest(outputs, K, mask, chunk=self.head_chunk)
      for outputs, mask in ((teacher, sides.t_BM), (student, s_mask_BN))
    )
    done = jnp.minimum(own.step / (self.total_steps or 1), 1)
    share_BM1 = jnp.broadcast_to(0.1 + 0.9 * done, (*t_BMK.shape[:2], 1))
    if not self.reference:
      # Alone where the student has no such position.
      more = max(0, sides.t_BM.shape[1] - sides.s_BN.shape[1])
      has_BM = jnp.pad(sides.s_BN, ((0, 0), (0, more)))[:, : t_BMK.shape[1]]
      share_BM1 = jnp.where(has_BM[:, :, None], share_BM1, 1)
    edits_BMN = mcw_costs.edits(batch.align, sides.cells_BMN.shape)
    return sides, {
      'logits': mcw_costs.of_logits(
        t_BMK, s_BNK, t_scores_BM, s_scores_BN, share_BM1, sides, bounded
      ),
      'hidden': mcw_costs.of_hiddens(t_BMD, s_BND, edits_BMN, sides, bounded),
    }

  def _sinkhorn(self, name, costs, features, sides, own):
    """OT of each row, and what each cost contributes unweighted."""
    del features
    weights_K = own.memory[name]
    cost_BMN = sum(w * c for w, c in zip(weights_K, costs, strict=True))
    a_BM, b_BN = map(ot.uniform, sides)
    solve, epsilon, n = ot.entropic, self.epsilon, self.iterations
    if self.reference:
      solve, epsilon, n = ot.unrolled, _RELEASED_EPSILON, 100
    value_B, plan_BMN = solve(
      cost_BMN, a_BM, b_BN, epsilon=epsilon, iterations=n
    )
    return value_B, [jnp.sum(plan_BMN * c, axis=(1, 2)) for c in costs]

  def _semi_dual(self, name, costs, features, sides, own):
    """As `_sinkhorn`, at the potential that the critic is."""
    a_BM, b_BN = map(ot.uniform, sides)

    def values(parameters, costs, x_BMF, a_BM, b_BN):
      f_BM = _potential(parameters, x_BMF, a_BM)
      found = [ot.semi_dual(f_BM, c, a_BM, b_BN, self.epsilon) for c in costs]
      return sum(found) / len(found), found

    inputs = costs, features, a_BM, b_BN
    if not self.reference:
      return values(own.critic[name], *inputs)

    def text(parameters, inputs):
      inputs = jax.tree.map(lambda x: x[None], inputs)
      fixed = jax.lax.stop_gradient(inputs)
      for _ in range(_ASCENTS):
        d = jax.grad(lambda p: values(p, *fixed)[0].sum())(parameters)
        parameters = jax.tree.map(
          lambda p, d: p + _RATE * jnp.clip(d, -1, 1), parameters, d
        )
      fixed = jax.lax.stop_gradient(parameters)
      return parameters, jax.tree.map(lambda x: x[0], values(fixed, *inputs))

    inputs = [list(costs), features, a_BM, b_BN]
    return jax.lax.scan(text, own.critic[name], inputs)[1]


def _has_next(tokens):
  """The tokens of a text after which another one comes."""
  segments_BT = tokens.segments_BT
  return (segments_BT > 0) & ~segments.is_last(segments_BT)


def _potential(parameters, x_BMF, a_BM):
  """f_BM, within 1, of a token and of the mean of its text."""
  mean_BF = jnp.sum(a_BM[:, :, None] * x_BMF, axis=1, keepdims=True)
  context = projectors.apply(parameters['context'], mean_BF)
  token = projectors.apply(parameters['token'], x_BMF)
  both = jnp.concatenate(
    [jnp.broadcast_to(context, token.shape), token], axis=2
  )
  return jnp.tanh(projectors.apply(parameters['combine'], both))[:, :, 0]
