"""How long alignments of two tokenizations take, and maps of vocabularies.

  python -m tools.bench.align --data=FILE.jsonl --tokenizers=DIR,DIR,... --map

Every pair of the tokenizers, both ways, all rows on one core: rows a second
and the share of the student's tokens with a partner. --map: the first two
tokenizers' map of minimum edit distance, on all cores.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np

from gakd_jax.data import align, sources, spelling, texts, vocab_map
from gakd_jax.data import tokenizer as tokenizer_lib


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--data', required=True)
  parser.add_argument('--tokenizers', required=True)
  parser.add_argument('--map', action='store_true')
  args = parser.parse_args()
  paths = args.tokenizers.split(',')
  tokenizers = [tokenizer_lib.load(path) for path in paths]
  names = [Path(path).name for path in paths]
  if args.map:
    with tempfile.TemporaryDirectory() as root:
      for _ in range(2):
        start = time.perf_counter()
        student_ids_U = vocab_map.nearest(*tokenizers[:2], root=root)
        seconds = time.perf_counter() - start
        print(
          f'map of {names[1]} ({len(student_ids_U):,} ids) to {names[0]}: '
          f'{seconds:.1f} s'
        )
  contents = sources.identity(args.data)
  rows = {
    name: texts.load(
      args.data,
      contents,
      tokenizer,
      template='alpaca',
      rules=sources.Rules(),
      thinking='refuse',
    )[0]
    for name, tokenizer in zip(names, tokenizers, strict=True)
  }
  spellings = dict(zip(names, map(spelling.of, tokenizers), strict=True))
  for student, teacher in itertools.permutations(names, 2):
    _measure(student, teacher, rows, spellings)


def _measure(student, teacher, rows, spellings):
  pair = student, teacher
  s_spelling, t_spelling = (spellings[name] for name in pair)
  responses = [
    (rows[student][i][1], rows[teacher][i][1])
    for i in range(len(rows[student]))
  ]
  n = len(responses)
  seconds = {}

  def timed(name, function, items):
    start = time.perf_counter()
    found = [function(*item) for item in items]
    seconds[name] = time.perf_counter() - start
    return found

  readings = timed(
    'read',
    lambda s, t: (spelling.read(s_spelling, s), spelling.read(t_spelling, t)),
    responses,
  )
  pairs = timed('pairs', align.exact_pairs, readings)
  pieces = timed('spans', align.spans, readings)
  s_strings, t_strings = spelling.strings(s_spelling, t_spelling)
  paths = timed(
    'dtw',
    lambda s, t: align.dtw(
      spelling.words(t_strings, t), spelling.words(s_strings, s)
    ),
    responses,
  )
  tokens = sum(len(s) for s, _ in responses)
  single = [
    align.partners(path[1], path[0], len(s))
    for path, (s, _) in zip(paths, responses, strict=True)
  ]
  shares = {
    'pairs': sum(len(s) for s, _ in pairs) / tokens,
    'spans': sum(np.sum(s >= 0) for s, _ in pieces) / tokens,
    'dtw': sum(np.sum(x >= 0) for x in single) / tokens,
  }
  print(f'{student} <- {teacher}: {n:,} rows, {tokens / n:.0f} tokens each')
  for name, s in seconds.items():
    share = f', {shares[name]:.1%} of tokens' if name in shares else ''
    print(f'  {name}: {n / s:,.0f} rows/s{share}', flush=True)


if __name__ == '__main__':
  main()
