"""Families that are answered from knowledge: words, facts, and some fantasy.

`task` says how their texts are read; `words` holds what they know.
"""

from tools.synthetic import words
from tools.synthetic.task import Task, a, both, cap


def biography(rng):
  name, she, her = rng.choice(words.PEOPLE)
  job, work = rng.choice(list(words.JOBS.items()))
  city = rng.choice(words.CITIES)
  hobby, does = rng.choice(list(words.HOBBIES.items()))
  return Task(
    key=(name, job, city),
    prompts=f"""
    Write a short biography of {name}, {a(job)} from {city} who likes {hobby}.
    Introduce {name}, who works as {a(job)} in {city} and likes {hobby}.
    Who is {name}? Job: {job}. City: {city}. Hobby: {hobby}.
    """,
    answer=f"""
    {name} is {a(job)} from {city}.
    {name} lives in {city} and works as {a(job)}.
    Meet {name}, {a(job)} from {city}.

    {cap(she)} {work}.
    Every day {she} {work}.

    In {her} free time {she} {does}.
    After work {she} {does}.
    On Sundays {she} {does}.
    """,
  )


def permuted(task):
  """The task with the fact of another job or gift, if it has such a fact."""
  if (facts := disputed(task)) is None:
    return task
  return task._replace(answer=task.answer.replace(*facts))


def disputed(task):
  """The fact of a task, and that of another job or gift; None: it has none."""
  for facts in (words.JOBS, words.GIFTS):
    names = list(facts)
    for part in task.key:
      if part in facts and facts[part] in task.answer:
        return facts[part], facts[names[(names.index(part) + 1) % len(names)]]
  return None


def animal_facts(rng):
  """Two questions about two animals."""
  asked = []
  for animal in rng.sample(words.ANIMALS, 2):
    one, many, kind, home, food, young = animal
    kinds, body = words.KINDS[kind]
    facts = {
      f'where {many} live': f"""
      {cap(many)} live {home}.
      You can find {many} {home}.
      Most {many} live {home}.""",
      f'what {many} eat': f"""
      {cap(many)} eat {food}.
      {cap(many)} feed on {food}.
      The food of {many} is {food}.""",
      f'what kind of animal {a(one)} is': f"""
      {cap(a(one))} is {a(kind)} and has {body}.
      {cap(many)} have {body}, because {many} are {kinds}.""",
      f'what a young {one} is called': f"""
      A young {one} is called {a(young)}.
      The name for a young {one} is {young}.""",
    }
    asked.append(rng.choice(list(facts.items())))
  (first, fact), (second, other_fact) = asked
  return Task(
    key=tuple(sorted((first, second))),
    prompts=f"""
    Tell me {first} and {second}.
    Do you know {first} and {second}?
    Explain {first}, then {second}.
    """,
    answer=f'{fact}\n\n{other_fact}',
  )


def comparison(rng):
  chosen = rng.sample(range(len(words.ANIMALS)), 3)
  x, y, z = (a(words.ANIMALS[i].name) for i in chosen)
  light, middle, heavy = (words.ANIMALS[i].name for i in sorted(chosen))
  return Task(
    key=(light, middle, heavy),
    prompts=f"""
    Compare the weight of {x}, {y} and {z}.
    Which is the heaviest and which is the lightest: {x}, {y} or {z}?
    Sort by weight: {x}, {y}, {z}.
    """,
    answer=f"""
    The {heavy} is the heaviest of the three.
    Of the three, the {heavy} is the heaviest.
    The {heavy} weighs the most.

    The {middle} comes next, and the {light} is the lightest.
    Then comes the {middle}, and last the {light}.
    The {middle} is lighter, and the {light} weighs the least.
    """,
  )


def thank_you_note(rng):
  giver, writer = (person.name for person in rng.sample(words.PEOPLE, 2))
  gift, use = rng.choice(list(words.GIFTS.items()))
  return Task(
    key=(giver, writer, gift),
    prompts=f"""
    Write a thank-you note from {writer} to {giver} for the {gift}.
    {giver} gave {writer} the {gift}. Write the thank-you note.
    Help {writer} thank {giver} for the {gift}.
    """,
    answer=f"""
    Dear {giver}, thank you for the {gift}.
    Dear {giver}, thank you so much for the lovely {gift}.
    Hello {giver}, many thanks for the {gift}.

    I will {use}.
    Now I can {use}.
    I am going to {use}.

    Love, {writer}
    Best wishes, {writer}
    Yours, {writer}
    """,
  )


def recipe(rng):
  dish, cook, serve = rng.choice(words.DISHES)
  ingredients = rng.sample(list(words.INGREDIENTS), 3)
  steps = both([f'{words.INGREDIENTS[x]} the {x}' for x in ingredients])
  return Task(
    key=(dish, *sorted(ingredients)),
    prompts=f"""
    Write a short recipe for {a(dish)}.
    How do I make {a(dish)} from this?
    """,
    input=both(ingredients),
    answer=f"""
    {cap(steps)}.
    First, {steps}.

    Then {cook}.
    {cap(cook)}.
    Now {cook}.

    Serve the {dish} {serve}.
    The {dish} is best {serve}.
    """,
  )


def weather_advice(rng):
  warmth, clothes = rng.choice(list(words.TEMPERATURES.items()))
  sky, gear, pleasant = rng.choice(words.SKIES)
  city = rng.choice(words.CITIES)
  day = rng.choice(words.DAYS)
  activity, indoors = rng.choice(list(words.ACTIVITIES.items()))
  if indoors:
    advice = f"""
    Yes, {activity} is fine in any weather.
    Yes, the weather does not matter for {activity}."""
  elif pleasant:
    advice = f"""
    Yes, {day} is a good day for {activity}.
    Yes, the weather will be good for {activity}."""
  else:
    advice = f"""
    No, it is too {sky} for {activity}.
    No, a {sky} day is bad for {activity}."""
  return Task(
    key=(warmth, sky, city, day, activity),
    prompts=f"""
    {city} will be {warmth} and {sky} on {day}. Can I go {activity}?
    It will be {warmth} and {sky} in {city} on {day}. Can we go {activity}?
    Is {day} good for {activity} in {city}? It will be {warmth} and {sky}.
    """,
    answer=f"""{advice}

    Outside, wear {clothes} and take {gear}.
    In {city} you will need {clothes} and {gear}.
    Pack {clothes} and {gear}.
    """,
  )


def story(rng):
  """The one family whose answers choose what happens."""
  trait = rng.choice(words.TRAITS)
  animal = rng.choice(words.ANIMALS).name
  place = rng.choice(words.STORY_PLACES)
  thing, did = rng.choice(list(words.TREASURES.items()))
  hero = a(f'{trait} {animal}')
  return Task(
    key=(trait, animal, place, thing),
    prompts=f"""
    Tell a story about {hero} {place} and {a(thing)}.
    Write a short story. Hero: {hero} {place}. Treasure: {a(thing)}.
    """,
    answer=f"""
    Once {hero} lived {place}.
    There once was {hero} {place}.

    One day it found {a(thing)} under a tree.
    One night a friend brought {a(thing)}.
    One morning {a(thing)} fell from the sky.

    The {thing} {did}.
    It was magic: the {thing} {did}.

    The {animal} was never sad again.
    So the {animal} was glad.
    """,
  )
