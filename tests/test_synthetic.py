import collections
import hashlib
import itertools
import json
import pathlib
import random
import re

import pytest
import transformers

from configs import base
from gakd_jax.data import sources
from tools import synthetic
from tools.synthetic import knowing, reading, words
from tools.synthetic import task as task_lib

ONE_ANSWER = ('train', 'prompts')
HELD_OUT = ('validation', 'test')


def texts(row):
  output = row['output']
  answers = [output] if isinstance(output, str) else output
  return [row['instruction'], row['input'], *answers]


@pytest.fixture(scope='module')
def train():
  return synthetic.rows('train', 4800)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('tokenizer')
  synthetic.train_tokenizer(path)
  return path


@pytest.fixture(scope='module')
def tokenizer(directory):
  return transformers.AutoTokenizer.from_pretrained(directory)


def draws(family, n, seed=0):
  rng = random.Random(seed)
  return [family(rng) for _ in range(n)]


def test_each_part_of_an_answer_is_checked():
  for row in synthetic.gradable('test', 240):
    given = sources.Row(row['instruction'], answer=row['answer'])
    for text in row['output']:
      assert synthetic.check(given, text) == 1
      assert synthetic.check(given, f'{text} And more.') < 1
    parts = task_lib.parts(row['answer'])
    said = [phrasings[0] for phrasings in parts]
    for i in range(len(said)):
      wrong = ' '.join([*said[:i], 'Something else.', *said[i + 1 :]])
      assert synthetic.check(given, wrong) == (len(said) - 1) / len(said)
    assert synthetic.check(given, '') == 0


@pytest.mark.parametrize(
  ('said', 'share'),
  [
    ('B. C.', 1),
    ('C. B.', 1 / 2),  # In another order, what comes before is missing.
    ('B.', 1 / 2),
    ('B. More. And more.', 1 / 3),  # As much is wrong as is said.
    ('B. C. More.', 2 / 3),
    ('Is B. C.', 1 / 2),  # A sentence is all of it.
    ('B. C.D.', 1 / 2),
    ('Eleven and 2 make 13. C.', 1 / 2),
    ('never ends', 0),
    ('', 0),
  ],
)
def test_what_is_missing_and_what_is_too_much_is_wrong(said, share):
  given = sources.Row('', answer='A.\nB.\n1 and 2 make 3.\n\nC.\nD.')
  assert synthetic.check(given, said) == pytest.approx(share)


def test_a_permuted_world_differs_in_two_families():
  """Prompts are the same; jobs and gifts have the facts of others."""
  rows, others = (
    make('train', 240) for make in (synthetic.rows, synthetic.permuted)
  )
  changed = set()
  for i, (a, b) in enumerate(zip(rows, others, strict=True)):
    assert (a['instruction'], a['input']) == (b['instruction'], b['input'])
    if a['output'] != b['output']:
      changed.add(synthetic.FAMILIES[i % len(synthetic.FAMILIES)])
      facts = [*words.JOBS.values(), *words.GIFTS.values()]
      (old,) = {x for x in facts if x in a['output']}
      (new,) = {x for x in facts if x in b['output']}
      assert a['output'].replace(old, new) == b['output']
  assert changed == {knowing.biography, knowing.thank_you_note}


def test_of_disputed_rows_a_world_has_one_fact():
  right, wrong = (
    synthetic.disputed('test', 24, world) for world in ('right', 'wrong')
  )
  rows = {x['instruction']: x for x in synthetic.rows('test', 240)}
  others = {x['instruction']: x for x in synthetic.permuted('test', 240)}
  for a, b in zip(right, wrong, strict=True):
    assert a | {'answer': ''} == b | {'answer': ''}
    given, other = (sources.Row('', answer=x['answer']) for x in (a, b))
    for fact, no_fact, world in (
      (given, other, rows),
      (other, given, others),
    ):
      for text in world[a['instruction']]['output']:
        assert synthetic.says(fact, text) == 1
        assert synthetic.says(no_fact, text) == 0


def test_joined_rows_ask_and_say_one_after_the_other():
  rows = synthetic.joined('test', 20, 3)
  single = synthetic.gradable('test', 60)
  for i, row in enumerate(rows):
    three = single[3 * i : 3 * i + 3]
    assert all(x['instruction'] in row['instruction'] for x in three)
    assert row['answer'] == '\n\n'.join(x['answer'] for x in three)
    given = sources.Row(row['instruction'], answer=row['answer'])
    assert synthetic.check(given, row['output']) == 1
    assert 0 < synthetic.check(given, three[0]['output'][0]) < 1


def test_gradable_rows_are_the_rows_with_all_that_may_be_answered():
  rows = synthetic.rows('test', 24)
  for row, given in zip(rows, synthetic.gradable('test', 24), strict=True):
    assert given | row == given
    phrasings = task_lib.parts(given['answer'])
    assert all(any(x in row['output'][0] for x in part) for part in phrasings)


@pytest.mark.parametrize('split', synthetic.SPLITS)
def test_rows_depend_on_split_seed_and_index_alone(split):
  rows = synthetic.rows(split, 120)
  assert rows == synthetic.rows(split, 120)
  assert rows[:50] == synthetic.rows(split, 50)
  assert rows != synthetic.rows(split, 120, seed=1)
  others = set(synthetic.SPLITS) - {split}
  assert all(rows != synthetic.rows(other, 120) for other in others)


def test_rows_are_the_same_on_every_machine():
  """A new digest means a new data set: the shipped teacher has to follow."""
  rows = [synthetic.rows(split, 120) for split in synthetic.SPLITS]
  digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
  assert digest[:16] == '5a842526b52787f0'


def test_unknown_split_names_the_known_ones():
  with pytest.raises(ValueError, match='train, prompts, validation, test'):
    synthetic.rows('dev', 1)


@pytest.mark.parametrize('split', synthetic.SPLITS)
def test_outputs_are_one_answer_or_different_references(split):
  for row in synthetic.rows(split, 240):
    assert list(row) == ['instruction', 'input', 'output']
    if split in ONE_ANSWER:
      assert isinstance(row['output'], str)
    else:
      assert len(set(row['output'])) == len(row['output']) == 4


def test_splits_share_no_content():
  keys = {
    split: {
      task.key for task, _ in itertools.islice(synthetic.tasks(split), 1200)
    }
    for split in synthetic.SPLITS
  }
  for one, other in itertools.combinations(synthetic.SPLITS, 2):
    assert not keys[one] & keys[other]


@pytest.mark.parametrize(
  ('family', 'pattern'),
  [(reading.addition, r'\d+'), (knowing.comparison, r'\ban? (\w+)')],
)
def test_split_is_a_function_of_what_a_prompt_asks_about(family, pattern):
  """Whatever the order and the wording: read back from the text itself."""
  splits = collections.defaultdict(set)
  for task in draws(family, 20_000):
    prompt = task.prompts.strip().splitlines()[0]
    content = tuple(sorted(re.findall(pattern, prompt)))
    splits[content].add(synthetic.split_of(task))
  assert max(map(len, splits.values())) == 1


@pytest.mark.parametrize('family', synthetic.FAMILIES)
def test_families_are_large(family):
  """2000 contents for the prompts; the training split has more."""
  rng = random.Random(0)
  keys = collections.defaultdict(set)
  for _ in range(30_000):
    task = family(rng)
    keys[synthetic.split_of(task)].add(task.key)
    if len(keys['prompts']) >= 2000:
      break
  assert len(keys['prompts']) >= 2000
  assert len(keys['train']) > len(keys['prompts'])
  assert min(len(keys[split]) for split in HELD_OUT) > 200


@pytest.mark.parametrize('family', synthetic.FAMILIES)
def test_answers_have_a_mode_and_alternatives(family):
  rng = random.Random(0)
  for task in draws(family, 20):
    answers = collections.Counter(synthetic.say(rng, task) for _ in range(200))
    (_, most), *_, (_, least) = answers.most_common()
    assert len(answers) >= synthetic.REFERENCES
    assert most > 3 * least
    prompts = {synthetic.ask(rng, task) for _ in range(40)}
    assert 2 <= len(prompts) <= 4


def test_phrasings_follow_their_odds():
  task = synthetic.Task((), 'Hello?', 'Yes.\nAye.\nSure.\n  \n  It is.\n')
  rng = random.Random(0)
  said = collections.Counter(synthetic.say(rng, task) for _ in range(10_000))
  odds = {'Yes. It is.': 0.6, 'Aye. It is.': 0.3, 'Sure. It is.': 0.1}
  assert {text: said[text] / 10_000 for text in odds} == pytest.approx(
    odds, abs=0.015
  )


# What none of the texts may hold.
FAULTS = {
  'a before a vowel': r'\b[Aa] ([aeiou]|hon|hour)',
  'an before a consonant': r'\b[Aa]n (?!hour)[^aeiou]',
  'a before a plural': r'\b[Aa]n? (mice|nuts|boots|pliers)\b',
  'doubled word': r'\b(\w+) \1\b',
  'space before punctuation': r' [.,:?!]',
  'doubled space or punctuation': r'  |[.,:?!]{2}',
  'sentence without a capital': r'[.?!] [a-z]',
  'wrong plural': r'\b(mouses|wolfs|foxs|sheeps|mooses|ostrichs|butterflys)\b',
  'verb form after does': r'\b[Dd]oes (not )?(\w+ )?\w*[^s]s \b(bread|tea|a)\b',
  'unfilled template': r'[{}]|None|\\n|\n',
}


@pytest.mark.parametrize('fault', FAULTS)
def test_no_text_has_a_fault(train, fault):
  for row in train + synthetic.rows('test', 600):
    for text in texts(row):
      assert not re.search(FAULTS[fault], text), text


def test_texts_are_sentences(train):
  for row in train:
    assert re.match(r'[A-Z]', row['instruction'])
    assert re.search(r'[.?]$', row['instruction'])
    assert re.match(r'[A-Z0-9]', row['output'])
    signed = re.search(r'(Love|Best wishes|Yours), [A-Z]\w+$', row['output'])
    assert signed or re.search(r'[.?"]$', row['output'])


def test_sums_are_right(train):
  sums = [row for row in train if re.match(r'.*\d', row['instruction'])]
  assert len(sums) == len(train) // len(synthetic.FAMILIES)
  for row in sums:
    terms = map(int, re.findall(r'\d+', row['instruction']))
    answer = int(re.search(r'(\d+)\.$', row['output'])[1])
    assert sum(terms) == answer


def test_facts_are_functions_of_the_animal(train):
  """Of each animal the data says one thing only, whatever the wording."""
  eaten = collections.defaultdict(set)
  for row in train:
    for many, food in re.findall(
      r'([A-Z]\w+) (?:eat|feed on) ([\w ]+)\.', row['output']
    ):
      eaten[many.lower()].add(food)
  facts = {animal.plural: {animal.food} for animal in words.ANIMALS}
  assert len(eaten) > 30
  assert eaten == {many: facts[many] for many in eaten}


def test_word_groups_are_disjoint():
  listed = [word for group in words.GROUPS.values() for word in group]
  assert len(listed) == len(set(listed))


def test_tokenizer_has_the_size_and_specials_asked_for(tokenizer):
  assert len(tokenizer) == 768
  assert sorted(tokenizer.get_vocab().values()) == list(range(768))
  assert tokenizer.eos_token == '<|im_end|>'
  assert tokenizer.pad_token == '<|endoftext|>'
  for token in (synthetic.PAD, synthetic.START, synthetic.END):
    assert len(tokenizer.encode(token)) == 1


def test_tokenizer_round_trips(tokenizer, train):
  odd = [' two  spaces ', 'tab\tand\nnewline', 'naïve “quotes” 🙂', "it's 1234"]
  for text in odd + [text for row in train[:600] for text in texts(row)]:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_deterministic(directory, tmp_path):
  synthetic.train_tokenizer(tmp_path)
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_larger_vocabulary_still_splits_numbers(tmp_path):
  synthetic.train_tokenizer(tmp_path, vocab_size=1200, n=1200)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(tokenizer) == 1200
  assert all(len(tokenizer.encode(f'{n:02}')) == 2 for n in range(100))


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  path = tmp_path_factory.mktemp('pieces')
  synthetic.train_pieces(path)
  return transformers.AutoTokenizer.from_pretrained(path)


def test_pieces_round_trip_and_cut_words_elsewhere(pieces, tokenizer, train):
  assert len(pieces) == 640
  odd = [' two  spaces ', 'tab\tand\nnewline', 'naïve “quotes” 🙂', "it's 1234"]
  for text in odd + [text for row in train[:600] for text in texts(row)]:
    assert pieces.decode(pieces.encode(text)) == text
  words = [
    word for row in train[:600] for word in re.findall(' [a-z]+', row['output'])
  ]
  alike = sum(
    [x.replace('\u2581', 'Ġ') for x in pieces.tokenize(word)]
    == tokenizer.tokenize(word)
    for word in words
  )
  assert 0.1 < alike / len(words) < 0.5


def test_the_shipped_pieces_are_these(pieces):
  path = pathlib.Path(base.__file__).parent / 'assets/tiny_student'
  shipped = transformers.AutoTokenizer.from_pretrained(path)
  assert shipped.get_vocab() == pieces.get_vocab()


def chat(tokenizer, row, **kwargs):
  content = '\n'.join(filter(None, (row['instruction'], row['input'])))
  messages = [{'role': 'user', 'content': content}]
  return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def test_chat_template_is_the_qwen_form(tokenizer):
  row = {'instruction': 'Hi', 'input': ''}
  start, answer = '<|im_start|>user\nHi<|im_end|>\n', '<|im_start|>assistant\n'
  assert chat(tokenizer, row) == start
  assert chat(tokenizer, row, add_generation_prompt=True) == start + answer


def test_rows_fit_the_quickstart(tokenizer, train):
  """At most 112 tokens with template and end; about half fit 64."""
  chats = [
    chat(tokenizer, row, add_generation_prompt=True)
    + row['output']
    + tokenizer.eos_token
    for row in train
  ]
  lengths = [len(ids) for ids in tokenizer(chats).input_ids]
  assert max(lengths) <= 112
  assert 0.45 < sum(n <= 64 for n in lengths) / len(lengths) < 0.7
  assert sorted(lengths)[len(lengths) // 20] >= 30
