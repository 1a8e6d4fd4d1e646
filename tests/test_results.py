"""One table from results.json of many runs, in every format."""

import json

import pytest

from gakd_jax import fingerprint, results, tables
from gakd_jax.results import Cell


def _run(path, values):
  path.mkdir()
  (path / 'results.json').write_text(json.dumps(values))
  return path


def _tables(**rows):
  """Of runs without files: {name: {key: mean}}."""
  groups = {}
  for name, cells in rows.items():
    cells = {(*key.split('/'), None): Cell(x) for key, x in cells.items()}
    groups.setdefault(name.partition('__')[0], []).append(cells)
  return results.tables(groups, frozenset({'teacher'} & groups.keys()))


def test_keys_are_read_with_deviations_and_lengths(tmp_path):
  values = {
    'self_inst/rouge_l': 20.0,
    'self_inst/rouge_l_std': 0.5,
    'self_inst/rouge_l_11-50': 30.0,
    'self_inst/rouge_l_11-50_std': 1.5,
    'self_inst/rouge_l_101+': 10.0,
    'a/b/accuracy': 1.0,
    'lonely/bleu_std': 1.0,
    'a/b/accuracy_stderr': 0.5,
    'a/b/task_version': 2,
    'peak_memory_gb': 3.0,
  }
  runs = {'sft-seed3': _run(tmp_path / 'a', values)}
  assert results.read(runs) == {
    'sft-seed3': [
      {
        ('self_inst', 'rouge_l', None): Cell(20.0, 0.5),
        ('self_inst', 'rouge_l', '11-50'): Cell(30.0, 1.5),
        ('self_inst', 'rouge_l', '101+'): Cell(10.0),
        ('a/b', 'accuracy', None): Cell(1.0),
      }
    ]
  }
  by_length = results.by_length(results.read(runs))
  assert by_length == {
    ('self_inst', 'rouge_l'): {
      'sft-seed3': [None, Cell(30.0, 1.5), None, Cell(10.0)]
    }
  }


def test_what_is_compared_first_has_its_averages():
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
    ('average', 'rouge_l'),
    ('z', 'corpus_bleu'),
  )
  assert [name for name, _ in first.rows] == ['a', 'b']
  assert first.rows[0][1][4] == Cell(15)
  assert first.rows[1][1] == (None, None, Cell(12), None, None, None)
  assert rest.columns == (
    ('x', 'bleu'),
    ('z', 'chrf'),
    ('x', 'answer_tokens'),
    ('x', 'agreement'),
  )


def test_averages_of_several_runs_have_their_deviation():
  first, _ = _tables(
    a__seed0={'x/rouge_l': 10, 'y/rouge_l': 20},
    a__seed1={'x/rouge_l': 20, 'y/rouge_l': 14},
  )
  ((name, cells),) = first.rows
  assert name == 'a'
  # Of 15 and 17: seeds are averaged over sets before they are compared.
  assert cells[2] == Cell(16, pytest.approx(2**0.5))


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
  ('key', 'less'),
  [
    ('loss/ce', True),
    ('fidelity/reverse_kl_gold', True),
    ('loss/ece', True),
    ('greedy/unfinished', True),
    ('greedy/rouge_l', False),
    ('gsm8k/accuracy', False),
    ('loss/agreement', False),
    ('greedy/rouge_l_11-50', False),
  ],
)
def test_a_metric_knows_its_direction(key, less):
  assert results.is_better(key, 1.0, 2.0) == less
  assert results.is_better(key, 2.0, 1.0) != less
  assert not results.is_better(key, 1.0, 1.0)
  # What is no number is never the best.
  nan = float('nan')
  assert results.is_better(key, 1.0, None)
  assert results.is_better(key, 1.0, nan)
  assert not results.is_better(key, nan, None)
  assert not results.is_better(key, nan, 1.0)


def _recorded(path, seed, file='config.json', **config):
  """A finished run of a config; of an evaluated model, what it says."""
  _run(path, {'x/rouge_l': 10.0 + seed})
  recipe = fingerprint.recipe({'seed': seed} | config)
  (path / file).write_text(json.dumps(recipe))
  return path


@pytest.mark.parametrize('file', ['config.json', 'model.json'])
def test_runs_that_differ_in_their_seed_share_a_row(tmp_path, file):
  runs = {
    name: _recorded(tmp_path / name, seed, file, kd=kd, start=f'sft-seed{seed}')
    for name, seed, kd in (
      ('fkl-seed0', 0, 1.0),
      ('fkl-seed1', 1, 1.0),
      ('fkl-seed2', 2, 0.5),  # another method, whatever its name says
      ('sft.seed_3', 3, 0.0),
      ('alone', 4, 0.1),
      ('monday', 5, 0.2),
      ('tuesday', 6, 0.2),
    )
  }
  runs['fkl-seed7'] = _run(tmp_path / 'unknown', {'x/rouge_l': 1.0})
  assert results.labels(runs) == {
    'fkl-seed0': 'fkl',
    'fkl-seed1': 'fkl',
    'fkl-seed2': 'fkl-seed2',
    'sft.seed_3': 'sft',
    'alone': 'alone',
    'monday': 'monday',
    'tuesday': 'tuesday',
    'fkl-seed7': 'fkl-seed7',
  }


def test_a_seed_counts_once(tmp_path):
  runs = {
    name: _recorded(tmp_path / name, seed, kd=1.0)
    for name, seed in (('a-seed0', 0), ('b-seed0', 0), ('a-seed1', 1))
  }
  groups = results.read(runs)
  assert sorted(len(cells) for cells in groups.values()) == [1, 2]


def test_how_a_run_is_carried_out_is_no_part_of_its_recipe():
  def of(**config):
    return fingerprint.recipe({'seed': 0, 'train': {'steps': 3}} | config)

  assert of(mesh={'data': 8}) == of(mesh={'data': 1})
  assert of(train={'steps': 4}) != of()
  assert of(seed=1)['recipe'] == of()['recipe']
  assert (
    of(seed=1, start='sft-seed1')['recipe'] == (of(start='sft-seed0')['recipe'])
  )
  # Seed 1 is not in the name of seed 10.
  assert (
    of(seed=1, start='sft-seed10')['recipe']
    != (of(start='sft-seed0')['recipe'])
  )


def test_the_teacher_is_who_is_said_to_be(tmp_path):
  """And not a student at no distance from it."""

  def run(name, **about):
    path = _run(tmp_path / name, {'loss/reverse_kl': 0.0})
    (path / f'{about.pop("file")}.json').write_text(json.dumps(about))
    return path

  def config(student, teacher):
    return {'student': {'path': student}, 'teacher': {'path': teacher}}

  runs = {
    'teacher': run('a', file='config', config=config('large', 'large')),
    'student': run('b', file='config', config=config('small', 'large')),
    'alone': run('c', file='config', config=config('small', None)),
    'nothing': run('d', file='config', config=config(None, None)),
    'evaluated': run('e', file='model', is_teacher=True),
    'other': run('f', file='model', is_teacher=False),
  }
  trained = config('large', 'large') | {'train': {'steps': 5}}
  runs['trained'] = run('h', file='config', config=trained)
  runs['unknown'] = _run(tmp_path / 'g', {'loss/reverse_kl': 0.0})
  assert results.teachers(runs) == {'teacher', 'evaluated'}
  first, _ = results.tables(results.read(runs), results.teachers(runs))
  best = {first.rows[i][0] for i, _ in first.best()}
  assert best == {*runs} - {'teacher', 'evaluated'}


def test_sets_of_one_name_with_other_rows_are_others(tmp_path):
  def run(name, digest, data=None):
    path = _run(tmp_path / name, {'generation/rouge_l': 1.0, 'loss/ce': 2.0})
    config = {'evals': {'generation': {}}, 'data': {'validation': data}}
    contents = {'config.evals.generation': digest, 'config.evals.loss': 'l'}
    about = {'config': config, 'contents': contents | {'config.student': 's'}}
    (path / 'config.json').write_text(json.dumps(about))
    return path

  runs = {
    'teacher': run('a', 'one', 'data/dolly/dev.jsonl'),
    'student': run('b', 'two', 'data/dolly/test.jsonl'),
    'other': run('c', 'two', 'data/dolly/test.jsonl'),
    'changed': run('d', 'three', 'data/dolly/test.jsonl'),
  }
  evaluated = _run(tmp_path / 'e', {'generation/rouge_l': 3.0})
  (evaluated / 'model.json').write_text(
    json.dumps({'data': {'generation': 'two'}})
  )
  runs['evaluated'] = evaluated
  columns = {
    name: [where for where, metric, _ in cells if metric == 'rouge_l']
    for name, (cells,) in results.read(runs).items()
  }
  assert columns == {
    'teacher': ['generation (dolly/dev.jsonl)'],
    'student': ['generation (dolly/test.jsonl)'],
    'other': ['generation (dolly/test.jsonl)'],
    'changed': ['generation (dolly/test.jsonl) 3'],
    'evaluated': ['generation (dolly/test.jsonl)'],
  }
  # What all have in common keeps its name.
  ((loss, _, _),) = [k for k in results.read(runs)['student'][0] if 'ce' in k]
  assert loss == 'loss'
  alone = {name: runs[name] for name in ('student', 'evaluated')}
  assert {k[0] for k in results.read(alone)['evaluated'][0]} == {'generation'}
