"The arithmetic of attention on tiny random models of three architectures."
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from sparse_coding import attention  # noqa: F401  (adds methods)
from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.models import LanguageModel, load_model
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
