"""Checkpoints: the train state, and what the host must remember beside it."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of a run, newest last.

  Each holds a `TrainState` (as arrays, wherever they lie) and `host`, a JSON
  dict: the position of the data iterator and the best score so far. Saving is
  asynchronous; a checkpoint appears whole or not at all.
  """

  def __init__(self, directory, keep=1):
    self._manager = ocp.CheckpointManager(
      Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest_step(self):
    """The newest step that was saved; None if there is none."""
    return self._manager.latest_step()

  def save(self, step, state, host):
    """Starts to save; returns when the arrays may be changed again."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
      ),
    )

  def restore(self, state):
    """The newest checkpoint as (state, host).

    `state` is an (abstract) state with the shapes, dtypes and shardings wanted.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    restored = self._manager.restore(
      self.latest_step(),
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore()
      ),
    )
    return restored.state, restored.host

  def wait(self):
    """Until the last save is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    self.wait()
    self._manager.close()
