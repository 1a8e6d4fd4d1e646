"""The page shows everything that it is given, escaped, and needs nothing else."""

import configparser
import fnmatch
import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np

from gakd_jax.page import figures, parts, rollouts

EVIL = '</p><script>alert("$x")</script>&amp;'


class _Page(html.parser.HTMLParser):
  """Collects what a page shows, and fails on tags that do not match."""

  def __init__(self, text):
    super().__init__()
    self.open, self.texts, self.tags, self.attributes = [], [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(name, value or '') for name, value in attrs]
    if tag not in ('meta', 'br', 'input'):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(name, value or '') for name, value in attrs]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if data.strip() and self.open[-1] not in ('style', 'script'):
      self.texts.append(data.strip('\n'))


def _page(path, *sections, title='Run', about=''):
  parts.write(path, title, about, sections)
  return _Page(path.read_text(encoding='utf-8'))


def _curves(**series):
  palette = figures.colours(series)
  return figures.curves('Loss', 'steps', series, palette)


def _set(*prompts, **answers):
  """A set of answers: every model says the same to all prompts."""
  rows = [
    {
      'index': i,
      'prompt': prompt,
      'input': '',
      'references': ['So.', 'Thus.'],
      'answers': {
        '0': {
          model: {'text': text, 'scores': {}} for model, text in answers.items()
        }
      },
    }
    for i, prompt in enumerate(prompts)
  ]
  return {
    'name': 'dolly',
    'seeds': ['0'],
    'models': [*answers],
    'metrics': [],
    'total': len(prompts),
    'rows': rows,
  }


def test_the_page_shows_everything_in_order(tmp_path):
  xs = range(300)
  answers = _set('Why?', 'How?', 'Who?', SFT=' \n', GAKD='\n b\n  c')
  shown = _page(
    tmp_path / 'new' / 'report.html',
    (
      'Results',
      parts.table(
        'Dolly',
        ['model', ('dolly', 'ROUGE-L'), 'note'],
        [['teacher', '27.1 ± 0.2', 'a < b'], ['GAKD', '9.9 ± 0.1', None]],
        note='the best in bold',
        best={(1, 1)},
      ),
    ),
    ('Nothing', ''),
    (
      'Training',
      parts.grid([_curves(GAKD=[(xs, np.cos(xs))], SFT=[([1], [2])])]),
    ),
    ('Answers', parts.browser([answers], {}, 2)),
    ('Configuration', parts.settings([('seed', 10)])),
    about='two models',
  )
  want = 'Run Run two models Results Training Answers Configuration'
  want += ' Results Dolly model dolly ROUGE-L note teacher 27.1 ± 0.2 a < b'
  want += ' GAKD 9.9 ± 0.1 - the best in bold'
  want += ' Training Loss GAKD SFT steps Answers'
  want += ' Why? References So. Thus. SFT (empty) GAKD b\n How?'
  want += ' Configuration All settings seed 10'
  text = ' '.join(shown.texts)
  position = 0
  for word in want.split(' '):
    position = text.index(word, position) + len(word)
  assert ' b\n  c' in shown.texts  # as code, answers keep their indentation
  assert not {'Nothing', 'Who?'} & set(shown.texts)
  assert shown.tags.count('svg') == 1
  assert shown.tags.count('strong') == 1
  assert shown.tags.count('details') == 1
  assert ('open', '') not in shown.attributes


def test_an_empty_page_has_no_empty_sections(tmp_path):
  empty = [
    ('Answers', parts.browser([], {}, 6)),
    ('Training', parts.grid([])),
    ('Configuration', parts.settings([])),
    ('More', parts.details('More', '')),
  ]
  assert _page(tmp_path / 'x.html', *empty).texts == ['Run', 'Run']


def test_text_of_users_is_escaped_everywhere(tmp_path):
  palette = figures.colours([EVIL])
  answers = _set(EVIL, **{EVIL: EVIL}) | {'name': EVIL, 'total': 2}
  answers['rows'][0] |= {'references': [EVIL], 'input': EVIL}
  line = {'index': 0, 'step': 1, 'instruction': EVIL, 'input': EVIL}
  line |= {'pieces': [[EVIL, False], [EVIL, True]], 'tokens': 2}
  (tmp_path / 'rollouts.jsonl').write_text(
    json.dumps(line | {'finished': True}) + '\n'
  )
  shown = _page(
    tmp_path / 'x.html',
    ('a', parts.table(EVIL, [EVIL, (EVIL, EVIL)], [[EVIL, EVIL]], note=EVIL)),
    ('b', figures.bars(EVIL, [('', EVIL, 1.0, 0.1, EVIL)], palette)),
    ('d', figures.bars(EVIL, [(EVIL, EVIL, 1.0, 0.1, EVIL)], palette)),
    ('c', figures.curves(EVIL, EVIL, {EVIL: [([1], [1])]}, palette)),
    ('e', parts.browser([answers], {EVIL: EVIL}, 1)),
    ('f', parts.settings([(EVIL, EVIL)]) + parts.details(EVIL, 'x')),
    ('g', rollouts.texts({EVIL: tmp_path})),
    title=EVIL,
    about=EVIL,
  )
  assert shown.tags.count('script') == 2  # the page's, and the answers
  whole = [text for text in shown.texts if EVIL in text]
  head, table, keyed, bars, curves = 3, 7, 3, 3, 3
  note, answer, configuration, rollout = 1, 4, 3, 4
  assert len(whole) == (
    head
    + table
    + keyed
    + bars
    + curves
    + note
    + answer
    + configuration
    + rollout
  )


def test_the_page_refers_to_nothing_outside(tmp_path):
  shown = _page(
    tmp_path / 'x.html',
    ('Training', _curves(c=[([1, 2], [3, 4])])),
    ('Answers', parts.browser([_set('Why?', a='b')], {}, 1)),
  )
  assert not {'link', 'img', 'iframe', 'object'} & set(shown.tags)
  for name, value in shown.attributes:
    assert name != 'src'
    assert not name.endswith('href') or value.startswith('#')
    assert '//' not in value or name.startswith('xmlns')
  policy = dict(shown.attributes)['content']
  assert "default-src 'none'" in policy


def test_what_is_cut_is_said(tmp_path):
  whole, cut = _set('Why?', a='b'), _set('Why?', a='b') | {'total': 5}
  assert 'Cut to fit' not in parts.browser([whole], {}, 1)
  text = parts.browser([whole, cut | {'name': 'x<y'}], {}, 1)
  assert 'Cut to fit: x&lt;y, the first 1 of 5 rows.' in text


def test_curves_with_gaps_have_one_look_per_label(tmp_path):
  nan = [math.nan] * 3
  many = {str(i): [([1, 2], [i, i])] for i in range(12)}
  palette = figures.colours(['x', 'y', 'z', *many])
  drawn = [
    figures.curves(title, 'step', series, palette)
    for title, series in (
      ('a', {'x': [([1, 2, 3], [1, math.nan, 2])], 'y': [([1, 2, 3], nan)]}),
      ('b', {'y': [([1, 2, 3], [1, 2, 3]), ([1, 2], [3, 2])], 'z': [([], [])]}),
      ('c', many),
    )
  ]
  shown = _Page(''.join(drawn))
  keys = [v for name, v in shown.attributes if name == 'style' and '--key' in v]
  x, y, also_y, z, *many_keys = keys
  assert y == also_y
  assert len({x, y, z}) == 3
  assert len(set(many_keys)) == 12
  again = figures.curves('c', 'step', many, palette)
  assert again == drawn[2]  # the same runs give the same file


def test_a_long_run_stays_a_small_page():
  xs = np.arange(100_000)
  ys = np.random.default_rng(0).normal(size=xs.size)
  assert len(_curves(x=[(xs, ys)])) < 300_000


def test_bars_are_as_long_as_their_numbers():
  palette = figures.colours('ab')
  text = figures.bars(
    't', [('a', 'a', 40.0, 10.0, 'A'), ('b', 'b', 20.0, None, 'B')], palette
  )
  assert 'class="keys"' not in text
  assert 'left: 0.0%; width: 80.0%' in text
  assert 'left: 60.0%; width: 40.0%' in text  # 30 to 50 of 50
  assert 'left: 0.0%; width: 40.0%' in text
  nothing = figures.bars('t', [('a', 'a', 0.0, None, '0')], palette)
  assert 'width: 0.0%' in nothing
  rows = [('a', 'a', -3.0, 1.0, '-3'), ('b', 'b', -1.0, None, '-1')]
  negative = figures.bars('t', rows, palette)
  assert {*re.findall('width: (.*?)%', negative)} == {'0.0'}


def test_bars_of_groups_have_a_key():
  rows = [('0-10', 'a', 1.0, 0.5, '1'), ('', 'b', 2.0, None, '2')]
  rows += [('101+', 'b', 3.0, None, '3')]
  text = figures.bars('t', rows, figures.colours('ab'))
  keys, _, bars = text.partition('class="bars"')
  assert re.findall('<li.*?>(.)</li>', keys) == ['a', 'b']
  shown = re.findall('<span>(.*?)</span>.*?(.)</span></li>', bars)
  assert shown == [('0-10', '1'), ('', '2'), ('101+', '3')]


def test_every_file_of_the_page_is_installed():
  root = Path(__file__).parents[2]
  setup = configparser.ConfigParser()
  setup.read(root / 'setup.cfg')
  patterns = setup['options.package_data']['gakd_jax.page'].split(', ')
  files = [
    x.name for x in (root / 'gakd_jax' / 'page').iterdir() if x.is_file()
  ]
  for name in files:
    if not name.endswith('.py'):
      assert any(fnmatch.fnmatch(name, p) for p in patterns), name
