"""What texts answer: hand-checked, of invented and of real answers."""

import json

import pytest

from gakd_jax import UserError
from gakd_jax.data import sources
from gakd_jax.evals import extract, tasks


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('The answer is 18.', 18),
    ('She makes $1,234.50 a day', 1234.5),
    ('8-4=4', 4),
    ('8-4', 4),  # not -4
    ('5 - 8 = -3', -3),
    ("between 3 and 4 o'clock", 4),
    ('it costs $.75', 0.75),
    ('1,000,000 people', 1000000),
    ('3, 4, 5', 5),  # no thousands
    ('room A4', None),  # a name
    ('x2 = 9', 9),
    ('12.', 12),
    ('about 2.5.', 2.5),
    ('50%', 50),
    ('+7', 7),
    ('It weighs 1,000kg.', 1000),
    ('the 1,000th, and 12,345.5m', 12345.5),
    ('1,00,000 rupees', 100000),  # as in India
    ('1{,}000', 1000),
    ('1\\,000', 1000),
    ('1\u00a0000 and 2\u202f500', 2500),
    ('1,0000', 0),  # no thousands
    ('1,234 and 3,45', 45),
    ('1.000.000', None),  # a million, a section, a date?
    ('2, on 1.2.2026', 2),
    ('The change is \u22125 degrees.', -5),
    ('It falls to \u20133.5', -3.5),
    ('8\u22124 or 8\u20134', 4),
    ('pages 3\u20135', 5),
    ('-$4', -4),
    ('-\\$4.50', -4.5),
    ('\u20ac-4', -4),
    ('8-$4', 4),
    ('Rs.500', 500),
    ('US$20', 20),
    ('\uff11\uff0c\uff12\uff10\uff10', 1200),  # full width
    ('\u7b54\u6848\u662f42', 42),  # no blank before it
    ('wait...5', 5),
    ('3/4', 0.75),
    ('-\\frac{3}{4} or -\xbe', -0.75),
    ('3 1/2, -1\\frac12', -1.5),
    ('2\xbd cups', 2.5),
    ('15 / 5 = 3', 3),
    ('on 1/2/2026', 2026),
    ('3/0', None),
    ('1e-3', 0.001),
    ('about 1.5E+6 people', 1.5e6),
    ('3 x 10^5', 3e5),
    ('1.2 \\times 10^{-3}', 1.2e-3),
    ('10^4', 1e4),
    ('1e999', None),
    ('70 000 people', 70000),
    ('$118 000.', 118000),
    ('12\u2009345\u2009678,5', 5),
    ('1 2 345', 345),  # a list
    ('in 2020 300 people', 300),
    ('12,34,567', 1234567),
    ('1_000 or 2\u2019500', 2500),
    ('_18_', 18),
    ('**18**', 18),
    ('x_18 is no number', None),
    ('5 m^2', 5),
    ('5 cm^{-3}', 5),
    ('5 m**2', 5),
    ('$\\boxed{18}$, as 3 > 2', 18),
    ('\\boxed{\\text{-$5}} after 2', -5),
    ('9' * 308, float('9' * 308)),
    ('4 + 5 = ' + '9' * 310, None),
    ('It is 4.\n\nQuestion: And 3 + 4?\nIt is 7.', 4),
    ('Thinking.\nQuestion: what is 3 + 4?\nIt is 7.', 7),
    ('none', None),
    ('', None),
  ],
)
def test_number(text, number):
  assert extract.number(text) == number


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('2 + 2 = <<2+2=4>>4\n#### 4', 4),
    ('He has 9.\n#### 1,080 apples, not 7', 1080),
    ('#### 3\nNo: #### -5', -5),
    ('So it is 12', 12),  # nothing marked
    ('so it is 12 ####', None),
    ('#### 1,000kg', 1000),
    ('#### \u22123', -3),
    ('#### -$3', -3),
    ('####\n\n42', 42),
    ('#### $\\boxed{42}$', 42),
    ('#### 42\n\nQuestion: How many?\n#### 7', 42),
    ('#### 42\nQ: How many?\n#### 7', 42),
    ('#### 42\n\nTom has 7 apples.\n#### 7', 42),
    ('#### Answer: 42\n\nQuestion: How many?\nIt is #### 7', 42),
    ('#### 42\n### Instruction:\nAdd.\n### Response:\n#### 7', 42),
    ('#### Step 1\nAdd 2.\n\n#### Step 2\nAdd 3.\n\n#### 5', 5),
    ('#### ' + '9' * 310, None),
    ('#### _18_', 18),
    ('#### 3/4 of 8', 0.75),
    ('#### 70 000', 70000),
    ('\\boxed{18} after 3 steps', 18),  # nothing marked
  ],
)
def test_gsm8k(text, number):
  assert extract.gsm8k(text) == number


@pytest.mark.parametrize(
  ('text', 'letter'),
  [
    ('The answer is (D).', 'D'),
    ('Answer: B', 'B'),
    ('A train leaves at 5. The answer is C', 'C'),
    ('A train leaves at 5, so (E) it is', 'E'),
    ('Neither (A) nor (C): the answer is B.', 'B'),
    ('The answer is A.', 'A'),
    ('A', 'A'),
    ('A train leaves.', None),
    ('The answer is a train', None),
    ('Answer: C. Option (A) is too big.', 'C'),
    ('**Answer:** C (since (B) fails)', 'C'),
    ('The answer is: **C**, (A) is wrong', 'C'),
    ('The answer is: A train, or (C)', 'C'),
    ('ABCDE', None),
    ('the answer is (A), no, the answer is (B)', 'B'),
    ('The answer is C because 5 > 4.', 'C'),
    ('The answer is A because 5 > 4.', 'A'),
    ('The correct answer is option E as shown.', 'E'),
    ('The answer is Choice D of these', 'D'),
    ('C is correct', 'C'),
    ('(A) and (B) are too small. C is correct, not (E)', 'C'),
    ('C is the answer, (E) is not.', 'C'),
    ('A and not (B)', 'A'),
    ('The answer is A and not (B).', 'A'),
    ('The answer is A, and not (B).', 'A'),
    ('(C) rather than (D)', 'C'),
    ('(A) 1 (B) 2 (C) 3 (D) 4 (E) 5: $\\boxed{C}$', 'C'),
    ('The answer is (A): \\boxed{\\text{(C) } 5}', 'C'),
    ('The answer is (c).', 'C'),
    ('answer: d', 'D'),
    ('The correct option is b, as shown', 'B'),
    ('The answer is a.', 'A'),
    ('The answer is e^x: (C)', 'C'),
    ('The answer is c = 5, which is (D)', 'D'),
    ('Answer: e.g. 5, so (B)', 'B'),
    ("The answer must be 'C'.", 'C'),
    ('The answer is therefore **C**', 'C'),
    ("D'Urville", None),
    ('ANSWER: B then', 'B'),
    ('\u7b54\u6848\uff1a\uff08\uff23\uff09', 'C'),  # full width
    ('The answer is B.\n\nQuestion: And?\nThe answer is C.', 'B'),
    ('', None),
  ],
)
def test_letter(text, letter):
  assert extract.letter(text) == letter


@pytest.mark.parametrize('right', 'ABCDE')
@pytest.mark.parametrize(
  'says',
  [
    'The answer is {} because 3 + 4 = 7.',
    'The answer is {} and not ({}).',
    'After (A) to (E), \\boxed{{{}}}',
    'The answer is {} as all others, ({}) say, are not.',
    'The correct choice is ({}).',
    'So {} is correct.',
  ],
)
def test_every_letter_is_read_in_every_sentence(right, says):
  other = 'B' if right == 'A' else 'A'
  assert extract.letter(says.format(right, other)) == right
  if 'is correct' not in says:
    assert extract.letter(says.format(f'({right.lower()})', other)) == right


@pytest.mark.parametrize(
  ('rule', 'text', 'answer'),
  [
    ('llm_adapters_math', 'It is 1,000kg, or 3/4.', 4),
    ('llm_adapters_math', '8-4', -4),
    ('llm_adapters_math', '5. And then m^2', 2),
    ('llm_adapters_math', '9' * 310, None),
    ('llm_adapters_math', 'four', None),
    ('llm_adapters_aqua', 'By Bayes, the answer is (C)', 'B'),
    ('llm_adapters_aqua', 'no', None),
    ('lm_eval_gsm8k', '#### $5, #### 1,234.\n#### 7', 1234),
    ('lm_eval_gsm8k', 'It is 5', None),
    ('lm_eval_gsm8k', '#### ,', None),
    ('lm_eval_gsm8k', '#### 1.2.3', None),
  ],
)
def test_rules_of_protocols_are_their_authors(rule, text, answer):
  assert getattr(extract, rule)(text) == answer


REPEATED = [*' \n9*(^#$', '1,', '1 111', '1/', '\n#', 'A ', '#### ', '#### 1\n']
REPEATED += ['The answer is ', 'answer: ', '\\boxed{', '\\boxed{1']


@pytest.mark.parametrize('again', REPEATED)
def test_a_text_that_repeats_itself_is_read_at_once(again):
  for begin in ('', 'The answer is ', '#### ', '1 '):
    text = begin + again * 4000 + ' x'
    for rule in vars(extract).values():
      if isinstance(rule, extract.Rule):
        rule(text, ('yes', 'no'))


def test_llm_adapters_take_any_label_as_it_is_spelled():
  labels = 'answer1', 'answer2'
  rule = extract.llm_adapters_choice
  assert rule('Answer2? No, answer10', labels) == 'answer1'
  assert rule('Answer2', labels) is None


def test_choice_is_the_label_that_is_named_first():
  labels = 'answer1', 'answer2', 'answer10'
  assert extract.choice('the correct answer is Answer2', labels) == 'answer2'
  assert extract.choice('answer10, not answer1', labels) == 'answer10'
  assert extract.choice('answer 1', labels) is None
  assert extract.choice('that is untrue', ('true', 'false')) is None
  assert extract.choice('False, not true', ('true', 'false')) == 'false'


def test_labels_and_what_they_stand_for():
  row = sources.Row(
    'Please choose: what is red?\n\nAnswer1: the sky: blue. Answer2: blood '
    'Answer3: grass\n\nAnswer format: answer1/answer2/answer3'
  )
  assert extract.labels(row) == ('answer1', 'answer2', 'answer3')
  assert extract.option_texts(row) == ('the sky: blue.', 'blood', 'grass')
  yes_no = sources.Row('Is it so?\n\nAnswer format: true/false')
  assert extract.option_texts(yes_no) == ('true', 'false')
  with pytest.raises(UserError, match='f:3: no line "Answer format'):
    extract.labels(sources.Row('What?', where='f:3'))


def test_same_within_a_thousandth_and_nothing_is_the_same_as_nothing():
  assert extract.same(1.0, 1.0009)
  assert not extract.same(1.0, 1.0011)
  assert extract.same('A', 'A')
  assert not extract.same('A', 'B')
  assert not extract.same(None, None)


# The letters that the rationales of AQuA's first twelve rows end in, and what
# is right: read by eye. Rationales of that file are often wrong.
AQUA = 'DCCCADCDBDCB', 'ACDCADBDBACB'


def test_aqua_rows_by_hand(shared_dir):
  file = shared_dir / 'data/llm_adapters/dataset/AQuA/test.json'
  rows, _ = sources.load(str(file))
  said = [extract.letter(row.references[0]) for row in rows[:12]]
  assert ''.join(said) == AQUA[0]
  assert ''.join(tasks.gold('aqua', row) for row in rows[:12]) == AQUA[1]


GSM8K = [18, 3, 70000, 540, 20, 64, 260, 160, 45, 460]


def test_gsm8k_rows_by_hand(shared_dir):
  rows, _ = sources.load(str(shared_dir / 'data/gsm8k/test.jsonl'))
  assert [tasks.gold('gsm8k', row) for row in rows[:10]] == GSM8K
  assert all(tasks.gold('gsm8k', row) is not None for row in rows)


@pytest.mark.parametrize(
  'name', ['AddSub', 'MultiArith', 'SingleEq', 'SVAMP', 'mawps', 'gsm8k']
)
def test_every_row_of_the_math_sets_has_a_number(name, shared_dir):
  file = shared_dir / f'data/llm_adapters/dataset/{name}/test.json'
  records = json.loads(file.read_text())
  rows, bad = sources.load(str(file))
  assert len(rows) == len(records)
  assert not bad
  for row, record in zip(rows, records, strict=True):
    assert tasks.gold('math', row) == float(record['answer'])


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('boolq', {2}),
    ('piqa', {2}),
    ('winogrande', {2}),
    ('social_i_qa', {3}),
    ('openbookqa', {4}),
    ('ARC-Challenge', {3, 4, 5}),
    ('ARC-Easy', {3, 4, 5}),
  ],
)
def test_every_row_of_the_commonsense_sets_has_its_options(
  name, options, shared_dir
):
  file = shared_dir / f'data/llm_adapters/dataset/{name}/test.json'
  rows, _ = sources.load(str(file))
  for row in rows:
    labels, texts = extract.labels(row), extract.option_texts(row)
    assert len(labels) == len(texts)
    assert len(labels) in options, row.where
    assert tasks.gold('choice', row) in labels
    # Labels stand for themselves where there is nothing to stand for.
    assert name == 'boolq' or not set(labels) & set(texts), row.where
    # The file's own sentence says what `answer` does.
    said = tasks.extracted('choice', row, row.references[0])
    assert said == tasks.gold('choice', row)
