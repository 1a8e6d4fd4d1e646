"""What a run tells its user: metrics on disk, progress and tables on screen.

`metrics.jsonl` is the record; TensorBoard, the terminal and the HTML page (see
`page`) are views of it. On several hosts, only one process may write.
"""

import datetime
import json
import math
import numbers
import os
import pathlib
import time

import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

from gakd_jax import UserError, json_lines

# The bins of all histograms, even in asinh: fine around 0, and up to 74.
HISTOGRAM_EDGES = np.sinh(np.linspace(-5, 5, 81))

_PLAIN_INTERVAL_S = 10.0  # Between two lines of progress in a log file.


class Metrics:
  """Writes metrics by step to <workdir>/metrics.jsonl and to trackers.

  A run that continues writes again what came after its checkpoint: of what is
  there, the first `rows` lines stay, up to its `step` (a user may have deleted
  a damaged one). `rows` counts on. A tracker that fails is told of and left
  out from there on: it is to stop no training.
  """

  def __init__(self, workdir, trackers=(), rows=0, step=math.inf):
    path = _metrics_path(workdir)
    kept = read_metrics(workdir)[:rows] if rows else []
    kept = [row for row in kept if row['step'] <= step]
    write_atomically(path, ''.join(map(_to_line, kept)))
    self.rows = len(kept)
    self._file = path.open('a', encoding='utf-8')
    self._trackers = [*trackers]
    for row in kept:
      self._track(**row)

  def write(self, step, values):
    """Appends one line.

    `values` maps names like 'train/loss' to scalars, or to the counts of a
    histogram over `HISTOGRAM_EDGES`.
    """
    values = {
      name: np.asarray(x, int).tolist() if np.ndim(x) else float(x)
      for name, x in values.items()
    }
    self._file.write(_to_line({'step': int(step)} | values))
    self._file.flush()
    self.rows += 1
    self._track(int(step), **values)

  def _track(self, step, **values):
    self._tell(lambda tracker: tracker.write(step, values))

  def close(self):
    self._file.close()
    self._tell(lambda tracker: tracker.close())

  def _tell(self, what):
    for tracker in [*self._trackers]:
      try:
        what(tracker)
      except Exception as error:  # Of a server, a network, a service's client.
        self._trackers.remove(tracker)
        said = ' '.join(str(error).split()) or type(error).__name__
        print(
          f'warning: {type(tracker).__name__} failed and is left out from here '
          f'on ({said[:200]}); metrics.jsonl has everything',
          flush=True,
        )


def read_metrics(workdir):
  """The rows of <workdir>/metrics.jsonl; [] if there is none yet.

  A last line that a killed process left unfinished is ignored. What was not
  finite when it was written reads as NaN.

  Raises:
    UserError: for what is no such file.
  """
  path = _metrics_path(workdir)
  rows = json_lines.read(path, {'step': int}, growing=True)
  for number, row in enumerate(rows, start=1):
    for name, value in row.items():
      if value is None:
        row[name] = math.nan
      elif type(value) not in (int, float) and not _is_histogram(value):
        raise UserError(
          f'{path}:{number}: {name} is no number, nor the counts of a '
          'histogram; repair or delete the line'
        )
  return rows


def _is_histogram(value):
  """Whether it is a list of counts over `HISTOGRAM_EDGES`."""
  n = HISTOGRAM_EDGES.size - 1
  return isinstance(value, list) and [*map(type, value)] == [int] * n


def write_atomically(path, text):
  """Replaces a file as a whole: a reader never sees half of it.

  Raises:
    UserError: if what is there is no file: a device, say, would be replaced.
  """
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    raise UserError(
      f'{path}: there is something else than a file; name another'
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  # Several processes may write the same, each by a name of its own.
  partial = path.with_name(
    f'{path.name}.{os.uname().nodename}.{os.getpid()}.tmp'
  )
  try:
    with partial.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())  # Before it has its name: a crash leaves one.
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _metrics_path(workdir):
  return pathlib.Path(workdir) / 'metrics.jsonl'


def to_json(value, **options):
  """`json.dumps` with null for what is not finite, and texts as they are.

  NaN and infinity are no JSON: a strict reader refuses all that holds one.
  """
  return json.dumps(
    _finite(value), ensure_ascii=False, allow_nan=False, **options
  )


def _finite(value):
  if isinstance(value, dict):
    return {key: _finite(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(x) for x in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _to_line(row):
  return to_json(row) + '\n'


class Progress:
  """A progress bar on a terminal; elsewhere a plain line now and then.

  with Progress(total_steps, start_step, 'distillation') as progress:
    progress.update(step, loss=1.25, tokens_per_second=1e4)
  """

  def __init__(self, total_steps, start_step=0, description='training'):
    self._total = total_steps
    self._step = start_step
    self._description = description
    self._console = rich.console.Console()
    self._start_time = time.monotonic()
    self._first = None  # (time, step) of the first update: after compilation.
    self._printed_time = -math.inf
    self._unprinted = None
    self._bar = None
    if self._console.is_interactive:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}', markup=False),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn('{task.fields[status]}', markup=False),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=self._console,
        expand=True,
        refresh_per_second=4,
        speed_estimate_period=600,  # A step may take minutes.
      )
      self._task = self._bar.add_task(
        description, completed=start_step, total=total_steps, status=''
      )

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception):
    if self._bar:
      self._bar.stop()
    elif self._unprinted:
      self.say(self._unprinted)

  def advance(self, steps, **status):
    """`update` by so many steps more."""
    self._step += steps
    self.update(self._step, **status)

  def update(self, step, *, loss=None, tokens_per_second=None):
    self._step = step
    status = [] if loss is None else [f'loss {loss:.4f}']
    if tokens_per_second is not None:
      status.append(f'{tokens_per_second:,.0f} tokens/s')
    if self._bar:
      text = '  '.join(status)
      self._bar.update(self._task, completed=step, status=text)
      return
    now = time.monotonic()
    self._first = self._first or (now, step)
    parts = [f'{self._description}  {step}/{self._total}', *status]
    parts.append(f'elapsed {_duration(now - self._start_time)}')
    first_time, first_step = self._first
    if first_step < step < self._total:
      seconds_per_step = (now - first_time) / (step - first_step)
      eta = seconds_per_step * (self._total - step)
      parts.append(f'ETA {_duration(eta)}')
    self._unprinted = '  '.join(parts)
    if now - self._printed_time >= _PLAIN_INTERVAL_S:
      self.say(self._unprinted)
      self._printed_time, self._unprinted = now, None

  def say(self, text):
    """Prints a line above the bar."""
    self._console.out(text, highlight=False)


def _duration(seconds):
  return str(datetime.timedelta(seconds=round(seconds)))


def print_table(columns, rows, title):
  """Prints a table; where no terminal bounds the width, as Markdown."""
  terminal = rich.console.Console().is_terminal
  table = rich.table.Table(
    title=rich.text.Text(title),
    title_justify='left',
    box=rich.box.SIMPLE_HEAD if terminal else rich.box.MARKDOWN,
  )
  rows = format_rows(rows)
  for i, name in enumerate(columns):
    table.add_column(
      rich.text.Text(name),
      justify='right' if is_numeric([row[i] for row in rows]) else 'left',
      overflow='fold',  # A narrow terminal breaks cells, and drops nothing.
    )
  for row in rows:
    table.add_row(*map(rich.text.Text, row))
  rich.console.Console(width=None if terminal else 10_000).print(table)


def format_rows(rows):
  """Cells as text; the floats of one column get the same decimals."""
  columns = [_format_column(column) for column in zip(*rows, strict=True)]
  return [list(row) for row in zip(*columns, strict=True)]


def is_numeric(column):
  """Whether the texts of a column are numbers ('24.1 ± 0.3' is one)."""
  texts = [text.lstrip('<+-') for text in column]
  return any(texts) and all(
    text[:1].isdigit() or text in ('', 'nan', 'inf') for text in texts
  )


def _format_column(cells):
  sizes = [abs(cell) for cell in cells if _is_float(cell)]
  largest = max(filter(math.isfinite, sizes), default=0)
  spec = '.2f' if largest >= 10 else '.2e' if 0 < largest < 0.01 else '.3f'
  texts = ['-' if cell is None else str(cell) for cell in cells]
  for i, cell in enumerate(cells):
    if _is_float(cell):
      texts[i] = format(cell, spec)
  return texts


def _is_float(x):
  return isinstance(x, numbers.Real) and not isinstance(x, numbers.Integral)
