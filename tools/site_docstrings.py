"""How docstrings become pages: an extension of Griffe, named in mkdocs.yml.

A paragraph that is indented is set as it is (formulas, tables); `<words>` are
words; the settings of a dataclass are one table, with the comments that stand
above or beside them.
"""

import re
import textwrap

import griffe


class Pages(griffe.Extension):
  def on_package(self, *, pkg, **_):
    self._tables = []
    self._visit(pkg)
    for cls, names in self._tables:  # When all have looked at their bases.
      for name in names:
        cls.del_member(name)

  def _visit(self, thing):
    if thing.is_alias:
      return
    if thing.docstring:
      thing.docstring.value = as_markdown(thing.docstring.value)
    if thing.is_class and 'dataclass' in thing.labels:
      _tabulate(thing)
      self._tables.append((thing, [*_settings(thing)]))
    for member in thing.members.values():
      self._visit(member)


def as_markdown(text):
  """A docstring of ours."""
  paragraphs = re.split(r'\n\s*\n', text)
  for i, paragraph in enumerate(paragraphs):
    lines = paragraph.splitlines()
    if lines and all(line.startswith('  ') for line in lines):
      paragraphs[i] = f'```text\n{textwrap.dedent(paragraph)}\n```'
    else:  # Of what stands between backticks, nothing is a tag.
      parts = paragraph.split('`')
      parts[::2] = [re.sub(r'<(?=\w)', '&lt;', x) for x in parts[::2]]
      paragraphs[i] = '`'.join(parts)
  return '\n\n'.join(paragraphs)


def _tabulate(cls):
  """A table of a dataclass's settings, its fields with a default."""
  rows = {}
  for owner in reversed([cls, *cls.mro()]):
    rows |= _settings(owner)
  if rows:
    head = '| setting | default | | type |\n| --- | --- | --- | --- |'
    table = '\n'.join([head, *rows.values()])
    if cls.docstring:
      cls.docstring.value += f'\n\n{table}'
    else:
      cls.docstring = griffe.Docstring(table, parent=cls)


def _settings(cls):
  """{name: its row}."""
  lines = cls.filepath.read_text(encoding='utf-8').splitlines()
  rows = {}
  for name, field in cls.members.items():
    is_field = field.is_attribute and field.annotation and field.value
    if not is_field or name.startswith('_'):
      continue
    line = lines[field.lineno - 1]
    if 'ClassVar[' in line or 'dataclasses.field(' in str(field.value):
      continue
    said = [lines[field.endlineno - 1].partition('  # ')[2]]
    above = field.lineno - 2
    while lines[above].strip().startswith('#'):
      said.insert(0, lines[above].strip('# '))
      above -= 1
    text = ' '.join(filter(None, said)).replace('|', '\\|')
    kind = str(field.annotation).replace(' | ', ' or ')
    rows[name] = f'| `{name}` | `{field.value}` | {text} | `{kind}` |'
  return rows
