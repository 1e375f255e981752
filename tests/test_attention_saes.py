"Dictionaries of attention's output on tiny random models: training, metrics, attribution, refusals."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sparse_coding.presets import PRESETS, Preset, Site, SparseCodingError
from sparse_coding.runs import write_json
from sparse_coding.models import load_model
from sparse_coding.dictionaries import TopKSAE, UntiedSAE, fixed
from sparse_coding.splicing import Placed, spliced_losses
from sparse_coding.trainer import eq4_alpha
from sparse_coding.evidence import Examples
from sparse_coding.suites import load_dictionary
from sparse_coding.paper2.claims import judge_attribution, judge_interp, judge_table
from sparse_coding.paper2.saes import (PAPER, attention_recipes, attention_results, attention_sae, attention_stores,
    begin_at, live, manner, paper_two, schedule, train_attention)
from sparse_coding.paper2.quality import (Attribution, heads_agree, attention_evidence, attention_fidelity,
    attention_losses, attribute, attribution_pairs, contributions, distinct, encoder_bias, head_attribution,
    head_shares, promoted, reaching_back, recovered, where_it_reads, z_directions)
from tiny import TEXT, tiny_model

SMALL = dict(row_len=16, attn_row_len=16, attn_tokens=4096, n_heldout=1024, attn_layers=(0, 3), attn_ratio=4., attn_k=4, attn_alpha=.02, steps=24,
             batch_size=128, layer=1, layers=(1,), mlp_layers=(0,))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A preset, and its model."
    folder = tmp_path_factory.mktemp("attention")
    tiny_model(folder/"llama", "llama")
    lines = TEXT.splitlines()
    with open(folder/"text.jsonl", "w") as f:
        for i in range(120): f.write(json.dumps({"text": f"{i}\n" + "\n".join(lines[i % 7:] + lines[:i % 5])}) + "\n")
    p = paper_two(Preset(model=str(folder/"llama"), corpus=str(folder/"text.jsonl"), **SMALL))
    return p, load_model(p.model, device="cpu")


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request, tmp_path_factory):
    return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", request.param)), device="cpu")


def random_sae(model, layer=2, seed=0, pre_bias=True):
    sae = UntiedSAE(model.d_in(Site(layer, "attn_z")), 40, pre_bias, "project", seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.b_enc.copy_(.1*torch.randn(40, generator=g))
        if pre_bias: sae.b_dec.copy_(.1*torch.randn(sae.d_in, generator=g))
    sae.metadata = dict(site=f"attn_z.{layer}", model_fingerprint=model.fingerprint)
    return sae.requires_grad_(False)


def test_the_papers_preset():
    p = paper_two(PRESETS["paper"])
    assert (p.model, p.attn_layers, p.batch_size, p.row_len, p.attn_k) == ("gpt2", tuple(range(12)), 4096, 128, None)
    assert paper_two(p) == p
    groups = attention_recipes(p)
    assert "frontier, L1" not in groups and groups["layer 11"][0].k is None
    for layer, l1, ratio in ((0, 1.8, 32), (5, 1., 64), (11, 3., 32)):
        r = groups[f"layer {layer}"][0]
        assert eq4_alpha(r.alpha, p.alpha_unit, 768) == pytest.approx(l1) and r.ratio == ratio    # its loss sums over coordinates, and so does eq. (4)
    assert manner(p, groups["layer 0"][0])["betas"] == (0., .9999)
    assert paper_two(PRESETS["paper"], "gemma-2b").model == "google/gemma-2b"
    with pytest.raises(SparseCodingError, match="pickle"): paper_two(PRESETS["paper"], "gelu-2l")
    with pytest.raises(SparseCodingError, match="no model"): paper_two(PRESETS["paper"], "gpt-5")
    assert all(len(s["ratio"]) == len(s["l1"]) == len(s["layers"]) for s in PAPER.values())


def test_a_model_of_ones_own_keeps_its_settings(tiny):
    p, _ = tiny
    own = paper_two(replace(p, size="paper", n_tokens=9999))
    assert (own.model, own.attn_k, own.n_tokens) == (p.model, 4, 9999)
    assert paper_two(replace(p, row_len=256, n_tokens=1)).row_len == 16


def test_rows_begin_with_the_beginning_of_text(tiny):
    p, model = tiny
    for store in attention_stores(p, model):
        assert (store.tokens[:, 0] == model.bos_id).all() and store.row_len == 16
        for site in store.sites: assert not store.keep(site).view(-1, 16)[:, 0].any()


@pytest.mark.parametrize("kind", ["topk", "l1"])
def test_dictionaries_know_what_they_are(tiny, kind):
    p, model = tiny
    for layer, found in zip(p.attn_layers, attention_results(p, model, kind)):
        sae = attention_sae(p, model, layer, kind)
        assert sae.metadata["prepend_bos"] is True and sae.metadata["context_size"] == 16 and sae.cfg["reshape_activations"] == "hook_z"
        assert isinstance(sae, TopKSAE) == (kind == "topk") and sae.pre_bias and sae.d_sae == 4*sae.d_in == found["d_sae"]
        assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-5, rtol=0)
        if kind == "topk": assert found["l0"] == pytest.approx(4, abs=.2)
        x = attention_stores(p, model)[1].read(Site(layer, "attn_z"), 0, 1024)
        keep = attention_stores(p, model)[1].keep(Site(layer, "attn_z"))
        fires = (sae.encode(x[keep]) > 0).sum(0)
        assert ((fires > 10) == live(p, model, layer, kind)).float().mean() > .99


def test_the_papers_way_replaces_dead_features(tiny):
    p, model = tiny
    log = [json.loads(l) for l in open(train_attention(p, model, "layer 3, L1")/"run"/"log.jsonl")]
    assert [r["step"] for r in log if "replaced" in r] == [4, 8, 12, 16]
    assert (schedule(10**6).every, schedule(10**6).window, schedule(10**6).times) == (25_000, 12_500, 4)
    assert not [l for l in open(train_attention(p, model, "layer 3")/"run"/"log.jsonl") if "replaced" in l]


def test_what_is_not_there(tiny):
    p, model = tiny
    with pytest.raises(SparseCodingError, match="Layer 2 has no"): attention_sae(p, model, 2)
    with pytest.raises(SparseCodingError, match="Unknown kind"): attention_sae(p, model, 3, "relu")
    with pytest.raises(SparseCodingError, match="none of the preset"): train_attention(p, model, "layer 99")


def test_training_begins_at_the_mean():
    x, sae = torch.randn(50, 6) + 3, TopKSAE(6, 24, 3)
    begin_at(sae, x)
    assert_close(sae.b_dec.data, x.mean(0))
    assert_close(sae.W_enc.data.T, sae.W_dec.data)
    assert_close(sae(x.mean(0, keepdim=True)), x.mean(0, keepdim=True))


@pytest.mark.parametrize("layer", [0, 3])
def test_losses_are_those_of_the_slow_way(model, layer):
    "Starting from the layer below changes nothing; identity costs nothing and is worth 1, zero is worth 0."
    tokens = np.random.default_rng(0).integers(1, 300, (6, 12))
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) > .3
    sae = random_sae(model, layer)
    fns = {"sae": sae, "same": lambda z: z, "zero": torch.zeros_like}
    other = 4
    found = attention_losses(model, tokens, {layer: keep, other: keep}, {layer: fns, other: {"same": lambda z: z}}, batch=4)
    slow = spliced_losses(model, Site(layer, "attn_z"), tokens, keep, {k: (f, True) for k,f in fns.items()})
    for name, values in slow.items(): assert found[layer][name] == pytest.approx(values, abs=2e-4)
    assert found[other]["same"] == pytest.approx(slow["none"], abs=2e-4) and found[layer]["sae"] != pytest.approx(slow["none"], abs=1e-3)
    assert recovered(found[layer], "same")[0] == pytest.approx(1, abs=1e-2)
    assert recovered(found[layer], "zero")[0] == 0


def test_recovered_has_its_denominator():
    rows = {"none": [1., 2, 3], "sae": [1.5, 2, 3], "zero": [2., 3, 4], "mean": [1.25, 2.25, 3.25]}
    value, (low, high), cost = recovered(rows)
    assert value == pytest.approx(1 - .5/3) and low == pytest.approx(.5) and high == 1 and cost == 1
    assert recovered(rows, ablation="mean")[0] == pytest.approx((.75 - .5)/.75)


def test_fidelity_from_folders(tiny):
    p, model = tiny
    folders = {l: {"sae": train_attention(p, model, f"layer {l}")/"000"} for l in p.attn_layers}
    found = attention_fidelity(p, model, folders, 256)
    assert set(found) == {0, 3} and all(len(v) == 16 for v in found[3].values()) and set(found[3]) == {"none", "sae", "zero", "mean", "kl"}
    heldout = attention_stores(p, model)[1]
    site = Site(3, "attn_z")
    slow = spliced_losses(model, site, np.asarray(heldout.tokens[:16]), heldout.keep(site, 0, 256).view(16, -1), {"sae": (attention_sae(p, model, 3), True)})
    assert found[3]["sae"] == pytest.approx(slow["sae"], abs=2e-4) and found[3]["kl"] == pytest.approx(slow["kl"], abs=2e-4)


def test_head_attribution_by_hand(model):
    sae = random_sae(model)
    h, W = head_attribution(sae, model.n_heads), sae.W_dec.view(40, model.n_heads, -1)
    for i in (0, 17):
        lengths = [float(W[i, k].square().sum())**.5 for k in range(model.n_heads)]
        assert_close(h[i], torch.tensor(lengths)/sum(lengths))
    assert_close(h.sum(1), torch.ones(40))
    with pytest.raises(SparseCodingError, match="evenly"): head_attribution(sae, 5)


@pytest.mark.parametrize("pre_bias", [True, False])
def test_heads_sources_and_bias_add_up_to_the_pre_activation(model, pre_bias):
    sae, site = random_sae(model, pre_bias=pre_bias), Site(2, "attn_z")
    tokens = np.random.default_rng(1).integers(1, 300, (5, 11))
    z = model.run_to(torch.from_numpy(tokens), site)[site]
    features, at = [3, 7, 7, 0, 39], [10, 4, 0, 9, 1]
    found = attribute(Placed(model, sae), features, tokens, at, batch=2)
    seen = model.attend(torch.from_numpy(tokens), 2)[2]
    for i, (a, f, d) in enumerate(zip(found, features, at)):
        x = z[i, d] - sae.b_dec if pre_bias else z[i, d]
        pre = float(x.double() @ sae.W_enc[:, f].double() + sae.b_enc[f])
        assert a.total == pytest.approx(pre, abs=1e-4) and a.parts.shape == (model.n_heads, d + 1) and a.at == d
        assert_close(a.parts, seen.by_source(sae.W_enc[:, f])[i, :, d, :d+1], atol=1e-5, rtol=1e-4)
        w = sae.W_enc[:, f].view(model.n_heads, -1)
        assert_close(a.parts.sum(1), (z[i, d].view(model.n_heads, -1)*w).sum(1), atol=1e-4, rtol=1e-3)


def test_a_source_is_not_where_heads_rest():
    a = Attribution(torch.tensor([[9., 1, 2], [9, 0, 1]]), .5, 2, np.arange(3))
    assert a.source == 2 and a.total == 22.5
    assert Attribution(torch.tensor([[4.]]), 0., 0, np.arange(1)).source == 0


def test_head_shares_by_brute_force(tiny):
    p, model = tiny
    layer, site, heldout = 3, Site(3, "attn_z"), attention_stores(p, model)[1]
    sae, n = attention_sae(p, model, layer), model.n_heads
    shares = head_shares(Placed(model, sae, heldout))
    x = heldout.read(site, 0, heldout.n)[heldout.keep(site)]
    c = sae.encode(x)
    for f in c.sum(0).topk(3).indices.tolist():
        rows = []
        for v in x[c[:, f] > 0]:
            parts = [abs(float(v.view(n, -1)[k] @ sae.W_enc[:, f].view(n, -1)[k])) for k in range(n)]
            rows.append(np.array(parts)/sum(parts))
        assert shares[f].tolist() == pytest.approx(np.mean(rows, 0).tolist(), abs=1e-4)
    assert (shares[(c > 0).sum(0) == 0] == 0).all()
    assert_close(contributions(p, model)[3], shares)
    h, s = attribution_pairs(p, model)[3]
    assert len(h) == len(s) == int(live(p, model, 3).sum())


def test_agreement_is_pearsons():
    g = torch.Generator().manual_seed(0)
    h, s = torch.rand(20, 9, generator=g), torch.rand(20, 9, generator=g)
    r, same = heads_agree(h, s)
    assert r == pytest.approx([np.corrcoef(a, b)[0, 1] for a,b in zip(h.numpy(), s.numpy())], abs=1e-6)
    assert same.tolist() == [int(np.argmax(a)) == int(np.argmax(b)) for a,b in zip(h.numpy(), s.numpy())]


def test_another_site_of_the_same_width_is_refused(tiny):
    p, model = tiny
    sae, resid = attention_sae(p, model, 3), Site(3)
    assert model.d_in(resid) == sae.d_in
    with pytest.raises(SparseCodingError, match="trained at attn_z.3; it cannot be used at resid_post.3"): sae.check(model, resid)
    with pytest.raises(SparseCodingError, match="cannot be used at attn_z.0"): Placed(model, sae, site=Site(0, "attn_z"))
    elsewhere = Placed(model, fixed(torch.eye(sae.d_in)), site=resid)
    with pytest.raises(SparseCodingError, match="resid_post.3.* give one at attn_z"): attribute(elsewhere, [0], np.ones((1, 4)), [3])
    with pytest.raises(SparseCodingError, match="cannot be used at attn_z.0"): attention_fidelity(p, model, {0: {"sae": train_attention(p, model, "layer 3")/"000"}}, 64)


def test_saved_and_loaded(tiny, tmp_path):
    p, model = tiny
    sae = attention_sae(p, model, 3)
    again = load_dictionary(sae.save(tmp_path/"d"))
    x = torch.randn(7, sae.d_in)
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
    again.check(model, Site(3, "attn_z"))
    cfg = json.loads((tmp_path/"d"/"cfg.json").read_text())                 # as SAELens writes it: only the hook's name tells where it reads
    del cfg["metadata"]["site"]
    write_json(tmp_path/"d"/"cfg.json", cfg)
    with pytest.raises(SparseCodingError, match="resid_post"): load_dictionary(tmp_path/"d").check(model, Site(3))


def test_promoted_is_what_the_projection_writes(model):
    d = torch.randn(1, model.d_in(Site(2, "attn_z")), generator=torch.Generator().manual_seed(0))
    module = model.where(Site(2, "attn_out"))[0]
    u = module(d) - module(torch.zeros_like(d))
    norm = next(getattr(model.hf.base_model, k) for k in ("norm", "final_layer_norm", "ln_f") if hasattr(model.hf.base_model, k))
    if isinstance(norm, torch.nn.LayerNorm): u = u - u.mean(-1, keepdim=True)
    assert_close(promoted(model, 2, d), u*norm.weight @ model.hf.get_output_embeddings().weight.T, atol=1e-3, rtol=1e-3)


def test_where_it_reads_and_how_far_back(tiny):
    p, model = tiny
    placed = Placed(model, attention_sae(p, model, 3))
    seen = attention_evidence(p, placed)
    assert seen.placed.store.folder == attention_stores(p, model)[1].folder and placed.store is None
    f = int(seen.fires.argmax())
    top = distinct(seen.examples("top", f), 4)
    found = attribute(placed, [f]*len(top), top.tokens, top.acts.argmax(1))
    reads = where_it_reads(top, found)
    assert (reads.acts[:, 0] == 0).all() and reads.tokens is top.tokens
    assert reads.acts[0, 1:found[0].at + 1] == pytest.approx(found[0].parts.sum(0)[1:].numpy(), abs=1e-6)
    shares = [v[1:-1].sum()/v.sum() for v in (a.parts.abs().sum(0) for a in found)]
    assert reaching_back(placed, seen, [f])[f] == pytest.approx(float(np.mean(shares)), abs=1e-5)
    assert isinstance(top, Examples) and found[0].total == pytest.approx(float(top.acts[0].max()), rel=2e-2, abs=1e-2)


def test_of_places_reached_by_the_same_words_the_strongest_counts():
    tokens = np.array([[1, 5, 6, 7, 8], [2, 5, 6, 7, 8], [1, 5, 9, 7, 8], [5, 6, 7, 3, 4]])
    acts = np.array([[0, 0, 0, 3., 1], [0, 0, 0, 2., 0], [0, 0, 0, 1., 0], [0, 0, .5, 0, 0]])
    examples = Examples(np.arange(4), tokens, acts, acts >= 0)
    assert distinct(examples, 9, words=3).ids.tolist() == [0, 2] and distinct(examples, 9).ids.tolist() == [0, 1, 2, 3] and distinct(examples, 1, words=3).ids.tolist() == [0]


def test_directions_to_compare_with(tiny):
    p, model = tiny
    x = torch.randn(5, model.d_in(Site(3, "attn_z")))
    assert_close(z_directions(model, 3, "basis").encode(x), x.relu())
    W = z_directions(model, 3, "random").W_dec
    assert_close(W @ W.T, torch.eye(len(W)), atol=1e-5, rtol=0)
    assert encoder_bias(z_directions(model, 3, "basis")).abs().max() == 0


def test_rules():
    row = lambda cost, low, l0: {"zero costs": cost, "low": low, "L0": l0}
    good, bad, small = row(.1, .8, 16), row(.1, .7, 16), row(.01, .1, 16)
    assert [judge_table({"layers": r}) for r in ([good, small], [good, bad], [bad, bad, good], [small], [row(.1, .9, 30)])] == \
        ["holds", "partly", "does not hold", "not comparable", "does not hold"]
    yes, no = {"basis": (.1, .2), "random": (.1, .2)}, {"basis": (-.1, .2), "random": (.1, .2)}
    assert [judge_interp({"over": o}) for o in ({1: yes}, {1: yes, 2: no}, {1: no}, {})] == ["holds", "partly", "does not hold", "not comparable"]
    assert [judge_attribution({"ci95": (c, 1), "same_first": s}) for c,s in ((.8, .6), (.8, .4), (.6, .4))] == ["holds", "partly", "does not hold"]
