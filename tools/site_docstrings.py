"""How docstrings become pages: an extension of Griffe, named in mkdocs.yml.

A paragraph that is indented is set as it is (formulas, tables); the settings
of a dataclass are one table, with the comments that stand beside them.
"""

import re
import textwrap

import griffe


class Pages(griffe.Extension):
  def on_package(self, *, pkg, **_):
    self._visit(pkg)

  def _visit(self, thing):
    if thing.is_alias:
      return
    if thing.is_class and 'dataclass' in thing.labels:
      _tabulate(thing)
    if thing.docstring:
      thing.docstring.value = _fenced(thing.docstring.value)
    for member in thing.members.values():
      self._visit(member)


def _fenced(text):
  paragraphs = re.split(r'\n\s*\n', text)
  for i, paragraph in enumerate(paragraphs):
    if all(line.startswith('  ') for line in paragraph.splitlines()):
      paragraphs[i] = f'```text\n{textwrap.dedent(paragraph)}\n```'
  return '\n\n'.join(paragraphs)


def _tabulate(cls):
  """A dataclass's annotated fields, from members to a table."""
  lines, rows = cls.filepath.read_text().splitlines(), []
  for name, field in [*cls.members.items()]:
    if not field.is_attribute or not field.annotation or name.startswith('_'):
      continue
    beside = lines[field.endlineno - 1].partition('  # ')[2]
    value = str(field.value or '').replace(
      'dataclasses.field(default_factory=dict)', '{}'
    )
    cells = [
      f'`{x}`' if x else '' for x in (name, value, str(field.annotation))
    ]
    cells.insert(2, beside)
    rows.append(' | '.join(x.replace('|', '\\|') for x in cells))
    cls.del_member(name)
  if rows:
    head = ['setting | default | | type', '--- | --- | --- | ---']
    table = '\n'.join(f'| {row} |' for row in head + rows)
    said = f'{cls.docstring.value}\n\n' if cls.docstring else ''
    cls.docstring = griffe.Docstring(said + table, parent=cls)
