"""Sites, partial runs, edits and folding on tiny models, against hooks and forwards written out here."""
import shutil
import time

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sparse_coding.presets import SITE_KINDS, Site, SparseCodingError
from sparse_coding.models import (LanguageModel, final_norm, fold_weights, hub_reachable, load_model, norm_parts,
    unembedded)
from sparse_coding.partial_runs import renumber, run_z
from sparse_coding.corpora import readable, row_texts, token_texts
from sparse_coding.evidence import printable
from tiny import TEXT, llama_tokenizer, tiny_config, tiny_model, tiny_tokenizer

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


@pytest.fixture(scope="module")
def peculiar(tmp_path_factory):
    "Models of other architectures, made when they are asked for."
    made = {}
    def get(arch):
        if arch not in made: made[arch] = load_model(tiny_model(tmp_path_factory.mktemp("p")/arch, arch, n_layers=3), device="cpu")
        return made[arch]
    return get


@pytest.mark.parametrize("arch", ["gemma2", "gemma3_text", "olmo2", "granite"])
def test_attention_and_mlp_add_what_the_block_adds(peculiar, arch):
    model, tokens = peculiar(arch), torch.arange(1, 13)[None]
    x = model.run_to(tokens, [Site(1), Site(2, "attn_out"), Site(2, "mlp_out"), Site(2)])
    assert_close(x[Site(1)] + x[Site(2, "attn_out")] + x[Site(2, "mlp_out")], x[Site(2)], rtol=1e-5, atol=1e-5)
    gone = model.splice(tokens, Site(2, "mlp_out"), torch.zeros_like)
    assert_close(gone, model.run_from(2, x[Site(1)] + x[Site(2, "attn_out")]), rtol=1e-4, atol=1e-4)
    assert_close(model.splice(tokens, Site(2, "mlp_out"), lambda v: v), model.logits(tokens), rtol=1e-4, atol=1e-4)


def test_what_a_block_adds_is_refused_where_it_is_not_known(tmp_path):
    "A model that scales its branches in a way of its own: two sites are refused by name, the others work."
    hf = AutoModelForCausalLM.from_config(tiny_config("llama", 300, n_layers=2)).requires_grad_(False)
    for block in hf.model.layers: block.mlp.register_forward_hook(lambda m, i, o: .5*o)
    model, tokens = LanguageModel(hf, tiny_tokenizer(), "own"), torch.arange(1, 9)[None]
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(SparseCodingError, match="attn_out and mlp_out cannot be had"): model.run_to(tokens, Site(1, kind))
    assert set(model.run_to(tokens, [Site(1), Site(0, "attn_z"), Site(1, "mlp_post")])) and model.splice(tokens, Site(1), lambda x: x) is not None


def test_a_model_without_the_fused_kernel_loads(peculiar):
    "Gemma 2 has a soft cap in its attention, which the kernel does not know."
    assert peculiar("gemma2").attention == "eager" and peculiar("llama").attention == "sdpa"


def test_the_message_names_what_a_folder_lacks(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path/"x")
    (tmp_path/"x/model.safetensors").unlink()
    with pytest.raises(SparseCodingError, match=r"has no \*.safetensors: it needs"): load_model(tmp_path/"x")
    shutil.copytree(folders["llama"], tmp_path/"y")
    (tmp_path/"y/config.json").write_text('{"model_type": "nobody_knows"}')
    with pytest.raises(SparseCodingError, match="nobody_knows") as e: load_model(tmp_path/"y")
    assert "safetensors" not in str(e.value)


@pytest.mark.parametrize("arch", ["gemma", "gemma2", "gemma3_text", "olmo2", "cohere", "stablelm", "gptj"])
def test_the_gain_of_any_norm(peculiar, arch):
    model = peculiar(arch)
    x = model.run_to(torch.arange(1, 9)[None], Site(2))[Site(2)]
    gain, shift, centred = norm_parts(final_norm(model), x)
    y = x - x.mean(-1, keepdim=True) if centred else x
    assert_close(gain*y/(y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() + shift, final_norm(model)(x), rtol=1e-4, atol=1e-4)
    assert gain.std() > .05 and centred == (arch in ("cohere", "stablelm", "gptj"))
    if not shift.any():
        top = unembedded(model, x[0]).topk(10).indices
        assert torch.equal(top, model.logits(torch.arange(1, 9)[None])[0].topk(10).indices)


def test_the_gain_of_a_norm_of_odd_width():
    for norm in (torch.nn.LayerNorm(7), torch.nn.RMSNorm(7), torch.nn.LayerNorm(3, elementwise_affine=False)):
        n = norm.normalized_shape[0]
        for w in norm.parameters(): w.data.normal_()
        gain, shift, centred = norm_parts(norm, torch.randn(2, n))
        assert_close(gain, torch.ones(n) if norm.weight is None else norm.weight.data, rtol=1e-5, atol=1e-5)
        assert centred == isinstance(norm, torch.nn.LayerNorm)
    with pytest.raises(SparseCodingError, match="no norm"): norm_parts(torch.nn.Linear(7, 7), torch.randn(2, 7))
    with pytest.raises(SparseCodingError, match="no norm"): norm_parts(torch.nn.Tanh(), torch.randn(2, 7))


@pytest.mark.parametrize("arch", ["granite", "cohere", "gemma2"])
def test_packed_logits_are_the_model_s(peculiar, arch):
    model, tokens = peculiar(arch), torch.arange(1, 21)[None]
    x = model.run_to(tokens, Site(0))[Site(0)]
    with torch.no_grad(): logits, _ = model.run_packed(0, x, *renumber(torch.arange(20)[None], torch.tensor([0]), 0), {})
    assert_close(logits, model.logits(tokens)[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["gemma3_text", "mistral", "smollm3", "gpt2", "granite"])
def test_one_layer_s_heads_on_a_given_stream(peculiar, arch):
    "Layer 0 as well, which stands nowhere but at 0: its window and its rotation are those of its place."
    model, tokens = peculiar(arch), torch.arange(1, 21)[None]
    for l in range(3):
        seen = []
        handle = model.blocks[l].register_forward_pre_hook(lambda m, i: seen.append(i[0]))
        z = model.run_to(tokens, Site(l, "attn_z"))[Site(l, "attn_z")]
        handle.remove()
        assert_close(run_z(model, l, seen[0]), z, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def old_llama():
    tokenizer = llama_tokenizer()
    return LanguageModel(AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer), n_layers=2)), tokenizer, "old")


def test_tokens_side_by_side_are_the_text(old_llama):
    for text in ("The river runs", " the store", "the  store\n\tof stone", "\u6771\u4eac!", TEXT):
        ids = old_llama.tokenize(text)[0]
        assert "".join(row_texts(old_llama, ids)) == text
        if text.isascii(): assert "".join(old_llama.str_tokens(ids)) == text
    texts = token_texts(old_llama)
    assert " the" in texts and " t" in texts and "t" in texts           # a blank in front makes another token
    assert old_llama.tokenize(" the").tolist() == [[texts.index(" the")]]


def test_a_tokenizer_that_puts_a_blank_before_bytes():
    "The same habit of a byte-level tokenizer; one without it is left as it is."
    from tokenizers import pre_tokenizers
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    hf = AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer), n_layers=1))
    model = LanguageModel(hf, tokenizer, "x")
    assert "".join(model.str_tokens(model.tokenize("When Mary"))) == "When Mary"
    plain = tiny_tokenizer()
    assert LanguageModel(hf, plain, "y").tokenizer is plain


def test_a_tokenizer_that_prepends_by_a_rule_for_text():
    "Llama 2 as it was first converted: the blank is put there by the normalizer."
    import json
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    rules = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    rules["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules | {"pre_tokenizer": None})), eos_token="</s>")
    model = LanguageModel(AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer), n_layers=1)), tokenizer, "x")
    for text in ("The river", " the store"): assert "".join(model.str_tokens(model.tokenize(text))) == text
    assert len(model.tokenize(" the")[0]) == 1 and (model.bos_id, model.eot_id) == (2, 2)


def test_what_begins_a_text():
    from tokenizers.processors import TemplateProcessing
    hf = AutoModelForCausalLM.from_config(tiny_config("llama", 500, n_layers=1))
    def ends(tokenizer):
        model = LanguageModel(hf, tokenizer, "x")
        return model.bos_id, model.eot_id, model.adds_bos
    assert ends(tiny_tokenizer()) == (0, 0, False)
    none = llama_tokenizer()
    none.bos_token = None
    assert ends(none) == (2, 2, False)                        # no beginning of text: the end of the one before
    always = llama_tokenizer()
    always.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert ends(always) == (1, 2, True)


def test_dollars_are_safe_in_figures_and_on_pages():
    import matplotlib.pyplot as plt
    for text in ("$$", "$", "a$b$c", "\\$x$", "\n$$ "):
        for safe in (readable(text), printable(text)):
            fig = plt.figure()
            fig.text(0, 0, safe)
            fig.canvas.draw()                                 # a formula that cannot be read raises here
            plt.close(fig)
            assert safe.count("$") == safe.count(r"\$")
