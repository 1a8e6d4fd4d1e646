"""Brings a data set into the form and place that the configs look for.

  python tools/prepare_data.py SOURCE data/dolly/train.jsonl

SOURCE is anything that `config.data.train` takes: a file, a directory or a hub
id (org/name:split). Rows are checked and written as JSON Lines with the fields
`instruction`, `input`, `output` (a list if there are several references), or
`messages`; bad rows are left out, counted by reason.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gakd_jax import UserError, main, report
from gakd_jax.data import sources


def to_record(row):
  """A `Row` as the dict that `sources.load` reads as that row again."""
  if row.messages is not None:
    answer = {'role': 'assistant', 'content': row.references[0]}
    return {'messages': [*row.messages, answer]}
  references = list(row.references)
  output = references if len(references) > 1 else references[0]
  return {'instruction': row.instruction, 'input': row.input, 'output': output}


def _main(argv):
  if len(argv) != 3:
    raise UserError('usage: python tools/prepare_data.py SOURCE FILE.jsonl')
  rows, bad = sources.load(argv[1])
  lines = (json.dumps(to_record(r), ensure_ascii=False) + '\n' for r in rows)
  report.write_atomically(argv[2], ''.join(lines))
  skipped = ''.join(f', {n} skipped: {why}' for why, n in sorted(bad.items()))
  print(f'{argv[2]}: {len(rows)} rows{skipped}')


if __name__ == '__main__':
  main.guarded(_main, sys.argv)
