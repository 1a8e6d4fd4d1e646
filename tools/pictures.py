"""The bar charts of docs/index.md: docs/pictures/{quickstart,cost}.svg.

  python -m tools.pictures

From the table of docs/tutorials/quickstart.md and the times of
docs/performance/rkl_step.json; bars with their spread, in the colours of the
reader's system.
"""

import html
import json
import pathlib
import re
import statistics

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
WIDTH, LABEL, ROW = 560, 240, 26  # of a picture, its labels, a bar and its gap
STYLE = """<style>
  text { font: 13px Helvetica, Arial, sans-serif; fill: #222; }
  .head { font-weight: 600; }
  .bar { fill: #9fa8da; } .ours { fill: #3f51b5; }
  .spread { stroke: #222; stroke-width: 1.2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #ddd; } .spread { stroke: #ddd; }
    .bar { fill: #5c6690; } .ours { fill: #97a6ff; }
  }
</style>"""
SAMPLED = 'sampled ROUGE-L'  # a column of it
# Rows of the quickstart's table, as they begin, and how they are called here.
QUICKSTART = {
  'teacher': 'teacher',
  'SFT on 600 gold rows': 'SFT',
  'the best of': 'SFT, continued, at its best',
  'SeqKD': "SeqKD: the teacher's answers too",
  '0.5 CE + 0.5 forward KL': 'forward KL on the same text',
  'then reverse KL': 'then reverse KL, half on its own text',
  '0.5 CE + 0.5 reverse KL': 'reverse KL on the same text',
  'GAKD': 'GAKD: that, with a critic',
}
SIDES = {
  'jax': 'gakd_jax',
  'compile': 'PyTorch, torch.compile',
  'eager': 'PyTorch, eager',
  'gkd': 'TRL, GKDTrainer',
  'distillation': 'TRL, DistillationTrainer',
}


def main():
  folder = DOCS / 'pictures'
  (folder / 'quickstart.svg').write_text(picture(quickstart()))
  (folder / 'cost.svg').write_text(picture(cost()))


def quickstart():
  """[(heading, [(label, value, low, high, is ours)])] of sampled ROUGE-L."""
  lines = (DOCS / 'tutorials/quickstart.md').read_text().splitlines()
  rows = [
    [x.strip(' *') for x in line.strip('|').split('|')]
    for line in lines
    if line.startswith('| ')
  ]
  [column] = {x.index(SAMPLED) for x in rows if SAMPLED in x}
  bars = []
  for begins, label in QUICKSTART.items():
    [cells] = [row for row in rows if row[0].startswith(begins)]
    mean, *spread = map(float, re.findall(r'[\d.]+', cells[column]))
    spread = spread[0] if spread else 0
    taught = begins not in ('teacher', 'SFT on 600 gold rows', 'the best of')
    bars.append((label, mean, mean - spread, mean + spread, taught))
  return [('sampled ROUGE-L, mean and deviation of three seeds', bars)]


def cost():
  """The same, of seconds and memory of a reverse-KL step."""
  file = DOCS / 'performance/rkl_step.json'
  sides = json.loads(file.read_text())['found']['sides']
  charts = []
  for key, heading in (
    ('seconds', 'seconds a step, median, least and most of three rounds'),
    ('peak_gb', 'peak resident memory, GB'),
  ):
    bars = [
      (label, statistics.median(x), min(x), max(x), side == 'jax')
      for side, label in SIDES.items()
      for x in [sides[side][key]]
    ]
    charts.append((heading, bars))
  return charts


def picture(charts):
  """Charts below each other, as SVG."""
  parts, y = [], 0
  for heading, bars in charts:
    parts.append(f'<text class="head" x="0" y="{y + 18}">{heading}</text>')
    y += 32
    scale = (WIDTH - LABEL - 60) / max(high for *_, high, _ in bars)
    for label, value, low, high, ours in bars:
      left, right = LABEL + low * scale, LABEL + high * scale
      kind = 'ours' if ours else 'bar'
      parts += [
        f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">'
        f'{html.escape(label)}</text>',
        f'<rect class="{kind}" x="{LABEL}" y="{y}" width="{value * scale:.1f}"'
        ' height="18" rx="2"/>',
        f'<line class="spread" x1="{left:.1f}" x2="{right:.1f}"'
        f' y1="{y + 9}" y2="{y + 9}"/>',
        f'<text x="{right + 8:.1f}" y="{y + 13}">{value:.3g}</text>',
      ]
      y += ROW
    y += 12
  body = '\n'.join(parts)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}"'
    f' role="img">\n<title>{charts[0][0]}</title>\n{STYLE}\n{body}\n</svg>\n'
  )


if __name__ == '__main__':
  main()
