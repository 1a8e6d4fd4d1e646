"""How long alignments of two tokenizations take, and maps of vocabularies.

  python -m tools.bench.align --data=FILE.jsonl --tokenizers=DIR,DIR,... --map

Every pair of the tokenizers, both ways, all rows on one core: rows a second,
and the share of the student's tokens with a partner. By default of synthetic
rows, byte-level BPE and SentencePiece. --map: the first two tokenizers' map of
minimum edit distance, on all cores, twice: the second reads what the first
left.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from gakd_jax.data import align, sources, spelling, texts, vocab_map
from gakd_jax.data import tokenizer as tokenizer_lib
from tools import synthetic


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data')
  parser.add_argument('--tokenizers', help='directories, with commas')
  parser.add_argument('--map', action='store_true')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    paths = (args.tokenizers or _tokenizers(folder)).split(',')
    tokenizers = {Path(path).name: tokenizer_lib.load(path) for path in paths}
    found = {}
    if args.map:
      student, teacher, *_ = tokenizers.values()
      found['map, seconds'] = seconds = {}
      for which in ('first', 'second'):
        start = time.perf_counter()
        vocab_map.nearest(student, teacher, root=folder)
        seconds[which] = time.perf_counter() - start
    data = args.data or 'python:tools.synthetic:rows:train:3000'
    contents = sources.identity(data)
    rows = {
      name: texts.load(
        data,
        contents,
        tokenizer,
        # Alignments are of responses, whatever stands before them.
        template='alpaca' if args.data else 'chat',
        rules=sources.Rules(),
        thinking='refuse',
      )[0]
      for name, tokenizer in tokenizers.items()
    }
    spellings = {name: spelling.of(x) for name, x in tokenizers.items()}
    found['pairs'] = {
      f'{student} from {teacher}': _measure(student, teacher, rows, spellings)
      for student, teacher in itertools.permutations(tokenizers, 2)
    }
  print(json.dumps(found))


def _tokenizers(folder):
  synthetic.train_tokenizer(f'{folder}/bytes')
  synthetic.train_pieces(f'{folder}/pieces')
  return f'{folder}/bytes,{folder}/pieces'


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
  found = {'rows': n, 'tokens a row': tokens / n}
  for name, s in seconds.items():
    found[f'{name}, rows/s'] = n / s
    if name in shares:
      found[f'{name}, share of tokens'] = shares[name]
  return found


if __name__ == '__main__':
  main()
