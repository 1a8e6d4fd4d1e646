"""What is said of the steps that were skipped, and when they end a run.

What is skipped, and why, is in `skips`.
"""

import jax

from gakd_jax import UserError, inputs, sharding

_ROWS = 3  # of a batch that are named
_TEXTS = {
  'no_text': 'no token of it is of a response',
  'spike': 'its loss or gradient is far above the last ones',
  'gradient': 'the gradient is not finite',
  'update': 'it would make parameters that are not finite',
}
_ADVICE = {
  'no_text': 'look at the rows, the template and config.data.max_length',
  'spike': 'raise config.train.skip_spikes, or lower the learning rate',
  'critic': 'lower config.critic_optimizer.learning_rate, or set its clip_norm',
}
_USUAL_ADVICE = (
  "lower config.optimizer.learning_rate, or look at the teacher's weights and "
  'at the rows'
)


class SkipLog:
  """Says which steps were skipped; all processes do alike.

  enough: so many were skipped in a row, as far as is known, that the run is to
    end.
  """

  def __init__(self, run, total):
    self._run = run
    self._most = min(run.config.train.max_skipped, total)
    self._causes = []
    self.enough = False

  def look(self, now, metrics, rows_B):
    """Looks at a step: its metrics on the host, and `Batch.rows_B`."""
    in_a_row = int(metrics['skipped/in_a_row'])
    self.enough = in_a_row >= self._most
    if not in_a_row:
      return
    self._causes = [
      name.removeprefix('skipped/')
      for name, x in metrics.items()
      if name.startswith('skipped/') and x and name != 'skipped/in_a_row'
    ]
    print(
      f'step {now} was skipped: {_reasons(self._causes)}'
      # Later ones of a row have the same causes, and files are long.
      + (self._rows(rows_B) if in_a_row == 1 else ''),
      flush=True,
    )

  def check(self, state):
    """Refuses to go on from a state before which enough were skipped.

    Raises:
      UserError: saying why, and what to look at.
    """
    last, total, in_a_row = (
      int(x) for x in (state.step, state.skips.total, state.skips.in_a_row)
    )
    if in_a_row < self._most:
      return
    causes = [x for x in self._causes if x in _ADVICE] or ['']
    advice = '; '.join(_ADVICE.get(x, _USUAL_ADVICE) for x in causes)
    before = last - in_a_row
    saved = 'no step was taken'
    if total < last:
      saved = f'the student of step {before} is saved'
    raise UserError(
      f'steps {before + 1} to {last} were all skipped '
      f'({_reasons(self._causes)}), which config.train.max_skipped='
      f'{self._run.config.train.max_skipped} does not allow: {advice}; {saved}'
    )

  def _rows(self, rows_B):
    """Where the first rows of a batch stand in the data, if that is known."""
    run = self._run
    if run.texts is None or jax.process_index() != 0:
      return ''
    found = [i for i in sharding.local_rows(rows_B) if i >= 0]
    places = run.texts.places[found[:_ROWS]]
    rows = inputs.rows(run.config, run.writer, places)
    more = len(found) - len(rows)
    return f'; its rows: {", ".join(row.where for row in rows)}' + (
      f' and {more} more' if more > 0 else ''
    )


def _reasons(causes):
  texts = [_TEXTS.get(x, f'{x} is not finite') for x in causes]
  return ', '.join(texts) or 'see metrics.jsonl'
