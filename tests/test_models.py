"""Sites, partial runs, edits and folding on tiny models, against hooks and forwards written out here."""
import shutil
import time

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sparse_coding.presets import SITE_KINDS, Site, SparseCodingError
from sparse_coding.models import LanguageModel, fold_weights, hub_reachable, load_model
from tiny import tiny_model

ARCHS = "gpt_neox", "gpt2", "llama"
LAYERS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {a: tiny_model(tmp_path_factory.mktemp(a)/"tiny", a) for a in ARCHS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {a: load_model(folders[a], device="cpu") for a in ARCHS}


@pytest.fixture(params=ARCHS)
def arch(request): return request.param


@pytest.fixture
def model(loaded, arch): return loaded[arch]


@pytest.fixture
def tokens(model):
    torch.manual_seed(1)
    return torch.randint(0, len(model.tokenizer), (3, 20))


def oracle(folder, tokens):
    "Every site of every layer from a model loaded afresh, with hooks put on by name, layer by layer."
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    kind = hf.config.model_type
    seen = {}
    for l in range(LAYERS):
        path, attn_name, out_proj = {
            "gpt2": ("transformer.h", "attn", "c_proj"), "gpt_neox": ("gpt_neox.layers", "attention", "dense"),
            "llama": ("model.layers", "self_attn", "o_proj")}[kind]
        block = hf.get_submodule(f"{path}.{l}")
        attn = getattr(block, attn_name)
        # attention and MLP outputs are read off the whole submodules, not off their last matrix
        attn.register_forward_hook(lambda m, i, o, l=l: seen.update({("attn_out", l): o[0]}))
        block.mlp.register_forward_hook(lambda m, i, o, l=l: seen.update({("mlp_out", l): o}))
        getattr(attn, out_proj).register_forward_hook(lambda m, i, o, l=l: seen.update({("attn_z", l): i[0]}))
        if kind == "llama":  # the hidden units by their formula, from the MLP's input
            block.mlp.register_forward_hook(lambda m, i, o, l=l: seen.update(
                {("mlp_post", l): torch.nn.functional.silu(m.gate_proj(i[0])) * m.up_proj(i[0])}))
        else:
            block.mlp.act.register_forward_hook(lambda m, i, o, l=l: seen.update({("mlp_post", l): o}))
        block.register_forward_hook(
            lambda m, i, o, l=l: seen.update({("resid_post", l): o[0] if isinstance(o, tuple) else o}))
    with torch.no_grad(): logits = hf(tokens, use_cache=False).logits
    return seen, logits


def test_every_site_of_every_layer(model, folders, arch, tokens):
    seen, logits = oracle(folders[arch], tokens)
    sites = [Site(l, k) for l in range(LAYERS) for k in SITE_KINDS]
    acts = model.run_to(tokens, sites)
    assert list(acts) == sites
    for s in sites:
        assert_close(acts[s], seen[s.kind, s.layer], rtol=1e-5, atol=1e-5)
        assert acts[s].shape[-1] == model.d_in(s) and not acts[s].is_inference()  # so that a dictionary can train on it
    assert_close(model.logits(tokens), logits)


def test_one_site_alone_stops_at_it(model, tokens):
    ran = []
    handles = [b.register_forward_hook(lambda m, i, o, l=l: ran.append(l)) for l, b in enumerate(model.blocks)]
    model.run_to(tokens, Site(2, "resid_post"))
    assert ran == [0, 1, 2]
    ran.clear()
    model.run_to(tokens, [Site(3, "attn_z"), Site(1, "mlp_post")])
    assert ran == [0, 1, 2]  # block 3 was left before its end
    for h in handles: h.remove()


def test_nothing_is_left_behind(model, tokens):
    model.run_to(tokens, Site(1, "attn_out"))
    with pytest.raises(ZeroDivisionError): model.run_with(tokens, {Site(0): lambda x: 1/0})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


@pytest.mark.parametrize("layer", [0, 3, LAYERS-1])
def test_run_from(model, tokens, layer):
    x = model.run_to(tokens, Site(layer))[Site(layer)]
    assert_close(model.run_from(layer, x), model.logits(tokens), rtol=1e-5, atol=1e-5)
    assert len(model.blocks) == LAYERS  # the model itself keeps its blocks


def test_run_from_a_changed_stream(model, tokens):
    torch.manual_seed(2)
    x = model.run_to(tokens, Site(2))[Site(2)]
    new = x + torch.randn_like(x)
    replace = lambda m, i, o: (new, *o[1:]) if isinstance(o, tuple) else new
    by_hook = model.blocks[2].register_forward_hook(replace)
    with torch.no_grad(): full = model.hf(tokens, use_cache=False).logits
    by_hook.remove()
    assert (full - model.logits(tokens)).abs().max() > .1
    assert_close(model.run_from(2, new), full, rtol=1e-5, atol=1e-5)


def test_run_from_skips_the_blocks_below(model, tokens):
    ran = []
    handles = [b.register_forward_hook(lambda m, i, o, l=l: ran.append(l)) for l, b in enumerate(model.blocks)]
    model.run_from(3, torch.randn(2, 5, model.d_model))
    for h in handles: h.remove()
    assert ran == [4, 5]


def test_gradient_by_finite_differences(model, tokens):
    x = model.run_to(tokens[:1], Site(3))[Site(3)].double()
    hf = AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float64)
    double = LanguageModel(hf, model.tokenizer, "double")
    x.requires_grad_()
    double.run_from(3, x)[0, -1, 7].backward()
    torch.manual_seed(3)
    step = 1e-3*torch.randn_like(x)  # RMSNorm works in float32 whatever it is given, so no smaller
    with torch.no_grad(): change = double.run_from(3, x + step)[0, -1, 7] - double.run_from(3, x - step)[0, -1, 7]
    assert_close(change, 2*(x.grad*step).sum(), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_splice_touches_only_what_is_kept(model, tokens, kind):
    site, keep = Site(2, kind), torch.zeros(3, 20, dtype=torch.bool)
    keep[1, 10:] = True
    wild = lambda x: torch.where(keep[..., None], 3*x.flip(-1), float("nan"))  # what it says elsewhere must not matter
    clean, out = model.logits(tokens), model.splice(tokens, site, wild, keep)
    assert_close(out[[0, 2]], clean[[0, 2]])          # other rows pass unchanged
    assert_close(out[1, :10], clean[1, :10])          # and so does what comes before
    assert (out[1, 10:] - clean[1, 10:]).abs().amax(-1).min() > 1e-3
    assert_close(model.splice(tokens, site, lambda x: x), clean)


def test_edits_at_two_sites_reach_the_activation(model, tokens):
    a, b = Site(1, "attn_out"), Site(4, "mlp_post")
    seen = {}
    def note(site, x): seen[site] = 1.5*x + torch.linspace(-1, 1, x.shape[-1]); return seen[site]
    out = model.run_with(tokens, {a: lambda x: note(a, x), b: lambda x: note(b, x)})
    alone = model.run_with(tokens, {b: lambda x: seen[b]})  # b's value already carries what a did below it
    assert not torch.allclose(out, model.logits(tokens), atol=1e-3)
    patched = model.run_with(tokens, {a: lambda x: seen[a], b: lambda x: seen[b]})
    assert_close(out, patched)
    assert not torch.allclose(out, alone, atol=1e-4)


def test_bridge_agrees_and_leaves_the_model_alone(model, tokens):
    before = model.logits(tokens)
    bridge = model.bridge()
    logits, cache = bridge.run_with_cache(tokens)
    sites = [Site(l, k) for l in range(LAYERS) for k in SITE_KINDS]
    for s, x in model.run_to(tokens, sites).items():
        assert_close(cache[s.hook_name].flatten(2), x, rtol=1e-4, atol=1e-4)
    assert_close(logits, before, rtol=1e-4, atol=1e-4)
    assert model.hf.config._attn_implementation == "sdpa"
    assert all(getattr(m, "config", model.hf.config)._attn_implementation == "sdpa" for m in model.hf.modules())
    shared = {w.data_ptr() for w in bridge.parameters()}
    assert model.hf.get_input_embeddings().weight.data_ptr() in shared
    assert torch.equal(model.logits(tokens), before)


@pytest.mark.parametrize("arch", ["gpt_neox", "gpt2"])
def test_folding_keeps_log_probabilities(folders, arch):
    raw, folded = load_model(folders[arch], device="cpu"), load_model(folders[arch], fold=True, device="cpu")
    torch.manual_seed(4)
    tokens = torch.randint(0, len(raw.tokenizer), (2, 30))
    assert_close(folded.logits(tokens).log_softmax(-1), raw.logits(tokens).log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert folded.fingerprint != raw.fingerprint
    for l in range(LAYERS):
        x, y = raw.run_to(tokens, Site(l))[Site(l)], folded.run_to(tokens, Site(l))[Site(l)]
        assert x.mean(-1).abs().max() > 1e-2
        assert_close(y, x - x.mean(-1, keepdim=True), rtol=1e-3, atol=1e-4)
        s = Site(l, "mlp_post")
        assert_close(folded.run_to(tokens, s)[s], raw.run_to(tokens, s)[s], rtol=1e-3, atol=1e-4)
    for m in folded.hf.modules():
        if isinstance(m, torch.nn.LayerNorm): assert (m.weight == 1).all() and (m.bias == 0).all()
    head = folded.hf.get_output_embeddings()
    assert head.weight.mean(0).abs().max() < 1e-6 and abs(head.bias.mean()) < 1e-6
    x = folded.run_to(tokens, Site(1))[Site(1)]
    assert_close(folded.run_from(1, x), folded.logits(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt_neox", "gpt2"])
def test_bridge_over_a_folded_model(folders, arch):
    folded, tokens = load_model(folders[arch], fold=True, device="cpu"), torch.arange(20)[None]
    logits, cache = folded.bridge().run_with_cache(tokens)
    s = Site(2)
    assert_close(cache[s.hook_name], folded.run_to(tokens, s)[s], rtol=1e-4, atol=1e-4)
    assert_close(logits, folded.logits(tokens), rtol=1e-4, atol=1e-4)


def test_folding_without_attention_biases(tmp_path):
    from transformers import GPTNeoXConfig
    torch.manual_seed(5)
    config = GPTNeoXConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, attention_bias=False)
    hf = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, w in hf.named_parameters():
        if w.ndim == 1: w += .3*torch.randn_like(w)
    tokens = torch.arange(12)[None]
    before = hf(tokens).logits.log_softmax(-1)
    assert_close(fold_weights(hf)(tokens).logits.log_softmax(-1), before, rtol=1e-4, atol=1e-5)


def test_rmsnorm_models_are_not_folded(folders):
    with pytest.raises(SparseCodingError, match="RMSNorm"): load_model(folders["llama"], fold=True)


def test_fingerprints(folders, tmp_path):
    first = load_model(folders["gpt2"], device="cpu")
    moved = shutil.copytree(folders["gpt2"], tmp_path/"elsewhere")
    assert load_model(moved, device="cpu").fingerprint == first.fingerprint
    other = load_model(tiny_model(tmp_path/"other", "gpt2", seed=1), device="cpu")
    assert other.fingerprint != first.fingerprint and other.vocab_fingerprint == first.vocab_fingerprint


def test_tokens(loaded):
    model = loaded["gpt_neox"]
    ids = model.tokenize("It's the store")
    assert ids.shape[0] == 1 and "".join(model.str_tokens(ids)) == "It's the store"
    assert model.eot_id == model.bos_id == model.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_bad_input(loaded, tmp_path):
    model = loaded["gpt2"]
    some = torch.zeros(1, 3, dtype=int)
    with pytest.raises(SparseCodingError, match="Layer 6 is out of range"): model.run_to(some, Site(6))
    with pytest.raises(SparseCodingError, match="Layer 9 is out of range"): model.run_from(9, torch.zeros(1, 3, 32))
    with pytest.raises(SparseCodingError, match="longer than the context"): model.logits(torch.zeros(1, 513, dtype=int))
    with pytest.raises(SparseCodingError, match=r"\[batch, seq\]"): model.logits(torch.zeros(3, dtype=int))
    with pytest.raises(SparseCodingError, match="no model at"): load_model(tmp_path/"nothing")
    (tmp_path/"empty").mkdir()
    with pytest.raises(SparseCodingError, match="No language model could be read"): load_model(tmp_path/"empty")


def test_without_a_hub_nothing_is_asked_of_it(monkeypatch):
    "When the first question goes unanswered, no other is put: only earlier downloads are looked at."
    import sparse_coding.models as models
    asked = []
    def silent(*args, **kwargs): raise OSError("no route to host")
    def from_pretrained(name, **kwargs): asked.append(kwargs.get("local_files_only")); raise OSError("not here")
    monkeypatch.setattr(models, "get_session", silent)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(SparseCodingError, match="nothing was downloaded before"): load_model("nobody/no-such-model")
    assert asked == [True]


def test_a_hub_name_without_a_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    assert not hub_reachable()
    with pytest.raises(SparseCodingError, match='use "embedded", or the path') as e: load_model("nobody/no-such-model")
    assert time.perf_counter() - start < 10
    assert "\n" not in str(e.value)
