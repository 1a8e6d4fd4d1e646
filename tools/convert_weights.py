"""Weights between a Hugging Face directory and a Flax one, or a .gguf file.

  python tools/convert_weights.py to_flax SRC DST [--dtype bfloat16]
  python tools/convert_weights.py to_hf SRC DST
  python tools/convert_weights.py to_hf --merge ADAPTER DST
  python tools/convert_weights.py from_gguf FILE DST [--dtype bfloat16]

A Flax directory has `params/`, an Orbax checkpoint of the parameter tree
(nested dicts; kernels [in, out]; layers stacked along a leading axis), beside
the config.json and the tokenizer of the Hugging Face directory. Weights keep
every bit unless a dtype is asked for, and memory never holds them twice.

With --merge, the source is a directory of adapters as PEFT and training write
it, and the result is their base model with them folded in.

from_gguf writes the Hugging Face directory of a file of llama.cpp. Such a file
may stand wherever a model's directory may; this is for who wants to keep it,
or wants it in another dtype.
"""

import argparse
import functools
import logging
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import rich.console
import rich.progress
from flax import nnx

from gakd_jax import UserError, best, models
from gakd_jax.models import convert, gguf_files, lora, transformer

DTYPES = ('float32', 'bfloat16', 'float16')


def to_flax(source, destination, dtype=None):
  """Writes the Flax directory of a Hugging Face directory or hub id.

  Adapters are merged into their base.
  """
  destination = Path(destination).resolve()
  new = destination.with_name(destination.name + '.tmp')
  shutil.rmtree(new, ignore_errors=True)
  with _progress() as progress:
    size = _loaded_bytes(models.resolve_base(source), dtype)
    model = models.load(source, dtype, report=_task(progress, 'reading', size))
    lora.merge(model)
    report = _task(progress, 'writing', _bytes(transformer.split(model)[1]))
    try:
      _write_flax(model, new)
      _copy_record(source, new)
    except BaseException:
      shutil.rmtree(new, ignore_errors=True)
      raise
    report(_bytes(transformer.split(model)[1]))
  new.rename(destination)


def _write_flax(model, path):
  params = transformer.split(model)[1]
  # In pieces, of which reading holds a few beside the parameter.
  pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2**27), params)
  with _checkpointer(params) as checkpointer:
    checkpointer.save(
      path / 'params', args=ocp.args.PyTreeSave(params, save_args=pieces)
    )
  models.write_config(model, path)
  models.copy_companions(model.companions, path)


def _copy_record(source, directory):
  """Of what the source says of how it is asked."""
  record = models.resolve(source, best.RECORD) / best.RECORD
  if record.exists():
    shutil.copyfile(record, directory / best.RECORD)


def to_hf(source, destination):
  """Writes the Hugging Face directory of a Flax directory."""
  source = Path(source).resolve()
  model = models.abstract(models.read_config(source), source)
  definition, shapes = transformer.split(model)
  with _progress() as progress:
    report = _task(progress, 'reading', None)
    params = _restore(source / 'params', shapes)
    report(_bytes(params))
    report = _task(progress, 'writing', _bytes(params))
    models.save(
      nnx.merge(definition, params),
      destination,
      report=report,
      describe=functools.partial(_copy_record, source),
    )


def merge(source, destination):
  """Writes the Hugging Face directory of a base model and its adapters."""
  with _progress() as progress:
    size = _loaded_bytes(models.resolve_base(source), None)
    model = models.load(source, report=_task(progress, 'reading', size))
    if not lora.adapters(model):
      raise UserError(f'{source}: has no adapters to merge')
    lora.merge(model)
    report = _task(progress, 'writing', size)
    describe = functools.partial(_copy_record, source)
    models.save(model, destination, report=report, describe=describe)


def from_gguf(source, destination, dtype=None):
  """Writes the Hugging Face directory of a .gguf file."""
  if not gguf_files.is_one(source):
    raise UserError(f'{source}: not a .gguf file')
  destination = Path(destination).resolve()
  new = destination.with_name(destination.name + '.tmp')
  shutil.rmtree(new, ignore_errors=True)
  gguf_files.write(source, new, dtype)
  new.rename(destination)


def _restore(path, shapes):
  """Reads an Orbax checkpoint whose shapes are known, in its own dtypes."""
  if not path.is_dir():
    raise UserError(f'{path}: not found; `to_flax` writes such a directory')
  try:
    return _restored(path, shapes)
  except UserError:
    raise
  except Exception as e:  # Orbax's errors have no common class.
    reason = (str(e).splitlines() or [''])[0]
    raise UserError(
      f'{path}: cannot be read ({type(e).__name__}: {reason}); make it again '
      'with `to_flax`'
    ) from e


def _restored(path, shapes):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata
  if metadata is None:
    raise ValueError('its metadata are not there, or damaged')
  stored = convert.flatten(metadata.tree)
  expected = {k: x.shape for k, x in convert.flatten(shapes).items()}
  found = {
    k: tuple(x.shape) for k, x in stored.items() if x.dtype.name in DTYPES
  }
  if found != expected:
    wrong = sorted(k for k, _ in found.items() ^ expected.items())
    raise UserError(
      f'{path}: does not match config.json in {", ".join(dict.fromkeys(wrong))}'
    )
  # To numpy: on the way to a device a parameter would be there twice.
  restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), shapes)
  with _checkpointer(shapes) as checkpointer:
    return checkpointer.restore(
      path, args=ocp.args.PyTreeRestore(shapes, restore_args)
    )


def _checkpointer(params):
  """Orbax, with one parameter in flight: it would copy all at once."""
  largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  gigabytes = 1.01 * largest / 10**9
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(
      save_concurrent_gb=gigabytes,
      restore_concurrent_gb=gigabytes,
      # A directory for each parameter, as it is: weights do not get smaller,
      # and it takes a fifth of the time.
      use_ocdbt=False,
      use_compression=False,
    )
  )


def _bytes(params):
  return sum(x.nbytes for x in jax.tree.leaves(params))


def _loaded_bytes(path, dtype):
  """What `models.load` will report, but for the headers of files."""
  if dtype is None:
    return sum(file.stat().st_size for file in path.glob('*.safetensors'))
  shapes = transformer.split(models.abstract(models.read_config(path)))[1]
  n = sum(x.size for x in jax.tree.leaves(shapes))
  return n * jax.numpy.dtype(dtype).itemsize


def _progress():
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TimeElapsedColumn(),
    console=rich.console.Console(stderr=True),
  )


def _task(progress, description, size):
  """A bar; what is returned advances it by a number of bytes."""
  task = progress.add_task(description, total=size)
  return lambda n: progress.advance(task, n)


def main(argv=None):
  """Returns the exit status: 2 if the user can put it right."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('direction', choices=('to_flax', 'to_hf', 'from_gguf'))
  parser.add_argument('source', help='directory, hub id for to_flax, or file')
  parser.add_argument('destination', help='a directory that is not there yet')
  parser.add_argument('--dtype', choices=DTYPES, help='cast; not for to_hf')
  parser.add_argument(
    '--merge', action='store_true', help='fold adapters in, for to_hf'
  )
  args = parser.parse_args(argv)
  # Orbax warns of files that it was asked not to write (`use_ocdbt`).
  logging.getLogger('absl').setLevel(logging.ERROR)
  if args.direction == 'to_hf' and args.dtype:
    parser.error('--dtype goes with to_flax and from_gguf')
  if args.direction != 'to_hf' and args.merge:
    parser.error('--merge goes with to_hf')
  try:
    if Path(args.destination).exists():
      raise UserError(f'{args.destination}: exists already; name a new one')
    if args.direction == 'to_flax':
      to_flax(args.source, args.destination, args.dtype)
    elif args.direction == 'from_gguf':
      from_gguf(args.source, args.destination, args.dtype)
    elif args.merge:
      merge(args.source, args.destination)
    else:
      to_hf(args.source, args.destination)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except OSError as e:  # A full disk, a place of others.
    where = e.filename or args.destination
    print(f'error: {where}: {e.strerror or e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # copying needs no accelerator
  sys.exit(main())
