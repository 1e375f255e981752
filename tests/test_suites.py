"""Dictionaries of other libraries: files made by hand with sizes that cannot be confused, forward passes in numpy, and odd files."""
import json
import pickle

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.dictionaries import Dictionary, TopKSAE, UntiedSAE
from sparse_coding.suites import (GatedSAE, JumpReLUSAE, load_dictionary, site_of, write_circuit_tracer,
    write_hub_repository, write_sparsify)

D, N, OUT = 4, 6, 5
X = np.random.default_rng(9).normal(size=(40, D)).astype(np.float32)


def arrays(out=D, seed=0, unit=False):
    "Weights in our layout, rows of different lengths, float32."
    rng = np.random.default_rng(seed)
    t = dict(W_enc=rng.normal(size=(D, N)), W_dec=rng.normal(size=(N, out)), b_enc=rng.normal(size=N),
             b_dec=rng.normal(size=out), threshold=rng.uniform(.2, 1, N))
    if unit: t["W_dec"] /= np.linalg.norm(t["W_dec"], axis=1, keepdims=True)
    return {k: v.astype(np.float32) for k, v in t.items()}


def relu(h): return np.maximum(h, 0)


def largest(h, k):
    kept = np.zeros_like(h, dtype=bool)
    np.put_along_axis(kept, np.argsort(-h, axis=1)[:, :k], True, axis=1)
    return relu(h)*kept


def write(folder, **files):
    "Files by name, with __ for a dot: dicts as JSON, dicts of arrays as safetensors."
    folder.mkdir(parents=True, exist_ok=True)
    for name, what in files.items():
        file = folder/name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors": save_file({k: np.ascontiguousarray(v) for k, v in what.items()}, file)
        elif file.suffix == ".npz": np.savez(file, **what)
        elif file.suffix == ".pt": torch.save({k: torch.tensor(v) for k, v in what.items()}, file)
        elif file.suffix == ".yaml": file.write_text(yaml.safe_dump(what))
        else: file.write_text(json.dumps(what))
    return folder


def agrees(d, codes, y):
    "Codes are lengths of what is written; outputs are the same."
    lengths = np.linalg.norm(d.W_dec.numpy(), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    np.testing.assert_allclose(d.encode(torch.tensor(X)).numpy(), codes, atol=2e-6, rtol=2e-5)
    np.testing.assert_allclose(d(torch.tensor(X)).numpy(), y, atol=4e-6, rtol=2e-5)
    assert not any(q.requires_grad for q in d.parameters())


def lens(folder, t, architecture="standard", meta=None, drop=(), **more):
    cfg = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "apply_b_dec_to_input": True,
           "normalize_activations": "none", "reshape_activations": "none",
           "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_post",
                        **(meta or {})}, **more}
    return write(folder, cfg__json={k: v for k, v in cfg.items() if k not in drop}, sae_weights__safetensors=t)


# --- SAELens ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("subtract", [True, False])
def test_saelens_jumprelu_by_numpy(tmp_path, subtract):
    t = arrays()
    h = (X - t["b_dec"]*subtract) @ t["W_enc"] + t["b_enc"]
    c = h*(h > t["threshold"])
    d = load_dictionary(lens(tmp_path, t, "jumprelu", apply_b_dec_to_input=subtract))
    assert type(d) is JumpReLUSAE and d.metadata["site"] == "resid_post.3" and d.metadata["model_name"] == "gpt2-small"
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"])


def test_a_code_exactly_at_its_threshold_is_silent(tmp_path):
    t = dict(W_enc=np.eye(D, N), W_dec=np.eye(N, D) + np.eye(N, D, -4), b_enc=np.zeros(N), b_dec=np.zeros(D), threshold=np.ones(N))
    d = load_dictionary(lens(tmp_path, {k: v.astype(np.float32) for k, v in t.items()}, "jumprelu"))
    assert d.encode(torch.tensor([[1., 1.5, 0., -2.]])).tolist() == [[0., 1.5, 0., 0., 0., 0.]]


def test_saelens_gated_by_numpy(tmp_path):
    rng, t = np.random.default_rng(3), arrays()
    t = {k: t[k] for k in ("W_enc", "W_dec", "b_dec")} | {k: rng.normal(size=N).astype(np.float32) for k in ("b_gate", "b_mag", "r_mag")}
    h = (X - t["b_dec"]) @ t["W_enc"]
    c = relu(h*np.exp(t["r_mag"]) + t["b_mag"])*(h + t["b_gate"] > 0)
    d = load_dictionary(lens(tmp_path/"a", t, "gated"))
    assert type(d) is GatedSAE
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"])
    again = load_dictionary(d.save(tmp_path/"b"))
    assert torch.equal(again(torch.tensor(X)), d(torch.tensor(X))) and type(again) is GatedSAE


@pytest.mark.parametrize("word, skip", [("transcoder", False), ("skip_transcoder", True), ("jumprelu_transcoder", False),
                                        ("jumprelu_skip_transcoder", True)])
def test_saelens_transcoders_by_numpy(tmp_path, word, skip):
    t = arrays(OUT)
    if "jumprelu" not in word: t.pop("threshold")
    if skip: t["W_skip"] = np.random.default_rng(5).normal(size=(OUT, D)).astype(np.float32)
    h = X @ t["W_enc"] + t["b_enc"]                                           # b_dec belongs to the output
    c = h*(h > t["threshold"]) if "threshold" in t else relu(h)
    y = c @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].T if skip else 0)
    meta = dict(hook_name="blocks.2.ln2.hook_normalized", hook_name_out="blocks.2.hook_mlp_out")
    d = load_dictionary(lens(tmp_path/"a", t, word, meta, d_out=OUT))
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), y)
    assert d.d_out == OUT and d.metadata["reads"] == "before the norm's gain" and "site" not in d.metadata
    again = load_dictionary(d.save(tmp_path/"b"))
    assert torch.equal(again(torch.tensor(X)), d(torch.tensor(X)))
    written = json.loads((tmp_path/"b"/"cfg.json").read_text())
    assert written["architecture"] == word and written["d_out"] == OUT


@pytest.mark.parametrize("cfg", [
    {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 3}},
    {"architecture": "topk", "activation_fn_kwargs": {"k": 3}},
    {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
    {"architecture": "topk", "k": 3, "metadata": {"sae_lens_version": "6.1.0"}},
    {"architecture": "standard", "activation_fn_name": "topk", "activation_fn_kwargs": {"k": 3}}])
def test_topk_however_it_is_told(tmp_path, cfg):
    t = arrays(unit=True)
    t.pop("threshold")
    d = load_dictionary(write(tmp_path, cfg__json={"d_in": D, "d_sae": N, **cfg}, sae_weights__safetensors=t))
    c = largest((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 3)
    assert type(d) is TopKSAE and d.k == 3
    agrees(d, c, c @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuned_factors_multiply_codes_or_are_refused(tmp_path, name):
    t, f = arrays(), np.linspace(.5, 2, N).astype(np.float32)
    t.pop("threshold")
    old = {"d_in": D, "d_sae": N, "hook_point": "blocks.2.hook_mlp_out", "finetuning_scaling_factor": True}
    d = load_dictionary(write(tmp_path/"a", cfg__json=old, sae_weights__safetensors=t | {name: f}))
    c = relu((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"])*f
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"])
    plain = write(tmp_path/"b", cfg__json=old | {"finetuning_scaling_factor": False}, sae_weights__safetensors=t | {name: f})
    with pytest.raises(SparseCodingError, match="scaling factors that are not 1"): load_dictionary(plain)
    ones = write(tmp_path/"c", cfg__json=old | {"finetuning_scaling_factor": False}, sae_weights__safetensors=t | {name: 0*f + 1})
    assert type(load_dictionary(ones)) is UntiedSAE


@pytest.mark.parametrize("value, says", [(False, None), ("none", None), (True, "not in the file"), ("layer_norm", "token by token"),
                                         ("expected_average_only_in", "not in the file"), ("constant_norm_rescale", "token by token")])
def test_scaling_of_inputs_is_honoured_or_refused(tmp_path, value, says):
    t = arrays()
    t.pop("threshold")
    folder = write(tmp_path, cfg__json={"d_in": D, "d_sae": N, "normalize_activations": value}, sae_weights__safetensors=t)
    if says is None: load_dictionary(folder); return
    with pytest.raises(SparseCodingError, match=says): load_dictionary(folder)


def test_unknown_settings_and_tensors_are_refused_by_name(tmp_path):
    t = arrays()
    t.pop("threshold")
    with pytest.raises(SparseCodingError, match="my_new_trick"): load_dictionary(lens(tmp_path/"a", t, my_new_trick=3))
    load_dictionary(tmp_path/"a", ignore=["my_new_trick"])
    with pytest.raises(SparseCodingError, match="tensor b_more"): load_dictionary(lens(tmp_path/"b", t | {"b_more": t["b_enc"]}))
    with pytest.raises(SparseCodingError, match="no b_enc"): load_dictionary(lens(tmp_path/"c", {k: v for k, v in t.items() if k != "b_enc"}))
    with pytest.raises(SparseCodingError, match="how many codes"): load_dictionary(lens(tmp_path/"d", t, "topk"))
    with pytest.raises(SparseCodingError, match="temporal"): load_dictionary(lens(tmp_path/"e", t, "temporal"))


def test_a_dictionary_of_a_folded_model_says_so_and_is_refused_on_another(tmp_path):
    from types import SimpleNamespace
    t = arrays()
    t.pop("threshold")
    d = load_dictionary(lens(tmp_path, t, meta={"model_from_pretrained_kwargs": {"center_writing_weights": True}}))
    plain, folded = (SimpleNamespace(fingerprint=f, d_in=lambda site: D) for f in ("abc", "abc-folded"))
    assert d.check(folded, Site(3)) is d
    with pytest.raises(SparseCodingError, match="fold=True"): d.check(plain, Site(3))


# --- the others -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("place, site, out", [("res", "resid_post.7", D), ("att", "attn_z.7", D), ("mlp", "mlp_out.7", D),
                                             ("transcoders", None, OUT)])
def test_gemma_scope_by_numpy(tmp_path, place, site, out):
    t = arrays(out)
    folder = tmp_path/f"google/gemma-scope-2b-pt-{place}/layer_7/width_6/average_l0_2"
    d = load_dictionary(write(folder, params__npz=t))
    h = X @ t["W_enc"] + t["b_enc"]                                           # b_dec is not subtracted
    c = h*(h > t["threshold"])
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"])
    assert d.metadata.get("site") == site and d.metadata["model_name"] == "google/gemma-2-2b"
    assert load_dictionary(folder/"params.npz", site=Site(1)).metadata["site"] == "resid_post.1"


def test_gemma_scope_two_has_small_letters_and_a_skip_the_other_way(tmp_path):
    t, skip = arrays(OUT), np.random.default_rng(6).normal(size=(D, OUT)).astype(np.float32)
    small = {k.replace("W_", "w_"): v for k, v in t.items()} | {"affine_skip_connection": skip}
    d = load_dictionary(write(tmp_path, params__safetensors=small))
    h = X @ t["W_enc"] + t["b_enc"]
    c = h*(h > t["threshold"])
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"] + X @ skip)


def test_numpy_files_with_objects_are_refused(tmp_path):
    np.savez(tmp_path/"params.npz", W_enc=np.array([{"a": 1}], dtype=object), W_dec=np.eye(2))
    with pytest.raises(SparseCodingError, match="would run when opened"): load_dictionary(tmp_path)


@pytest.mark.parametrize("out", [D, OUT])
def test_llama_scope_by_numpy(tmp_path, out):
    t, norm = arrays(out), {"in": 10.8, "out": 10.8 if out == D else 3.2}
    hooks = dict(hook_point_in="blocks.1.hook_resid_post", hook_point_out="blocks.1.hook_resid_post") if out == D else \
        dict(hook_point_in="blocks.1.ln2.hook_normalized", hook_point_out="blocks.1.hook_mlp_out")
    cfg = dict(d_model=D, d_sae=N, act_fn="jumprelu", jump_relu_threshold=.3, norm_activation="dataset-wise",
               dataset_average_activation_norm=norm, sparsity_include_decoder_norm=True,
               apply_decoder_bias_to_pre_encoder=False, use_decoder_bias=True, use_glu_encoder=False, **hooks)
    stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T, "decoder.bias": t["b_dec"]}
    write(tmp_path, **{"hyperparams__json": cfg, "checkpoints/final__safetensors": stored})
    d = load_dictionary(tmp_path)
    s, r = D**.5/norm["in"], out**.5/norm["out"]                              # what training multiplied by
    h = (s*X @ t["W_enc"] + t["b_enc"])/s                                     # in the units of x
    length = np.linalg.norm(t["W_dec"], axis=1)*s/r                           # of what a feature writes, in the units of y
    c = h*length*(h*length > .3)
    agrees(d, c, (c/length*s) @ t["W_dec"]/r + t["b_dec"]/r)
    assert d.metadata.get("site") == ("resid_post.1" if out == D else None)


@pytest.mark.parametrize("two", [False, True])
def test_sparsify_by_numpy(tmp_path, two):
    t = arrays(OUT if two else D, unit=True)
    skip = np.random.default_rng(7).normal(size=(OUT, D)).astype(np.float32)
    stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    cfg = dict(activation="topk", expansion_factor=2, normalize_decoder=True, num_latents=0, k=2, multi_topk=False,
               skip_connection=two, transcode=two, d_in=D)
    folder = write(tmp_path/"layers.5.mlp", cfg__json=cfg, sae__safetensors=stored | ({"W_skip": skip} if two else {}))
    write(tmp_path, config__json={"model": "HuggingFaceTB/SmolLM2-135M"})
    d = load_dictionary(folder)
    c = largest((X if two else X - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 2)
    agrees(d, c, c @ t["W_dec"] + t["b_dec"] + (X @ skip.T if two else 0))
    assert d.metadata["model_name"] == "HuggingFaceTB/SmolLM2-135M"
    assert d.metadata.get("site") == (None if two else "mlp_out.5")
    back = load_dictionary(write_sparsify(d, tmp_path/"again"/"layers.5.mlp"))
    assert torch.equal(back(torch.tensor(X)), d(torch.tensor(X)))


def learned(name, t, rng):
    "A state dictionary of dictionary_learning, and its forward pass."
    both = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T}
    plain, moved = X @ t["W_enc"], (X - t["b_dec"]) @ t["W_enc"]
    if name == "AutoEncoder": return both | {"bias": t["b_dec"]}, relu(moved + t["b_enc"])
    if name == "AutoEncoderNew": return both | {"decoder.bias": t["b_dec"]}, relu(plain + t["b_enc"])
    if name == "AutoEncoderTopK": return both | {"b_dec": t["b_dec"], "k": np.int64(2)}, largest(moved + t["b_enc"], 2)
    if name == "BatchTopKSAE":
        h = relu(moved + t["b_enc"])
        return both | {"b_dec": t["b_dec"], "k": np.int64(2), "threshold": np.float32(.4)}, h*(h > .4)
    if name == "JumpReluAutoEncoder":
        h = plain + t["b_enc"]
        return {k: t[k] for k in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}, relu(h*(h > t["threshold"]))
    g = {k: rng.normal(size=N).astype(np.float32) for k in ("r_mag", "gate_bias", "mag_bias")}
    c = relu(moved*np.exp(g["r_mag"]) + g["mag_bias"])*(moved + g["gate_bias"] > 0)
    return {"encoder.weight": both["encoder.weight"], "decoder.weight": both["decoder.weight"], "decoder_bias": t["b_dec"]} | g, c


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder",
                                  "GatedAutoEncoder"])
def test_dictionary_learning_by_numpy(tmp_path, name):
    t = arrays(unit=name == "AutoEncoderTopK")
    stored, c = learned(name, t, np.random.default_rng(8))
    about = dict(dict_class=name, activation_dim=D, dict_size=N, layer=3, lm_name="EleutherAI/pythia-70m-deduped", submodule_name="resid_post_layer_3")
    d = load_dictionary(write(tmp_path, config__json={"trainer": about, "buffer": {"ctx_len": 128}}, ae__pt=stored))
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"])
    assert d.metadata["site"] == "resid_post.3"


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
def test_circuit_tracer_by_numpy(tmp_path, act):
    t = arrays(OUT, unit=act == "topk")
    threshold, skip = t.pop("threshold"), np.random.default_rng(7).normal(size=(OUT, D)).astype(np.float32)
    h = X @ t["W_enc"] + t["b_enc"]
    c = {"relu": relu(h), "topk": largest(h, 2), "jumprelu": h*(h > threshold)}[act]
    stored = t | {"W_enc": t["W_enc"].T, "W_skip": skip} | ({"activation_function.threshold": threshold} if act == "jumprelu" else {})
    cfg = dict(model_kind="transcoder_set", model_name="Qwen/Qwen3-0.6B", feature_input_hook="mlp.hook_in",
               feature_output_hook="mlp.hook_out", scan="x") | ({"k": 2} if act == "topk" else {})
    folder = write(tmp_path/"a", config__yaml=cfg, layer_3__safetensors=stored)
    with pytest.raises(SparseCodingError, match="layer=3"): load_dictionary(folder)
    d = load_dictionary(folder/"layer_3.safetensors")
    agrees(d, c*np.linalg.norm(t["W_dec"], axis=1), c @ t["W_dec"] + t["b_dec"] + X @ skip.T)
    assert d.metadata["reads"] == "module input" and d.metadata["hook_name_out"] == "blocks.3.mlp.hook_out"
    back = load_dictionary(write_circuit_tracer({3: d}, tmp_path/"b"), layer=3)
    assert torch.equal(back(torch.tensor(X)), d(torch.tensor(X))) and back.metadata == d.metadata


# --- what is refused --------------------------------------------------------------------------------------------------

class Runs:
    "An object that runs something when it is unpickled."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (str(self.mark), "w")


def test_pickles_are_refused_by_name_and_never_run(tmp_path):
    mark = tmp_path/"ran"
    for name in ("sae.pt", "model.bin", "x.pkl"):
        folder = tmp_path/name.replace(".", "_")
        folder.mkdir()
        (folder/name).write_bytes(pickle.dumps(Runs(mark)))
        for path in (folder, folder/name):
            with pytest.raises(SparseCodingError, match="pickle, which can run"): load_dictionary(path)
    folder = write(tmp_path/"learned", config__json={"trainer": {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": N}})
    torch.save(Runs(mark), folder/"ae.pt")
    with pytest.raises(SparseCodingError, match="would run"): load_dictionary(folder)
    assert not mark.exists()


def test_what_is_no_dictionary_is_said_in_a_sentence(tmp_path):
    with pytest.raises(SparseCodingError, match="no dictionary in"): load_dictionary(tmp_path)
    with pytest.raises(SparseCodingError, match="no dictionary at"): load_dictionary(tmp_path/"missing")
    with pytest.raises(SparseCodingError, match="cross-layer"): load_dictionary(write(tmp_path/"clt", W_enc_0__safetensors={"a": X}))
    with pytest.raises(SparseCodingError, match="cut|damaged"):
        folder = lens(tmp_path/"cut", arrays(), "jumprelu")
        whole = (folder/"sae_weights.safetensors").read_bytes()
        (folder/"sae_weights.safetensors").write_bytes(whole[:-7])
        load_dictionary(folder)


def test_the_hub_is_asked_only_for_what_is_wanted_and_its_silence_is_a_sentence(tmp_path, monkeypatch):
    import huggingface_hub
    asked = {}
    def there(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)
    lens(tmp_path/"blocks.3", arrays(), "jumprelu")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", there)
    assert load_dictionary("someone/some-saes/blocks.3").d_sae == N
    assert asked["repo"] == "someone/some-saes" and not any(p.endswith((".bin", ".pkl")) for p in asked["patterns"])
    assert all(p.startswith("blocks.3/") or p == "config.json" for p in asked["patterns"])
    def silent(*a, **k): raise OSError("no route to host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    with pytest.raises(SparseCodingError, match="no route to host"): load_dictionary("someone/some-saes/blocks.3")


def test_a_repository_for_the_hub(tmp_path):
    d = UntiedSAE(D, N, pre_bias=True, norm="project")
    d.metadata = {"site": "resid_post.2", "model_name": "tiny"}
    write_hub_repository({"blocks.2.hook_resid_post": d}, tmp_path, "Two sentences.")
    front = yaml.safe_load((tmp_path/"README.md").read_text().split("---")[1])
    assert front["library_name"] == "saelens"
    assert torch.equal(load_dictionary(tmp_path/"blocks.2.hook_resid_post").W_dec, d.W_dec)


VALUES = st.recursive(st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=8),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3), max_leaves=4)
KEYS = st.sampled_from(["architecture", "d_in", "d_sae", "k", "metadata", "normalize_activations", "activation_fn", "d_out",
                        "activation_fn_kwargs", "apply_b_dec_to_input", "reshape_activations", "trainer", "act_fn", "activation",
                        "norm_activation", "dataset_average_activation_norm", "jump_relu_threshold", "hook_point_in",
                        "finetuning_scaling_factor", "transcode", "model_kind", "rescale_acts_by_decoder_norm"])
LAYOUTS = ["saelens", "sparsify", "llama", "learned", "tracer"]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(changes=st.dictionaries(KEYS, VALUES, max_size=3))
def test_odd_settings_never_end_in_a_traceback(tmp_path_factory, layout, changes):
    folder, (cfg, name) = laid_out(tmp_path_factory, layout)
    text = {**cfg, **changes}
    (folder/name).write_text(yaml.safe_dump(text) if name.endswith("yaml") else json.dumps(text))
    try: d = load_dictionary(folder, layer=0)
    except SparseCodingError as e: assert len(str(e)) < 600 + 2*len(str(folder))
    else: assert isinstance(d, Dictionary) and d.encode(torch.tensor(X)).isfinite().all()


MADE = {}


def laid_out(factory, layout):
    "A good folder of each layout, made once."
    if layout in MADE: return MADE[layout]
    t, f = arrays(unit=True), factory.mktemp(layout)
    torchlike = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"]}
    if layout == "saelens": cfg, name = {"architecture": "standard", "d_in": D, "d_sae": N}, "cfg.json"; t.pop("threshold"); write(f, sae_weights__safetensors=t)
    if layout == "sparsify": cfg, name = {"activation": "topk", "k": 2, "d_in": D}, "cfg.json"; write(f, sae__safetensors=torchlike | {k: t[k] for k in ("W_dec", "b_dec")})
    if layout == "llama":
        cfg, name = dict(act_fn="jumprelu", jump_relu_threshold=.3, norm_activation="dataset-wise", dataset_average_activation_norm={"in": 2., "out": 2.}), "hyperparams.json"
        write(f, **{"checkpoints/final__safetensors": torchlike | {"decoder.weight": t["W_dec"].T, "decoder.bias": t["b_dec"]}})
    if layout == "learned":
        cfg, name = {"trainer": {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": N}}, "config.json"
        write(f, ae__pt=torchlike | {"decoder.weight": t["W_dec"].T.copy(), "bias": t["b_dec"]})
    if layout == "tracer": cfg, name = {"model_kind": "transcoder_set"}, "config.yaml"; t.pop("threshold"); write(f, layer_0__safetensors=t | {"W_enc": t["W_enc"].T})
    MADE[layout] = f, (cfg, name)
    return MADE[layout]


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json", "params.npz", "ae.pt"])
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(at=st.floats(0, 1), what=st.binary(min_size=1, max_size=6), cut=st.booleans())
def test_damaged_bytes_never_end_in_a_traceback(tmp_path_factory, name, at, what, cut):
    f = tmp_path_factory.getbasetemp()/f"bytes-{name}"
    if not f.exists():
        t = arrays()
        if name == "params.npz": write(f, params__npz=t)
        elif name == "ae.pt":
            write(f, config__json={"trainer": {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": N}},
                  ae__pt={"encoder.weight": t["W_enc"].T.copy(), "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T.copy(), "bias": t["b_dec"]})
        else: lens(f, t, "jumprelu")
        (f.parent/f"whole-{name}").write_bytes((f/name).read_bytes())
    whole = (f.parent/f"whole-{name}").read_bytes()
    i = int(at*(len(whole) - 1))
    (f/name).write_bytes(whole[:i] if cut else whole[:i] + what + whole[i + len(what):])
    try: d = load_dictionary(f)
    except SparseCodingError: pass
    else: assert isinstance(d, Dictionary)


def test_sites_of_hooks():
    assert str(site_of("blocks.8.hook_resid_pre")) == "resid_post.7" and site_of("blocks.0.hook_resid_pre") is None
