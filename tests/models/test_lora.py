"""Adapters: what they compute, which parameters train, PEFT's files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from gakd_jax import UserError, models
from gakd_jax.models import convert, decoding, lora, peft
from gakd_jax.models.transformer import split
from tools import make_goldens

IDS_BT = make_goldens.IDS_BT
SOME = lora.LoRAConfig(rank=3, alpha=12.0, targets='(query|value|down)$')


def with_adapters(path, config=SOME, seed=0):
  """A model with adapters that do something: B is random, too."""
  model = models.load(path)
  lora.attach(model, config, seed)
  rng = np.random.default_rng(seed)
  for adapter in lora.adapters(model).values():
    b = 0.1 * rng.standard_normal(adapter.b.shape, np.float32)
    adapter.b[...] = jnp.asarray(b)
  return model


def logits(model, **kwargs):
  definition, params = split(model)

  def run(params):
    outputs = nnx.merge(definition, params)(IDS_BT, **kwargs)
    return jax.vmap(outputs.head)(outputs.hidden_BTD)

  return jax.jit(run)(params)


@pytest.fixture(params=['qwen2_untied', 'gpt2'])
def directory(request, tmp_path):
  case = make_goldens.CASES[request.param]
  return make_goldens.write_directory(case, tmp_path / 'base')


@pytest.fixture
def qwen(tiny_model_dir):
  return tiny_model_dir()


def test_a_fresh_adapter_changes_nothing(directory):
  model = models.load(directory)
  want = logits(model)
  lora.attach(model, SOME, 0)
  found = lora.adapters(model)
  np.testing.assert_array_equal(logits(model), want)
  assert list(found) == ['attention/query', 'attention/value', 'mlp/down']
  for adapter in found.values():
    bound = adapter.a.shape[1] ** -0.5
    assert 0.9 * bound < jnp.abs(adapter.a[...]).max() <= bound
  a, b, _ = (x.a[...][:, :48] for x in found.values())
  assert jnp.any(a != b)


def test_an_adapter_is_a_low_rank_change_of_its_kernel(directory):
  """With W + (alpha / r) A B computed here, in numpy."""
  model = with_adapters(directory)
  got = logits(model)
  flat = convert.flatten(split(model)[1])
  plain = models.load(directory)
  definition, params = split(plain)
  changed = convert.flatten(params)
  for name in lora.adapters(model):
    a, b = (np.asarray(flat[f'blocks/{name}/lora/{x}']) for x in 'ab')
    change = 12.0 / 3 * np.einsum('lir,lro->lio', a, b)
    changed[f'blocks/{name}/kernel'] += change
  want = logits(nnx.merge(definition, convert.unflatten(changed)))
  assert np.abs(logits(plain) - want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-4)
  lora.merge(model)
  assert not lora.adapters(model)
  assert split(model)[0] == split(models.load(directory))[0]
  np.testing.assert_allclose(logits(model), want, atol=1e-4)


def test_cached_decoding_has_the_adapters(qwen):
  model = with_adapters(qwen)
  definition, params = split(model)
  positions_BT = np.broadcast_to(np.arange(10), IDS_BT.shape)

  @jax.jit
  def decode(params):
    model = nnx.merge(definition, params)
    cache = model.init_cache(*IDS_BT.shape)
    return model.decode(IDS_BT, positions_BT, cache)[0].hidden_BTD

  want = jax.jit(lambda p: nnx.merge(definition, p)(IDS_BT).hidden_BTD)(params)
  definition, params = split(decoding.unstack(model))
  np.testing.assert_allclose(decode(params), want, atol=1e-5)


@pytest.mark.slow
def test_dropout_differs_by_key_layer_and_projection(qwen):
  config = lora.LoRAConfig(rank=2, dropout=0.5)
  model = with_adapters(qwen, config)
  plain = logits(model)
  np.testing.assert_array_equal(plain, logits(with_adapters(qwen, config)))
  a, b, again = (logits(model, key=jax.random.key(k)) for k in (0, 1, 0))
  np.testing.assert_array_equal(a, again)
  assert np.abs(a - b).max() > 0.1 < np.abs(a - plain).max()
  # An adapter alone: kept entries are scaled up, and their share is as asked.
  adapter = lora.LoRA(jnp.eye(50), jnp.eye(50), 1.0, 0.2, index=1)
  other = lora.LoRA(jnp.eye(50), jnp.eye(50), 1.0, 0.2, index=2)
  x = jnp.ones((100, 50))
  y, z = (f(x, jax.random.key(0)) for f in (adapter, other))
  assert np.any(y != z)


@pytest.mark.parametrize(
  ('share', 'dropped'), [(0.2, 51), (0.5, 128), (1e-4, 1), (0.9999, 255)]
)
def test_dropout_keeps_the_mean(share, dropped):
  """A byte decides, so shares are 256ths: of a width that is no whole words."""
  adapter = lora.LoRA(jnp.eye(101), jnp.eye(101), 1.0, share)
  n = 1000
  y_NI = adapter(jnp.ones((n, 101)), jax.random.key(0))
  kept = 1 - dropped / 256
  np.testing.assert_allclose(np.unique(y_NI), [0, 1 / kept], rtol=1e-5)
  # Four standard deviations of a mean of as many draws.
  error = 4 * (kept * (1 - kept) / y_NI.size) ** 0.5
  assert np.mean(y_NI > 0) == pytest.approx(kept, abs=error)
  assert np.mean(y_NI) == pytest.approx(1, abs=error / kept)
  # No two inputs share their draws.
  error_I = 4.5 * (kept * (1 - kept) / n) ** 0.5
  np.testing.assert_allclose(np.mean(y_NI > 0, axis=0), kept, atol=error_I)


def test_dropout_asks_for_a_byte_an_input():
  adapter = lora.LoRA(jnp.ones((64, 2)), jnp.ones((2, 2)), 1.0, 0.1)
  jaxpr = jax.make_jaxpr(adapter)(jnp.ones((10, 64)), jax.random.key(0))
  assert 'u32[10,16] = random_bits' in str(jaxpr)


def test_partition_takes_the_adapters_and_combine_gives_them_back(qwen):
  params = split(with_adapters(qwen))[1]
  mine, base = lora.partition(params)
  assert all('/lora/' in name for name in convert.flatten(mine))
  assert len(convert.flatten(mine)) == 2 * 3
  assert not any('/lora/' in name for name in convert.flatten(base))
  jax.tree.map(np.testing.assert_array_equal, lora.combine(mine, base), params)
  assert lora.combine(base, None) is base


def test_peft_directory_round_trip(directory, tmp_path):
  model = with_adapters(directory)
  models.save(model, tmp_path / 'adapter')
  files = sorted(f.name for f in (tmp_path / 'adapter').iterdir())
  assert files == ['adapter_config.json', 'adapter_model.safetensors']
  again = models.load(tmp_path / 'adapter')
  np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)
  # Saved again, over the first: nothing is lost.
  models.save(again, tmp_path / 'adapter')
  np.testing.assert_allclose(
    logits(models.load(tmp_path / 'adapter')), logits(model), atol=1e-5
  )


def test_adapters_that_were_written_go_on(directory, tmp_path):
  """GPT-2's too, three of which are one in the file."""
  model = with_adapters(directory)
  want = logits(model)
  for path in (tmp_path / 'once', tmp_path / 'twice'):
    models.save(model, path)
    model = models.load(path)
    lora.resume(model, SOME, path)
    np.testing.assert_allclose(logits(model), want, atol=1e-6)


def test_an_adapter_s_own_tokenizer_travels_with_it(qwen, tmp_path):
  """That of the base has no such template, and ends elsewhere."""
  adapter = tmp_path / 'adapter'
  models.save(with_adapters(qwen), adapter)
  (qwen / 'chat_template.jinja').unlink(missing_ok=True)
  (adapter / 'chat_template.jinja').write_text('its own')
  merged = models.load(adapter)
  lora.merge(merged)
  for name, model in {
    'again': models.load(adapter),
    'merged': merged,
    'new': models.init(adapter, 0),
    'abstract': models.abstract(
      models.read_config(adapter), qwen, companions=adapter
    ),
  }.items():
    assert model.source == str(qwen), name
    assert model.companions == str(adapter), name
  models.save(merged, tmp_path / 'merged')
  template = tmp_path / 'merged/chat_template.jinja'
  assert template.read_text() == 'its own'


def test_what_is_written_is_what_peft_writes(tmp_path):
  case = make_goldens.CASES['qwen2_untied']
  base = make_goldens.write_directory(case, tmp_path / 'base')
  model = with_adapters(base, lora.LoRAConfig(4, 8.0, 0.1, 'up|key'))
  models.save(model, tmp_path / 'adapter')
  settings = json.loads((tmp_path / 'adapter' / peft.CONFIG).read_text())
  assert settings['base_model_name_or_path'] == str(base)
  assert settings['target_modules'] == ['mlp.up_proj', 'self_attn.k_proj']
  assert (settings['r'], settings['lora_alpha']) == (4, 8.0)
  assert settings['lora_dropout'] == 0.1
  tensors = safetensors.numpy.load_file(tmp_path / 'adapter' / peft.WEIGHTS)
  assert len(tensors) == 2 * 2 * 3
  prefix = 'base_model.model.model.layers.1.mlp.up_proj.lora_'
  adapter = lora.adapters(model)['mlp/up']
  for name, x in (('A', adapter.a), ('B', adapter.b)):
    np.testing.assert_array_equal(tensors[f'{prefix}{name}.weight'], x[1].T)


def _edit(path, file, change):
  settings = json.loads((path / file).read_text())
  (path / file).write_text(json.dumps(settings | change))


def test_a_base_that_is_not_there_is_named(qwen, tmp_path):
  path = tmp_path / 'adapter'
  models.save(with_adapters(qwen), path)
  _edit(path, peft.CONFIG, {'base_model_name_or_path': 'no/such/base'})
  with pytest.raises(UserError, match='no/such/base'):
    models.load(path)


def test_adapters_that_do_not_fit_are_refused(qwen, tiny_model_dir, tmp_path):
  path = tmp_path / 'adapter'
  models.save(with_adapters(qwen), path)
  for shape, word in (({'layers': 1}, 'layers.1'), ({'width': 64}, '64')):
    other = tiny_model_dir(**shape)
    _edit(path, peft.CONFIG, {'base_model_name_or_path': str(other)})
    with pytest.raises(UserError, match=word):
      models.load(path)
  _edit(path, peft.CONFIG, {'base_model_name_or_path': str(qwen)})
  file = path / peft.WEIGHTS
  tensors = safetensors.numpy.load_file(file)
  del tensors[min(tensors)]
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(UserError, match='no tensor'):
    models.load(path)


def test_rank_stabilised_scale_and_patterns(qwen, tmp_path):
  path = tmp_path / 'adapter'
  models.save(with_adapters(qwen), path)
  _edit(
    path,
    peft.CONFIG,
    {'use_rslora': True, 'alpha_pattern': {'self_attn.q_proj': 6.0}},
  )
  found = lora.adapters(models.load(path))
  assert found['attention/query'].scale == pytest.approx(6.0 / 3**0.5)
  assert found['mlp/down'].scale == pytest.approx(12.0 / 3**0.5)


@pytest.mark.parametrize(
  ('settings', 'word'),
  [
    ({'rnak': 2}, "no setting 'rnak'"),
    ({'rank': 0}, 'rank=0'),
    ({'dropout': 1.0}, 'dropout=1.0'),
    ({'targets': 'q_proj'}, 'attention/query'),
  ],
)
def test_settings_that_make_no_sense_are_one_line(settings, word, qwen):
  with pytest.raises(UserError, match=word):
    lora.attach(models.load(qwen), lora.make_config(settings), 0)


@pytest.mark.torch
# peft asks transformers for a property that has a new name.
@pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`:FutureWarning')
@pytest.mark.parametrize(
  'directory', ['qwen2_untied', 'gpt2', 'gemma2'], indirect=True
)
def test_peft_loads_what_is_written_and_its_files_load_here(
  directory, tmp_path
):
  torch = pytest.importorskip('torch')
  theirs = pytest.importorskip('peft')
  import transformers

  model = with_adapters(directory)
  models.save(model, tmp_path / 'ours')

  def base():
    return transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype='float32', attn_implementation='eager'
    )

  def their_logits(model):
    with torch.no_grad():
      return model.eval()(torch.tensor(IDS_BT)).logits.numpy()

  loaded = theirs.PeftModel.from_pretrained(base(), tmp_path / 'ours')
  np.testing.assert_allclose(their_logits(loaded), logits(model), atol=1e-4)

  targets = {'gpt2': ['c_attn', 'mlp.c_proj']}.get(
    model.config.family, ['q_proj', 'down_proj']
  )
  made = theirs.get_peft_model(
    base(),
    theirs.LoraConfig(
      r=2,
      lora_alpha=6,
      target_modules=targets,
      fan_in_fan_out=model.config.family == 'gpt2',
    ),
  )
  torch.manual_seed(0)
  for name, x in made.named_parameters():
    if 'lora_B' in name:
      torch.nn.init.normal_(x, std=0.1)
  made.save_pretrained(tmp_path / 'theirs')
  got = logits(models.load(tmp_path / 'theirs'))
  want = their_logits(made)
  assert np.abs(want - their_logits(base())).max() > 0.05
  np.testing.assert_allclose(got, want, atol=1e-4)
