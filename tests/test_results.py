"""One table from results.json of many runs, in every format."""

import pytest

from gakd_jax import UserError, results
from gakd_jax.page import tables
from gakd_jax.results import Cell
from tests.written import write_results


def _tables(**rows):
  """Of runs without files: {name: {key: mean}}."""
  groups = {}
  for name, cells in rows.items():
    cells = {(*key.split('/'), None): Cell(x) for key, x in cells.items()}
    groups.setdefault(name.partition('__')[0], []).append(cells)
  return results.tables(groups, frozenset({'teacher'} & groups.keys()))


def test_deviations_and_lengths_are_read(tmp_path):
  bucket = {'mean': 30.0, 'std': 1.5, 'by_seed': {'1': 29.0, '2': 31.0}}
  values = {
    'self_inst/rouge_l': {
      'mean': 20.0,
      'std': 0.5,
      'stderr': 0.2,
      'by_length': {'11-50': bucket, '101+': {'mean': 10.0}},
    },
    # What these names mean by accident is nothing.
    'a/b/bleu_std': 1.0,
    'a/b/rouge_l_11-50': 2.0,
    'lost/ce': None,
  }
  path = write_results(tmp_path / 'a', values, peak_memory_gb=3.0)
  runs = {'sft-seed3': path}
  nan = pytest.approx(float('nan'), nan_ok=True)
  assert results.read(runs) == {
    'sft-seed3': [
      {
        ('self_inst', 'rouge_l', None): Cell(20.0, 0.5),
        ('self_inst', 'rouge_l', '11-50'): Cell(30.0, 1.5),
        ('self_inst', 'rouge_l', '101+'): Cell(10.0),
        ('a/b', 'bleu_std', None): Cell(1.0),
        ('a/b', 'rouge_l_11-50', None): Cell(2.0),
        ('lost', 'ce', None): Cell(nan),
      }
    ]
  }
  by_length = results.by_length(results.read(runs))
  assert by_length == {
    ('self_inst', 'rouge_l'): {
      'sft-seed3': [None, Cell(30.0, 1.5), None, Cell(10.0)]
    }
  }


def test_what_is_compared_first():
  first, rest = _tables(
    a={
      'x/answer_tokens': 9,
      'x/rouge_l': 10,
      'x/bleu': 5,
      'z/corpus_bleu': 7,
      'z/chrf': 8,
      'y/rouge_l': 20,
      'loss/ce': 1,
      'gsm8k/accuracy': 50,
    },
    b={'x/rouge_l': 12, 'x/agreement': 1},
  )
  assert first.columns == (
    ('loss', 'ce'),
    ('gsm8k', 'accuracy'),
    ('x', 'rouge_l'),
    ('y', 'rouge_l'),
    ('z', 'corpus_bleu'),
  )
  assert [name for name, _ in first.rows] == ['a', 'b']
  assert first.rows[1][1] == (None, None, Cell(12), None, None)
  assert rest.columns == (
    ('x', 'bleu'),
    ('z', 'chrf'),
    ('x', 'agreement'),
    ('x', 'answer_tokens'),
  )


def test_an_average_is_over_the_sets_that_are_declared(tmp_path):
  def run(name, **values):
    values = {f'{key}/rouge_l': x for key, x in values.items()}
    return write_results(
      tmp_path / name,
      values | {'x/bleu': 7.0},
      averages={'both': ['x', 'y']},
      recipe=name[0],
      seed=int(name[1]),
    )

  runs = {
    # `greedy` is x once more: no set of its own.
    'a0': run('a0', x=10.0, y=20.0, greedy=90.0),
    'a1': run('a1', x=20.0, y=14.0, greedy=90.0),
    'b0': run('b0', x=99.0),
    'b1': run('b1', x=None, y=1.0),
  }
  first, _ = results.tables(results.read(runs))
  assert [where for where, _ in first.columns] == ['x', 'y', 'greedy', 'both']
  cells = {name: row[3] for name, row in first.rows}
  # Of 15 and 17: seeds are averaged over sets before they are compared.
  assert cells['a{0,1}'] == Cell(16, pytest.approx(2**0.5))
  assert cells['b{0,1}'].mean != cells['b{0,1}'].mean  # NaN, of b1 alone
  groups = results.read({'b0': runs['b0']})
  assert 'both' not in {where for where, *_ in groups['b0'][0]}
  # Over other rows, it is another average.
  other = run('c0', x=1.0, y=2.0)
  text = (other / 'results.json').read_text()
  other.joinpath('results.json').write_text(
    text.replace('"data": "y"', '"data": "z"')
  )
  first, _ = results.tables(results.read({'a0': runs['a0'], 'c0': other}))
  assert [where for where, _ in first.columns if 'both' in where] == [
    'both (1)',
    'both (2)',
  ]


def test_the_best_is_the_best_as_printed():
  first, rest = _tables(
    teacher={'x/rouge_l': 90, 'l/ce': 0.1, 'l/reverse_kl': 0.0, 'x/bleu': 80},
    a={'x/rouge_l': 30.001, 'l/ce': 2.0, 'l/reverse_kl': 1.0, 'x/bleu': 5},
    b={'x/rouge_l': 30.004, 'l/ce': 1.0, 'l/reverse_kl': 2.0, 'x/bleu': 4},
    c={'x/rouge_l': 9.0, 'l/ce': float('nan'), 'x/other': 1, 'y/accuracy': 1},
    d={'x/other': 2},
  )
  names = [metric for _, metric in first.columns]
  assert names == ['ce', 'reverse_kl', 'rouge_l']
  # Two are printed as 30.00.
  assert first.best() == {(2, 0), (1, 1), (1, 2), (2, 2)}
  # Nobody competes for accuracy: on set y, c alone was measured.
  assert [m for _, m in rest.columns] == ['accuracy', 'bleu', 'other']
  assert rest.best() == {(1, 1)}


TABLE = results.Table(
  (('self_inst', 'rouge_l'), ('average', 'rouge_l'), ('a|b', 'ce')),
  (
    ('sft_1', (Cell(9.5, 0.25), Cell(9.5), None)),
    ('r&d 50%', (Cell(12.0, 1.0), Cell(8.0), Cell(-0.5))),
  ),
)


def test_a_column_has_one_number_of_decimals():
  assert TABLE.texts() == [
    [('9.50', '0.25'), ('9.500', ''), ('-', '')],
    [('12.00', '1.00'), ('8.000', ''), ('-0.500', '')],
  ]


def test_unknown_metrics_are_words():
  table = results.Table((('x', 'answer_tokens'),), (('a_b', (Cell(1.0),)),))
  assert tables.plain(table) == ([('x', 'answer tokens')], [['a_b', '1.000']])


def test_markdown():
  assert tables.markdown(TABLE) == (
    '|  | self_inst ROUGE-L | average ROUGE-L | a\\|b CE |\n'
    '| --- | ---: | ---: | ---: |\n'
    '| sft_1 | 9.50 ± 0.25 | **9.500** | - |\n'
    '| r&d 50% | **12.00 ± 1.00** | 8.000 | -0.500 |\n'
  )


def test_latex():
  assert (
    tables.latex(TABLE)
    == r"""% Needs \usepackage{booktabs}.
\begin{tabular}{lrrr}
\toprule
 & \multicolumn{2}{c}{ROUGE-L} & \multicolumn{1}{c}{CE} \\
\cmidrule(lr){2-3} \cmidrule(lr){4-4}
 & self\_inst & average & a|b \\
\midrule
sft\_1 & 9.50 $\pm$ 0.25 & \textbf{9.500} & - \\
r\&d 50\% & \textbf{12.00 $\pm$ 1.00} & 8.000 & $-$0.500 \\
\bottomrule
\end{tabular}
"""
  )


def test_latex_escapes_what_it_reads_itself():
  table = results.Table((('\\~^{}', 'ce'),), (('$#_', (None,)),))
  text = tables.latex(table)
  escaped = r'\textbackslash{}\textasciitilde{}\textasciicircum{}\{\}'
  assert f' & {escaped} \\\\' in text
  assert r'\$\#\_ & - \\' in text


@pytest.mark.parametrize(
  ('metric', 'less'),
  [
    ('ce', True),
    ('reverse_kl_gold', True),
    ('ece', True),
    ('unfinished', True),
    ('sequence_kl_student', True),
    ('rouge_l', False),
    ('accuracy', False),
    ('agreement', False),
    ('ceiling', False),
  ],
)
def test_a_metric_knows_its_direction(metric, less):
  assert results.is_better(metric, 1.0, 2.0) == less
  assert results.is_better(metric, 2.0, 1.0) != less
  assert not results.is_better(metric, 1.0, 1.0)
  # What is no number is never the best.
  nan = float('nan')
  assert results.is_better(metric, 1.0, None)
  assert results.is_better(metric, 1.0, nan)
  assert not results.is_better(metric, nan, None)
  assert not results.is_better(metric, nan, 1.0)


def test_runs_that_differ_in_their_seed_share_a_row(tmp_path):
  runs = {
    name: write_results(
      tmp_path / name, {'x/rouge_l': 10.0 + seed}, recipe=recipe, seed=seed
    )
    for name, seed, recipe in (
      ('fkl-seed0', 0, 'fkl'),
      ('fkl-seed1', 1, 'fkl'),
      ('fkl-seed2', 2, 'other'),  # another method, whatever its name says
      ('run10', 10, 'sft'),
      ('run11', 11, 'sft'),
      ('monday', 5, 'day'),
      ('tuesday', 6, 'day'),
      ('again', 6, 'day'),  # a seed counts once
    )
  }
  for name in ('fkl-seed7', 'fkl-seed8'):
    runs[name] = write_results(tmp_path / name, {'x/rouge_l': 1.0})
  assert results.labels(runs) == {
    'fkl-seed0': 'fkl-seed{0,1}',
    'fkl-seed1': 'fkl-seed{0,1}',
    'fkl-seed2': 'fkl-seed2',
    'run10': 'run{10,11}',
    'run11': 'run{10,11}',
    'monday': '{monday,tuesday}',
    'tuesday': '{monday,tuesday}',
    'again': 'again',
    'fkl-seed7': 'fkl-seed7',
    'fkl-seed8': 'fkl-seed8',
  }


def test_a_metric_that_is_no_number_in_one_seed(tmp_path):
  runs = {
    f'a{seed}': write_results(
      tmp_path / str(seed), {'x/ce': ce}, recipe='a', seed=seed
    )
    for seed, ce in enumerate((1.0, None))
  }
  runs['b'] = write_results(tmp_path / 'b', {'x/ce': 3.0})
  runs['c'] = write_results(tmp_path / 'c', {'x/ce': 2.0})
  first, _ = results.tables(results.read(runs))
  assert first.texts()[0] == [('nan', 'nan')]
  assert first.best() == {(2, 0)}


@pytest.mark.parametrize(
  'text', ['{"x/rouge_l": 1.0}', '[]', 'no JSON', '{"best": null, "last": 1}']
)
def test_results_of_earlier_versions_are_one_line(tmp_path, text):
  (tmp_path / 'results.json').write_text(text)
  with pytest.raises(UserError, match=r'of an earlier version.*; delete it'):
    results.read({'a': tmp_path})


def test_the_teacher_is_who_is_said_to_be(tmp_path):
  """And not a student at no distance from it."""
  runs = {
    name: write_results(tmp_path / name, {'loss/reverse_kl': 0.0}, **about)
    for name, about in (
      ('teacher', {'is_teacher': True}),
      ('student', {'is_teacher': False}),
      ('unknown', {}),
    )
  }
  assert results.teachers(runs) == {'teacher'}
  first, _ = results.tables(results.read(runs), results.teachers(runs))
  assert {first.rows[i][0] for i, _ in first.best()} == {'student', 'unknown'}


def test_sets_of_one_name_with_other_rows_are_others(tmp_path):
  def run(name, digest, source=None):
    return write_results(
      tmp_path / name,
      {'generation/rouge_l': 1.0, 'loss/ce': 2.0},
      evaluators={'generation': {'data': digest, 'source': source}},
    )

  test = 'data/dolly/test.jsonl'
  runs = {
    'teacher': run('a', 'one', 'data/dolly/dev.jsonl'),
    'student': run('b', 'two', test),
    'other': run('c', 'two', test),
    'changed': run('d', 'three', test),
    'unnamed': run('e', 'two'),
    'both': run('f', 'four', ['a.jsonl', 'b.jsonl']),
  }
  columns = {
    name: [where for where, metric, _ in cells if metric == 'rouge_l']
    for name, (cells,) in results.read(runs).items()
  }
  assert columns == {
    'teacher': ['generation (dolly/dev.jsonl)'],
    'student': ['generation (dolly/test.jsonl)'],
    'other': ['generation (dolly/test.jsonl)'],
    'changed': ['generation (dolly/test.jsonl) 3'],
    'unnamed': ['generation (dolly/test.jsonl)'],
    'both': ['generation (4)'],
  }
  # What all have in common keeps its name.
  ((loss, _, _),) = [k for k in results.read(runs)['student'][0] if 'ce' in k]
  assert loss == 'loss'
  alone = {name: runs[name] for name in ('student', 'unnamed')}
  assert 'generation' in {k[0] for k in results.read(alone)['unnamed'][0]}
