"""The words and facts behind the families: a few hundred words, all invented.

What a task says about a thing is a function of the thing (an owl always eats
mice, a nurse always works in a hospital), so that it can be learnt. Verbs stay
short and common: the tokenizer has 768 entries.
"""

from typing import NamedTuple


def _split(text: str) -> tuple[str, ...]:
  return tuple(text.split())


class Person(NamedTuple):
  name: str
  she: str
  her: str


class Animal(NamedTuple):
  name: str
  plural: str
  kind: str
  home: str  # follows 'owls live'
  food: str
  young: str


class Dish(NamedTuple):
  name: str
  cook: str  # an instruction; 'them' are the ingredients
  serve: str  # follows 'serve the soup' and 'the soup is best'


class Sky(NamedTuple):
  name: str
  gear: str
  pleasant: bool


class Verb(NamedTuple):
  base: str
  third: str
  past: str
  objects: tuple[str, str]


class Aspects(NamedTuple):
  things: tuple[str, ...]
  good: tuple[str, ...]
  bad: tuple[str, ...]


_WOMEN = _split(
  'Anna Clara Emma Eva Grace Ida Julia Lucy Mia Nora Olga Rosa Sara Tina '
  'Vera Zoe'
)
_MEN = _split(
  'Adam Ben Carl David Eric Felix Hugo Ivan Jack Leo Max Noah Oscar Paul '
  'Sam Tom'
)
PEOPLE = (
  *(Person(name, 'she', 'her') for name in _WOMEN),
  *(Person(name, 'he', 'his') for name in _MEN),
)

CITIES = _split(
  'Athens Berlin Boston Cairo Delhi Dublin Lima Lisbon London Madrid Oslo '
  'Paris Prague Rome Tokyo Vienna'
)

DAYS = _split('Monday Tuesday Wednesday Thursday Friday Saturday Sunday')

# What each does at work; follows 'she'.
JOBS = {
  'actor': 'plays roles in a theater',
  'artist': 'draws pictures in a studio',
  'baker': 'bakes bread in a shop',
  'barber': 'cuts hair in a shop',
  'butcher': 'sells meat in a shop',
  'cook': 'makes dinner in a hotel',
  'dentist': 'cleans teeth in a clinic',
  'doctor': 'treats patients in a clinic',
  'driver': 'drives a bus through the city',
  'engineer': 'builds bridges over rivers',
  'farmer': 'grows wheat on a farm',
  'gardener': 'plants trees in a park',
  'guide': 'leads tours in a museum',
  'judge': 'hears cases in a court',
  'miner': 'digs for coal in a mine',
  'nurse': 'looks after patients in a hospital',
  'pilot': 'flies planes over the sea',
  'plumber': 'repairs pipes in old houses',
  'sailor': 'sails ships over the sea',
  'singer': 'sings songs in a theater',
  'tailor': 'makes coats in a shop',
  'teacher': 'teaches children at a school',
  'waiter': 'serves food in a hotel',
  'writer': 'writes stories in a library',
}

# What a person likes -> what the person does; follows 'she'.
HOBBIES = {
  'books': 'reads books',
  'chess': 'plays chess',
  'films': 'watches films',
  'fishing': 'goes fishing',
  'football': 'plays football',
  'hiking': 'goes hiking',
  'music': 'listens to music',
  'photos': 'takes photos',
  'roses': 'grows roses',
  'tennis': 'plays tennis',
}

# From light to heavy: `comparison` uses the order.
ANIMALS = (
  Animal('ant', 'ants', 'insect', 'in nests', 'seeds', 'larva'),
  Animal('bee', 'bees', 'insect', 'in hives', 'nectar', 'larva'),
  Animal(
    'butterfly', 'butterflies', 'insect', 'in meadows', 'nectar', 'caterpillar'
  ),
  Animal('mouse', 'mice', 'mammal', 'in fields', 'seeds', 'pup'),
  Animal('sparrow', 'sparrows', 'bird', 'in gardens', 'seeds', 'chick'),
  Animal('frog', 'frogs', 'amphibian', 'in ponds', 'insects', 'tadpole'),
  Animal('squirrel', 'squirrels', 'mammal', 'in forests', 'nuts', 'kit'),
  Animal('crow', 'crows', 'bird', 'in fields', 'insects', 'chick'),
  Animal('owl', 'owls', 'bird', 'in forests', 'mice', 'owlet'),
  Animal('hedgehog', 'hedgehogs', 'mammal', 'in gardens', 'insects', 'hoglet'),
  Animal('duck', 'ducks', 'bird', 'in ponds', 'plants', 'duckling'),
  Animal('rabbit', 'rabbits', 'mammal', 'in meadows', 'grass', 'kit'),
  Animal('cat', 'cats', 'mammal', 'in houses', 'mice', 'kitten'),
  Animal('eagle', 'eagles', 'bird', 'in mountains', 'rabbits', 'eaglet'),
  Animal('fox', 'foxes', 'mammal', 'in forests', 'rabbits', 'cub'),
  Animal('monkey', 'monkeys', 'mammal', 'in jungles', 'fruit', 'infant'),
  Animal('otter', 'otters', 'mammal', 'in rivers', 'fish', 'pup'),
  Animal('swan', 'swans', 'bird', 'in lakes', 'plants', 'cygnet'),
  Animal('beaver', 'beavers', 'mammal', 'in rivers', 'bark', 'kit'),
  Animal('penguin', 'penguins', 'bird', 'on the ice', 'fish', 'chick'),
  Animal('wolf', 'wolves', 'mammal', 'in forests', 'deer', 'pup'),
  Animal('goat', 'goats', 'mammal', 'in mountains', 'grass', 'kid'),
  Animal('sheep', 'sheep', 'mammal', 'on farms', 'grass', 'lamb'),
  Animal('panda', 'pandas', 'mammal', 'in mountains', 'bamboo', 'cub'),
  Animal('ostrich', 'ostriches', 'bird', 'in deserts', 'plants', 'chick'),
  Animal('seal', 'seals', 'mammal', 'on the ice', 'fish', 'pup'),
  Animal('pig', 'pigs', 'mammal', 'on farms', 'corn', 'piglet'),
  Animal('lion', 'lions', 'mammal', 'on plains', 'zebras', 'cub'),
  Animal('tiger', 'tigers', 'mammal', 'in jungles', 'deer', 'cub'),
  Animal('bear', 'bears', 'mammal', 'in forests', 'berries', 'cub'),
  Animal('zebra', 'zebras', 'mammal', 'on plains', 'grass', 'foal'),
  Animal('moose', 'moose', 'mammal', 'in forests', 'leaves', 'calf'),
  Animal('horse', 'horses', 'mammal', 'on farms', 'grass', 'foal'),
  Animal('camel', 'camels', 'mammal', 'in deserts', 'plants', 'calf'),
  Animal('cow', 'cows', 'mammal', 'on farms', 'grass', 'calf'),
  Animal('shark', 'sharks', 'fish', 'in the sea', 'fish', 'pup'),
  Animal('giraffe', 'giraffes', 'mammal', 'on plains', 'leaves', 'calf'),
  Animal('hippo', 'hippos', 'mammal', 'in rivers', 'grass', 'calf'),
  Animal('rhino', 'rhinos', 'mammal', 'on plains', 'grass', 'calf'),
  Animal('elephant', 'elephants', 'mammal', 'on plains', 'leaves', 'calf'),
  Animal('whale', 'whales', 'mammal', 'in the sea', 'krill', 'calf'),
)

# The kind's plural, and what all of them have.
KINDS = {
  'amphibian': ('amphibians', 'smooth skin'),
  'bird': ('birds', 'feathers'),
  'fish': ('fish', 'gills'),
  'insect': ('insects', 'six legs'),
  'mammal': ('mammals', 'warm blood'),
}

# Gift -> what one does with it; follows 'I will'.
GIFTS = {
  'bike': 'ride it to work',
  'blanket': 'sleep under it',
  'book': 'read it at night',
  'boots': 'wear them in winter',
  'cake': 'share it with my family',
  'camera': 'take photos with it',
  'clock': 'hang it on the wall',
  'cup': 'drink tea from it',
  'flowers': 'put them by the window',
  'gloves': 'wear them in winter',
  'guitar': 'play it every day',
  'hat': 'wear it in the sun',
  'honey': 'eat it with bread',
  'kite': 'fly it on the beach',
  'lamp': 'put it by the bed',
  'map': 'hang it on the wall',
  'pen': 'write letters with it',
  'plant': 'put it by the window',
  'scarf': 'wear it in winter',
  'sweater': 'wear it at home',
  'tea': 'drink it at work',
  'tickets': 'use them with a friend',
  'umbrella': 'use it in the rain',
  'vase': 'fill it with flowers',
}

DISHES = (
  Dish('curry', 'cook them in coconut milk', 'with rice'),
  Dish('omelet', 'fry them with three eggs', 'hot'),
  Dish('pie', 'bake them in dough for an hour', 'warm'),
  Dish('pizza', 'bake them on dough with cheese', 'hot'),
  Dish('salad', 'mix them with oil and salt', 'cold'),
  Dish('sandwich', 'put them between slices of bread', 'with mustard'),
  Dish('soup', 'boil them in salted water', 'hot'),
  Dish('stew', 'cook them slowly in a big pot', 'with bread'),
)

# Ingredient -> how it is prepared.
INGREDIENTS = {
  'apples': 'peel',
  'beans': 'rinse',
  'beets': 'peel',
  'cabbage': 'chop',
  'carrots': 'peel',
  'celery': 'slice',
  'corn': 'rinse',
  'fennel': 'slice',
  'garlic': 'crush',
  'ginger': 'grate',
  'ham': 'slice',
  'kale': 'wash',
  'leeks': 'wash',
  'mushrooms': 'slice',
  'nuts': 'crush',
  'olives': 'slice',
  'onions': 'chop',
  'parsley': 'chop',
  'peas': 'rinse',
  'peppers': 'chop',
  'potatoes': 'peel',
  'spinach': 'wash',
  'tofu': 'slice',
  'tomatoes': 'chop',
}

# Groups of words that share none.
GROUPS = {
  'animals': tuple(animal.name for animal in ANIMALS),
  'clothes': _split(
    'boots coat dress gloves hat jacket scarf shirt skirt socks sweater'
  ),
  'fruits': _split(
    'apple banana cherry fig grape lemon melon orange peach pear plum'
  ),
  'tools': _split(
    'axe brush drill file hammer knife ladder nail pliers saw shovel'
  ),
}

VERBS = (
  Verb('bring', 'brings', 'brought', ('flowers', 'good news')),
  Verb('buy', 'buys', 'bought', ('fruit', 'a ticket')),
  Verb('carry', 'carries', 'carried', ('a bag', 'water')),
  Verb('clean', 'cleans', 'cleaned', ('the room', 'the windows')),
  Verb('cook', 'cooks', 'cooked', ('rice', 'dinner')),
  Verb('draw', 'draws', 'drew', ('a map', 'animals')),
  Verb('drink', 'drinks', 'drank', ('tea', 'cold milk')),
  Verb('drive', 'drives', 'drove', ('a truck', 'the bus')),
  Verb('eat', 'eats', 'ate', ('an apple', 'soup')),
  Verb('grow', 'grows', 'grew', ('beans', 'roses')),
  Verb('make', 'makes', 'made', ('a cake', 'coffee')),
  Verb('open', 'opens', 'opened', ('the shop', 'the door')),
  Verb('paint', 'paints', 'painted', ('a wall', 'a boat')),
  Verb('play', 'plays', 'played', ('chess', 'football')),
  Verb('sell', 'sells', 'sold', ('bread', 'flowers')),
  Verb('sing', 'sings', 'sang', ('a song', 'old songs')),
  Verb('take', 'takes', 'took', ('the bus', 'a photo')),
  Verb('teach', 'teaches', 'taught', ('a class', 'children')),
  Verb('wash', 'washes', 'washed', ('the dishes', 'the car')),
  Verb('watch', 'watches', 'watched', ('a film', 'the birds')),
  Verb('write', 'writes', 'wrote', ('a letter', 'a story')),
)
SUBJECTS = (
  *(person.name for person in PEOPLE),
  *(f'the {job}' for job in JOBS),
)
TIMES = (
  'after lunch',
  'at night',
  'before work',
  'every day',
  'in the morning',
  'on Mondays',
)

# Places where people meet; follow 'at the'.
VENUES = _split(
  'beach cafe harbor library market museum park school station theater'
)

# Temperature -> what to wear.
TEMPERATURES = {
  'cold': 'a warm coat',
  'cool': 'a sweater',
  'hot': 'a thin shirt',
  'warm': 'a light jacket',
}
SKIES = (
  Sky('cloudy', 'a bottle of water', True),
  Sky('foggy', 'a bright lamp', False),
  Sky('rainy', 'an umbrella', False),
  Sky('stormy', 'a raincoat', False),
  Sky('sunny', 'sunglasses', True),
  Sky('windy', 'a scarf', False),
)
# Follow 'go'; True where a roof keeps the weather out.
ACTIVITIES = {
  'bowling': True,
  'camping': False,
  'climbing': False,
  'cycling': False,
  'dancing': True,
  'fishing': False,
  'hiking': False,
  'riding': False,
  'running': False,
  'shopping': True,
}

TRAITS = _split('brave clever happy hungry kind lazy old unlucky')
STORY_PLACES = (
  'by the sea',
  'in a castle',
  'in a dark forest',
  'in a village',
  'near a river',
  'on a hill',
  'on an island',
  'under a bridge',
)
# What a hero finds -> what the thing did.
TREASURES = {
  'arrow': 'showed the way north',
  'bell': 'called all the birds',
  'blanket': 'kept out the cold',
  'boat': 'crossed the sea in a day',
  'book': 'told a new story every night',
  'coin': 'came back every morning',
  'egg': 'hid a small dragon',
  'flute': 'made the wind sing',
  'key': 'opened a box of gold',
  'lamp': 'lit the dark road',
  'map': 'showed the way home',
  'mirror': 'showed the future',
  'ring': 'shone like the sun',
  'rope': 'reached the moon',
  'seed': 'grew into a tall tree',
  'umbrella': 'flew over the hills',
}

ASPECTS = (
  Aspects(
    ('cake', 'fish', 'pizza', 'rice', 'soup'),
    ('excellent', 'fresh', 'tasty', 'warm'),
    ('awful', 'burnt', 'cold', 'salty'),
  ),
  Aspects(
    ('cook', 'driver', 'guide', 'manager', 'waiter'),
    ('friendly', 'helpful', 'kind', 'polite'),
    ('careless', 'lazy', 'rude', 'slow'),
  ),
  Aspects(
    ('bathroom', 'hall', 'kitchen', 'lobby', 'room'),
    ('bright', 'clean', 'cozy', 'quiet'),
    ('dark', 'dirty', 'noisy', 'tiny'),
  ),
  Aspects(
    ('beach', 'garden', 'park', 'pool', 'terrace'),
    ('lovely', 'peaceful', 'pretty', 'safe'),
    ('closed', 'crowded', 'muddy', 'ugly'),
  ),
)
THINGS = tuple((group, thing) for group in ASPECTS for thing in group.things)
