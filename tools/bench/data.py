"""What a large data set costs before the first step, and its batches.

  python -m tools.bench.data --tokenizer=DIR --data=FILE.jsonl --rows=1000000

Repeats the rows of a file, numbered, up to so many (by default synthetic ones,
with their tokenizer); reads them as a training run does, twice, each in a
process of its own: the first start tokenises, the second finds what that left,
and compares it with its checksums. Memory is the process's own: what is mapped
from files is shared and can be dropped.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools import synthetic


def main():
  args = _arguments()
  if args.run:
    print(json.dumps(_run(args)))
    return
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / 'rows.jsonl'
    if args.data:
      lines = Path(args.data).read_text().splitlines()
    else:
      lines = map(json.dumps, synthetic.rows('train', 10_000))
    tokenizer = args.tokenizer or f'{folder}/tokenizer'
    if not args.tokenizer:
      synthetic.train_tokenizer(tokenizer)
    _write(file, [*lines], args.rows)
    table = {}
    for start in ('first', 'second'):
      command = [sys.executable, '-m', 'tools.bench.data', '--run']
      command += [f'--tokenizer={tokenizer}', f'--data={file}']
      done = subprocess.run(
        [*command, *(['--packing'] if args.packing else [])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {'GAKD_JAX_CACHE': folder},
      )
      table[start] = json.loads(done.stdout.splitlines()[-1])
      print(start, table[start], flush=True)
    found = {'rows': args.rows, 'MB': file.stat().st_size / 1e6}
  print(json.dumps(found | {'starts': table}))


def _arguments():
  parser = argparse.ArgumentParser()
  parser.add_argument('--tokenizer', help='a directory')
  parser.add_argument('--data', help='a file of rows, a JSON object a line')
  parser.add_argument('--rows', type=int, default=1_000_000)
  parser.add_argument('--packing', action='store_true')
  parser.add_argument('--run', action='store_true', help='one of the two')
  return parser.parse_args()


def _write(file, lines, n):
  with file.open('w') as out:
    for i, line in zip(range(n), itertools.cycle(lines), strict=False):
      row = json.loads(line)
      key = next(k for k in ('instruction', 'question', 'prompt') if k in row)
      out.write(json.dumps(row | {key: f'{i}. {row[key]}'}) + '\n')


def _run(args):
  from gakd_jax.data import pipeline, sources, texts
  from gakd_jax.data import tokenizer as tokenizer_lib
  from gakd_jax.data.sources import Rules

  tokenizer = tokenizer_lib.load(args.tokenizer)
  imported, start = _memory(), time.perf_counter()
  every, _ = texts.load(
    args.data,
    sources.identity(args.data),
    tokenizer,
    template='qwen3',
    rules=Rules(),
    thinking='refuse',
  )
  found, _ = every.fit(512, 256)
  batches = pipeline.batches(
    found,
    batch_size=32,
    max_length=512,
    pad_id=tokenizer_lib.pad_id(tokenizer),
    packing=args.packing,
    seed=0,
  )
  next(batches)
  first = time.perf_counter() - start
  memory = _memory() - imported
  start, tokens, n = time.perf_counter(), 0, 2000
  for batch in itertools.islice(batches, n):
    tokens += (batch.student.segments_BT > 0).sum()
  seconds = time.perf_counter() - start
  return {
    'seconds to the first batch': first,
    'MB': memory / 1e6,
    'ms a batch': 1e3 * seconds / n,
    'tokens/s': float(tokens / seconds),
  }


def _memory():
  """Bytes that are this process's alone."""
  status = Path('/proc/self/status').read_text()
  return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1])


if __name__ == '__main__':
  main()
