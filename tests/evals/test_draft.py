"""How many of a student's drafts its teacher lets stand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gakd_jax import models, sharding
from gakd_jax.data import sources
from gakd_jax.data import tokenizer as tokenizer_lib
from gakd_jax.evals import draft, encoded, evaluator
from gakd_jax.models import lora, pair
from gakd_jax.models.transformer import split

ROWS = tuple(
  sources.Row(f'Say {text}.', references=(text,), where=f'f:{i}')
  for i, text in enumerate(['yes', 'no', 'the answer', 'a teacher', 'x'])
)
NEW = 14


@pytest.fixture
def subject_of(tiny_model_dir):
  def subject_of(student, teacher, **mesh):
    mesh = sharding.make_mesh(**{'data': 1} | mesh)
    both, params = pair.make(
      *(x and models.load(x, mesh=mesh) for x in (student, teacher)),
      dtype='float32',
      tokenizers=[tokenizer_lib.load(x) for x in (student, teacher) if x],
    )
    subject = evaluator.Subject(
      models=both,
      template='chat',
      max_length=64,
      max_prompt_length=48,
      head_chunk=7,
      mesh=mesh,
      workdir=None,
    )
    return subject, params

  return subject_of


def make(**settings):
  settings = {'max_new_tokens': NEW, 'batch_size': 3, 'rows': ROWS} | settings
  return draft.Draft('draft', **settings)


def means(found):
  return {k: x['mean'] for k, x in found['metrics'].items()}


@pytest.mark.parametrize(
  ('stood', 'gamma', 'passes'),
  [
    ([], 3, 0),
    ([1], 3, 1),
    ([1, 1, 1, 1], 3, 1),  # Three drafts and the teacher's own.
    ([1, 1, 1, 1, 1], 3, 2),
    ([1, 1, 1, 0, 1], 3, 2),  # The fourth was no draft.
    ([0, 0, 0], 3, 3),
    ([1, 0, 1, 0, 1, 0], 3, 3),
    ([1, 0, 1, 0, 1, 0], 1, 3),
    ([1, 1, 0, 1, 1, 0], 1, 4),
    ([0, 1, 1, 1, 1], 8, 2),
  ],
)
def test_passes_are_counted_as_blocks_are_drafted(stood, gamma, passes):
  assert draft.passes_of(np.array(stood, bool), gamma) == passes


def test_adapters_that_are_merged_for_decoding_cost_nothing(tiny_model_dir):
  path = tiny_model_dir()
  student = models.load(path)
  lora.attach(student, lora.LoRAConfig(rank=4), 0)
  both, params = pair.make(student, models.load(path), dtype='float32')
  assert draft._cost(both, params) == 1


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_twin_is_never_corrected(subject_of, tiny_model_dir, temperature):
  path = tiny_model_dir()
  subject, params = subject_of(path, path)
  found = means(make(temperature=temperature).run(subject, params, 0))
  assert found['accepted'] == 100
  # Texts of at most NEW tokens: of gamma + 1 to a pass, the last one fewer.
  for gamma in range(1, 9):
    assert 1 < found[f'tokens_per_pass_{gamma}'] <= gamma + 1
  assert found['tokens_per_pass_1'] > 1.5
  cost = make().run(subject, params, 0)['cost']
  assert cost == 1
  assert found['speedup_2'] == pytest.approx(found['tokens_per_pass_2'] / 3)


@pytest.mark.slow
def test_greedy_drafts_stand_where_both_say_the_same(
  subject_of, tiny_model_dir, tmp_path
):
  paths = tmp_path / 'student', tiny_model_dir(seed=0)
  definition, weights = split(models.load(paths[1]))
  rng = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda x: x + 0.3 * x.std() * rng.standard_normal(x.shape, np.float32),
    weights,
  )
  models.save(nnx.merge(definition, weights), paths[0])
  subject, params = subject_of(*paths)
  made = make(temperature=0.0)
  prompts = encoded.encode(subject, ROWS).prompts
  got = made._write(subject, params, prompts, 0)
  student, teacher = map(models.load, paths)
  ends = subject.models.tokenizer.eos_token_id
  for prompt, stood in zip(prompts, got, strict=True):
    ids, want = [*prompt], []
    while len(want) < NEW and ids[-1] != ends:
      s, t = (
        int(jnp.argmax(x.logits(np.array([ids]))[0, -1, :300]))
        for x in (student, teacher)
      )
      ids.append(t)
      want.append(s == t)
    assert stood.tolist() == want
  assert 0 < np.concatenate(got).mean() < 1


@pytest.mark.slow
def test_drawn_drafts_stand_as_often_as_both_agree(subject_of, tiny_model_dir):
  """Of the first tokens, sum of min(p, q); whatever mesh writes."""
  paths = tiny_model_dir(seed=0), tiny_model_dir(seed=1, width=48)
  rows = tuple(dataclasses.replace(ROWS[0], where=f'f:{i}') for i in range(999))
  made = make(rows=rows, max_new_tokens=1, batch_size=333)
  subject, params = subject_of(*paths)
  (prompt, *_) = prompts = encoded.encode(subject, rows).prompts
  p, q = (
    np.asarray(
      jax.nn.softmax(models.load(x).logits(np.array([prompt]))[0, -1, :300])
    )
    for x in paths
  )
  share = np.minimum(p, q).sum()
  got = np.concatenate(made._write(subject, params, prompts, 0))
  assert len(got) == 999
  error = (share * (1 - share) / 999) ** 0.5
  assert abs(got.mean() - share) < 4 * error
  assert 0.05 < share < 0.95
  others = make(seeds=(0, 1)).run(subject, params, 0)
  with jax.set_mesh(sharding.make_mesh(data=2)):
    subject, params = subject_of(*paths, data=2)
    again = make(seeds=(0, 1)).run(subject, params, 0)
  assert means(again) == pytest.approx(means(others))
  assert others['metrics']['accepted']['by_seed'].keys() == {'0', '1'}


def test_without_a_teacher_there_is_nothing_to_draft_for(
  subject_of, tiny_model_dir
):
  subject, params = subject_of(tiny_model_dir(), None)
  assert make().run(subject, params, 0) == {'metrics': {}}
  assert make().metrics(has_teacher=False) == []
  assert make(gammas=(2,)).metrics(has_teacher=True) == [
    'accepted',
    'tokens_per_pass_2',
    'speedup_2',
  ]


def test_a_pass_costs_the_weights_that_it_reads(tiny_model_dir):
  paths = tiny_model_dir(), tiny_model_dir(width=48, layers=3)
  both, params = pair.make(*map(models.load, paths), dtype='float32')
  small, large = (
    sum(x.size for x in jax.tree.leaves(split(models.load(path))[1]))
    for path in paths
  )
  # Their heads are their embeddings; norms are next to nothing.
  assert draft._cost(both, params) == pytest.approx(small / large, rel=0.01)
