"""Which prompts are read together, and what is read once for several of them.

All of it is a function of the prompts, the batch size and the devices alone.
"""

import dataclasses

import numpy as np

# Prompts are padded to a power of two, at least this: less padding would cost
# more compilations than it saves time.
_SHORTEST_PROMPT = 64
_GROUPS = 4  # in a batch


@dataclasses.dataclass(frozen=True)
class Plan:
  """How prompts come into a batch of rows.

  A group's members have rows on the devices in their order, as many on each:
  a device's part of the group. What is the same within a part is read once.
  """

  prompts: list
  first: list  # of each prompt, the index of the first that is the same
  ways: int  # over how many devices rows are split
  rows: int  # of a batch
  size: int  # of a group
  groups: list  # of lists of indices, the longest prompts first
  different: int  # prompts in a device's part of a group, at most

  @property
  def longest(self):
    """Padded."""
    return _bucket(max(map(len, self.prompts)))

  def parts(self, group):
    """{index of a prompt: its number} of each device's part of a group."""
    return _parts(self.first, group, self.size // self.ways)

  def take(self, group, owners, done):
    """A row for each prompt of a group, None for one that is done.

    Or None where a device has too few free rows for its part of a group.

    owners: of each row its prompt, None: it is free; those taken are set.
    """
    own = self.rows // self.ways
    free = [
      [b for b in range(w * own, (w + 1) * own) if owners[b] is None]
      for w in range(self.ways)
    ]
    if min(map(len, free)) < self.size // self.ways:
      return None
    slots = []
    for g, i in enumerate(group):
      slots.append(
        None if i in done else free[g * self.ways // self.size].pop(0)
      )
      if i not in done:
        owners[slots[-1]] = i
    return slots

  def batch(self, group, slots, places):
    """What a refill puts into rows, as numpy.

    slots: of each prompt of the group, its row, of all; None: none.
    places: of all prompts.

    Returns:
      The different prompts [U, T]; of each row of the group its prompt among
      the device's own, its length, its place, and which row of the device's it
      is to be; all of them with a part for each device.
    """
    ways, U, G = self.ways, self.different, self.size
    T = _bucket(len(self.prompts[group[0]]))
    prompt_UT = np.zeros((ways * U, T), np.int32)
    of_G = np.zeros(G, np.int32)
    length_G = np.zeros(G, np.int32)
    place_G = np.zeros(G, np.uint32)
    slot_G = np.full(G, self.rows // ways, np.int32)  # There is no such row.
    parts = self.parts(group)
    for w, part in enumerate(parts):
      for i, u in part.items():
        prompt_UT[w * U + u, : len(self.prompts[i])] = self.prompts[i]
    for g, (i, slot) in enumerate(zip(group, slots, strict=True)):
      of_G[g] = parts[g * ways // G][self.first[i]]
      length_G[g], place_G[g] = len(self.prompts[i]), places[i]
      if slot is not None:
        slot_G[g] = slot % (self.rows // ways)
    return prompt_UT, of_G, length_G, place_G, slot_G


def make(prompts, batch_size, ways=1):
  """The `Plan` of a batch of at least `batch_size` rows on `ways` devices."""
  first = _first(prompts)
  rows, size = _sizes(len(prompts), batch_size, ways)
  order = sorted(
    range(len(prompts)), key=lambda i: (-len(prompts[i]), first[i])
  )
  groups = [order[i : i + size] for i in range(0, len(order), size)]
  parts = [x for group in groups for x in _parts(first, group, size // ways)]
  different = max(map(len, parts), default=0)
  return Plan(prompts, first, ways, rows, size, groups, different)


def padding(prompts, batch_size):
  """The share of prompt slots that are filled with nothing."""
  plan = make(prompts, batch_size)
  slots = read = 0
  for group in plan.groups:
    slots += plan.different * _bucket(len(prompts[group[0]]))
    read += sum(len(prompts[i]) for part in plan.parts(group) for i in part)
  return 1 - read / slots


def _first(prompts):
  same = {}
  return [same.setdefault(tuple(ids), i) for i, ids in enumerate(prompts)]


def _parts(first, group, own):
  return [
    {i: u for u, i in enumerate(dict.fromkeys(first[i] for i in some))}
    for some in (group[g : g + own] for g in range(0, len(group), own))
  ]


def _sizes(prompts, batch_size, ways):
  """Rows of a batch and of a group, which divide over `ways` devices."""
  own = -(-min(batch_size, prompts or 1) // ways)
  if prompts <= own * ways:
    return own * ways, own * ways
  most = max(own // _GROUPS, 1)
  group = max(n for n in range(1, most + 1) if own % n == 0)
  return own * ways, group * ways


def _bucket(length):
  """The next of 64, 96, 128, 192, 256 ...: few shapes, little padding."""
  power = max(_SHORTEST_PROMPT, 1 << (length - 1).bit_length())
  smaller = power * 3 // 4
  return smaller if _SHORTEST_PROMPT <= length <= smaller else power
