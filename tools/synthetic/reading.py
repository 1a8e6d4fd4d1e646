"""Families that are answered from what the prompt holds, by working on it.

`task` says how their texts are read.
"""

from tools.synthetic import words
from tools.synthetic.task import Task, both, cap


def addition(rng):
  """Two numbers by their tens and ones, or three one after the other."""
  if rng.random() < 0.5:
    x, y = terms = [rng.randint(10, 99) for _ in range(2)]
    tens, ones = x // 10 * 10 + y // 10 * 10, x % 10 + y % 10
    work = f"""
    The tens make {tens} and the ones make {ones}.
    Tens: {tens}. Ones: {ones}."""
  else:
    x, y, z = terms = [rng.randint(1, 30) for _ in range(3)]
    work = f"""
    First, {x} + {y} = {x + y}, then {x + y} + {z} = {x + y + z}.
    {x} and {y} make {x + y}, and {z} more make {x + y + z}."""
  numbers = [str(term) for term in terms]
  return Task(
    key=tuple(sorted(terms)),
    prompts=f"""
    What is {' + '.join(numbers)}?
    Add {both(numbers)}.
    Find the sum of {both(numbers)}.
    """,
    answer=f"""{work}

    The sum is {sum(terms)}.
    So the answer is {sum(terms)}.
    """,
  )


def word_list(rng):
  """A list of words: reverse it, or keep the words of one group."""
  group, other = rng.sample(list(words.GROUPS), 2)
  kept = rng.sample(words.GROUPS[group], rng.randint(2, 3))
  listed = kept + rng.sample(words.GROUPS[other], 2)
  rng.shuffle(listed)
  if rng.random() < 0.5:
    result = listed[::-1]
    prompts = """
    Reverse this list.
    Write these words from last to first.
    """
    lead = """
    The reversed list is
    From last to first:
    In reverse:"""
  else:
    result = [word for word in listed if word in kept]
    prompts = f"""
    Keep only the {group}.
    Which of these are {group}?
    """
    lead = f"""
    The {group} are
    The list has these {group}:
    I keep"""
  return Task(
    key=tuple(sorted(listed)),
    prompts=prompts,
    input=', '.join(listed),
    answer=f"""{lead}

    {both(result)}.
    {', '.join(result)}.
    """,
  )


def sentence(rng):
  """Past tense, question or negation of a sentence."""
  subject = rng.choice(words.SUBJECTS)
  verb, verbs, past, objects = rng.choice(words.VERBS)
  rest = f'{rng.choice(objects)} {rng.choice(words.TIMES)}'
  form, result, new = rng.choice(
    (
      ('the past tense', f'{subject} {past} {rest}.', past),
      ('a question', f'does {subject} {verb} {rest}?', f'does {verb}'),
      ('a negation', f'{subject} does not {verb} {rest}.', f'does not {verb}'),
    )
  )
  return Task(
    key=(subject, verb, rest),
    prompts=f"""
    Turn this sentence into {form}.
    Change this into {form}.
    How do I turn this into {form}?
    """,
    input=f'{cap(subject)} {verbs} {rest}.',
    answer=f"""
    Turned into {form}:
    Here is {form}:
    Changed into {form}:

    {cap(result)}

    Here "{verbs}" becomes "{new}".
    The verb "{verbs}" turns into "{new}".
    """,
  )


def extraction(rng):
  """Two of the four facts in a message."""
  x, y = (person.name for person in rng.sample(words.PEOPLE, 2))
  place = rng.choice(words.VENUES)
  day = rng.choice(words.DAYS)
  hour = f'{rng.randint(1, 9)} pm'
  facts = {
    'place': f'the {place}',
    'day': day,
    'time': hour,
    'names': f'{x} and {y}',
  }
  first, second = rng.sample(list(facts), 2)
  message = rng.choice(
    (
      f'{x} will meet {y} at the {place} on {day} at {hour}.',
      f'Hi {y}, see you on {day} at the {place}. Be there at {hour}. {x}',
      f'Dear {y}, at {hour} on {day} I will be at the {place}. Yours, {x}',
    )
  )

  def fact(field):
    be = 'are' if field == 'names' else 'is'
    return f"""
    The {field} {be} {facts[field]}.
    {cap(field)}: {facts[field]}."""

  return Task(
    key=(*sorted((x, y)), place, day, hour),
    prompts=f"""
    Find the {first} and the {second} in this message.
    Give the {first} and the {second}.
    What does it say about the {first} and the {second}?
    """,
    input=message,
    answer=f'{fact(first)}\n\n{fact(second)}',
  )


def review(rng):
  """The verdict of a hotel guest on two things."""
  seen = []
  for group, thing in rng.sample(words.THINGS, 2):
    good = rng.random() < 0.5
    seen.append((thing, rng.choice(group.good if good else group.bad), good))
  (x, how_x, good_x), (y, how_y, good_y) = seen
  if good_x and good_y:
    verdict = 'positive'
    reason = f"""
    The guest liked the {x} and the {y}.
    Both the {x} and the {y} were good."""
  elif good_x or good_y:
    verdict = 'mixed'
    liked, other = (x, y) if good_x else (y, x)
    reason = f"""
    The guest liked the {liked} but not the {other}.
    The {liked} was good, but the {other} was bad."""
  else:
    verdict = 'negative'
    reason = f"""
    The guest liked neither the {x} nor the {y}.
    Both the {x} and the {y} were bad."""
  link = 'and' if good_x == good_y else 'but'
  return Task(
    key=tuple(sorted(seen)),
    prompts="""
    Is this review positive, negative or mixed?
    What did the guest think?
    Sum up this hotel review.
    """,
    input=f'The {x} was {how_x}, {link} the {y} was {how_y}.',
    answer=f"""
    The review is {verdict}.
    This is a {verdict} review.
    It sounds {verdict}.
    {reason}
    """,
  )
