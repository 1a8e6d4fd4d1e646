"""Records what transformers computes, for tests that run without it.

  python tools/make_goldens.py

writes `tests/goldens/qwen3_*.npz`. Weights are a function of the tensor's
name alone, so that only outputs are stored; needs torch.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

GOLDENS = Path(__file__).parents[1] / 'tests' / 'goldens'

_QWEN3 = {
  'architectures': ['Qwen3ForCausalLM'],
  'model_type': 'qwen3',
  'vocab_size': 160,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'hidden_act': 'silu',
  'max_position_embeddings': 64,
  'attention_bias': False,
}
# config.json as transformers 4 wrote it, and as transformers 5 does.
CASES = {
  'qwen3_tied': _QWEN3
  | {
    'num_key_value_heads': 2,
    'head_dim': 16,
    'tie_word_embeddings': True,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'rope_scaling': None,
    'torch_dtype': 'float32',
  },
  'qwen3_untied': _QWEN3
  | {
    'num_key_value_heads': 1,
    'head_dim': 8,
    'tie_word_embeddings': False,
    'rms_norm_eps': 1e-2,
    'rope_parameters': {'rope_theta': 100.0, 'rope_type': 'default'},
    'dtype': 'float32',
  },
}

# A whole row, one padded on the right, one on the left, two packed texts.
SEGMENTS_BT = np.array(
  [
    [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
  ]
)
IDS_BT = np.random.default_rng(0).integers(0, 160, SEGMENTS_BT.shape)


def tensors(case):
  """{name: fp32 weights} of a config; names written out, not shared."""
  D, F, V = (
    case[k] for k in ('hidden_size', 'intermediate_size', 'vocab_size')
  )
  H = case['head_dim']
  NH, KH = case['num_attention_heads'] * H, case['num_key_value_heads'] * H
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not case['tie_word_embeddings']:
    shapes['lm_head.weight'] = (V, D)
  for l in range(case['num_hidden_layers']):
    layer = {
      'input_layernorm': (D,),
      'post_attention_layernorm': (D,),
      'self_attn.q_proj': (NH, D),
      'self_attn.k_proj': (KH, D),
      'self_attn.v_proj': (KH, D),
      'self_attn.o_proj': (D, NH),
      'self_attn.q_norm': (H,),
      'self_attn.k_norm': (H,),
      'mlp.gate_proj': (F, D),
      'mlp.up_proj': (F, D),
      'mlp.down_proj': (D, F),
    }
    for name, shape in layer.items():
      shapes[f'model.layers.{l}.{name}.weight'] = shape

  def weights(name, shape):
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    # Norms near one; matrices large enough that attention is not uniform.
    x = 1 + 0.3 * x if len(shape) == 1 else x / shape[-1] ** 0.5
    return x.astype(np.float32)

  return {name: weights(name, shape) for name, shape in shapes.items()}


def write_directory(case, path):
  """The Hugging Face directory of a case: config.json and weights."""
  path.mkdir(parents=True, exist_ok=True)
  (path / 'config.json').write_text(json.dumps(case))
  safetensors.numpy.save_file(
    tensors(case), path / 'model.safetensors', metadata={'format': 'pt'}
  )
  return path


def reference_logits(path):
  """Logits by transformers, each text on its own; 0 where there is padding."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype='float32', attn_implementation='eager'
  )
  logits_BTV = np.zeros((*IDS_BT.shape, model.config.vocab_size), np.float32)
  for ids_T, segments_T, out_TV in zip(
    IDS_BT, SEGMENTS_BT, logits_BTV, strict=True
  ):
    for segment in set(segments_T) - {0}:
      here_T = segments_T == segment
      with torch.no_grad():
        out_TV[here_T] = model(torch.tensor(ids_T[None, here_T])).logits[0]
  return logits_BTV


def main():
  for name, case in CASES.items():
    with tempfile.TemporaryDirectory() as path:
      logits_BTV = reference_logits(write_directory(case, Path(path)))
    file = GOLDENS / f'{name}.npz'
    norm_D = tensors(case)['model.norm.weight']
    np.savez_compressed(file, logits_BTV=logits_BTV, norm_D=norm_D)
    print(f'{file}: {file.stat().st_size} bytes')


if __name__ == '__main__':
  main()
