"""What others made, models, templates, texts, runs nothing and goes nowhere."""

import ast
import html.parser
import json
import pickle
import shutil
from pathlib import Path

import pytest

from gakd_jax import UserError, best, models, page
from gakd_jax.data import templates
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.data.sources import BadRow, Row
from gakd_jax.models import peft, weight_files
from tests.written import write_results

ROOT = Path(__file__).parents[1]


class _Bomb:
  """Unpickled, it writes a file."""

  def __init__(self, marker):
    self._marker = marker

  def __reduce__(self):
    return Path.touch, (self._marker,)


@pytest.fixture
def marker(tmp_path):
  """A file that is there if something was run."""
  file = tmp_path / 'was_run'
  yield file
  assert not file.exists()


@pytest.fixture(scope='module')
def good(tiny_model_dir):
  return tiny_model_dir(layers=1)


@pytest.fixture
def source(good, tmp_path):
  """A copy, to be spoilt."""
  return shutil.copytree(good, tmp_path / 'model')


def test_a_bomb_is_one(tmp_path):
  pickle.loads(pickle.dumps(_Bomb(tmp_path / 'was_run')))
  assert (tmp_path / 'was_run').exists()


PICKLES = (
  *('pytorch_model.bin', 'model.pt', 'consolidated.00.pth', 'model.ckpt'),
  *('adapter_model.bin', 'training_args.bin', 'tokenizer.pkl', 'model.npz'),
  *('optimizer.pt', 'rng_state.pth', 'scheduler.pt', 'flax_model.msgpack'),
)


def test_no_pickle_beside_weights_is_read(source, tmp_path, marker):
  for name in PICKLES:
    (source / name).write_bytes(pickle.dumps(_Bomb(marker)))
  models.save(models.load(source), tmp_path / 'out')
  assert not {f.name for f in (tmp_path / 'out').iterdir()} & {*PICKLES[:6]}
  models.identity(source)
  tokenizer_lib.load(source)


@pytest.mark.parametrize('name', PICKLES)
def test_no_pickle_is_read_for_weights(name, source, marker):
  """By its name, or by theirs."""
  (source / weight_files.WHOLE).unlink()
  (source / name).write_bytes(pickle.dumps(_Bomb(marker)))
  with pytest.raises(UserError, match=r'no \*\.safetensors file'):
    models.load(source)
  for file in (weight_files.WHOLE, weight_files.INDEX):
    shutil.copy(source / name, source / file)
    with pytest.raises(UserError, match=r'not a readable|not valid JSON'):
      models.load(source)
    (source / file).unlink()


def test_an_adapter_that_is_a_pickle_is_not_read(source, tmp_path, marker):
  options = {
    'peft_type': 'LORA',
    'target_modules': ['q_proj'],
    'base_model_name_or_path': str(source),
  }
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / peft.CONFIG).write_text(json.dumps(options))
  for name in ('adapter_model.bin', peft.WEIGHTS):
    (tmp_path / 'a' / name).write_bytes(pickle.dumps(_Bomb(marker)))
    with pytest.raises(UserError, match=r'adapter_model\.safetensors: not'):
      models.load(tmp_path / 'a')


# What runs a program of a text or of bytes, or unpacks to where it says.
_CALLS = {
  *('eval', 'exec', 'compile', '__import__', 'pickle.load', 'np.load'),
  *('torch.load', 'joblib.load', 'dill.load', 'dill.loads', 'marshal.loads'),
  *('yaml.load', 'yaml.unsafe_load', 'os.system', 'os.popen', 'shelve.open'),
}
_MODULES = {'tarfile', 'zipfile', 'shelve', 'marshal', 'dill', 'joblib', 'yaml'}


def test_nothing_that_runs_what_it_reads_is_called():
  files = [*(ROOT / 'gakd_jax').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]
  unpickles = []
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        assert called not in _CALLS, f'{file}:{node.lineno}: {called}'
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        for name in ('shell', 'allow_pickle', 'trust_remote_code'):
          assert given.get(name, 'False') == 'False', f'{file}:{node.lineno}'
        if called == 'pickle.loads':
          unpickles.append(file.name)
      elif isinstance(node, ast.Import | ast.ImportFrom):
        names = {alias.name for alias in node.names}
        names.add(getattr(node, 'module', None))
        assert not names & _MODULES, f'{file}:{node.lineno}'
  assert unpickles == ['hosts.py']  # What one process of a run tells others.


def test_no_code_of_a_model_is_run_or_carried_on(source, tmp_path, marker):
  code = f'import pathlib; pathlib.Path({str(marker)!r}).touch()\n'
  for name in (
    *('modeling_odd.py', 'configuration_odd.py', 'tokenization_odd.py'),
    *('tokenizer_odd.py', '__init__.py', 'custom_generate/generate.py'),
  ):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(code)
  _change(
    source / 'config.json',
    architectures=['OddForCausalLM'],
    auto_map={
      'AutoConfig': 'configuration_odd.Odd',
      'AutoModelForCausalLM': 'modeling_odd.Odd',
    },
  )
  models.save(models.load(source), tmp_path / 'out')
  assert not [*(tmp_path / 'out').rglob('*.py')]
  saved = json.loads((tmp_path / 'out/config.json').read_text())
  assert 'auto_map' not in saved
  assert saved['architectures'] == ['Qwen3ForCausalLM']
  assert tokenizer_lib.load(tmp_path / 'out')
  _change(
    source / 'tokenizer_config.json',
    tokenizer_class='Odd',
    auto_map={'AutoTokenizer': ['tokenization_odd.Odd', 'tokenizer_odd.Odd']},
  )
  assert tokenizer_lib.load(source)


def _change(file, **values):
  file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_an_index_leads_nowhere_else(source, tmp_path):
  """Not even to weights that are as they should be."""
  whole = source / weight_files.WHOLE
  names = weight_files.tensors(whole)
  (tmp_path / 'other').mkdir()
  other = shutil.move(whole, tmp_path / 'other' / 'a.safetensors')
  (source / 'sub').mkdir()
  for name in (
    *(str(other), '../other/a.safetensors', 'sub/../../other/a.safetensors'),
    *('/dev/stdin', '/proc/self/mem', '//etc/passwd', '..', './../a'),
  ):
    index = {'weight_map': dict.fromkeys(names, name)}
    (source / weight_files.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match='is not in its directory'):
      models.load(source)


def test_the_hubs_own_links_are_followed(source, tmp_path):
  """Its directories are of links to blobs beside them."""
  snapshot = tmp_path / 'models--org--name' / 'snapshots' / 'f00'
  blobs = tmp_path / 'models--org--name' / 'blobs'
  for path in (snapshot, blobs):
    path.mkdir(parents=True)
  models.save(models.load(source), source, max_shard_bytes=20_000)
  assert (source / weight_files.INDEX).exists()
  for i, file in enumerate(source.iterdir()):
    shutil.move(file, blobs / str(i))
    (snapshot / file.name).symlink_to(f'../../blobs/{i}')
  assert models.load(snapshot).config.layers == 1
  models.save(models.load(snapshot), tmp_path / 'out')
  assert not [f for f in (tmp_path / 'out').iterdir() if f.is_symlink()]


@pytest.mark.parametrize(
  'attack',
  [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ ([''.__class__]|map(attribute='__mro__')|list) }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ joiner.__init__.__globals__['os'].system('touch MARKER') }}",
    '{{ namespace.__init__.__globals__ }}',
    '{{ lipsum.__globals__.os }}',
    '{{ self.__init__.__globals__ }}',
    '{{ self._TemplateReference__context.eval_ctx.environment.compile }}',
    '{{ raise_exception.__globals__ }}',
    '{{ strftime_now.__closure__ }}',
    '{{ messages.__class__ }}',
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    '{{ messages[0].update(content=1) }}',
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '%s'.__mod__.__self__.__class__ }}",
    '{{ dict.mro() }}{{ ().__reduce__ }}',
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ __import__('os').system('touch MARKER') }}",
    "{{ open('MARKER', 'w') }}",
    '{{ range(10**9)|list }}',
    '{% for i in range(999999999999) %}{% endfor %}',
    '{{ caller.__globals__ }}',
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
  ],
)
def test_a_chat_template_reaches_nothing(attack, tiny_tokenizer_dir, marker):
  tokenizer = tokenizer_lib.load(tiny_tokenizer_dir)
  # It says what it is asked for: the attack alone can fail.
  tokenizer.chat_template = '{{ messages[0].content }}' + attack.replace(
    'MARKER', str(marker)
  )
  templates.stops(tokenizer)
  try:
    prompt = templates.prompt_text('chat', Row('Which?'), tokenizer)
  except BadRow:
    return
  assert prompt == 'Which?'  # Nothing more was to be had.


EVIL = '</p></script><script>alert("$x")</script><img src=x onerror=y>&amp;\'"`'


class _Tags(html.parser.HTMLParser):
  """Tags of a page in their order, with the names of their attributes."""

  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, *(name for name, _ in attrs)))


def _page(path, text):
  """The page of two runs in which everything is called `text`."""
  runs = {}
  for i, name in enumerate((f'a{text}', f'b{text}')):
    about = {'averages': {text: [text]}, 'template': text, 'seed': i}
    run = write_results(
      path / str(i), {f'{text}/{text}': i, f'{text}/rouge_l': 1.0}, **about
    )
    row = {
      'instruction': text,
      'input': text,
      'references': [text],
      'answer': text,
      'gold': text,
      'extracted': text,
      'cut_at': text,
      'scores': {text: 1.0, 'rouge_l': 0.5},
    }
    (run / 'answers').mkdir()
    stem = text.replace('/', '_')
    (run / 'answers' / f'{stem}-0.jsonl').write_text(json.dumps(row) + '\n')
    written = {
      'index': 0,
      'step': 1,
      'instruction': text,
      'input': text,
      'pieces': [[text, False], [text, True]],
      'tokens': 3,
      'finished': True,
    }
    (run / 'rollouts.jsonl').write_text(json.dumps(written) + '\n')
    metrics = [{'step': s, f'train/{text}': float(s)} for s in (1, 2)]
    lines = ''.join(json.dumps(x) + '\n' for x in metrics)
    (run / 'metrics.jsonl').write_text(lines)
    config = {'config': {'student': {text: text, 'path': text + str(i)}}}
    (run / 'config.json').write_text(json.dumps(config))
    runs[name] = run
  difference = {'difference': 1.0, 'low': -1.0, 'high': 2.0, 'p': 0.1}
  comparisons = [
    {'set': text, 'metric': text, 'a': text, 'b': text} | difference
  ]
  page.write(path / 'report.html', runs, comparisons=comparisons)
  return (path / 'report.html').read_text('utf-8')


def test_texts_and_names_in_the_page_are_texts(tmp_path):
  evil = _page(tmp_path / 'evil', EVIL)
  tags = [_Tags(text).found for text in (_page(tmp_path / 'good', 'x'), evil)]
  assert tags[0] == tags[1]
  assert len(tags[0]) > 150
  assert "default-src 'none'" in evil  # Nothing is fetched.
  assert evil.count('<script') == 2
  assert EVIL not in evil


def test_a_model_card_holds_no_markup(source, tmp_path):
  about = {
    'base': 'a/b',
    'base_revision': None,
    'data': f'x | y\n{EVIL}\n# A heading',
    'teacher': '[here](javascript:alert(1)) **bold** `code` \\| |',
  }
  card = best._card(about, is_adapter=False)
  rows = card[card.index('|---|---|') :].splitlines()[1:]
  assert [row.count('|') for row in rows] == [3] * 3
  assert not set('<>[]`*') & {*''.join(rows)}


@pytest.mark.parametrize(
  ('said', 'line'),
  [
    ('a\r\n  b\u2028c\x1b[2J', 'a b c [2J'),
    ('\u202eexe.txt \u200b', r'\u202eexe.txt \u200b'),
    ('\ud800 \ud7c7', r'\ud800 \ud7c7'),
    ('Grüße, 你好 ⏎', 'Grüße, 你好 ⏎'),
  ],
)
def test_what_an_error_quotes_is_one_printable_line(said, line):
  assert str(UserError(said)) == line
