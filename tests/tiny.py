"""Tiny models with random weights, saved with a tokenizer of their own in a folder, as `load_model` wants them."""
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast)

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


def tiny_config(arch, vocab_size, n_layers=6, d_model=32, context=512):
    "A configuration of one of the three architectures; Llama with grouped-query attention."
    if arch == "gpt2":
        return GPT2Config(vocab_size=vocab_size, n_embd=d_model, n_layer=n_layers, n_head=4, n_positions=context,
                          bos_token_id=0, eos_token_id=0)
    shared = dict(vocab_size=vocab_size, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=4,
                  intermediate_size=3*d_model, max_position_embeddings=context, bos_token_id=0, eos_token_id=0)
    if arch == "llama": return LlamaConfig(**shared, num_key_value_heads=2, tie_word_embeddings=True)
    if arch == "gpt_neox": return GPTNeoXConfig(**shared)
    raise ValueError(f"no tiny {arch}: gpt_neox, gpt2 or llama")


def tiny_model(folder, arch="gpt_neox", seed=0, **changes):
    "Save a tiny random model, its norms and biases not the trivial ones, and its tokenizer in `folder`; return that."
    folder, tokenizer = Path(folder), tiny_tokenizer()
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(tiny_config(arch, len(tokenizer), **changes))
    with torch.no_grad():
        for name, w in hf.named_parameters():
            if w.ndim == 1: w += 0.3*torch.randn_like(w)
            else: w *= 5
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
