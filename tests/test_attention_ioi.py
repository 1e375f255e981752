"Attention features in IOI sentences on tiny random models of three architectures, against slow ways of doing the same."
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.models import load_model
from sparse_coding.attention import freeze_norm
from sparse_coding.dictionaries import TopKSAE
from sparse_coding.splicing import Placed
from sparse_coding.paper2.claims import judge_and, judge_gate, judge_pairs, judge_position
from sparse_coding.paper2.long_prefix import matched
from sparse_coding.paper2.ioi import (Sentences, _kinds, at_mean, at_place, by_order, feature_effects, greedy_pairs,
    lead, logit_difference, losses_by_layer, name_movers, noising, plans, read_from, recovery, reordered,
    score_parts, sentences, spliced, together, variance_explained, written)
from tiny import tiny_model

LAYER = 2


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def made(request, tmp_path_factory):
    "A model, sentences, and random dictionaries of two layers."
    model = load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", request.param)), device="cpu")
    saes = {}
    for l in (1, LAYER):
        saes[l] = TopKSAE(model.d_in(Site(l, "attn_z")), 96, 6, seed=l).requires_grad_(False)
        saes[l].b_dec += .3*torch.randn(saes[l].d_in, generator=torch.Generator().manual_seed(l))
    return model, sentences(model, plans(model, 6, 1)), saes


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path): monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path))


def gap(model, s, i, edits={}):
    "The slow way: one sentence without anything after its end, all logits."
    end = int(s.at["END"][i])
    z = model.run_with(s.tokens[i:i + 1, :end + 1], edits)[0, end].double()
    return float(z[s.io[i]] - z[s.s[i]])


def test_names_stand_where_they_are_said_to(made):
    model, _, _ = made
    planned = plans(model, 8, 3)
    for how in ({}, dict(others=True, filler=True), dict(conjunction=" with"), dict(filler=True)):
        s = sentences(model, planned, **how)
        for i, plan in enumerate(planned):
            text, io, name = written(plan, **how)
            row, end = s.tokens[i].tolist(), int(s.at["END"][i])
            assert row[0] == model.bos_id and model.tokenizer.decode(row[1:end + 1]) == text
            assert [model.str_tokens([row[int(s.at[k][i])]])[0] for k in ("IO", "S1", "S2")] == [f" {io}", f" {name}", f" {name}"]
            assert s.at["S1"][i] < s.at["S2"][i] < end and set(row[end + 1:]) <= {model.eot_id}
            assert (s.at["IO"][i] < s.at["S1"][i]) == (plan["order"] == "ABBA") and len({*plan["names"]}) == 4
        assert ("nice" in text) == how.get("filler", False) and (" with " in text.split(",")[0]) == ("conjunction" in how)
    with pytest.raises(SparseCodingError, match="four names"): plans(model, 2, names=("Mary", "John", "Anna"))


def test_logit_differences_with_padding_and_from_a_layer_on(made):
    model, s, _ = made
    want = [gap(model, s, i) for i in range(len(s))]
    tol = 1e-4*float(model.logits(s.tokens).abs().max())
    assert np.allclose(logit_difference(model, s, batch=4), want, atol=tol)
    rows = torch.tensor([3, 0, 3])
    for l in (1, 4): assert np.allclose(logit_difference(model, s, rows=rows, given=(l, model.resid_pre(s.tokens, [l])[l])), np.array(want)[rows], atol=tol)


def test_one_place_of_each_line_is_rewritten(made):
    model, s, _ = made
    site, at, seen = Site(LAYER, "attn_out"), s.at["S2"], {}
    value = torch.randn(len(s), model.d_model)
    for add in (False, True):
        edit = at_place(site, at, value, add)(torch.arange(len(s)))[site]
        x = torch.randn(*s.tokens.shape, model.d_model)
        new, i = edit(x), torch.arange(len(s))
        changed = (new != x).any(-1)
        assert (changed.sum(1) == 1).all() and changed[i, at].all()
        assert_close(new[i, at], value + x[i, at]*add)
    edits = at_place(site, at, value)
    for i in range(len(s)):
        def fn(x):
            x = x.clone()
            x[0, at[i]] = value[i]
            return x
        seen[i] = gap(model, s, i, {site: fn})
    assert np.allclose(logit_difference(model, s, edits, batch=4), list(seen.values()), atol=1e-4*float(model.logits(s.tokens).abs().max()))


def test_feature_effects_are_those_of_one_hook_per_sentence(made):
    model, s, saes = made
    sae, site = saes[LAYER], Site(LAYER, "attn_z")
    placed = Placed(model, sae, site=site)
    found, tol = feature_effects(placed, s), 2e-4*float(model.logits(s.tokens).abs().max())
    assert (found.codes > 0).any(0).all() and found.features == sorted(found.features)
    for i in range(len(s)):
        s2, clean = int(s.at["S2"][i]), gap(model, s, i)
        def at_s2(change):
            def fn(x):
                x = x.clone()
                x[0, s2] = change(x[0, s2])
                return x
            return gap(model, s, i, {site: fn}) - clean
        for k, j in enumerate(found.features):
            assert abs(at_s2(lambda z: z - sae.encode(z)[j]*sae.W_dec[j]) - found.change[j][i]) < tol
            if not found.codes[i, k] > 0: assert found.change[j][i] == 0
        assert abs(at_s2(sae) - found.change["error"][i]) < tol
        assert abs(at_s2(lambda z: z - sae(z) + sae.b_dec) - found.change["all features"][i]) < tol
    assert np.allclose(together(placed, s, found.features), found.change["all features"], atol=tol)


def test_features_are_read_from_all_of_the_sentence(made):
    model, s, saes = made
    for j in (0, 5):
        read, code = read_from(Placed(model, saes[LAYER], site=Site(LAYER, "attn_z")), s, j)
        z = model.run_to(s.tokens, Site(LAYER, "attn_z"))[Site(LAYER, "attn_z")][torch.arange(len(s)), s.at["S2"]]
        whole = z @ saes[LAYER].W_enc[:, j]
        assert np.allclose(read.sum(1), whole, atol=1e-3*float(whole.abs().max()))
        assert np.allclose(code, saes[LAYER].encode(z)[:, j], atol=1e-4)


def test_layers_at_their_mean(made):
    model, s, _ = made
    lost, site = losses_by_layer(model, s), Site(4, "attn_out")
    mean = model.run_to(s.tokens, site)[site][torch.arange(len(s)), s.at["S2"]].mean(0)
    for i in (0, 3):
        def fn(x):
            x = x.clone()
            x[0, s.at["S2"][i]] = mean
            return x
        assert abs(gap(model, s, i) - gap(model, s, i, {site: fn}) - float(lost[4, i])) < 2e-4*float(model.logits(s.tokens).abs().max())


def test_reconstructions_leave_the_beginning(made):
    model, s, saes = made
    found = logit_difference(model, s, spliced(saes))
    def fn(sae): return lambda x: torch.cat([x[:, :1], sae(x[:, 1:])], 1)
    want = [gap(model, s, i, {Site(l, "attn_z"): fn(sae) for l, sae in saes.items()}) for i in range(len(s))]
    assert np.allclose(found, want, atol=2e-4*float(model.logits(s.tokens).abs().max()))


def test_one_vector_leaves_the_beginning(made):
    model, s, _ = made
    site, mean = Site(1, "attn_z"), torch.linspace(-1, 1, model.d_in(Site(1, "attn_z")))
    want = [gap(model, s, i, {site: lambda x: torch.cat([x[:, :1], mean.expand(1, x.shape[1] - 1, -1)], 1)}) for i in range(len(s))]
    assert np.allclose(logit_difference(model, s, at_mean(site, mean)), want, atol=2e-4*float(model.logits(s.tokens).abs().max()))


def test_noising_takes_attention_at_s2_from_the_other_sentence(made):
    model, _, _ = made
    planned, layers = plans(model, 4, 5), [1, 3]
    found, s = noising(model, planned, layers, (" and",)), sentences(model, planned)
    tol = 2e-4*float(model.logits(s.tokens).abs().max())
    assert np.allclose(found["clean"], logit_difference(model, s), atol=tol) and np.allclose(found[" and"], found["clean"], atol=tol)
    other = sentences(model, planned, others=True, filler=True)
    for i in range(4):
        sites = [Site(l, "attn_out") for l in layers]
        theirs = model.run_to(other.tokens[i:i + 1, :other.at["END"][i] + 1], sites)
        def fn(site, keep):
            def put(x):
                x = x.clone()
                x[0, s.at["S2"][i]] = keep*theirs[site][0, other.at["S2"][i]]
                return x
            return put
        for name, keep in (("other names, filler", 1), ("zero", 0)):
            assert abs(gap(model, s, i, {site: fn(site, keep) for site in sites}) - found[name][i]) < tol
    swapped = sentences(model, reordered(planned))
    assert torch.equal(swapped.io, s.io) and torch.equal(swapped.at["S2"], s.at["S2"]) and torch.equal(swapped.at["IO"], s.at["S1"]) and list(swapped.order) == ["BABA", "ABBA"]*2
    noised = noising(model, planned, layers, ())["the other order"]
    theirs = model.run_to(swapped.tokens, [Site(l, "attn_out") for l in layers])
    put = lambda site: lambda x: x.index_put((torch.arange(4), s.at["S2"]), theirs[site][torch.arange(4), s.at["S2"]])
    assert np.allclose(noised, logit_difference(model, s, lambda part: {site: put(site) for site in theirs}), atol=tol)


def test_queries_and_keys_are_those_of_the_model(made):
    model, s, _ = made
    for l in (1, 4):
        seen, x = model.attend(s.tokens, l)[l], model.resid_pre(s.tokens, [l])[l]
        for (W, b), saw in zip(model.W_QK(l), (seen.q, seen.k)):
            for at in (s.at["S1"], s.at["END"]):
                i = torch.arange(len(s))
                mine = model.rotate(l, torch.einsum("bm,kme->bke", model.attn_norm(l)(x)[i, at], W) + b, at)
                assert_close(mine, saw[i, at], atol=1e-3*float(saw.abs().max()), rtol=0)


def test_pairs_of_parts_add_up_to_the_score(made):
    model, s, saes = made
    layer, head, i = 4, 3, torch.arange(len(s))
    found, seen = score_parts(model, s, layer, head, saes), model.attend(s.tokens, layer)[layer]
    score = {k: seen.scale*(seen.q[i, s.at["END"], head]*seen.k[i, s.at[k], head]).sum(-1) for k in ("IO", "S1")}
    size = float(found.parts.abs().sum((1, 2)).max())
    assert np.allclose(found.total, (score["IO"] - score["S1"]).numpy(), atol=1e-5*size)
    assert found.features.any() and (found.features <= found.query_feature).all() and found.features.shape == found.parts.shape[1:] == (len(found.query), len(found.key))


def test_a_features_pairs_are_what_the_score_loses_without_it(made):
    model, s, saes = made
    layer, head, i = 4, 1, torch.arange(len(s))
    found = score_parts(model, s, layer, head, saes)
    row = int(found.query_feature[:, 0].argmax())
    l, j = map(int, found.query[row].split(": "))
    site, seen = Site(l, "attn_z"), model.attend(s.tokens, layer)[layer]
    code = saes[l].encode(model.run_to(s.tokens, site)[site][i, s.at["END"]])[:, j]
    written_ = code[:, None]*(saes[l].W_dec[j] @ model.W_O(l)[0].flatten(0, 1))
    x = model.resid_pre(s.tokens, [layer])[layer][i, s.at["END"]][:, None]
    norm, (W, b) = freeze_norm(model.attn_norm(layer), x), (v[head] for v in model.W_QK(layer)[0])
    q, without = (model.rotate(layer, norm(y) @ W + b, s.at["END"])[:, 0] for y in (x, x - written_[:, None]))
    keys = seen.k[i, s.at["IO"], head] - seen.k[i, s.at["S1"], head]
    want = seen.scale*((q - without)*keys).sum(-1)
    assert code.max() > 0
    assert_close(found.parts[:, row].sum(-1), want, atol=1e-3*float(want.abs().max()) + 1e-5, rtol=1e-3)


def test_the_rotation_depends_on_the_distance_alone(made):
    model, *_ = made
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    at = lambda v, p: model.rotate(1, v[None], torch.tensor([p]))[0]
    assert_close(at(q, 11) @ at(k, 4), at(q, 8) @ at(k, 1), atol=1e-4, rtol=1e-4)


def test_name_movers_are_of_layers_above(made):
    model, s, _ = made
    found = name_movers(model, s, 3)
    assert {r["layer"] for r in found} == {4, 5} and len(found) == 8
    i, looks = torch.arange(len(s)), model.attend(s.tokens, 5)[5].pattern
    r = next(r for r in found if (r["layer"], r["head"]) == (5, 2))
    assert abs(r["IO"] - float(looks[i, 2, s.at["END"], s.at["IO"]].mean())) < 1e-4
    with pytest.raises(SparseCodingError, match="above"): name_movers(model, s, 5)


def test_earlier_copies_beside_a_word(made):
    model, *_ = made
    word, names = 270, model.tokenize(" Mary John Anna Tom")[0].tolist()
    assert model.str_tokens([word]) == [" and"]
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.zeros((20, 1), int), rng.choice([word, *names], (20, 15))], 1)
    kinds = _kinds(model, tokens, word).reshape(3, 20, 16)
    for r, row in enumerate(tokens):
        for d in range(16):
            copies = [e for e in range(1, d - 1) if row[e] == row[d]]        # the token right before has nothing in between
            assert kinds[:, r, d].tolist() == [bool(copies), any(row[e + 1] == word for e in copies), any(row[e - 1] == word for e in copies if e)]
    assert kinds.any((1, 2)).all() and matched(model, tokens).max() > 1


def test_shares_by_hand():
    clean, low = np.array([4., 6]), np.array([0., 2])
    assert recovery(clean, low, clean) == (1., (1., 1.)) and recovery(low, low, clean)[0] == 0
    assert np.isclose(recovery(np.array([2., 4]), low, clean)[0], .5)
    assert lead(clean, clean, low, clean) == (0, 0) and np.allclose(lead(clean, low, low, clean), 1) and np.allclose(lead(np.array([3., 5]), np.array([1., 3]), low, clean), .5)
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(200, 5))*[3, 1, .1, 2, 0]
    target = parts.sum(1)
    assert greedy_pairs(target, parts, 3) == [0, 3, 1]
    share, (a, b) = variance_explained(target, parts[:, [0, 3]].sum(1))
    assert a < share < b and abs(share - 13/14.01) < .03
    assert variance_explained(target, target)[0] == 1 and variance_explained(target, -target)[0] == pytest.approx(-3)
    apart = by_order(np.array([1., 5, 2, 7]), np.array(["ABBA", "BABA"]*2))
    assert (apart["ABBA"], apart["BABA"], apart["ABBA minus BABA"]) == (1.5, 6, -4.5) and apart["low"] < -4.5 < apart["high"]


def test_rules():
    gate = dict(clean=[4., .9], layers={"1": [3.3, .9], "2": [3.5, .88]})
    assert judge_gate(gate) == "holds" and judge_gate(gate | dict(layers={"1": [3.1, .9], "2": [3.5, .88]})) == "partly"
    assert judge_gate(gate | dict(layers={"1": [3.1, .9], "2": [3.5, .84]})) == "does not hold"
    three = dict(share=.6, differences={"1": [.1, .2], "2": [-.3, -.1], "3": [.2, .4]})
    assert judge_position(three) == "holds" and judge_position(three | dict(share=.4)) == "partly"
    assert judge_position(dict(share=.4, differences={"1": [-.1, .2], "2": [-.3, -.1], "3": [.2, .4]})) == "does not hold"
    noise = dict(ci95=[.8, 1.], conjunctions={" alongside": [.4, .3, .5], " or": [.7, .6, .79]})
    assert judge_and(noise) == "holds" and judge_and(noise | dict(ci95=[.7, 1.])) == "partly" and judge_and(noise | dict(ci95=[.45, 1.])) == "does not hold"
    assert [judge_pairs(dict(ci95=[v, 1.])) for v in (.6, .3, .2)] == ["holds", "partly", "does not hold"]


def test_sentences_can_be_picked(made):
    _, s, _ = made
    part = s[2:4]
    assert isinstance(part, Sentences) and len(part) == 2 and torch.equal(part.at["S2"], s.at["S2"][2:4]) and list(part.order) == list(s.order[2:4])
