"""Records what transformers computes, for tests that run without it.

  python tools/make_goldens.py

writes `tests/goldens/*.npz`, one for each of `CASES`. Weights are a function of
the tensor's name alone, so that only outputs are stored; needs torch.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy

GOLDENS = Path(__file__).parents[1] / 'tests' / 'goldens'

_SHAPE = {
  'vocab_size': 160,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
}
_QWEN3 = _SHAPE | {
  'architectures': ['Qwen3ForCausalLM'],
  'model_type': 'qwen3',
  'hidden_act': 'silu',
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
  # A window on the second and third layer, shorter than the text.
  'qwen3_window': _QWEN3
  | {
    'num_key_value_heads': 2,
    'head_dim': 16,
    'tie_word_embeddings': True,
    'rope_theta': 10000.0,
    'use_sliding_window': True,
    'sliding_window': 3,
    'max_window_layers': 1,
  },
  'qwen2_tied': _SHAPE
  | {
    'architectures': ['Qwen2ForCausalLM'],
    'model_type': 'qwen2',
    'num_key_value_heads': 2,
    'tie_word_embeddings': True,
    'rope_theta': 1000000.0,
    'use_sliding_window': False,
    'sliding_window': 3,
    'max_window_layers': 1,
  },
  'qwen2_untied': _SHAPE
  | {
    'architectures': ['Qwen2ForCausalLM'],
    'model_type': 'qwen2',
    'num_key_value_heads': 4,
    'tie_word_embeddings': False,
    'rope_theta': 10000.0,
  },
  'llama_untied': _SHAPE
  | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'num_key_value_heads': 2,
    'tie_word_embeddings': False,
    'rms_norm_eps': 1e-5,
  },
  # Wavelengths of all three kinds: 6.3 to 1115 tokens, bounds 16 and 32.
  'llama_scaled': _SHAPE
  | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'num_key_value_heads': 1,
    'head_dim': 16,
    'tie_word_embeddings': True,
    'rope_theta': 1000.0,
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 4.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 2.0,
      'original_max_position_embeddings': 32,
    },
  },
  'mistral_window': _SHAPE
  | {
    'architectures': ['MistralForCausalLM'],
    'model_type': 'mistral',
    'num_key_value_heads': 2,
    'head_dim': 8,
    'tie_word_embeddings': False,
    'sliding_window': 4,
    'rope_theta': 10000.0,
  },
  'gemma': _SHAPE
  | {
    'architectures': ['GemmaForCausalLM'],
    'model_type': 'gemma',
    'num_key_value_heads': 1,
    'head_dim': 16,
    'hidden_act': 'gelu_pytorch_tanh',
    'rope_theta': 10000.0,
  },
  # Caps that bite, a window on the first and third layer.
  'gemma2': _SHAPE
  | {
    'architectures': ['Gemma2ForCausalLM'],
    'model_type': 'gemma2',
    'num_key_value_heads': 2,
    'head_dim': 8,
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': 24,
    'attn_logit_softcapping': 2.0,
    'final_logit_softcapping': 3.0,
    'sliding_window': 3,
    'rope_theta': 10000.0,
  },
  'gpt2': {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': 160,
    'n_embd': 48,
    'n_layer': 3,
    'n_head': 4,
    'n_inner': None,
    'n_positions': 64,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'bos_token_id': 1,
    'eos_token_id': 1,
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
  shapes = _gpt2_shapes(case) if case['model_type'] == 'gpt2' else _shapes(case)
  small = case['model_type'].startswith('gemma')  # whose norms add the 1

  def weights(name, shape):
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:  # Large enough that attention is not uniform.
      x /= (shape[0] if name.startswith('transformer.h') else shape[-1]) ** 0.5
    elif name.endswith('bias') or small:
      x *= 0.3
    else:
      x = 1 + 0.3 * x
    return x.astype(np.float32)

  return {name: weights(name, shape) for name, shape in shapes.items()}


def _shapes(case):
  kind = case['model_type']
  D, F, V = (
    case[k] for k in ('hidden_size', 'intermediate_size', 'vocab_size')
  )
  H = case.get('head_dim', D // case['num_attention_heads'])
  NH, KH = case['num_attention_heads'] * H, case['num_key_value_heads'] * H
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not case.get('tie_word_embeddings', True):
    shapes['lm_head.weight'] = (V, D)
  layer = {
    'input_layernorm.weight': (D,),
    'post_attention_layernorm.weight': (D,),
    'self_attn.q_proj.weight': (NH, D),
    'self_attn.k_proj.weight': (KH, D),
    'self_attn.v_proj.weight': (KH, D),
    'self_attn.o_proj.weight': (D, NH),
    'mlp.gate_proj.weight': (F, D),
    'mlp.up_proj.weight': (F, D),
    'mlp.down_proj.weight': (D, F),
  }
  if kind == 'qwen3':
    layer |= {'self_attn.q_norm.weight': (H,), 'self_attn.k_norm.weight': (H,)}
  if kind == 'qwen2':
    layer |= {
      'self_attn.q_proj.bias': (NH,),
      'self_attn.k_proj.bias': (KH,),
      'self_attn.v_proj.bias': (KH,),
    }
  if kind == 'gemma2':
    layer |= {
      'pre_feedforward_layernorm.weight': (D,),
      'post_feedforward_layernorm.weight': (D,),
    }
  for l in range(case['num_hidden_layers']):
    shapes |= {f'model.layers.{l}.{name}': s for name, s in layer.items()}
  return shapes


def _gpt2_shapes(case):
  D, V, P = (case[k] for k in ('n_embd', 'vocab_size', 'n_positions'))
  shapes = {
    'transformer.wte.weight': (V, D),
    'transformer.wpe.weight': (P, D),
    'transformer.ln_f.weight': (D,),
    'transformer.ln_f.bias': (D,),
  }
  layer = {'ln_1.weight': (D,), 'ln_1.bias': (D,)}
  layer |= {'ln_2.weight': (D,), 'ln_2.bias': (D,)}
  for name, n_in, n_out in (
    ('attn.c_attn', D, 3 * D),
    ('attn.c_proj', D, D),
    ('mlp.c_fc', D, 4 * D),
    ('mlp.c_proj', 4 * D, D),
  ):
    layer |= {f'{name}.weight': (n_in, n_out), f'{name}.bias': (n_out,)}
  for l in range(case['n_layer']):
    shapes |= {f'transformer.h.{l}.{name}': s for name, s in layer.items()}
  return shapes


def final_norm(case):
  """The weights of the last norm, by which a change of numpy would be seen."""
  names = 'model.norm.weight', 'transformer.ln_f.weight'
  return next(x for name, x in tensors(case).items() if name in names)


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
    norm_D = final_norm(case)
    np.savez_compressed(file, logits_BTV=logits_BTV, norm_D=norm_D)
    print(f'{file}: {file.stat().st_size} bytes')


if __name__ == '__main__':
  main()
