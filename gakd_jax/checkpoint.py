"""Checkpoints: the train state, and what the host must remember beside it."""

import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from gakd_jax import UserError, hosts


class Checkpoints:
  """The checkpoints of a run, newest last.

  Each holds a `TrainState` (as arrays, wherever they lie) and `host`, a JSON
  dict: the position of the data iterator, the best score so far and whether it
  is this state's. Saving is asynchronous; a checkpoint appears whole or not at
  all.
  """

  def __init__(self, directory, keep=1):
    self._manager = ocp.CheckpointManager(
      Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest_step(self):
    """The newest step that was saved; None if there is none."""
    return hosts.of_first(self._manager.latest_step)

  def save(self, step, state, host):
    """Starts to save; returns when the arrays may be changed again.

    Raises:
      UserError: if it does not fit on the disk. Orbax would find out in its
        threads, which report it in several hundred lines.
    """
    hosts.only_first(lambda: self._check_room(state))
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)
      ),
    )

  def _check_room(self, state):
    directory = self._manager.directory
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    free = shutil.disk_usage(directory).free
    if free < needed:
      raise UserError(
        f'the disk is full: a checkpoint needs {needed / 1e6:,.0f} MB and '
        f'{directory} has {free / 1e6:,.0f} MB left; free some space and run '
        'the same command again, which continues from the last checkpoint'
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
