"""DistiLLM-2: another divergence on the student's text than on the teacher's.

(1 - beta) KL(p || a p + (1-a) q) over tokens of the data, which the teacher
wrote (`python -m gakd_jax.generate --dataset`, or a stage of the writer
`teacher`), and beta KL(q || (1-a) p + a q) over tokens that the student writes
in the run (arXiv 2503.07067, eq. 7): the first raises what the teacher says,
the second lowers what only the student says. Each is a mean over its own
tokens; `config.rollout.share` says how much there is of each. Departures: the
authors pair both texts of a prompt, take their student's from an epoch before,
and move alpha and beta over the run; here a row has one text, and both stay.
"""

import dataclasses

from gakd_jax import UserError
from gakd_jax.objectives import base, divergences
from gakd_jax.settings import Share


@dataclasses.dataclass(frozen=True)
class DistiLLM2(base.Objective):
  alpha: Share = 0.1  # of both skewed divergences
  beta: Share = 0.5  # weight of what the student wrote

  def check(self, config):
    if config.rollout.writer != 'student':
      raise UserError(
        "config.objective: distillm2 tells the teacher's text from the "
        "student's; set config.rollout.writer='student', and a share"
      )
    if config.rollout.get('share', 1) == 1 and not config.rollout.get('beside'):
      raise UserError(
        'config.rollout.share=1: all would be the text of the student; lower '
        'it, or set config.rollout.beside'
      )

  def loss(self, student, teacher, batch, own, key):
    del own, key
    return self.mean_over_ids(self._id_loss, (student, teacher), batch)

  def _id_loss(self, log_probs, target):
    log_q_NV, log_p_NV = log_probs
    forward_N = target.data_N * divergences.skew_forward(
      log_p_NV, log_q_NV, self.alpha
    )
    reverse_N = target.written_N * divergences.skew_reverse(
      log_p_NV, log_q_NV, self.alpha
    )
    loss_N = (1 - self.beta) * forward_N + self.beta * reverse_N
    _, metrics = base.imitation(log_q_NV, target)
    return loss_N, metrics | {
      'skew_forward': forward_N,
      'skew_reverse': reverse_N,
    }
