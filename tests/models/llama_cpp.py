"""Writes .gguf files as llama.cpp's converter does, for tests that read them.

Written after its rules, not after our reader: names are written out.
"""

import gguf
import numpy as np

_LAYER = {
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_GEMMA2 = _LAYER | {
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}
_GPT2 = {
  'ln_1': 'attn_norm',
  'ln_2': 'ffn_norm',
  'attn.c_attn': 'attn_qkv',
  'attn.c_proj': 'attn_output',
  'mlp.c_fc': 'ffn_up',
  'mlp.c_proj': 'ffn_down',
}
_OTHERS = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'transformer.wte': 'token_embd',
  'transformer.wpe': 'position_embd',
  'transformer.ln_f': 'output_norm',
}
# Bytes as GPT-2 writes them, and two control tokens.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [chr(i) for i in _PRINTABLE] + [chr(256 + i) for i in range(68)]


def theirs(name, kind):
  """llama.cpp's name of a tensor of Hugging Face's."""
  stem, _, what = name.rpartition('.')
  if stem in _OTHERS:
    return f'{_OTHERS[stem]}.{what}'
  layer = stem.removeprefix('model.layers.').removeprefix('transformer.h.')
  l, _, rest = layer.partition('.')
  names = {'gpt2': _GPT2, 'gemma2': _GEMMA2}.get(kind, _LAYER)
  return f'blk.{l}.{names[rest]}.{what}'


def converted(name, x, case):
  """A tensor as the converter leaves it."""
  kind = case['model_type']
  if kind == 'llama' and name.endswith(('q_proj.weight', 'k_proj.weight')):
    heads = case['num_attention_heads']
    if 'k_proj' in name:
      heads = case['num_key_value_heads']
    # Of the reshape with which Meta's weights became Hugging Face's, the other.
    x = x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:])
    x = x.swapaxes(1, 2).reshape(-1, *x.shape[3:])
  if kind.startswith('gemma') and name.endswith('norm.weight'):
    x = x + 1
  if kind == 'gpt2' and x.ndim == 2 and 'transformer.h' in name:
    x = x.T
  return np.ascontiguousarray(x)


def write(
  case, tensors, path, stored='F32', more=None, pre='gpt-2', keys=None, **said
):
  """A file of a config.json and {name: array}.

  stored: the kind of matrices; vectors are F32, as llama.cpp has them.
  more: tensors that are written as they are.
  keys: {llama.cpp's name: value} of the model, None to leave one out.
  said: of the tokenizer, instead of GPT-2's bytes and two control tokens.
  """
  kind = case['model_type']
  writer = gguf.GGUFWriter(path, kind)
  get = case.get
  writer.add_block_count(get('num_hidden_layers') or get('n_layer'))
  writer.add_context_length(
    get('max_position_embeddings') or get('n_positions')
  )
  writer.add_embedding_length(get('hidden_size') or get('n_embd'))
  width = get('intermediate_size') or 4 * case.get('n_embd', 0)
  writer.add_feed_forward_length(width)
  writer.add_head_count(get('num_attention_heads') or get('n_head'))
  if kind == 'gpt2':
    writer.add_layer_norm_eps(case['layer_norm_epsilon'])
  else:
    writer.add_head_count_kv(case['num_key_value_heads'])
    writer.add_layer_norm_rms_eps(get('rms_norm_eps', 1e-6))
    rope = get('rope_parameters', {})
    writer.add_rope_freq_base(get('rope_theta', rope.get('rope_theta', 1e4)))
    if 'head_dim' in case:
      writer.add_key_length(case['head_dim'])
      writer.add_value_length(case['head_dim'])
  if kind == 'gemma2':
    writer.add_attn_logit_softcapping(case['attn_logit_softcapping'])
    writer.add_final_logit_softcapping(case['final_logit_softcapping'])
    writer.add_sliding_window(case['sliding_window'])
  for name, value in (keys or {}).items():
    key = name.replace('{}', kind)
    for some in writer.kv_data:
      some.pop(key, None)
    _add(writer, key, value)
  _add_tokenizer(writer, get('vocab_size'), pre, said)
  quantization = gguf.GGMLQuantizationType[stored]
  for name, x in tensors.items():
    x = converted(name, x, case)
    if x.ndim == 2:
      data = gguf.quants.quantize(x, quantization)
      writer.add_tensor(theirs(name, kind), data, raw_dtype=quantization)
    else:
      writer.add_tensor(theirs(name, kind), x)
  for name, x in (more or {}).items():
    writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add_tokenizer(writer, vocab, pre, said):
  specials = ['<|endoftext|>', '<|im_end|>']
  tokens = (specials + ALPHABET)[:vocab]
  tokens += [f'<unused_{i}>' for i in range(vocab - len(tokens))]
  kinds = [3] * 2 + [1] * (vocab - 2)
  said = {
    'model': 'gpt2',
    'pre': pre,
    'tokens': tokens,
    'token_type': kinds,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'padding_token_id': 0,
  } | said
  template = said.pop('chat_template', None)
  if template:
    writer.add_chat_template(template)
  for name, value in said.items():
    _add(writer, f'tokenizer.ggml.{name}', value)


def _add(writer, key, value):
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, int):
    writer.add_uint32(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  elif value is not None:
    writer.add_array(key, value)
