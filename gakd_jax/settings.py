"""Settings: of which types and within which ranges, and what is refused.

Objectives, writers, evaluators and adapters are dataclasses. A config, or a
flag, gives the settings that are not the default; what they are called, their
types and ranges stand in the class, as in

  kd: Share = 0.5
  accept: Literal['rank', 'probability'] = 'rank'
  warmup_steps: Natural | None = None

Those of a whole config are in `fields`. Numbers are finite whatever they are,
and whole ones fit in the 32 bits in which devices count.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated

import ml_collections

from gakd_jax import UserError, json_file


@dataclasses.dataclass(frozen=True)
class Only:
  """What values of a type are allowed, in words and as a test."""

  words: str
  holds: Callable


def _is_regex(text):
  try:
    re.compile(text)
  except re.error:
    return False
  return True


Natural = Annotated[int, Only('0 or more', lambda x: x >= 0)]
Count = Annotated[int, Only('1 or more', lambda x: x >= 1)]
# In tokens: no model reads more, and what is longer no array can hold.
Length = Annotated[int, Only('1 to 2^24', lambda x: 1 <= x <= 2**24)]
NotNegative = Annotated[float, Only('0 or more', lambda x: x >= 0)]
Positive = Annotated[float, Only('more than 0', lambda x: x > 0)]
Share = Annotated[float, Only('0 to 1', lambda x: 0 <= x <= 1)]
Mass = Annotated[float, Only('more than 0, at most 1', lambda x: 0 < x <= 1)]
BelowOne = Annotated[
  float, Only('0 or more, less than 1', lambda x: 0 <= x < 1)
]
# Paths among them: one with a null character cannot be asked for.
Text = Annotated[
  str, Only('not empty, without null', lambda x: x and '\0' not in x)
]
Regex = Annotated[str, Only('a regular expression', _is_regex)]
Counts = Annotated[tuple[Count, ...], Only('one at least', bool)]
Lengths = Annotated[tuple[Length, ...], Only('one at least', bool)]
Seeds = Annotated[
  tuple[Natural, ...],
  Only('one at least, none twice', lambda x: x and len({*x}) == len(x)),
]
# As a run has measured it: it may be NaN or infinite.
Measured = Annotated[
  object, Only('a number', lambda x: type(x) in (int, float))
]
DataSpec = Text | tuple[Text, ...]  # see `data.sources`
# Of what has a directory or a file of its own in a run.
Name = Annotated[
  str,
  Only(
    'a name of a file: without a slash, nor a dot in front',
    re.compile(r'[^/.\0][^/\0]*').fullmatch,
  ),
]

_KINDS = {
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  bool: 'True or False',
  list: 'a list',
  Mapping: 'a dict of names',
}
_LARGEST = 2**31 - 1


def types_of(cls, *but):
  """{setting: type} of a dataclass, less those of these names."""
  hints = typing.get_type_hints(cls, include_extras=True)
  names = [field.name for field in dataclasses.fields(cls)]
  return {name: hints[name] for name in names if name not in but}


def checked(prefix, settings, known, owner):
  """The settings of a part, converted to the types of `known`.

  A single value stands for a tuple of one, which flags cannot write.

  Raises:
    UserError: for a name or a value that is wrong. It begins with `prefix`,
      'config.objective.' say, and the name; `owner` is who has no such setting.
  """

  def is_whole(value):
    return value is None or isinstance(value, list | tuple)

  return {
    key: _convert(
      f'{prefix}{key}',
      value if is_whole(value) or not _is_tuple(known[key]) else (value,),
      known[key],
    )
    for key, value in named(prefix, settings, known, owner).items()
  }


def named(prefix, settings, known, owner):
  """The settings, if they are a dict of names in `known`; see `checked`."""
  check(prefix.removesuffix('.'), settings, Mapping)
  for key in settings:
    if key not in known:
      raise UserError(
        f'{prefix.removesuffix(".")}: {owner} has no setting {key!r}; '
        f'{did_you_mean(key, known)}known are '
        f'{", ".join(sorted(known)) or "none"}'
      )
  return settings


def check(what, value, kind):
  """Refuses a value that is not of a type; `what` is how people call it."""
  _convert(what, value, kind)


def check_row(prefix, row, kinds):
  """`check` of a dict that has {key: type}, or `NotRequired[type]`."""
  for key, kind in kinds.items():
    if typing.get_origin(kind) is typing.NotRequired:
      if key not in row:
        continue
      (kind,) = typing.get_args(kind)
    elif key not in row:
      raise UserError(f'{prefix}{key} is missing')
    check(f'{prefix}{key}', row[key], kind)


def did_you_mean(word, known):
  near = difflib.get_close_matches(str(word), known, 1)
  return f'did you mean {near[0]!r}? ' if near else ''


def shown(value):
  """A value in one line, however long it is."""
  return ' '.join(json_file.shown(value).split())


def _is_tuple(kind):
  """Whether a type is of tuples alone, but for None."""
  if typing.get_origin(kind) is Annotated:
    return _is_tuple(typing.get_args(kind)[0])
  kinds = [x for x in _alternatives(kind) or [kind] if x is not types.NoneType]
  return all(typing.get_origin(x) is tuple for x in kinds)


def _alternatives(kind):
  """The types of `X | Y`; () of any other."""
  is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
  return typing.get_args(kind) if is_union else ()


def _convert(what, value, kind):
  """A value as one of a type.

  Raises:
    UserError: if it is none.
  """
  fits, value = _fit(value, kind)
  if not fits:
    near = ''
    if isinstance(value, str):
      near = did_you_mean(value, [x for x in _choices(kind) if x])
    raise UserError(f'{what}={shown(value)}: {near}expected {_words(kind)}')
  return value


def _fit(value, kind):
  """(whether a value is of a type, the value as one)."""
  parts = typing.get_args(kind)
  origin = typing.get_origin(kind) or kind
  if kinds := _alternatives(kind):
    for one in kinds:
      fits, found = _fit(value, one)
      if fits:
        return True, found
    return False, value
  if origin is Annotated:
    fits, found = _fit(value, parts[0])
    return (fits and bool(parts[1].holds(found))), found
  if origin is typing.Literal:
    return isinstance(value, str) and value in parts, value
  if origin is tuple:  # tuple[X, ...]
    if not isinstance(value, list | tuple):
      return False, value
    found = [_fit(x, parts[0]) for x in value]
    return all(fits for fits, _ in found), tuple(x for _, x in found)
  if kind in (int, float) and isinstance(value, bool):
    return False, value
  if kind is int:
    return isinstance(value, int) and abs(value) <= _LARGEST, value
  if kind is float:
    if isinstance(value, int) and abs(value) < 1e300:
      value = float(value)
    return isinstance(value, float) and math.isfinite(value), value
  if kind is Mapping:
    return _is_dict(value), value
  return isinstance(value, kind), value


def _is_dict(value):
  if not isinstance(value, Mapping | ml_collections.ConfigDict):
    return False
  try:
    return all(isinstance(name, str) for name in value)
  except TypeError:  # A ConfigDict sorts its names.
    return False


def _choices(kind):
  """The texts that a type allows, if it lists them."""
  if typing.get_origin(kind) is typing.Literal:
    return typing.get_args(kind)
  return [x for one in _alternatives(kind) for x in _choices(one)]


def _words(kind):
  """A type, as people say it."""
  parts = typing.get_args(kind)
  origin = typing.get_origin(kind)
  if kinds := _alternatives(kind):
    return ', or '.join(map(_words, kinds))
  if origin is Annotated:
    words = parts[1].words
    return words if parts[0] is object else f'{_words(parts[0])} ({words})'
  if origin is typing.Literal:
    return f'one of {", ".join(parts)}'
  if origin is tuple:
    return f'a tuple, each {_words(parts[0])}'
  return 'None' if kind is type(None) else _KINDS.get(kind, kind.__name__)
