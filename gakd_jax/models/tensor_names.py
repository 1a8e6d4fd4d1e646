"""Our parameter paths -> the names of Hugging Face's tensors, by family.

`{}` in a name is the layer. A path that ends in `kernel` is transposed where
the family keeps linear layers as [out, in] (`families.Family.transposed`).
"""

from typing import NamedTuple


class Part(NamedTuple):
  """One of `of` equal parts of a tensor, along our last axis."""

  tensor: str
  index: int
  of: int


_LAYER = 'model.layers.{}.'
_ATTENTION = _LAYER + 'self_attn.'
LLAMA = {
  'embedding': 'model.embed_tokens.weight',
  'blocks/attention_norm/scale': _LAYER + 'input_layernorm.weight',
  'blocks/attention/query/kernel': _ATTENTION + 'q_proj.weight',
  'blocks/attention/key/kernel': _ATTENTION + 'k_proj.weight',
  'blocks/attention/value/kernel': _ATTENTION + 'v_proj.weight',
  'blocks/attention/out/kernel': _ATTENTION + 'o_proj.weight',
  'blocks/mlp_norm/scale': _LAYER + 'post_attention_layernorm.weight',
  'blocks/mlp/gate/kernel': _LAYER + 'mlp.gate_proj.weight',
  'blocks/mlp/up/kernel': _LAYER + 'mlp.up_proj.weight',
  'blocks/mlp/down/kernel': _LAYER + 'mlp.down_proj.weight',
  'final_norm/scale': 'model.norm.weight',
  'head_weight': 'lm_head.weight',
}
QWEN2 = LLAMA | {
  'blocks/attention/query/bias': _ATTENTION + 'q_proj.bias',
  'blocks/attention/key/bias': _ATTENTION + 'k_proj.bias',
  'blocks/attention/value/bias': _ATTENTION + 'v_proj.bias',
}
QWEN3 = LLAMA | {
  'blocks/attention/query_norm/scale': _ATTENTION + 'q_norm.weight',
  'blocks/attention/key_norm/scale': _ATTENTION + 'k_norm.weight',
}
GEMMA2 = LLAMA | {
  'blocks/attention_post_norm/scale': _LAYER
  + 'post_attention_layernorm.weight',
  'blocks/mlp_norm/scale': _LAYER + 'pre_feedforward_layernorm.weight',
  'blocks/mlp_post_norm/scale': _LAYER + 'post_feedforward_layernorm.weight',
}


def _gpt2_names():
  block = 'transformer.h.{}.'
  names = {
    'embedding': 'transformer.wte.weight',
    'position_embedding': 'transformer.wpe.weight',
    'final_norm/scale': 'transformer.ln_f.weight',
    'final_norm/bias': 'transformer.ln_f.bias',
    'head_weight': 'lm_head.weight',
  }
  for ours, theirs in (
    ('attention_norm', 'ln_1'),
    ('mlp_norm', 'ln_2'),
    ('attention/out', 'attn.c_proj'),
    ('mlp/up', 'mlp.c_fc'),
    ('mlp/down', 'mlp.c_proj'),
  ):
    weight = 'scale' if ours.endswith('norm') else 'kernel'
    names[f'blocks/{ours}/{weight}'] = f'{block}{theirs}.weight'
    names[f'blocks/{ours}/bias'] = f'{block}{theirs}.bias'
  # Queries, keys and values are columns of one tensor.
  for i, ours in enumerate(('query', 'key', 'value')):
    for kind, theirs in (('kernel', 'weight'), ('bias', 'bias')):
      names[f'blocks/attention/{ours}/{kind}'] = Part(
        f'{block}attn.c_attn.{theirs}', i, 3
      )
  return names


GPT2 = _gpt2_names()
