"""Settings of the parts of a config that name a class: those it is made with.

Objectives, writers and evaluators are dataclasses. A config, or a flag, gives
the settings that are not the default; what they are called and of which types
they are stands in the class.
"""

import dataclasses
import difflib
import types
import typing

from gakd_jax import UserError

_NAMES = {
  int: 'whole number',
  float: 'number',
  str: 'text',
  bool: 'True or False',
}


def types_of(cls, *but):
  """{setting: type} of a dataclass, less those of these names."""
  hints = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  return {name: hints[name] for name in names if name not in but}


def checked(where, settings, known):
  """The settings, converted to the types of `known`.

  Raises:
    UserError: beginning with `where`, for a name or a value that is wrong.
  """
  for key in settings:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f'did you mean {near[0]!r}? ' if near else ''
      raise UserError(
        f'{where} has no setting {key!r}; {hint}'
        f'known are {", ".join(sorted(known)) or "none"}'
      )
  return {
    key: _convert(f'{where}: {key}={value!r}', value, known[key])
    for key, value in settings.items()
  }


def _convert(what, value, kind):
  parts = typing.get_args(kind)
  if isinstance(kind, types.UnionType):  # X | None
    return value if value is None else _convert(what, value, parts[0])
  if typing.get_origin(kind) is tuple:  # tuple[X, ...]
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(_convert(what, x, parts[0]) for x in values)
  if kind not in _NAMES:
    return value
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise UserError(f'{what}: expected {_NAMES[kind]}')
  return value
