"The arithmetic of attention on tiny random models of three architectures."
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sparse_coding import attention  # noqa: F401  (adds methods)
from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.models import LanguageModel, load_model
from sparse_coding.partial_runs import renumber
from sparse_coding.attention import freeze_norm
from tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def seen(request, tmp_path_factory):
    model = load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", request.param)), device="cpu")
    tokens = torch.randint(1, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    return model, tokens, model.attend(tokens, [1, 4])


def test_patterns_are_those_of_transformers(seen):
    model, tokens, found = seen
    model.hf.set_attn_implementation("eager")
    try: other = model.hf(tokens, output_attentions=True).attentions
    finally: model.hf.set_attn_implementation("sdpa")
    for l, a in found.items(): assert_close(a.pattern, other[l], atol=1e-5, rtol=1e-4)


def test_z_from_patterns_and_values(seen):
    model, tokens, found = seen
    for l, a in found.items():
        z = model.run_to(tokens, Site(l, "attn_z"))[Site(l, "attn_z")]
        assert_close(a.z, z, atol=1e-4*float(z.abs().max()), rtol=0)


def test_scores_give_the_pattern(seen):
    _, _, found = seen
    for a in found.values():
        s = a.scale*torch.einsum("bdhe,bshe->bhds", a.q, a.k)
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        assert_close(s.softmax(-1), a.pattern, atol=1e-5, rtol=1e-4)


def test_values_and_outputs_by_head(seen):
    model, tokens, found = seen
    for l, a in found.items():
        x = model.resid_pre(tokens, [l])[l]
        (W, b), (O, c) = model.W_V(l), model.W_O(l)
        v = torch.einsum("bsm,kme->bske", model.attn_norm(l)(x), W) + b
        assert_close(a.v, v, atol=1e-3*float(v.abs().max()), rtol=0)
        out = model.run_to(tokens, Site(l, "attn_out"))[Site(l, "attn_out")]
        assert_close(torch.einsum("bdke,kem->bdm", a.z.unflatten(-1, (model.n_heads, -1)), O) + c, out, atol=1e-3*float(out.abs().max()), rtol=0)


def test_a_frozen_norm_is_the_norm_and_linear(seen):
    model, tokens, _ = seen
    x, module = model.resid_pre(tokens, [4])[4], model.attn_norm(4)
    norm, half = freeze_norm(module, x), torch.randn(x.shape)
    assert_close(norm(x), module(x), atol=1e-5, rtol=1e-4)
    assert_close(norm(half) + norm(x - half) - norm.shift, module(x), atol=1e-4, rtol=1e-4)
    u = torch.randn(x.shape[-1])
    assert_close((x*norm.pull_back(u, norm.scale)).sum(-1) + u @ norm.shift, module(x) @ u, atol=1e-4, rtol=1e-4)


def test_a_reading_is_the_sum_over_heads_and_sources(seen):
    _, _, found = seen
    for a in found.values():
        w = torch.randn(a.z.shape[-1])
        assert_close(a.by_source(w).sum((1, 3)), a.z @ w, atol=1e-4*float(a.z.abs().max()), rtol=1e-3)
        at = torch.tensor([2, 16, 0])
        assert_close(a.by_source(w, at), a.by_source(w)[torch.arange(3), :, at])
        assert (a.by_source(w, at)[2, :, 1:] == 0).all()


def test_one_layer_or_many(seen):
    model, tokens, found = seen
    assert_close(model.attend(tokens, 4)[4].pattern, found[4].pattern)
    with pytest.raises(SparseCodingError, match="out of range"): model.attend(tokens, [0, 6])
    assert model.hf.config._attn_implementation == "sdpa"


def test_what_is_no_norm(seen):
    with pytest.raises(SparseCodingError, match="no norm"): freeze_norm(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_a_neox_without_biases_in_attention():
    config = tiny_config("gpt_neox", len(tokenizer := tiny_tokenizer()))
    config.attention_bias = False
    model = LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer, "plain")
    (W, b), tokens = model.W_V(2), torch.arange(1, 9)[None]
    v = torch.einsum("bsm,kme->bske", model.attn_norm(2)(model.resid_pre(tokens, [2])[2]), W)
    assert_close(model.attend(tokens, 2)[2].v, v, atol=1e-4, rtol=1e-3)
    assert not b.any()


@pytest.fixture(scope="module")
def peculiar(tmp_path_factory):
    return lambda arch: load_model(tiny_model(tmp_path_factory.mktemp("p")/arch, arch, n_layers=3), device="cpu")


def stored(model):
    "Patterns from the same weights, by the model's own slow attention."
    hf = AutoModelForCausalLM.from_pretrained(model.source, attn_implementation="eager").eval()
    return lambda tokens: hf(tokens, use_cache=False, output_attentions=True).attentions


@pytest.mark.parametrize("arch", ["mistral", "qwen2", "gemma3_text", "phi3", "smollm3", "gemma2"])
def test_windows_and_caps(peculiar, arch):
    "Rows of 20 tokens, windows of 7 and, in Gemma 2, a cap of 2."
    model, tokens = peculiar(arch), torch.arange(1, 21)[None].repeat(2, 1)
    truth, seen = stored(model)(tokens), model.attend(tokens, range(3))
    for l,a in seen.items(): assert_close(a.pattern, truth[l], atol=1e-5, rtol=1e-4)
    assert any((truth[l][0, 0, 19, :13] == 0).all() for l in range(3))
    x = model.run_to(tokens, Site(0))[Site(0)]
    with torch.no_grad(): logits, _ = model.run_packed(0, x, *renumber(torch.arange(20).expand(2, -1), torch.tensor([0, 19]), 0), {})
    assert_close(logits, model.logits(tokens)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["qwen3", "gemma3_text", "olmo2", "cohere", "stablelm", "smollm3", "phi3", "gpt_neox"])
def test_queries_and_keys_in_parts(peculiar, arch):
    model, tokens = peculiar(arch), torch.arange(1, 21)[None]
    x, at = model.resid_pre(tokens, range(3)), torch.arange(20)
    for l,a in model.attend(tokens, range(3)).items():
        half = torch.randn(20, 32)
        parts = torch.stack([half, x[l][0] - half], 1)
        for head in (0, 3):
            for key, whole in ((False, a.q), (True, a.k)):
                found = model.qk_parts(l, head, x[l][0], parts, at, key)
                assert found.shape == (20, 3, whole.shape[-1])
                assert_close(found.sum(1), whole[0, :, head], atol=1e-4*float(whole.abs().max()), rtol=0)


def test_phi_3_keeps_all_three_in_one_matrix(peculiar):
    model, tokens = peculiar("phi3"), torch.arange(1, 12)[None]
    (W, b), seen = model.W_V(1), model.attend(tokens, 1)[1]
    v = torch.einsum("bsm,kme->bske", model.attn_norm(1)(model.resid_pre(tokens, [1])[1]), W) + b
    assert_close(seen.v, v, atol=1e-5*float(v.abs().max()), rtol=0)


def test_what_heads_write_behind_a_norm_is_refused(peculiar):
    with pytest.raises(SparseCodingError, match="Gemma3ForCausalLM sends what its heads bring through a norm"): peculiar("gemma3_text").W_O(0)


def test_attention_in_its_own_code_is_refused(peculiar):
    model, tokens = peculiar("gptj"), torch.arange(1, 9)[None]
    for call in (lambda: model.attend(tokens, 1), lambda: model.W_V(0), lambda: model.masks(4),
                 lambda: model.run_packed(0, torch.zeros(1, 4, 32), torch.arange(4)[None], torch.ones(1, 4, dtype=bool), {})):
        with pytest.raises(SparseCodingError, match="GPTJForCausalLM computes attention in its own code"): call()
    assert model.hf.config._attn_implementation == "eager"


def test_what_is_not_known_of_is_noticed(tmp_path):
    "At the first call, and said again by every other."
    model, tokens = load_model(tiny_model(tmp_path/"x", "llama", n_layers=2), device="cpu"), torch.arange(1, 9)[None]
    model.blocks[1].self_attn.q_norm = torch.nn.RMSNorm(8, 1e-6)             # it says that it norms, and does not
    for layer in (1, 0):
        with pytest.raises(SparseCodingError, match="makes queries and keys in a way that is not known"):
            model.qk_parts(layer, 0, torch.randn(2, 32), torch.randn(2, 1, 32), torch.arange(2), False)
    assert model.attend(tokens, 1)[1].pattern.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("rope", [dict(rope_type="yarn", factor=4., original_max_position_embeddings=16), dict(
    rope_type="longrope", factor=4., short_factor=[1., 1.2, 1.3, 1.1], long_factor=[2., 3., 4., 5.],
    original_max_position_embeddings=16)])
def test_angles_that_depend_on_the_length_of_the_row(rope):
    config = tiny_config("llama", len(tokenizer := tiny_tokenizer()), n_layers=2, context=64)
    config.rope_parameters = dict(rope, rope_theta=1e4)
    model, tokens = LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer, "x"), torch.arange(1, 33)[None]
    x, a, at = model.resid_pre(tokens, [1])[1][0], model.attend(tokens, 1)[1], torch.tensor([1, 5, 9])
    for key, whole in ((False, a.q), (True, a.k)):
        found = model.qk_parts(1, 3, x[at], x[at, None], at, key, length=32).sum(1)
        assert_close(found, whole[0, at, 3], atol=1e-6, rtol=1e-4)
