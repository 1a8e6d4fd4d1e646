"""What a compiled program sends between devices, read from its HLO text.

The compilers for CPUs, GPUs and TPUs write one language, and each its own
dialect of it: transfers may be pairs of a start and a done, stand in
computations that others call, or be cloned into the operations that hide them.
What a loop does counts as often as the loop turns.
"""

import dataclasses
import math
import re

import numpy as np

KINDS = (
  'all-gather',
  'reduce-scatter',
  'all-reduce',
  'all-to-all',
  'collective-permute',
)

_INSTRUCTION = re.compile(
  r'^ *(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)'
)
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply)=%?([\w.-]+)')
_BRANCHES = re.compile(
  r'branch_computations=\{(.*?)\}|(?:true|false)_computation=%?([\w.-]+)'
)
# So many devices as "[2,4]", and in which order: "T(1,0)".
_IDS = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'
_ENDS = 'custom_call_target="AsyncCollectiveDone"'
_DTYPES = {'pred': 8, 'bf16': 16}
_WORK = ('fusion', 'custom-call', 'while', 'dot', 'convolution', 'conditional')


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One collective of a program."""

  kind: str  # of `KINDS`
  shapes: tuple  # ((dtype, dimensions), ...) of what a device gets
  groups: np.ndarray  # devices that talk to each other, [groups, members]
  times: int  # in one run of the program
  loops: int  # how many loops it is in
  name: str  # of the operation in the program that was compiled
  hidden: bool = False  # something is computed between its start and its end

  @property
  def size(self):
    """Bytes of what a device gets, each time."""
    return sum(math.prod(dims) * _bits(kind) // 8 for kind, dims in self.shapes)

  @property
  def sent(self):
    """Bytes that a device sends, at least, in one run of the program."""
    return self.sent_among(self.groups.shape[1])

  def sent_among(self, n):
    """The same, if the group were of n that hold as much together."""
    # Of a sum that is scattered, a device gets its part.
    parts = self.groups.shape[1] if self.kind == 'reduce-scatter' else 1
    share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1}
    share = share.get(self.kind, (n - 1) / n)
    return self.times * self.size * parts * share


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  rest: str  # operands and attributes

  def attribute(self, pattern):
    found = re.search(pattern, self.rest)
    return found and found[1]

  @property
  def operands(self):
    """Names of instructions of the same computation."""
    return re.findall(r'%([\w.-]+)', self.rest[: self.rest.find(')')])

  @property
  def number(self):
    """Of a constant integer; None of anything else."""
    if self.opcode != 'constant' or not self.shape.startswith(
      ('s32[]', 'u32[]')
    ):
      return None
    return int(self.rest[: self.rest.find(')')])


def transfers(text, turns=1):
  """The `Transfer`s of a program that `as_text()` gave.

  turns: of loops that end where data say so.
  """
  return _Program(text, turns).transfers()


def arrays(text):
  """{(dtype, dimensions)} of all arrays that a program names."""
  return set(_shapes(text))


def _shapes(text):
  return [
    (dtype, tuple(int(n) for n in dims.split(',') if n))
    for dtype, dims in _SHAPE.findall(text)
  ]


def _bits(dtype):
  """Of an element; `dtype` as HLO writes it, such as bf16 or s4."""
  digits = re.search(r'\d+', dtype)
  return _DTYPES.get(dtype) or (int(digits[0]) if digits else 8)


class _Program:
  def __init__(self, text, turns):
    self.turns = turns
    self.devices = int(_found(r'num_partitions=(\d+)', text, 1))
    self.computations, self.entry, body = {}, None, None
    for line in text.splitlines():
      if match := _COMPUTATION.match(line):
        body = self.computations[match[1]] = []
        if line.startswith('ENTRY'):
          self.entry = match[1]
      elif body is not None and (match := _INSTRUCTION.match(line)):
        body.append(_Instruction(*match.groups()))

  def transfers(self):
    return self._of_loop(self.entry, 1, 0)

  def _of_loop(self, name, times, loops):
    """Those of a loop's body, or of the whole program, and of loops in it."""
    found = []
    self._visit(name, times, loops, found)
    return found

  def _visit(self, name, times, loops, found, hidden=False):
    body = self.computations[name]
    if any(_ENDS in x.rest for x in body):
      return  # On a TPU: the transfer stands where it starts, and here again.
    for x in body:
      kind, _, phase = x.opcode.partition('-start')
      if x.opcode == 'while':
        inner = x.attribute(r'body=%?([\w.-]+)')
        found += self._of_loop(inner, times * self._turns(x), loops + 1)
      elif kind in KINDS and not phase:
        transfer = self._transfer(kind, x, body, name, times, loops)
        hidden_here = hidden or _is_hidden(x, body)
        found.append(dataclasses.replace(transfer, hidden=hidden_here))
      elif x.opcode not in ('async-update', 'async-done'):
        for called in _CALLED.findall(x.rest):
          self._visit(called, times, loops, found, _is_hidden(x, body))
        for several, one in _BRANCHES.findall(x.rest):
          for branch in re.findall(r'[\w.-]+', several or one):
            self._visit(branch, times, loops, found)

  def _transfer(self, kind, x, body, computation, times, loops):
    shape, groups = x.shape, self._groups(x.rest)
    if x.opcode.endswith('-start'):
      # Its own shape has what goes in beside what comes out.
      operand = _use_of(x)
      done = f'{kind}-done'
      shape = next(
        y.shape for y in body if y.opcode == done and operand.match(y.rest)
      )
    shapes = tuple(_shapes(shape))
    if kind == 'all-reduce' and 'all-reduce-scatter' in computation:
      # As the TPU's compiler writes a reduce-scatter: the slice comes after.
      kind, n = 'reduce-scatter', groups.shape[1]
      shapes = tuple((d, (s[0] // n, *s[1:])) for d, s in shapes)
    name = x.attribute(r'op_name="([^"]*)"') or ''
    return Transfer(kind, shapes, groups, times, loops, name)

  def _groups(self, text):
    """Of devices, from `replica_groups` in any of their notations."""
    if found := re.search(r'replica_groups=\{(\{.*?\})\}', text):
      rows = re.findall(r'\{([\d,]*)\}', found[1])
      return np.array([_numbers(row) for row in rows])
    if found := re.search(rf'replica_groups=\[(\d+),(\d+)\]<={_IDS}', text):
      return _ids(*found.groups()[2:]).reshape(int(found[1]), int(found[2]))
    if found := re.search(
      rf'replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IDS}\))? *\{{(.*?)\}}',
      text,
    ):
      mesh, sizes, order, axes = found.groups()
      ids = _ids(sizes or str(self.devices), order)
      return _mesh_groups(mesh, axes, ids)
    assert 'replica_groups={}' in text or 'replica_groups' not in text, text
    return np.arange(self.devices)[None]

  def _turns(self, loop):
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = loop.attribute(r'condition=%?([\w.-]+)')
    limit = max(self._constants(condition), default=0)
    if not limit:  # "As long as any row": a comparison with 0, or with none.
      return self.turns
    return -(-limit // self._step(loop, condition))

  def _constants(self, name):
    """Numbers that a condition compares with."""
    for x in self.computations[name]:
      if (value := x.number) is not None:
        yield value
      for called in _CALLED.findall(x.rest):
        yield from self._constants(called)

  def _step(self, loop, condition):
    """By how much the body moves what the condition looks at; 1 if unclear."""
    looked_at = {
      x.attribute(r'index=(\d+)')
      for x in self.computations[condition]
      if x.opcode == 'get-tuple-element'
    }
    body = self.computations[loop.attribute(r'body=%?([\w.-]+)')]
    by_name = {x.name: x for x in body}
    results = by_name[body[-1].name].operands
    if len(looked_at) != 1 or not results:
      return 1
    new = by_name[results[int(looked_at.pop())]]
    added = [by_name[name].number for name in new.operands if name in by_name]
    added = [n for n in added if n]
    return added[0] if new.opcode == 'add' and added else 1


def _use_of(x):
  """Its name where it is read; x.1 is another than x."""
  return re.compile(rf'(?<![\w.-])%?{re.escape(x.name)}(?![\w.-])')


def _is_hidden(start, body):
  """Whether work stands between a start and its end, in a schedule."""
  if not start.opcode.endswith('-start'):
    return False
  after = body[body.index(start) + 1 :]
  ends = _use_of(start)
  for i, x in enumerate(after):
    if x.opcode.endswith('-done') and ends.search(x.rest):
      return any(y.opcode in _WORK for y in after[:i])
  return False


def _ids(sizes, order):
  """Device ids as in "2,4" and "1,0": so many, in this order of dimensions."""
  ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return (ids.transpose(_numbers(order)) if order else ids).flatten()


def _mesh_groups(mesh, axes, ids):
  """Of "'a'=2,'b'=4" and "'b'", or "'b':(1)2": 2 of what is left after 1."""
  parts, wanted = {}, set()
  for name, n in re.findall(r"'(\w+)'=(\d+)", mesh):
    parts[name] = [int(n)]
  for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
    if size:
      before, size = int(before), int(size)
      parts[name] = [before, size, parts[name][0] // (before * size)]
    wanted.add((name, 1 if size else 0))
  names = [(name, i) for name in parts for i in range(len(parts[name]))]
  shape = [n for sizes in parts.values() for n in sizes]
  inside = [i for i, name in enumerate(names) if name in wanted]
  outside = [i for i in range(len(names)) if i not in inside]
  members = math.prod(shape[i] for i in inside)
  return ids.reshape(shape).transpose(outside + inside).reshape(-1, members)


def _numbers(text):
  return [int(n) for n in text.split(',')]


def _found(pattern, text, default):
  match = re.search(pattern, text)
  return match[1] if match else default
