"""What PEFT can say of an adapter: computed as it does, or refused by name."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gakd_jax import UserError, models
from gakd_jax.models import lora, peft, peft_settings
from tools import make_goldens

QUERY, DOWN = 'self_attn.q_proj', 'mlp.down_proj'
SHAPES = {QUERY: (32, 64), DOWN: (48, 32)}  # of `tiny_model_dir`
OURS = {QUERY: 'attention/query', DOWN: 'mlp/down'}
# Options that are refused unless they say nothing.
REFUSED = {
  'alora_invocation_tokens': [8, 11],
  'arrow_config': {'top_k': 3},
  'ensure_weight_tying': True,
  'kasa_config': {'beta': 1e-4},
  'layer_replication': [[0, 2], [1, 2]],
  'lora_bias': True,
  'megatron_config': {'hidden_size': 32},
  'modules_to_save': ['lm_head'],
  'monteclora_config': {'num_samples': 2},
  'target_parameters': ['mlp.experts.up'],
  'trainable_token_indices': [3],
  'use_bdlora': {'nblocks': 2},
  'use_dora': True,
  'use_qalora': True,
  'velora_config': {'num_groups': 2},
}


def tensor(layer, module, side):
  return f'base_model.model.model.layers.{layer}.{module}.lora_{side}.weight'


def draw(ranks, seed=0):
  """Random A and B, for {(layer, module): rank}."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for (layer, module), rank in ranks.items():
    n_in, n_out = SHAPES[module]
    for side, shape in (('A', (rank, n_in)), ('B', (n_out, rank))):
      x = 0.1 * rng.standard_normal(shape, np.float32)
      tensors[tensor(layer, module, side)] = x
  return tensors


@pytest.fixture(scope='module')
def base(tiny_model_dir):
  return tiny_model_dir()


@pytest.fixture
def write(base, tmp_path):
  """`write(tensors, **options)` -> the directory of an adapter."""

  def write(tensors=None, **options):
    path = tmp_path / 'adapter'
    path.mkdir(exist_ok=True)
    settings = {
      'peft_type': 'LORA',
      'base_model_name_or_path': str(base),
      'target_modules': ['q_proj', 'down_proj'],
      'r': 2,
      'lora_alpha': 8,
    }
    (path / peft.CONFIG).write_text(json.dumps(settings | options))
    if tensors is None:
      tensors = draw({(l, m): 2 for l in range(2) for m in SHAPES})
    safetensors.numpy.save_file(tensors, path / peft.WEIGHTS)
    return path

  return write


def changes(model):
  """{(layer, module): what its adapter adds to a projection}; zeros left out."""
  found = {}
  for module, ours in OURS.items():
    adapter = lora.adapters(model).get(ours)
    if adapter:
      added = adapter.scale * np.einsum('lir,lro->lio', adapter.a, adapter.b)
      found |= {(l, module): x for l, x in enumerate(added) if np.any(x)}
  return found


SAME = {(0, QUERY): (2, 4.0), (1, QUERY): (2, 4.0)}
FIRST = 'model.layers.0.self_attn.q_proj'
SECOND = 'model.layers.1.self_attn.q_proj'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('options', 'want'),
  [
    ({}, SAME | {(0, DOWN): (2, 4.0), (1, DOWN): (2, 4.0)}),
    # Ranks and scales of single layers.
    (
      {'alpha_pattern': {'layers.1.self_attn.q_proj': 64}},
      {(0, QUERY): (2, 4.0), (1, QUERY): (2, 32.0)},
    ),
    (
      {'alpha_pattern': {r'.*\.0\..*': 2, 'q_proj': 6}},
      {(0, QUERY): (2, 1.0), (1, QUERY): (2, 3.0)},
    ),
    (
      {'rank_pattern': {SECOND: 4}, 'alpha_pattern': {'1.self_attn': 2}},
      {(0, QUERY): (2, 4.0), (1, QUERY): (4, 2.0)},
    ),
    (
      {'use_rslora': True, 'rank_pattern': {'0.self_attn.q_proj': 4}},
      {(0, QUERY): (4, 4.0), (1, QUERY): (2, 8 / 2**0.5)},
    ),
    # Adapters in some layers.
    ({'layers_to_transform': [1]}, {(1, QUERY): (2, 4.0)}),
    ({'layers_to_transform': 0}, {(0, QUERY): (2, 4.0)}),
    (
      {'layers_to_transform': [0, 7], 'layers_pattern': 'layers'},
      {(0, QUERY): (2, 4.0)},
    ),
    (
      {
        'layers_to_transform': [0],
        'layers_pattern': ['h', ''],
        'target_modules': ['q_proj', 'model.layers.1.mlp.down_proj'],
      },
      {(1, DOWN): (2, 4.0)},
    ),
    (
      {'layers_to_transform': [1], 'layers_pattern': ['h', 'layers']},
      {(1, QUERY): (2, 4.0)},
    ),
    ({'target_modules': r'.*\.1\..*q_proj'}, {(1, QUERY): (2, 4.0)}),
    ({'target_modules': [FIRST]}, {(0, QUERY): (2, 4.0)}),
    ({'exclude_modules': [FIRST]}, {(1, QUERY): (2, 4.0)}),
    ({'exclude_modules': r'.*\.1\.self_attn\..*'}, {(0, QUERY): (2, 4.0)}),
    (
      {'target_modules': 'all-linear', 'exclude_modules': r'.*[kvopt]_proj'},
      SAME,
    ),
    # What changes nothing.
    ({'init_lora_weights': 'gaussian', 'fan_in_fan_out': True}, SAME),
    ({'init_lora_weights': False, 'bias': 'none', 'loftq_config': {}}, SAME),
    ({'use_dora': False, 'modules_to_save': [], 'new': None}, SAME),
    ({'task_type': 'CAUSAL_LM', 'megatron_core': 'megatron.core'}, SAME),
  ],
)
def test_layers_have_their_own_adapters(options, want, write, tmp_path):
  if not any(module == DOWN for _, module in want):
    options = {'target_modules': ['q_proj']} | options
  if options.get('target_modules') == 'all-linear':
    options |= {'exclude_modules': r'.*\.(k|v|o|gate|up|down)_proj'}
  tensors = draw({place: rank for place, (rank, _) in want.items()})
  model = models.load(write(tensors, **options))
  models.save(model, tmp_path / 'again')
  for found in (changes(model), changes(models.load(tmp_path / 'again'))):
    assert found.keys() == want.keys()
    for place, (_, scale) in want.items():
      a, b = (tensors[tensor(*place, side)] for side in 'AB')
      np.testing.assert_allclose(
        found[place], scale * (b @ a).T, rtol=2e-5, atol=1e-6
      )


@pytest.mark.parametrize(
  ('option', 'value'),
  [
    *REFUSED.items(),
    *(
      ('init_lora_weights', how)
      for how in (
        'pissa',
        'pissa_niter_4',
        'olora',
        'loftq',
        'corda',
        'lora_ga',
      )
    ),
    *(
      ('peft_type', kind) for kind in ('LOHA', 'IA3', 'PROMPT_TUNING', None, 3)
    ),
    ('bias', 'lora_only'),
    ('task_type', 'SEQ_CLS'),
    ('option_of_tomorrow', {'x': 1}),
    ('option_of_tomorrow', 0),
  ],
)
def test_what_is_not_computed_is_refused_by_name(option, value, write):
  with pytest.raises(UserError) as error:
    # Before the base is looked for.
    models.load(write(**{option: value, 'base_model_name_or_path': 'a/b'}))
  assert f'{peft.CONFIG}: {option}={value!r} ' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('option', 'value', 'words'),
  [
    ('r', '2', "r='2' must be a whole number"),
    ('r', 2.0, 'r=2.0 must be'),
    ('r', 0, 'r=0 must be'),
    ('lora_alpha', 'x', "lora_alpha='x' must be a positive number"),
    ('lora_alpha', float('nan'), 'lora_alpha=nan must be'),
    ('rank_pattern', {'q_proj': '2'}, 'rank_pattern={'),
    ('rank_pattern', [2], 'rank_pattern=[2] must be'),
    ('alpha_pattern', {'(': 2}, 'is no regular expression'),
    ('lora_dropout', 2, 'lora_dropout=2 must be from 0 to 1'),
    ('use_rslora', 'yes', "use_rslora='yes' must be true or false"),
    ('target_modules', 5, 'target_modules=5 must be names or a pattern'),
    ('target_modules', [5], 'target_modules=[5] must be'),
    ('target_modules', '*', "'*' is no regular expression"),
    ('target_modules', None, 'target_modules is missing'),
    ('layers_to_transform', 'all', "layers_to_transform='all' must be"),
    ('base_model_name_or_path', 7, 'base_model_name_or_path=7 must be'),
    ('base_model_name_or_path', '', 'base_model_name_or_path is missing'),
  ],
)
def test_values_that_make_no_sense_are_one_line(option, value, words, write):
  with pytest.raises(UserError) as error:
    models.load(write(**{option: value}))
  assert words in str(error.value)
  assert '\n' not in str(error.value)


def test_layers_need_names(write):
  path = write(target_modules='.*q_proj', layers_to_transform=[0])
  with pytest.raises(UserError, match='layers_to_transform needs a list'):
    models.load(path)


def test_settings_that_are_no_object_are_one_line(write):
  path = write()
  (path / peft.CONFIG).write_text('[]')
  with pytest.raises(UserError, match='not a JSON object'):
    models.load(path)


def _without_b(tensors):
  del tensors[tensor(1, QUERY, 'B')]


def _of_another_rank(tensors):
  tensors |= draw({(1, QUERY): 3})


def _of_another_width(tensors):
  tensors[tensor(0, DOWN, 'A')] = np.ones((2, 32), np.float32)


def _elsewhere(tensors):
  tensors[tensor(0, 'self_attn.k_proj', 'A')] = np.ones((2, 32), np.float32)


def _under_another_name(tensors):
  name = tensor(0, QUERY, 'A')
  tensors[name.replace('.weight', '.default.weight')] = tensors[name]


def _of_an_embedding(tensors):
  name = 'base_model.model.model.embed_tokens.lora_embedding_A'
  tensors[name] = np.ones((2, 304), np.float32)


def _of_integers(tensors):
  name = tensor(0, QUERY, 'A')
  tensors[name] = tensors[name].astype(np.int8)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (_without_b, 'no tensor base_model.model.model.layers.1.self_attn.q_proj'),
    (_of_another_rank, r'has shape \[3, 32\], expected \[2, 32\]: rank 2'),
    (_of_another_width, r'has shape \[2, 32\], expected \[2, 48\]'),
    (_elsewhere, 'no.* place for .*layers.0.self_attn.k_proj.lora_A'),
    (_under_another_name, 'place for .*q_proj.lora_A.default.weight'),
    (_of_an_embedding, 'place for .*embed_tokens.lora_embedding_A'),
    (_of_integers, 'lora_A.weight is stored as I8'),
  ],
)
def test_tensors_that_do_not_fit_are_one_line(change, words, write):
  tensors = draw({(l, m): 2 for l in range(2) for m in SHAPES})
  change(tensors)
  with pytest.raises(UserError, match=words):
    models.load(write(tensors))


def test_other_files_are_one_line(write):
  path = write()
  (path / peft.WEIGHTS).write_bytes(b'version https://git-lfs')
  with pytest.raises(UserError, match='not a readable safetensors file'):
    models.load(path)
  (path / peft.WEIGHTS).rename(path / 'adapter_model.bin')
  with pytest.raises(UserError, match='write it from adapter_model'):
    models.load(path)


@pytest.mark.parametrize(
  'dtype', ['float64', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2']
)
def test_adapters_of_any_float(dtype, write):
  tensors = draw({(0, QUERY): 2, (1, QUERY): 2})
  stored = {name: x.astype(jnp.dtype(dtype)) for name, x in tensors.items()}
  model = models.load(write(stored, target_modules=['q_proj']))
  adapter = lora.adapters(model)['attention/query']
  assert adapter.a.dtype == adapter.b.dtype == np.float32
  for l in range(2):
    for side, ours in (('A', adapter.a), ('B', adapter.b)):
      want = stored[tensor(l, QUERY, side)].astype(np.float32)
      np.testing.assert_array_equal(ours[l].T, want)


@pytest.mark.parametrize('tied', [True, False])
def test_the_embedding_may_be_there_if_it_is_the_bases(
  tied, write, tiny_model_dir
):
  """PEFT writes it if the vocabulary has another size than the base's."""
  base = tiny_model_dir(tied_head=tied, dtype='float16')
  tensors = safetensors.numpy.load_file(base / 'model.safetensors')
  head = 'model.embed_tokens.weight' if tied else 'lm_head.weight'
  copies = {
    'base_model.model.model.embed_tokens.weight': 'model.embed_tokens.weight',
    'base_model.model.lm_head.weight': head,
  }
  copies = {theirs: tensors[ours] for theirs, ours in copies.items()}
  adapter = draw({(l, m): 2 for l in range(2) for m in SHAPES})
  options = {'base_model_name_or_path': str(base)}
  model = models.load(write(adapter | copies, **options))
  assert len(changes(model)) == 4
  for name, x in copies.items():
    other = x.copy()
    other[7, 3] += 1
    for changed in (other, np.concatenate([x, x[:1]])):
      with pytest.raises(UserError, match=f'place for {name}'):
        models.load(write(adapter | copies | {name: changed}, **options))


@pytest.mark.parametrize(
  ('options', 'ranks'),
  [
    ({'rank_pattern': {FIRST: 1}}, (1, 2)),
    ({'alpha_pattern': {FIRST: 4}}, (2, 2)),
    ({'layers_to_transform': [1]}, (0, 2)),
  ],
)
def test_layers_that_differ_are_not_trained_on(options, ranks, write):
  """Their zeros would stay zeros, under a rank that is not theirs."""
  tensors = draw({(l, QUERY): r for l, r in enumerate(ranks) if r})
  config = lora.LoRAConfig(2, 8.0, 0.0, 'query')
  options = {'target_modules': ['q_proj']} | options
  with pytest.raises(UserError, match='other ranks or alphas in some layers'):
    lora.resume(models.load(write(tensors, **options)), config, 'student')
  tensors = draw({(0, QUERY): 2, (1, QUERY): 2})
  model = models.load(write(tensors, target_modules=['q_proj']))
  lora.resume(model, config, 'student')


@pytest.mark.torch
def test_every_option_of_peft_is_accepted_or_refused():
  theirs = pytest.importorskip('peft')
  accepted = {
    *peft_settings.COMPUTED,
    *peft_settings.WITHOUT_EFFECT,
    *peft_settings.ONLY,
  }
  fields = {field.name for field in dataclasses.fields(theirs.LoraConfig)}
  assert fields == accepted | REFUSED.keys()
  assert not accepted & REFUSED.keys()
  # What PEFT writes for an adapter of which nothing special was asked.
  settings = theirs.LoraConfig(target_modules=['q_proj']).to_dict()
  settings = json.loads(json.dumps(settings, default=list))
  peft_settings.check(settings, 'here')
  defaults = {name: x for name, (x, *_) in peft_settings.COMPUTED.items()}
  for name, value in defaults.items():
    assert settings[name] in (value, None, ['q_proj']), name


QUERY_OF = {'llama_untied': 'q_proj', 'gpt2': 'c_attn'}


@pytest.mark.torch
# peft asks transformers for a property that has a new name.
@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`:FutureWarning')
# It says what else it does with an option: of GPT-2 fan_in_fan_out is not False.
@pytest.mark.filterwarnings(
  'ignore:fan_in_fan_out is set to False:UserWarning',
  'ignore:.init_lora_weights. is .eva. but:UserWarning',
  'ignore:lora with eva initialization:UserWarning',
)
@pytest.mark.parametrize('family', ['llama_untied', 'gpt2'])
@pytest.mark.parametrize(
  'options',
  [
    {'rank_pattern': {r'1\..*QUERY': 5, 'DOWN': 3}},
    {'alpha_pattern': {r'LAYERS\.1\..*QUERY': 64}},
    {
      'use_rslora': True,
      'rank_pattern': {r'.*\.0\..*': 1},
      'alpha_pattern': {'DOWN': 9},
    },
    {'layers_to_transform': [1]},
    {'layers_to_transform': 0, 'layers_pattern': 'LAYERS'},
    {'target_modules': r'.*\.1\..*(QUERY|DOWN)'},
    {'target_modules': 'all-linear'},
    {'target_modules': 'all-linear', 'exclude_modules': ['DOWN']},
    {'exclude_modules': r'.*\.0\..*'},
    {'init_lora_weights': 'orthogonal'},
    {'init_lora_weights': 'eva'},
    {'init_lora_weights': 'mica'},
    {'save_embedding_layers': True},
  ],
  ids=repr,
)
def test_logits_are_those_of_peft(family, options, tmp_path):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  import transformers

  base = make_goldens.write_directory(
    make_goldens.CASES[family], tmp_path / 'base'
  )
  spelled = json.dumps(options)
  for word, name in {
    'QUERY': QUERY_OF[family],
    'DOWN': 'mlp.c_proj' if family == 'gpt2' else 'down_proj',
    'LAYERS': 'h' if family == 'gpt2' else 'layers',
  }.items():
    spelled = spelled.replace(word, name)
  options = json.loads(spelled)
  embeddings = options.pop('save_embedding_layers', 'auto')
  targets = (
    ['c_attn', 'mlp.c_proj'] if family == 'gpt2' else ['q_proj', 'down_proj']
  )

  def plain():
    return transformers.AutoModelForCausalLM.from_pretrained(
      base, dtype='float32', attn_implementation='eager'
    )

  torch.manual_seed(0)
  config = {'r': 2, 'lora_alpha': 6, 'target_modules': targets} | options
  made = theirs.get_peft_model(plain(), theirs.LoraConfig(**config))
  for name, x in made.named_parameters():
    if 'lora_' in name:
      torch.nn.init.normal_(x, std=0.1)
  made.save_pretrained(tmp_path / 'a', save_embedding_layers=embeddings)
  file = tmp_path / 'a' / peft.CONFIG  # where it wrote all-linear out
  targets = {'target_modules': config['target_modules']}
  file.write_text(json.dumps(json.loads(file.read_text()) | targets))
  loaded = theirs.PeftModel.from_pretrained(plain(), tmp_path / 'a').eval()
  ids_BT = make_goldens.IDS_BT
  with torch.no_grad():
    want, without = (
      model(torch.tensor(ids_BT)).logits.numpy() for model in (loaded, plain())
    )
  assert np.abs(want - without).max() > 0.02
  model = models.load(tmp_path / 'a')
  np.testing.assert_allclose(model.logits(ids_BT), want, atol=2e-4)
