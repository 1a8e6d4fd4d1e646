"""What a critic's scores are explained by, and where its gradient leads."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_teacher
from gakd_jax import models
from tools import critic_knows, synthetic


def test_a_score_that_is_explained_is_explained():
  random = np.random.default_rng(0)
  a_MN, b_MN, of_prompt_M1 = (
    random.normal(size=shape) for shape in ((200, 4), (200, 4), (200, 1))
  )
  rows = {'a': a_MN + of_prompt_M1, 'b': b_MN}
  rows['D'] = 2 * rows['a'] + 1
  for where in ('over all', 'within prompts'):
    assert critic_knows.regression(rows, ('a',))[where] > 0.999
    assert abs(critic_knows.regression(rows, ('b',))[where]) < 0.1
  # A score of the prompt alone orders none of its answers.
  rows['D'] = of_prompt_M1 + 0.01 * b_MN
  found = critic_knows.regression(rows, ('a',))
  assert found['over all'] > 0.3 > abs(found['within prompts']) + 0.2


def test_what_is_left_has_no_part_along_the_other():
  a = {'x': jnp.array([1.0, 2.0]), 'y': jnp.array([[3.0]])}
  b = {'x': jnp.array([0.5, -1.0]), 'y': jnp.array([[2.0]])}
  left = critic_knows.without(a, b)
  assert abs(critic_knows.cosine(left, b)) < 1e-6
  assert critic_knows.cosine(left, a) > 0.5


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(critic_knows, 'HELD_OUT', 16)
  monkeypatch.setattr(critic_knows, 'SIZES', (0.1,))
  start = models.init(
    tiny_teacher.PATH, seed=0, width=16, layers=1, ff_width=16
  )
  models.save(start, tmp_path / 'start')
  (tmp_path / 'teacher').mkdir()
  rows = synthetic.rows('train', 64)
  (tmp_path / 'teacher/answers.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  arguments = [
    f'--start={tmp_path / "start"}',
    f'--text={tmp_path / "teacher"}',
    f'--workdir={tmp_path / "out"}',
    *('--steps=2', '--prompts=64', '--frozen=2'),
  ]
  monkeypatch.setattr(sys, 'argv', ['critic_knows', *arguments])
  critic_knows.main()
  found = json.loads((tmp_path / 'out/found.json').read_text())
  assert found['cosine with KL']['KL'] == pytest.approx(1)
  assert found['cosine of halves'].keys() > {'D without KL'}
  assert {'none', 'KL, 0.1', 'random, 0.1'} < {*found['steps']}
  none = found['steps']['none']
  # Of its own text, E[D*] is -KL(q, p) but for what is drawn.
  assert none['D*'][0] == pytest.approx(-none['KL(q,p)'][0], rel=0.1)
  assert [*found['frozen']] == ['2']
