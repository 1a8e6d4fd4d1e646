"""tools/prepare_data.py: files in, rows that the loader reads out."""

import json

from gakd_jax.data import sources
from tools import prepare_data


def test_rows_come_back_as_they_were(tmp_path, capsys):
  source, made = tmp_path / 'a.json', tmp_path / 'data' / 'a.jsonl'
  records = [
    {'instruction': 'Add.', 'input': '1 1', 'output': '2', 'answer': '2.0'},
    {'instruction': 'Say.', 'output': ['a', 'b']},
    {'dialogue': 'A: Hi', 'summary1': 'a', 'summary2': 'b'},
    {
      'messages': [
        {'role': 'system', 'content': 'Be brief.'},
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Ho'},
      ]
    },
    {'instruction': '', 'output': 'x'},
  ]
  source.write_text(json.dumps(records))
  assert prepare_data.main([str(source), str(made)]) == 0
  assert '4 rows, 1 skipped: empty prompt' in capsys.readouterr().out

  def of(path):
    return [
      (r.instruction, r.input, r.references, r.messages, r.answer)
      for r in sources.load(str(path))[0]
    ]

  assert of(made) == of(source)


def test_translations_of_two_texts(tmp_path, capsys):
  one, other, made = (tmp_path / x for x in ('a.ne', 'a.en', 'a.jsonl'))
  one.write_text('एक\nदुई\n\n', 'utf-8')
  other.write_text('one\ntwo\n\n')
  arguments = [str(one), str(made), f'--target={other}']
  assert prepare_data.main([*arguments, '--languages=Nepali,English']) == 0
  first, second = sources.load(str(made))[0]
  assert first.instruction == (
    'Translate the following Nepali text into English.'
  )
  assert (first.input, first.references) == ('एक', ('one',))
  assert second.input == 'दुई'
  capsys.readouterr()
  assert prepare_data.main(arguments) == 2
  assert '--languages: name two' in capsys.readouterr().err
  other.write_text('one\n')
  assert prepare_data.main([*arguments, '--languages=Nepali,English']) == 2
  assert 'a.ne has 4 lines and' in capsys.readouterr().err


def test_real_translations(shared_dir):
  folder = shared_dir / 'data/flores_v1'
  rows = prepare_data.translations(
    folder / 'wikipedia.test.ne-en.ne',
    folder / 'wikipedia.test.ne-en.en',
    ('Nepali', 'English'),
  )
  assert len(rows) > 2500
  assert rows[0].references == (
    'If the research problem is not clear then review of literature can help '
    'focus on the problem.',
  )
