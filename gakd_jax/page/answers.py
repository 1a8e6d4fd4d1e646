"""Everybody's answers to everything: what the page's browser of answers reads.

The files are answers/<set>-<seed>.jsonl of each run, one JSON a row:
instruction, input, references, answer, and scores by metric.
"""

import collections
import json
import math
from pathlib import Path

from gakd_jax import log, rundir

# As JSON in the page. Beyond it, only the first rows of each set are kept.
LIMIT_BYTES = 20_000_000


def collect(runs, limit=LIMIT_BYTES):
  """All answers of some runs.

  Args:
    runs: {model: run directory}.
    limit: in bytes; what is too much is cut at the same row in all sets.

  Returns:
    A list with a dict for each set: 'name', 'seeds', 'models', 'metrics',
    'total' (its rows before any was cut), and 'rows', dicts of 'index',
    'prompt', 'input', 'references', 'gold' where there is one, and 'answers':
    {seed: {model: {'text', 'scores': {metric: value}}}} with 'tokens',
    'extracted' and 'cut_at' of those that have them.
  """
  sets = {}
  for model, directory in runs.items():
    for path in sorted((Path(directory) / 'answers').glob('*.jsonl')):
      name, _, seed = path.stem.rpartition('-')
      found = sets.setdefault(
        name or path.stem,
        {'seeds': {}, 'models': {}, 'metrics': {}, 'rows': {}},
      )
      found['seeds'][seed] = found['models'][model] = True
      _add(found, model, seed, path)
  listed = [
    {
      'name': name,
      'seeds': sorted(found['seeds'], key=lambda seed: (len(seed), seed)),
      'models': list(found['models']),
      'metrics': list(found['metrics']),
      'total': len(found['rows']),
      'rows': list(found['rows'].values()),
    }
    for name, found in sets.items()
  ]
  return _cut(listed, limit)


def _add(found, model, seed, path):
  seen = collections.Counter()
  for number, row in enumerate(rundir.read_answers(path)):
    prompt, context = row['instruction'], row.get('input', '')
    # By its text and not by its number: runs may differ in what they left out.
    # A set may ask the same twice.
    key = prompt, context, seen[prompt, context]
    seen[prompt, context] += 1
    entry = found['rows'].setdefault(
      key,
      {
        'index': row.get('index', number),
        'prompt': prompt,
        'input': context,
        'references': row.get('references', []),
        'answers': {},
      },
    )
    if row.get('gold') is not None:
      entry['gold'] = row['gold']
    # Where there are no scores, the one of earlier versions may stand alone.
    scores = row.get('scores', {k: row[k] for k in ('rouge_l',) if k in row})
    answer = {
      'text': row['answer'],
      'scores': {
        k: round(v, 2)
        for k, v in scores.items()
        if v is not None and math.isfinite(v)
      },
    }
    optional = ('tokens', 'extracted', 'cut_at')
    answer |= {k: row[k] for k in optional if k in row}
    found['metrics'] |= scores
    entry['answers'].setdefault(seed, {})[model] = answer


def _cut(sets, limit):
  """The first rows of each set that fit, one at least; all, if they do."""
  by_row = collections.Counter()
  for found in sets:
    for i, row in enumerate(found['rows']):
      by_row[i] += len(json.dumps(row, ensure_ascii=False).encode())
  kept, size = 0, 0
  while kept in by_row and (not kept or size + by_row[kept] <= limit):
    size += by_row[kept]
    kept += 1
  return [found | {'rows': found['rows'][:kept]} for found in sets]


def to_script(data):
  """JSON that may stand between <script> tags, whatever it says."""
  text = log.to_json(data, separators=(',', ':'))
  for character in '<>&\u2028\u2029':
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text
