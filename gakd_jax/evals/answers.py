"""<workdir>/answers/<set>-<seed>.jsonl: a line for each row of a set."""

from gakd_jax import UserError, hosts, log, rundir


def path_of(workdir, name, seed):
  return workdir / 'answers' / f'{name}-{seed}.jsonl'


def prompt(index, row, tag):
  """How a line begins: which row it answers, at which step."""
  return {
    'index': index,
    'step': tag,
    'instruction': row.instruction,
    'input': row.input,
    'references': row.references,
  }


def write(workdir, name, seed, lines):
  """Writes the file; of several processes, the first one."""

  def do():
    text = ''.join(log.to_json(x) + '\n' for x in lines)
    log.write_atomically(path_of(workdir, name, seed), text)

  hosts.only_first(do)


def keep(source, workdir, step):
  """Copies what was answered at a step from one run's directory to another's.

  Of several processes, the first one does.
  """

  def do():
    for path in sorted((source / 'answers').glob('*.jsonl')):
      if rundir.read_answers(path)[0].get('step') == step:
        text = path.read_text('utf-8')
        log.write_atomically(workdir / 'answers' / path.name, text)

  hosts.only_first(do)


def read(workdir, evaluator, seed):
  """The lines of the file, one for each of an evaluator's rows.

  Raises:
    UserError: if it is not there, or no such file.
  """
  name = evaluator.name
  path = path_of(workdir, name, seed)
  if not path.exists():
    raise UserError(f'{path} is not there: {name!r} was not evaluated')
  lines = rundir.read_answers(path)
  n = len(evaluator.rows)
  if len(lines) != n:
    raise UserError(
      f'{path}: has {len(lines)} answers to {n} rows; move it away'
    )
  return lines
