"""Brings a data set into the form and place that the configs look for.

  python tools/prepare_data.py SOURCE data/dolly/train.jsonl

SOURCE is anything that `config.data.train` takes: a file, a directory or a hub
id (org/name:split). Rows are checked and written as JSON Lines with the fields
`instruction`, `input`, `output` (a list if there are several references), or
`messages`; bad rows are left out, counted by reason. `--skip=7000` leaves out
the first 7000 of the others, `--limit=1000` takes 1000 from there on: a part of
a file to train on, and another to validate with.

  python tools/prepare_data.py test.ne data/flores_ne_en/test.jsonl \\
    --target=test.en --languages=Nepali,English

makes translation rows of two texts, line by line.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gakd_jax import UserError, log
from gakd_jax.data import files, sources


def to_record(row):
  """A `Row` as the dict that `sources.load` reads as that row again."""
  references = list(row.references)
  output = references if len(references) > 1 else references[0]
  answer = {'answer': row.answer} if row.answer else {}
  if row.messages is None:
    prompt = {'instruction': row.instruction, 'input': row.input}
    return prompt | {'output': output} | answer
  if len(references) > 1 or answer:
    return {'messages': [*row.messages], 'output': output} | answer
  return {'messages': [*row.messages, {'role': 'assistant', 'content': output}]}


def translations(source, target, languages):
  """The rows of two files of text whose lines belong together."""
  one, other = map(_lines, (source, target))
  if len(one) != len(other):
    raise UserError(
      f'{source} has {len(one)} lines and {target} {len(other)}: these are not '
      'translations line by line'
    )
  task = 'Translate the following {} text into {}.'.format(*languages)
  return [
    sources.Row(task, text, (translation,), where=f'{source}:{i + 1}')
    for i, (text, translation) in enumerate(zip(one, other, strict=True))
    if text.strip() and translation.strip()
  ]


def _lines(file):
  file = Path(file)
  files.check(file)
  try:
    with file.open(encoding='utf-8-sig', newline='\n') as lines:
      return [line.removesuffix('\n').removesuffix('\r') for line in lines]
  except UnicodeDecodeError as error:
    raise UserError(f'{file}: not UTF-8 ({error}); convert it') from error


def _prepare(args):
  if args.skip < 0 or (args.limit is not None and args.limit < 1):
    raise UserError(
      f'--skip={args.skip} --limit={args.limit}: expected 0 or more rows to '
      'leave out, and 1 or more to take'
    )
  if not args.file.endswith('.jsonl') or Path(args.file).is_dir():
    raise UserError(f'{args.file}: name a file to write that ends in .jsonl')
  if args.languages and not args.target:
    raise UserError('--languages are of the source and of --target; name both')
  if args.target:
    languages = [x.strip() for x in args.languages.split(',')]
    if len(languages) != 2 or not all(languages):
      raise UserError('--languages: name two, as in Nepali,English')
    rows, bad = translations(args.source, args.target, languages), {}
  else:
    rows, bad = sources.load(args.source)
  kept = rows[args.skip :][: args.limit]
  if not kept:
    raise UserError(
      f'--skip={args.skip}: {args.source} has {len(rows)} rows; nothing is left'
    )
  lines = (json.dumps(to_record(r), ensure_ascii=False) + '\n' for r in kept)
  log.write_atomically(args.file, ''.join(lines))
  skipped = ''.join(f', {n} skipped: {why}' for why, n in sorted(bad.items()))
  some = f' of {len(rows)}' * (len(kept) < len(rows))
  print(f'{args.file}: {len(kept)}{some} rows{skipped}')


def main(argv=None):
  """Returns the exit status: 2 if the user can put it right."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('source')
  parser.add_argument('file', help='.jsonl')
  parser.add_argument('--target', help='text; the source is text as well')
  parser.add_argument('--languages', default='', help='as in Nepali,English')
  parser.add_argument('--skip', type=int, default=0, help='rows')
  parser.add_argument('--limit', type=int, help='rows; default: all')
  try:
    _prepare(parser.parse_args(argv))
  except (UserError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
