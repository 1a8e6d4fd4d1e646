"""Scoring answers in processes, beside one process.

  python tools/bench/scoring.py data/sinst_11/test.jsonl

Each row of a data file is answered with the reference of another, and with
--long with the prompt's words; ROUGE-L, BLEU and exact match of all. The time
counts the start of the processes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from gakd_jax.data import sources
from gakd_jax.evals import tasks


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('data')
  parser.add_argument('--long', action='store_true')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  rows, _ = sources.load(args.data)
  answers = [row.references[0] for row in rows[1:] + rows[:1]]
  if args.long:
    answers = [f'{row.instruction} {row.input}'[:1200] for row in rows]
  pairs = dict(enumerate(zip(rows, answers, strict=True)))
  tasks.score('instruct', rows[0], answers[0])  # imports the packages
  for _ in range(args.rounds):
    result = {'rows': len(rows)}
    scored = {}
    for side, expected in (('one', 0), ('processes', 10**6)):
      start = time.perf_counter()
      with tasks.Pool('instruct', expected=expected) as pool:
        pool.add(pairs)
        scored[side] = pool.results()
      result[f'{side}_seconds'] = time.perf_counter() - start
    result['same'] = scored['one'] == scored['processes']
    print(json.dumps(result))


if __name__ == '__main__':
  main()
