"""What is a value of a type of settings, and how a line says that one is not."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal, NotRequired

import ml_collections
import pytest

from gakd_jax import UserError, settings

KINDS = {
  'natural': settings.Natural,
  'count': settings.Count,
  'length': settings.Length,
  'not negative': settings.NotNegative,
  'positive': settings.Positive,
  'share': settings.Share,
  'mass': settings.Mass,
  'below one': settings.BelowOne,
  'text': settings.Text,
  'regex': settings.Regex,
  'name': settings.Name,
  'seeds': settings.Seeds,
  'counts': settings.Counts,
  'data': settings.DataSpec | None,
  'choice': Literal['one', 'two'],
  'bool': bool,
  'dict': Mapping,
}
GOOD = [
  *[('natural', x) for x in (0, 1, 2**31 - 1)],
  *[('count', x) for x in (1, 7)],
  *[('length', x) for x in (1, 2**24)],
  *[('not negative', x) for x in (0, 0.0, 3, 1e9)],
  *[('positive', x) for x in (1e-30, 2)],
  *[('share', x) for x in (0, 0.5, 1)],
  *[('mass', x) for x in (1e-6, 1, 1.0)],
  *[('below one', x) for x in (0, 0.0, 0.999)],
  *[('text', x) for x in ('a', ' ', '\u2028')],
  *[('regex', x) for x in ('', 'a|b', r'(scale|bias)$')],
  *[('name', x) for x in ('a', 'a.b', 'rgan,4b', '-', 'a b')],
  *[('seeds', x) for x in ((0,), [1, 2], (5, 0))],
  *[('counts', x) for x in ((1,), [2, 2])],
  *[('data', x) for x in (None, 'a', ('a', 'b'), ['a'])],
  *[('choice', x) for x in ('one', 'two')],
  *[('bool', x) for x in (True, False)],
  *[('dict', x) for x in ({}, {'a': 1}, ml_collections.ConfigDict())],
]
MIXED = ml_collections.ConfigDict({'a': 1})
MIXED[0] = 2  # It sorts its names, of which these have no order.
NAN, INF = float('nan'), float('inf')
BAD = [
  *[('natural', x) for x in (-1, 1.0, True, None, '1', 2**31, NAN, [1])],
  *[('count', x) for x in (0, -1, 1.5, False, 10**301)],
  *[('length', x) for x in (0, 2**24 + 1)],
  *[('not negative', x) for x in (-1e-9, NAN, INF, -INF, True, '0', None)],
  *[('positive', x) for x in (0, 0.0, -1, NAN, INF, 10**301)],
  *[('share', x) for x in (-0.1, 1.1, 2, NAN)],
  *[('mass', x) for x in (0, 0.0, 1.01, NAN)],
  *[('below one', x) for x in (1, 1.0, -0.1, NAN)],
  *[('text', x) for x in ('', 3, None, b'a', ('a',), 'a\0b')],
  *[('regex', x) for x in ('(', '[', '*', 3, None)],
  *[('name', x) for x in ('', '.', '..', '.a', 'a/b', '/a', 'a\0', 3, None)],
  *[('seeds', x) for x in ((), (1, 1), (-1,), ('a',), 3, None, (1.0,))],
  *[('counts', x) for x in ((), (0,), (1, 'a'), 'ab')],
  *[('data', x) for x in (3, '', (3,), (None,), {'a': 1}, ('a', ''))],
  *[('choice', x) for x in ('three', '', None, 1, ('one',))],
  *[('bool', x) for x in (0, 1, 'yes', None)],
  *[('dict', x) for x in ([], 'a', None, 3, {1: 2}, MIXED)],
]


def named(x):
  return re.sub(' at 0x[0-9a-f]+', '', settings.shown(x))


@pytest.mark.parametrize(('kind', 'value'), GOOD, ids=named)
def test_what_is_a_value(kind, value):
  settings.check('it', value, KINDS[kind])


@pytest.mark.parametrize(('kind', 'value'), BAD, ids=named)
def test_what_is_none(kind, value):
  with pytest.raises(UserError, match=r'^it=.*: .*expected ') as error:
    settings.check('it', value, KINDS[kind])
  text = str(error.value)
  assert '\n' not in text
  assert len(text) < 300


@pytest.mark.parametrize(
  ('kind', 'value', 'line'),
  [
    ('count', 0, 'it=0: expected a whole number (1 or more)'),
    ('mass', 0.0, 'it=0.0: expected a number (more than 0, at most 1)'),
    ('choice', 'tow', "it='tow': did you mean 'two'? expected one of one, two"),
    (
      'data',
      3,
      'it=3: expected a text (not empty, without null), or a tuple, each a '
      'text (not empty, without null), or None',
    ),
  ],
)
def test_a_line_says_what_was_expected(kind, value, line):
  with pytest.raises(UserError) as error:
    settings.check('it', value, KINDS[kind])
  assert str(error.value) == line


@dataclasses.dataclass(frozen=True)
class Part:
  rate: settings.Share = 0.5
  seeds: settings.Seeds = (0,)
  spec: settings.DataSpec | None = None
  name: str = ''


def checked(given):
  known = settings.types_of(Part, 'name')
  return settings.checked('config.part.', given, known, 'a part')


def test_settings_of_a_part_are_converted():
  found = checked({'rate': 1, 'seeds': 3, 'spec': 'a'})
  assert found == {'rate': 1.0, 'seeds': (3,), 'spec': 'a'}
  assert isinstance(found['rate'], float)
  assert checked({'seeds': [1, 2], 'spec': ['a', 'b']}) == {
    'seeds': (1, 2),
    'spec': ('a', 'b'),
  }


@pytest.mark.parametrize(
  ('given', 'line'),
  [
    ({'rate': 2}, 'config.part.rate=2.0: expected a number (0 to 1)'),
    (
      {'raet': 1},
      "config.part: a part has no setting 'raet'; did you mean 'rate'? known "
      'are rate, seeds, spec',
    ),
    (
      {'name': 'a'},
      "config.part: a part has no setting 'name'; known are rate, seeds, spec",
    ),
    (3, 'config.part=3: expected a dict of names'),
  ],
)
def test_wrong_settings_of_a_part(given, line):
  with pytest.raises(UserError) as error:
    checked(given)
  assert str(error.value) == line


def test_what_need_not_be_there_may_not_be_wrong():
  kinds = {'a': int, 'b': NotRequired[str]}
  settings.check_row('', {'a': 1}, kinds)
  for row, line in (
    ({'b': 'c'}, 'a is missing'),
    ({'a': 1, 'b': None}, 'b=None: expected a text'),
  ):
    with pytest.raises(UserError) as error:
      settings.check_row('', row, kinds)
    assert str(error.value) == line
