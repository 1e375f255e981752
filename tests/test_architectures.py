"""What the library can do with which architecture: tiny random models against plain forward passes of `transformers`,
and the table of all that in foundation/06_models."""
import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_coding.presets import SITE_KINDS, Site, SparseCodingError
from sparse_coding.models import final_norm, load_model, unembedded
from sparse_coding.partial_runs import renumber
from sparse_coding.attention import freeze_norm
from tiny import tiny_model

NAMES = {"gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "gptj": "GPT-J", "llama": "Llama", "mistral": "Mistral",
         "qwen2": "Qwen 2", "qwen3": "Qwen 3", "gemma": "Gemma 1", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3",
         "phi3": "Phi-3", "olmo2": "OLMo 2", "granite": "Granite", "smollm3": "SmolLM3", "stablelm": "StableLM",
         "stablelm-parallel": "StableLM", "cohere": "Cohere"}
BLOCKS = {"gpt2": "transformer.h", "gptj": "transformer.h", "gpt_neox": "gpt_neox.layers"}      # else model.layers
ATTN = {"gpt2": "attn", "gptj": "attn", "gpt_neox": "attention"}                                # else self_attn
OUT = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "gptj": ("attn.out_proj", "mlp.fc_out"),
       "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h")}                    # else self_attn.o_proj, mlp.down_proj
MIDDLE = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm", "olmo2": "mlp",
          **dict.fromkeys(("gptj", "gpt_neox", "stablelm-parallel", "cohere"))} # what reads the stream after attention
LAYERS, N = 3, 20


class Case:
    "A model of ours and the plain one, with everything that a forward pass shows."
    def __init__(self, arch, folder):
        self.arch, self.model = arch, load_model(folder, device="cpu")
        self.hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=self.model.attention).eval()
        self.blocks = self.hf.get_submodule(BLOCKS.get(arch, "model.layers"))
        self.out = OUT.get(arch, ("self_attn.o_proj", "mlp.down_proj"))
        self.tokens = torch.randint(1, 300, (3, N), generator=torch.Generator().manual_seed(1))
        self.seen, handles = {}, []
        for l,b in enumerate(self.blocks): handles += self.watch(l, b)
        with torch.no_grad(): self.logits = self.hf(self.tokens, use_cache=False).logits
        for h in handles: h.remove()
        slow = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad(): self.patterns = slow(self.tokens, use_cache=False, output_attentions=True).attentions

    def watch(self, l, block):
        def note(name, x): self.seen[name, l] = x[0] if isinstance(x, tuple) else x
        yield block.register_forward_pre_hook(lambda m, i: note("x", i))
        yield block.register_forward_hook(lambda m, i, o: note("resid_post", o))
        for path,name in zip(self.out, ("attn_z", "mlp_post")):
            yield block.get_submodule(path).register_forward_pre_hook(lambda m, i, name=name: note(name, i))
        if middle := MIDDLE.get(self.arch, "post_attention_layernorm"):
            yield block.get_submodule(middle).register_forward_pre_hook(lambda m, i: note("middle", i))
        else:
            yield block.get_submodule(ATTN.get(self.arch, "self_attn")).register_forward_hook(lambda m, i, o: note("attn_out", o))
            yield block.mlp.register_forward_hook(lambda m, i, o: note("mlp_out", o))

    def at(self, kind, l):
        "The activation at a site, from what was seen."
        if (kind, l) in self.seen: return self.seen[kind, l]
        ends = {"attn_out": ("middle", "x"), "mlp_out": ("resid_post", "middle")}[kind]
        return self.seen[ends[0], l] - self.seen[ends[1], l]

    @torch.no_grad()
    def from_stream(self, l, x, read=None):
        "Plain logits (or what comes out of block `read`) with x in the place of what block l gives."
        got = []
        swap = lambda m, i, o: (x, *o[1:]) if isinstance(o, tuple) else x
        h = [self.blocks[l].register_forward_hook(swap)]
        if read: h.append(self.blocks[read].register_forward_hook(lambda m, i, o: got.append(o[0] if isinstance(o, tuple) else o)))
        try: logits = self.hf(torch.zeros(x.shape[:2], dtype=int), use_cache=False).logits
        finally: [x.remove() for x in h]
        return got[0] if read else logits

    @torch.no_grad()
    def without(self, l, which, bias):
        "Plain logits with the weights of attention's or the MLP's last matrix at zero, and its bias kept or not."
        hf = copy.deepcopy(self.hf)
        last = hf.get_submodule(BLOCKS.get(self.arch, "model.layers"))[l].get_submodule(self.out[which])
        last.weight.zero_()
        if last.bias is not None and not bias: last.bias.zero_()
        return hf(self.tokens, use_cache=False).logits


def same(a, b, tol=1e-5):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tol*max(1., float(b.abs().max())), float((a - b).abs().max()/b.abs().max())


def sites(c):
    found = c.model.run_to(c.tokens, [Site(l, k) for l in range(LAYERS) for k in SITE_KINDS])
    for s,x in found.items():
        if s.kind != "mlp_in": same(x, c.at(s.kind, s.layer))
    same(c.model.logits(c.tokens), c.logits)


def splice(c):
    for kind, which, bias in (("attn_out", 0, False), ("mlp_out", 1, False), ("attn_z", 0, True), ("mlp_post", 1, True)):
        same(c.model.splice(c.tokens, Site(1, kind), torch.zeros_like), c.without(1, which, bias))
        same(c.model.splice(c.tokens, Site(1, kind), lambda x: x), c.logits)
    new = c.at("resid_post", 1).flip(1)
    same(c.model.splice(c.tokens, Site(1), lambda x: x.flip(1)), c.from_stream(1, new))


def run_from(c):
    for l in range(LAYERS):
        x = c.at("resid_post", l)
        same(c.model.run_from(l, x), c.logits)
        same(c.model.run_from(l, x.flip(1)), c.from_stream(l, x.flip(1)))


def packed(c):
    x, rows = c.at("resid_post", 0)[:1], torch.arange(N)[None]
    whole, known = c.model.run_packed(0, x, *renumber(rows, torch.tensor([0]), 0), {})
    same(whole, c.logits[:1, -1])
    starts = torch.tensor([2, 9, N - 1])
    new = torch.where((torch.arange(N) >= starts[:, None])[..., None], x.flip(-1), x)
    see, fresh = renumber(rows.expand(3, -1), starts, N)
    same(c.model.run_packed(0, new, see, fresh, known)[0], c.from_stream(0, new)[:, -1])
    _, known = c.model.run_between(0, 2, x, *renumber(rows, torch.tensor([0]), 0), {})
    same(c.model.run_between(0, 2, new, see, fresh, known)[0], c.from_stream(0, new, read=2)[:, -1])


def attend(c):
    for l,a in c.model.attend(c.tokens, range(LAYERS)).items():
        same(a.pattern, c.patterns[l])
        same(a.z, c.at("attn_z", l))
        same(a.scores.masked_fill(a.pattern == 0, float("-inf")).softmax(-1), c.patterns[l])


def values(c):
    for l,block in enumerate(c.blocks):
        norm = next((getattr(block, n) for n in ("input_layernorm", "ln_1") if hasattr(block, n)), lambda x: x)
        W, b = c.model.W_V(l)
        v = torch.einsum("bsm,kme->bske", norm(c.seen["x", l]), W) + b
        same(torch.einsum("bkds,bske->bdke", c.patterns[l], v).flatten(2), c.at("attn_z", l))


def outputs(c):
    for l in range(LAYERS):
        W, b = c.model.W_O(l)
        same(torch.einsum("bdke,kem->bdm", c.at("attn_z", l).unflatten(-1, (c.model.n_heads, -1)), W) + b, c.at("attn_out", l))


def scores(c):
    at, halves = torch.arange(N), torch.rand(2, N, 32, generator=torch.Generator().manual_seed(0))
    for l in range(LAYERS):
        a, x = c.model.attend(c.tokens[:1], l)[l], c.seen["x", l][0]
        parts = torch.stack([halves[0], halves[1], x - halves.sum(0)], 1)
        for head in range(c.model.n_heads):
            q, k = (c.model.qk_parts(l, head, x, parts, at, key).sum(1) for key in (False, True))
            s = a.scale*q @ k.T
            s = s if a.cap is None else a.cap*torch.tanh(s/a.cap)
            truth = c.patterns[l][0, head]
            same(s.masked_fill(truth == 0, float("-inf")).softmax(-1), truth)


def unembedding(c):
    x, norm = c.seen["resid_post", LAYERS - 1], final_norm(c.model)
    same(c.model.unembed(norm(x)), c.logits)
    frozen, U = freeze_norm(norm, x), c.model.hf.get_output_embeddings()
    raw = unembedded(c.model, x.flatten(0, 1)).view(*x.shape[:2], -1)/frozen.scale + U(frozen.shift)
    same(c.model.logits_of(raw), c.logits)


CHECKS = {"sites": sites, "splice": splice, "run from a layer": run_from, "packed runs": packed, "patterns": attend,
          "values": values, "outputs": outputs, "scores": scores, "unembedding": unembedding}
SAID = {}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                                        # these models are too small for two
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(NAMES))
def case(request, tmp_path_factory):
    return Case(request.param, tiny_model(tmp_path_factory.mktemp("m")/request.param, request.param, n_layers=LAYERS))


@pytest.mark.parametrize("what", CHECKS)
def test_exact_or_refused(case, what):
    try:
        with torch.no_grad(): CHECKS[what](case)
        said = "exact"
    except SparseCodingError as e:
        said = "refused"
        assert str(e).endswith(".") and "\n" not in str(e) and type(case.hf).__name__ in str(e)
        assert case.model.hf.config._attn_implementation == case.model.attention
    assert SAID.setdefault((NAMES[case.arch], what), said) == said     # in both kinds of StableLM


def table(said):
    head = ["", *CHECKS]
    rows = [[name, *(said[name, what] for what in CHECKS)] for name in dict.fromkeys(NAMES.values())]
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"]*len(head), *rows)]


def test_the_table_of_the_page():
    "Runs after the tests above, whose answers it collects."
    if len(SAID) < len(set(NAMES.values()))*len(CHECKS): pytest.skip("needs all tests of this file")
    page = json.loads((Path(__file__).parents[1]/"nbs/foundation/06_models.ipynb").read_text(encoding="utf-8"))
    lines = [line.rstrip("\n") for cell in page["cells"] if cell["cell_type"] == "markdown" for line in cell["source"]]
    first = lines.index(table(SAID)[0])
    assert lines[first:first + len(table(SAID))] == table(SAID)
