"""Instructions in plain English, made up by twelve small grammars.

A teacher of two million parameters learns this data set in minutes, and a
smaller student does not learn it from a few hundred rows: what the quickstart
and the tests distil. What an answer says follows from the prompt; how it says
it is drawn, sentence by sentence, with odds 6 : 3 : 1. So a teacher's
distribution holds more than any one answer shows.

Every content belongs to one split, by a hash: what a held-out row asks about
(this person with this job in this city, these numbers) is in no other split,
in any wording.
"""

import itertools
import json
import pathlib
import random
import zlib
from collections.abc import Iterator

from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)

from tools.synthetic import knowing, reading
from tools.synthetic.task import Task, ask, say, share_said

FAMILIES = (
  knowing.biography,
  knowing.animal_facts,
  reading.addition,
  knowing.comparison,
  knowing.thank_you_note,
  reading.word_list,
  knowing.recipe,
  reading.sentence,
  knowing.weather_advice,
  reading.extraction,
  knowing.story,
  reading.review,
)

SPLITS = ('train', 'prompts', 'validation', 'test')
_SHARES = 13 * ('train',) + 5 * ('prompts',) + ('validation', 'test')
REFERENCES = 4  # answers in a row of validation or test


def split_of(task: Task) -> str:
  """The one split that the task's content belongs to."""
  return _SHARES[zlib.crc32(repr(task.key).encode()) % len(_SHARES)]


def tasks(split: str, seed: int = 0) -> Iterator[tuple[Task, random.Random]]:
  """Endless (task, generator) of a split, the families taking turns.

  Row i depends on (split, seed, i) alone, so that n rows begin any m > n.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r}: choose from {", ".join(SPLITS)}')
  for i in itertools.count():
    rng = random.Random(f'{split} {seed} {i}')
    family = FAMILIES[i % len(FAMILIES)]
    task = family(rng)
    while split_of(task) != split:
      task = family(rng)
    yield task, rng


def rows(split: str, n: int, seed: int = 0) -> list[dict]:
  """The first n rows: instruction, input and output of a split.

  `output` is one answer for 'train' and 'prompts' (whose prompts are for a
  teacher to answer), and a list of different ones for 'validation' and 'test'.
  """
  return [_row(split, *x) for x in itertools.islice(tasks(split, seed), n)]


def _row(split, task, rng):
  row = {'instruction': ask(rng, task), 'input': task.input}
  if split in ('train', 'prompts'):
    return row | {'output': say(rng, task)}
  answers = {}  # a dict, to keep the order in which they were drawn
  while len(answers) < REFERENCES:
    answers[say(rng, task)] = None
  return row | {'output': list(answers)}


def permuted(split: str, n: int, seed: int = 0) -> list[dict]:
  """`rows` of a world in which two families have other facts.

  What the people of one job do those of another do here (`biography`), and so
  it is with gifts (`thank_you_note`): of a teacher that is wrong about them.
  """
  return [
    _row(split, knowing.permuted(task), rng)
    for task, rng in itertools.islice(tasks(split, seed), n)
  ]


def disputed(split: str, n: int, world: str = 'right') -> list[dict]:
  """n rows that `permuted` changes; `answer` is a fact of each, for `says`.

  world: whose fact: 'right', or 'wrong', that of `permuted`.
  """
  some = (x for x in tasks(split) if knowing.disputed(x[0]))
  found = []
  for task, rng in itertools.islice(some, n):
    right, wrong = knowing.disputed(task)
    fact = right if world == 'right' else wrong
    found.append(_row(split, task, rng) | {'answer': fact})
  return found


def says(row, answer: str) -> float:
  """Whether an answer has the fact of a row of `disputed`."""
  return float(row.answer in answer)


def joined(split: str, n: int, k: int, seed: int = 0) -> list[dict]:
  """n rows that ask k questions each, to be answered one after the other.

  Of an answer to k questions; for `check`, as `gradable` rows.
  """
  some, found = tasks(split, seed), []
  for _ in range(n):
    asked, said, parts = [], [], []
    for i, (task, rng) in enumerate(itertools.islice(some, k), start=1):
      asked.append(f'{i}. {ask(rng, task)} {task.input}'.strip())
      said.append(say(rng, task))
      parts.append(task.answer)
    found.append(
      {
        'instruction': '\n'.join(asked),
        'input': '',
        'output': ' '.join(said),
        'answer': '\n\n'.join(parts),
      }
    )
  return found


def gradable(split: str, n: int, seed: int = 0) -> list[dict]:
  """`rows`, each with all that may be answered as its `answer`, for `check`."""
  return [
    _row(split, task, rng) | {'answer': task.answer}
    for task, rng in itertools.islice(tasks(split, seed), n)
  ]


def check(row, answer: str) -> float:
  """How much of an answer is right, 0 to 1; `row`: of `gradable` rows.

  What an answer says follows from its prompt, how it says so does not: the
  share of its sentences that are a phrasing of what there is to say, in order.
  """
  return share_said(row.answer, answer)


PAD, START, END = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
CHAT_TEMPLATE = (
  '{% for message in messages %}'
  "{{ '<|im_start|>' + message['role'] + '\\n'"
  " + message['content'] + '<|im_end|>' + '\\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(path, vocab_size: int = 768, n: int = 6000) -> None:
  """Trains a byte-level BPE on n training rows; writes it into directory path.

  Qwen's special tokens and chat template; `AutoTokenizer` loads it. The same
  arguments write the same bytes.
  """
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, START, END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  _write(tokenizer, trainer, path, n)


def train_pieces(path, vocab_size: int = 640, n: int = 6000) -> None:
  """As `train_tokenizer`, a BPE of characters in the way of SentencePiece.

  A blank is U+2581, and a character that the rows do not have is bytes. Pieces
  have four characters at most: most words are cut in other places than there.
  """
  tokenizer = Tokenizer(models.BPE(byte_fallback=True))
  tokenizer.normalizer = normalizers.Replace(' ', '\u2581')
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.Split('\n', 'isolated'),
      pre_tokenizers.Split('\u2581', 'merged_with_next'),
    ]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, START, END, *(f'<0x{i:02X}>' for i in range(256))],
    max_token_length=4,
    show_progress=False,
  )
  _write(tokenizer, trainer, path, n)


def _write(tokenizer, trainer, path, n):
  """Trains on n training rows, and writes what `AutoTokenizer` loads."""
  # With the roles that the template names, so that each becomes one token.
  texts = (
    f'user\n{row["instruction"]}\n{row["input"]}\nassistant\n{row["output"]}'
    for row in rows('train', n)
  )
  tokenizer.train_from_iterator(texts, trainer)
  path = pathlib.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(path / 'tokenizer.json'))
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': END,
    'pad_token': PAD,
    'additional_special_tokens': [START],
    'clean_up_tokenization_spaces': False,
    'chat_template': CHAT_TEMPLATE,
  }
  text = json.dumps(config, indent=2) + '\n'
  (path / 'tokenizer_config.json').write_text(text, encoding='utf-8')
