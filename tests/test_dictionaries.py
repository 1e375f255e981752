"""Dictionaries against files laid out by hand, forward passes in numpy, and brute force."""
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.dictionaries import (TiedSAE, TopKSAE, UntiedSAE, evaluate, load_saved, matched_cosines,
    max_cosines, mmcs, total_variance)
from sparse_coding.suites import load_dictionary

D_IN, D_SAE = 3, 5


def weights(seed=0, unit=True):
    "Four tensors as SAELens stores them."
    rng = np.random.default_rng(seed)
    t = {"W_enc": rng.normal(size=(D_IN, D_SAE)), "W_dec": rng.normal(size=(D_SAE, D_IN)),
         "b_enc": rng.normal(size=D_SAE), "b_dec": rng.normal(size=D_IN)}
    if unit: t["W_dec"] /= np.linalg.norm(t["W_dec"], axis=1, keepdims=True)
    return {k: v.astype(np.float32) for k, v in t.items()}


def cfg(architecture="standard", metadata=None, **more):
    "cfg.json as SAELens 6 writes it."
    return {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
            "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small",
                         "hook_name": "blocks.8.hook_resid_pre", **(metadata or {})}, **more}


def lay_out(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"cfg.json").write_text(json.dumps(config))
    save_file(tensors, folder/"sae_weights.safetensors")
    return folder


def by_numpy(x, t, subtract=True, k=None, rescale=False):
    "The documented forward pass: act((x - b_dec) W_enc + b_enc) W_dec + b_dec."
    t = {n: v.astype(np.float64) for n, v in t.items()}
    a = (x - t["b_dec"] if subtract else x) @ t["W_enc"] + t["b_enc"]
    c = np.maximum(a, 0)
    if k:
        rank = a*np.linalg.norm(t["W_dec"], axis=1) if rescale else a
        kept = np.argsort(-rank, axis=1)[:, :k]
        mask = np.zeros_like(c)
        np.put_along_axis(mask, kept, 1, axis=1)
        c = c*mask
    return c, c @ t["W_dec"] + t["b_dec"]


@pytest.fixture
def x():
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))


def agrees(d, x, expected):
    c, x_hat = expected
    torch.testing.assert_close(d.encode(x), torch.tensor(c).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(d(x), torch.tensor(x_hat).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("subtract", [True, False])
def test_reads_a_standard_file(tmp_path, x, subtract):
    t = weights()
    d = load_dictionary(lay_out(tmp_path, cfg(apply_b_dec_to_input=subtract), t))
    agrees(d, x, by_numpy(x.numpy(), t, subtract))
    assert type(d) is UntiedSAE and not any(q.requires_grad for q in d.parameters())
    assert d.metadata["site"] == "resid_post.7"             # what enters block 8 is what left block 7


def test_reads_a_topk_file(tmp_path, x):
    t = weights(2)
    d = load_dictionary(lay_out(tmp_path, cfg("topk", k=2, rescale_acts_by_decoder_norm=False), t))
    agrees(d, x, by_numpy(x.numpy(), t, k=2))
    assert d.k == 2 and (d.encode(x) != 0).sum(-1).max() <= 2


def test_reads_a_tied_file(tmp_path, x):
    t = weights(3)
    t["W_enc"], t["b_dec"] = np.ascontiguousarray(t["W_dec"].T), np.zeros(D_IN, dtype=np.float32)
    d = load_dictionary(lay_out(tmp_path, cfg(metadata={"tied": True, "norm": "project"}, apply_b_dec_to_input=False), t))
    assert type(d) is TiedSAE
    agrees(d, x, by_numpy(x.numpy(), t, subtract=False))


def test_reads_a_file_from_before_version_6(tmp_path, x):
    t = weights(4)
    old = {"d_in": D_IN, "d_sae": D_SAE, "hook_point": "blocks.2.hook_mlp_out", "model_name": "gpt2-small",
           "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    d = load_dictionary(lay_out(tmp_path, old, t))
    agrees(d, x, by_numpy(x.numpy(), t, k=3))
    assert d.metadata["site"] == "mlp_out.2" and d.metadata["model_name"] == "gpt2-small"


def test_rows_of_other_lengths_are_folded_without_changing_reconstructions(tmp_path, x):
    t = weights(5, unit=False)
    t["W_dec"][2] = 0                                       # a dead row stays what it is
    d = load_dictionary(lay_out(tmp_path/"relu", cfg(), t))
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.tensor([1., 1., 0., 1., 1.]))
    torch.testing.assert_close(d(x), torch.tensor(by_numpy(x.numpy(), t)[1]).float(), atol=1e-5, rtol=1e-4)
    t["W_dec"][2] = 3
    d = load_dictionary(lay_out(tmp_path/"topk", cfg("topk", k=2, rescale_acts_by_decoder_norm=True), t))
    x_hat = by_numpy(x.numpy(), t, k=2, rescale=True)[1]
    torch.testing.assert_close(d(x), torch.tensor(x_hat).float(), atol=1e-5, rtol=1e-4)
    with pytest.raises(SparseCodingError, match="not of length one"):
        load_dictionary(lay_out(tmp_path/"plain", cfg("topk", k=2), t))


def dictionaries():
    made = [TiedSAE(D_IN, D_SAE), TiedSAE(D_IN, D_SAE, norm="project"), UntiedSAE(D_IN, D_SAE),
            UntiedSAE(D_IN, D_SAE, pre_bias=True), TopKSAE(D_IN, D_SAE, k=2)]
    for i, d in enumerate(made):
        g = torch.Generator().manual_seed(i)
        d.b_enc.data = torch.randn(D_SAE, generator=g)
        if d.pre_bias: d.b_dec.data = torch.randn(D_IN, generator=g)
        if d.norm == "in_loss": d.M.data *= 1 + torch.rand(D_SAE, 1, generator=g)
    return made


@pytest.mark.parametrize("d", dictionaries(), ids=lambda d: f"{type(d).__name__}-{d.norm}-{d.pre_bias}")
def test_what_we_write_follows_the_documented_forward_pass(tmp_path, x, d):
    d.metadata = {"site": "resid_post.4", "model_name": "tiny"}
    d.save(tmp_path)
    config, t = json.loads((tmp_path/"cfg.json").read_text()), load_file(tmp_path/"sae_weights.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert {k: v.shape for k, v in t.items()} == {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    assert all(v.dtype == np.float32 for v in t.values())
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["architecture"] == ("topk" if isinstance(d, TopKSAE) else "standard")
    assert config["metadata"]["hook_name"] == Site(4, "resid_post").hook_name
    np.testing.assert_allclose(np.linalg.norm(t["W_dec"], axis=1), 1, atol=1e-6)
    agrees(d, x, by_numpy(x.numpy(), t, config["apply_b_dec_to_input"], config.get("k")))
    back = load_saved(tmp_path)
    assert torch.equal(load_dictionary(tmp_path)(x), back(x))
    assert type(back) is type(d) and torch.equal(back.W_dec, d.W_dec.detach()) and torch.equal(back.W_enc, d.W_enc.detach())
    assert load_saved(back.save(tmp_path/"again")).metadata == back.metadata


def test_attention_files_say_that_heads_are_flattened(tmp_path):
    d = TiedSAE(D_IN, D_SAE)
    assert d.cfg["reshape_activations"] == "none"
    d.metadata["site"] = "attn_z.1"
    assert d.cfg["reshape_activations"] == "hook_z" and d.cfg["metadata"]["hook_name"] == "blocks.1.attn.hook_z"


@pytest.mark.parametrize("break_it, says", [
    (lambda c, t: c.update(architecture="gated"), "hold no b_gate"),
    (lambda c, t: c.update(architecture="temporal"), "architecture is 'temporal'"),
    (lambda c, t: c.pop("architecture"), "architecture is None"),
    (lambda c, t: c.update(normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
    (lambda c, t: c.update(d_in=4), "has shape"),
    (lambda c, t: t.pop("b_dec"), "hold no b_dec"),
    (lambda c, t: t["b_enc"].__setitem__(0, np.nan), "b_enc holds NaN"),
    (lambda c, t: c["metadata"].update(tied=True, norm="project"), "calls itself tied"),
])
def test_refuses_what_it_cannot_honour(tmp_path, break_it, says):
    c, t = cfg(), weights()
    break_it(c, t)
    with pytest.raises(SparseCodingError, match=says): load_dictionary(lay_out(tmp_path, c, t))


def test_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(SparseCodingError, match="cfg.json is missing"): load_saved(tmp_path/"nowhere")
    lay_out(tmp_path, cfg(metadata={"tied": False, "norm": "project"}), weights())
    whole = (tmp_path/"sae_weights.safetensors").read_bytes()
    (tmp_path/"sae_weights.safetensors").write_bytes(whole[:-7])
    with pytest.raises(SparseCodingError, match="missing or damaged"): load_saved(tmp_path)
    (tmp_path/"sae_weights.safetensors").unlink()
    with pytest.raises(SparseCodingError, match="missing or damaged"): load_saved(tmp_path)
    (tmp_path/"cfg.json").write_text("{")
    with pytest.raises(SparseCodingError, match="not readable as JSON"): load_saved(tmp_path)


@pytest.mark.parametrize("make", [lambda: TiedSAE(D_IN, D_SAE), lambda: UntiedSAE(D_IN, D_SAE, pre_bias=True),
                                  lambda: UntiedSAE(D_IN, D_SAE, norm="project")])
def test_gradients_agree_with_finite_differences(make):
    d = make().double()
    x = torch.randn(4, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names, values = zip(*((n, q.detach().clone().requires_grad_()) for n, q in d.named_parameters()))
    loss = lambda *v: (x - torch.func.functional_call(d, dict(zip(names, v)), (x,))).pow(2).sum()
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("d", dictionaries(), ids=lambda d: f"{type(d).__name__}-{d.norm}-{d.pre_bias}")
def test_scaled_equals_scaling_by_hand(x, d):
    torch.testing.assert_close(d.scaled(.1).encode(x), 10*d.encode(.1*x))
    torch.testing.assert_close(d.scaled(.1)(x), 10*d(.1*x))


def test_scaling_twice_is_scaling_by_the_product(x):
    d = UntiedSAE(D_IN, D_SAE, pre_bias=True)
    d.b_dec.data += 1
    torch.testing.assert_close(d.scaled(2.).scaled(5.)(x), d.scaled(10.)(x))
    assert d.scaled(2.).scaled(5.).metadata["input_scale"] == 10 and d.metadata == {} and (d.b_dec == 1).all()
    for s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(SparseCodingError, match="positive"): d.scaled(s)


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_evaluate_does_not_depend_on_how_the_stream_is_cut(size):
    x = 1e3 + torch.randn(500, D_IN, generator=torch.Generator().manual_seed(2))
    d = TopKSAE(D_IN, D_SAE, k=2)
    d.b_dec.data += 1e3
    with torch.no_grad(): c, x_hat = (v.double().numpy() for v in (d.encode(x), d(x)))
    fires = (c != 0).sum(0)
    enough = int(np.sort(fires)[2])                         # exactly reached by one feature, missed by two
    m = evaluate(d, x.split(size), min_fires=enough)
    x = x.double().numpy()
    error = ((x - x_hat)**2).sum()
    cosines = (x*x_hat).sum(1)/np.linalg.norm(x, axis=1)/np.linalg.norm(x_hat, axis=1)
    expected = dict(l0=(c != 0).sum()/500, fvu=error/((x - x.mean(0))**2).sum(), mse=error/500, cossim=cosines.mean(),
                    frac_alive=3/5, n=500)
    expected["explained_variance"] = 1 - expected["fvu"]
    assert m.keys() == expected.keys()
    for key, value in expected.items(): np.testing.assert_allclose(m[key], value, rtol=1e-6, err_msg=key)


def test_variance_survives_a_mean_that_float32_cannot_square():
    x = 3e4 + torch.randn(4000, 2, generator=torch.Generator().manual_seed(3))
    constant = UntiedSAE(2, 1)
    constant.W_enc.data.zero_()
    constant.b_dec.copy_(x.mean(0))
    assert abs(evaluate(constant, x.split(100))["fvu"] - 1) < 1e-3
    np.testing.assert_allclose(total_variance(x), x.double().numpy().var(0).sum(), rtol=1e-9)


def test_evaluate_refuses_nan_and_nothing():
    x = torch.zeros(10, D_IN)
    x[3, 1] = float("inf")
    with pytest.raises(SparseCodingError, match="Row 3 "): evaluate(TiedSAE(D_IN, D_SAE), x.split(2))
    with pytest.raises(SparseCodingError, match="empty"): evaluate(TiedSAE(D_IN, D_SAE), [])
    with pytest.raises(SparseCodingError, match="no variance"): evaluate(TiedSAE(D_IN, D_SAE), [torch.ones(5, D_IN)])


def test_cosines_by_brute_force():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(6, 4)), rng.normal(size=(5, 4))
    cos = lambda a, b: a @ b/np.linalg.norm(a)/np.linalg.norm(b)
    expected = [max(cos(a, b) for a in A) for b in B]
    np.testing.assert_allclose(max_cosines(torch.tensor(A), torch.tensor(B)), expected)
    np.testing.assert_allclose(mmcs(torch.tensor(A), torch.tensor(B)), np.mean(expected))
    best = max(sum(cos(A[i], b) for i, b in zip(order, B)) for order in itertools.permutations(range(6), 5))
    np.testing.assert_allclose(matched_cosines(torch.tensor(A), torch.tensor(B)).sum(), best)


def test_initial_weights_follow_the_seed_and_the_xavier_bound():
    a, b, c = TiedSAE(30, 60, seed=1), TiedSAE(30, 60, seed=1), TiedSAE(30, 60, seed=2)
    bound = (6/(30 + 60))**.5
    assert torch.equal(a.M, b.M) and not torch.equal(a.M, c.M)
    assert .95*bound < a.M.abs().max() <= bound and abs(a.M.std().item() - bound/3**.5) < .02
    g = torch.Generator().manual_seed(1)
    assert torch.equal(TiedSAE(30, 60, seed=g).M, a.M) and not torch.equal(TiedSAE(30, 60, seed=g).M, a.M)
