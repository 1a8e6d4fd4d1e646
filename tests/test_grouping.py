import pytest

from gakd_jax import grouping


def prompts(*lengths):
  return [[i] * n for i, n in enumerate(lengths)]


def test_the_same_prompts_are_neighbours():
  a, b, c = prompts(5, 7, 5)
  plan = grouping.make([a, b, c, a, b, c, a, b], batch_size=4)
  assert plan.groups == [[1], [4], [7], [0], [3], [6], [2], [5]]
  assert plan.different == 1
  plan = grouping.make([a, b, c, a, b, c, a, b], batch_size=8)
  assert plan.groups == [[1, 4, 7, 0, 3, 6, 2, 5]]
  assert plan.different == 3


def test_each_device_reads_the_prompts_of_its_own_rows():
  a, b, c = prompts(5, 7, 5)
  given = [a, a, a, b, b, b, c, c, c] * 2
  plan = grouping.make(given, batch_size=16, ways=2)
  assert (plan.rows, plan.size, plan.different) == (16, 4, 1)
  plan = grouping.make(given, batch_size=18, ways=2)
  assert (plan.rows, plan.size, plan.different) == (18, 18, 2)
  group = plan.groups[0]
  prompt_UT, of_G, length_G, place_G, slot_G = plan.batch(
    group, [*range(17), None], range(100, 118)
  )
  # Six of b and three of a; three of a and six of c.
  assert prompt_UT[:, :8].tolist() == [
    [*b, 0], [*a, 0, 0, 0], [*a, 0, 0, 0], [*c, 0, 0, 0]
  ]  # fmt: skip
  assert of_G.tolist() == [0] * 6 + [1] * 3 + [0] * 3 + [1] * 6
  assert length_G.tolist() == [7] * 6 + [5] * 12
  assert place_G.tolist() == [100 + i for i in group]
  assert slot_G.tolist() == [*range(9), *range(8), 9]


def test_padding_is_what_no_prompt_fills():
  given = prompts(*(64, 60, 96, 80) * 3)
  # A group is a quarter of a batch: three of 96 or 80 in 96, three of 64.
  found = grouping.padding(given, 8)
  assert found == pytest.approx(1 - 900 / (6 * 96 + 6 * 64))
  # Of a group that is not full, the empty row counts as well.
  rest = prompts(*(64, 60, 96, 80) * 2, 64, 80, 64)
  assert grouping.padding(rest, 8) == pytest.approx(1 - 808 / (6 * 96 + 6 * 64))
  # What fits into one batch is one group.
  assert grouping.padding(given[:3], 4) == pytest.approx(1 - 220 / (3 * 96))
  # What is there several times is read once.
  assert grouping.padding(given[:2] * 3, 6) == pytest.approx(1 - 124 / 128)
