"""Tiny models with random weights, saved with a tokenizer of their own in a folder, as `load_model` wants them."""
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast)

from sparse_coding.dictionaries import TiedSAE
from sparse_coding.paper2.families import Contexts

TEXT = """When Mary and John went to the store, John gave a drink to Mary. It's a small store, and it doesn't sell much:
bread, milk, apples, and the newspaper of the day before. The keeper of the store counts the apples every morning and
every evening.
def count(apples, eaten=0):
    return len(apples) - eaten
The river runs from the mountains to the sea, and the people of the valley have always lived by the river. In the year
1901 the river rose higher than anyone remembered. They said: "We'll build the bridge again, and it will be of stone."
for year in range(1901, 1911):
    print(year, "the bridge is standing")
"""
NAMES = [" Mary", " John", " Anna", " Tom", " Paul", " Lisa"]                   # one token each, as sentences for IOI want them


def tiny_tokenizer(vocab_size=384):
    "A byte-level tokenizer trained on TEXT: any string can be written in it, and `<|endoftext|>` is token 0."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"],
                                                        initial_alphabet=alphabet, show_progress=False))
    tok.add_tokens(NAMES)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


GQA = dict(num_key_value_heads=2)                                               # two query heads share a key
PECULIAR = { # what is special in other architectures, in numbers small enough to show in rows of 20 tokens
    "gptj": dict(rotary_dim=4),
    "mistral": dict(**GQA, sliding_window=7),
    "qwen2": dict(**GQA, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "qwen3": dict(**GQA, head_dim=12),
    "gemma": dict(**GQA, head_dim=12),
    "gemma2": dict(**GQA, head_dim=12, sliding_window=7, query_pre_attn_scalar=20, attn_logit_softcapping=2.,
                   final_logit_softcapping=3.),
    "gemma3_text": dict(**GQA, head_dim=12, sliding_window=7, query_pre_attn_scalar=20,
                        layer_types=["sliding_attention", "full_attention"]*8),
    "phi3": dict(**GQA, sliding_window=7, pad_token_id=0,
                 rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": .5}),
    "olmo2": dict(**GQA),
    "granite": dict(**GQA, logits_scaling=8., residual_multiplier=.3, embedding_multiplier=3., attention_multiplier=.2),
    "smollm3": dict(**GQA, no_rope_layers=[1, 0]*8, use_sliding_window=True, sliding_window=7,
                    layer_types=["sliding_attention", "full_attention"]*8, pad_token_id=0),
    "stablelm": dict(**GQA, use_qkv_bias=True, qk_layernorm=True),
    "stablelm-parallel": dict(num_key_value_heads=4, use_parallel_residual=True),
    "cohere": dict(**GQA, logit_scale=.25, use_qk_norm=True, pad_token_id=0),
}


def tiny_config(arch, vocab_size, n_layers=6, d_model=32, context=512):
    "A configuration of one of the three architectures, Llama with grouped-query attention, or of one in PECULIAR."
    if arch == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=d_model, n_layer=n_layers, n_head=4, n_positions=context,
                          bos_token_id=0, eos_token_id=0)
    shared = dict(vocab_size=vocab_size, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=4,
                  intermediate_size=3*d_model, max_position_embeddings=context, bos_token_id=0, eos_token_id=0)
    if arch == "llama": return LlamaConfig(**shared, num_key_value_heads=2, tie_word_embeddings=True)
    if arch == "gpt_neox": return GPTNeoXConfig(**shared)
    if arch not in PECULIAR: raise ValueError(f"no tiny {arch}: gpt_neox, gpt2, llama, {', '.join(PECULIAR)}")
    special = {k: v[:n_layers] if isinstance(v, list) else v for k,v in PECULIAR[arch].items()}
    return AutoConfig.for_model(arch.split("-")[0], **shared | special)


def tiny_model(folder, arch="gpt_neox", seed=0, **changes):
    "Save a tiny random model, its norms and biases not the trivial ones, and its tokenizer in `folder`; return that."
    folder, tokenizer = Path(folder), tiny_tokenizer()
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(tiny_config(arch, len(tokenizer), **changes))
    with torch.no_grad():
        for name, w in hf.named_parameters():
            if w.ndim == 1 or "norm" in name: w += 0.3*torch.randn_like(w)
            else: w *= 5
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama_tokenizer():
    "A tokenizer as Llama 2 has it, trained on TEXT: ▁ for blanks, one of them before every text, bytes as a last resort."
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tok.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    made = json.loads(tok.to_str())["model"]
    return LlamaTokenizer(vocab=made["vocab"], merges=[tuple(m) for m in made["merges"]])


def sparse(d=32, n=48, bias=-.6, most=3., cls=TiedSAE, **how):
    "A dictionary whose features fire on some tokens, each on fewer than the one before."
    sae = cls(d, n, seed=3, **how)
    sae.b_enc.data += bias*torch.linspace(.2, most, n)
    return sae.requires_grad_(False)


def contexts(f=5, n=6, seq=80, vocab=12, rows=30, seed=0, first=4, end=None, weakest=1.):
    "Random places in random text, with random attributions."
    g = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=g)
    pos = draw((end or seq) - first, f, n) + first
    dfa = torch.randn(f, n, seq, generator=g)*(torch.arange(seq) <= pos[..., None])
    c = Contexts(draw(rows, f, n), pos, torch.rand(f, n, generator=g) + weakest, dfa, torch.zeros(f, n, 4), draw(vocab, f, 10), draw(vocab, f, 10))
    return c, draw(vocab, rows, seq).numpy()
