"""Causes against brute force with plain hooks, gradients against finite differences, and trees of hand-made graphs."""
import copy

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from sparse_coding.presets import Site, SparseCodingError, preset
from sparse_coding.ledger import claims
from sparse_coding.models import LAYOUTS, load_model, final_norm
from sparse_coding.partial_runs import Packed, run_rows
from sparse_coding.corpora import load_rows
from sparse_coding.activations import load_store
from sparse_coding.dictionaries import TiedSAE
from sparse_coding.evidence import FragmentStore, evidence
from sparse_coding.lexicon import TokenLexicon
from sparse_coding.paper1.causes import Causes, Chain, DrawnContexts, causes, draw_contexts, edges, find_causes, grow
import sparse_coding.paper1.causes as trees
from tiny import TEXT, tiny_model

LAYERS = (1, 2, 4)


def sparse(seed, store, layer, d=32, n=40, share=.15):
    "A dictionary whose features fire on some tokens; feature 0 on none."
    sae = TiedSAE(d, n, seed=seed)
    a = store.read(Site(layer), 0, store.n) @ sae.W_dec.detach().T
    sae.b_enc.data -= a.quantile(1 - share, dim=0)
    sae.b_enc.data[0] = -1e6
    sae.metadata = {"site": str(Site(layer))}
    return sae.requires_grad_(False)


def make_chain(folder, arch):
    (folder/"text.txt").write_text((TEXT + "\n")*20)
    model = load_model(str(tiny_model(folder/"model", arch)))
    rows = load_rows(str(folder/"text.txt"), model, "train", 24*16, 16, heldout=0.)
    store = load_store(model, rows, [Site(l) for l in LAYERS], dtype="float32", drop_first=True, max_norm=3.)
    store = FragmentStore(store.folder, model.eot_id, drop_first=True, max_norm=3.)
    return Chain(model, {l: sparse(l, store, l) for l in LAYERS}, store, length=12)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def chain(request, tmp_path_factory): return make_chain(tmp_path_factory.mktemp("trees"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory): return make_chain(tmp_path_factory.mktemp("trees"), "llama")


def blocks(model): return next(getattr(model.hf.base_model, name) for name,*_ in LAYOUTS if hasattr(model.hf.base_model, name))


@torch.inference_mode()
def by_hand(chain, lower, upper, feature, i, t, j=None):
    "The target's activation at the end of one context, by a plain forward pass of the whole model in which a hook takes feature j out."
    below, above, seen = chain.saes[lower], chain.saes[upper], []
    tokens = torch.from_numpy(chain.tokens[[i], :t+1].astype(np.int64))
    def take_out(module, args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        for pos in range(t + 1):
            if j is None or not chain.keep[lower][i, pos]: continue
            c = torch.relu(x[0, pos] @ below.W_dec[j] + below.b_enc[j])
            x[0, pos] -= c*below.W_dec[j]
        return (x, *out[1:]) if isinstance(out, tuple) else x
    def read(module, args, out): seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    handles = [blocks(chain.model)[lower].register_forward_hook(take_out), blocks(chain.model)[upper].register_forward_hook(read)]
    try: chain.model.hf(tokens)
    finally: [h.remove() for h in handles]
    return float(torch.relu(above.W_dec[feature] @ seen[0] + above.b_enc[feature]))


def a_target(chain, layer):
    "A feature of a layer that fires, with a few contexts."
    acts = chain.acts(layer, list(range(40)))
    feature = int((acts > 0).sum((0, 1)).argmax())
    return feature, draw_contexts(acts[..., feature], 3, seed=1)


@pytest.mark.parametrize("lower, upper", [(2, 4), (1, 2), (1, 4)])
def test_weights_are_brute_force(chain, lower, upper):
    feature, contexts = a_target(chain, upper)
    found = find_causes(chain, upper, feature, contexts, lower)
    for k,(i,t) in enumerate(zip(contexts.ids.tolist(), contexts.at.tolist())):
        a = by_hand(chain, lower, upper, feature, i, t)
        assert found.a[k] == pytest.approx(a, rel=1e-3)
        for j in range(0, 40, 5):
            plain = (a - by_hand(chain, lower, upper, feature, i, t, j))/a
            assert found.drop[k, j] == pytest.approx(plain, rel=1e-3, abs=2e-3)
            if found.activity[k, j] == 0: assert plain == found.drop[k, j] == found.gradient[k, j] == 0
    assert (found.activity > 0).sum() > 20 and (found.activity == 0).any() and np.abs(found.drop).max() > .02
    assert chain.model.hf.config._attn_implementation == "sdpa"


def test_batches_do_not_matter(chain):
    x, f = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), chain.saes[1].W_dec
    c = chain.saes[1].encode(x)*(torch.arange(40) < 20)
    whole, live, without = trees.ablate_each(chain.model, 1, 4, x, c, f)
    assert live == c.any(0).nonzero()[:, 0].tolist() and len(live) > 5
    for positions in (1, 17):
        again = trees.ablate_each(chain.model, 1, 4, x, c, f, positions)
        torch.testing.assert_close(again[2], without, atol=1e-3, rtol=1e-4)
    nothing = trees.ablate_each(chain.model, 1, 4, x, 0*c, f)
    assert nothing[1] == [] and nothing[2].shape == (0, 32)
    torch.testing.assert_close(nothing[0], whole)


def test_tokens_that_the_study_drops_stay(llama):
    "Where only dropped tokens have the feature, nothing is taken out."
    dropped = ~llama.keep[2]
    assert dropped[:, 0].all() and dropped[:, 1:].any()
    feature, contexts = a_target(llama, 4)
    before = find_causes(llama, 4, feature, contexts)
    other = copy.copy(llama)
    other.keep = llama.keep | {2: torch.zeros_like(llama.keep[2])}
    assert before.drop.any() and not find_causes(other, 4, feature, contexts).drop.any()


def test_gradients_are_finite_differences(chain):
    "And so attribution is ablation for a small part of a feature."
    model, target = chain.model, chain.saes[4]
    x = model.run_to(chain.tokens[:3].astype(np.int64), Site(1))[Site(1)]
    read = lambda y: (y[:, -1] @ target.W_dec[3])
    g = trees.gradients_between(model, 1, 4, x, read)
    with torch.inference_mode():
        through = lambda x: read(run_rows(model, 1, x.flatten(0, 1)[None], *packed(x, model), Site(4))[0].view(3, -1, 32))
        for pos,f in ((2, chain.saes[1].W_dec[7]), (11, chain.saes[1].W_dec[9])):
            step = torch.zeros_like(x)
            step[:, pos] = 1e-2*f
            slope = (through(x + step) - through(x - step))/2e-2
            torch.testing.assert_close(slope, g[:, pos] @ f, rtol=.03, atol=3e-3)


def packed(x, model):
    "All positions of some rows, computed now."
    see, fresh = trees.renumber(torch.arange(x.shape[0]*x.shape[1]).view(x.shape[:2]), torch.zeros(len(x)), 0)
    return Packed(see, fresh, {}, {}), "packed"


def test_attribution_is_the_limit_of_ablation(llama, monkeypatch):
    "With a hundredth of every code taken out, both agree."
    feature, contexts = a_target(llama, 4)
    found, real = find_causes(llama, 4, feature, contexts), trees.ablate_each
    monkeypatch.setattr(trees, "ablate_each", lambda model, lower, upper, x, c, f: real(model, lower, upper, x, c, .01*f))
    small = find_causes(llama, 4, feature, contexts)
    np.testing.assert_allclose(100*small.drop, small.gradient, rtol=.05, atol=.01)
    np.testing.assert_allclose(small.gradient, found.gradient, rtol=1e-5, atol=1e-6)
    assert np.abs(found.gradient).max() > .02


def test_contexts_lie_in_the_upper_half_and_are_drawn_by_seed():
    acts = np.random.default_rng(0).random((90, 12))**4*(np.random.default_rng(1).random((90, 12)) < .3)
    for seed in range(5):
        c = draw_contexts(acts, 8, seed=seed)
        a = acts[c.ids, c.at]
        assert len(c) == 8 and (a >= acts.max()/2).all() and (np.diff(a) > 0).all()
        bins = lambda v: np.bincount(np.minimum((2*v/acts.max() - 1)*8, 7).astype(int), minlength=8)
        drawn, there = bins(a), bins(acts[acts >= acts.max()/2])
        assert (drawn <= there).all() and (drawn[there > 0] > 0).all() and drawn.max() <= drawn[there > drawn].min(initial=9) + 1
        again = draw_contexts(acts, 8, seed=seed)
        assert (again.ids == c.ids).all() and (again.at == c.at).all()
    assert len({tuple(draw_contexts(acts, 8, seed=s).ids) for s in range(8)}) > 1
    top = draw_contexts(acts, 7, "top")
    np.testing.assert_allclose(acts[top.ids, top.at], np.sort(acts.ravel())[-7:])
    assert (acts[(few := draw_contexts(acts*(acts > np.sort(acts.ravel())[-4]), 7, "top")).ids, few.at] > 0).all() and len(few) == 3


def test_causes_are_kept(llama, monkeypatch):
    feature, _ = a_target(llama, 4)
    found = causes(llama, 4, feature, 5)
    acts = llama.acts(4, [feature])[..., 0]
    monkeypatch.setattr(Chain, "acts", None)                                       # nothing is drawn or run again
    again = causes(llama, 4, feature, 5)
    for k in ("a", "drop", "gradient", "activity"): np.testing.assert_array_equal(getattr(found, k), getattr(again, k))
    assert (again.contexts.at == found.contexts.at).all() and np.allclose(found.weight, found.drop.mean(0))
    np.testing.assert_allclose(found.a, acts[found.contexts.ids, found.contexts.at], rtol=1e-3)


def made(drop, activity):
    drop, activity = np.array(drop, float), np.array(activity, float)
    return Causes(DrawnContexts(np.arange(len(drop)), np.arange(len(drop))), np.ones(len(drop)), drop, drop, activity)


def test_edges_are_means_with_intervals_against_features_of_equal_activity():
    rng = np.random.default_rng(0)
    drop = np.hstack([np.full((6, 1), .5) + .01*rng.standard_normal((6, 1)), .001*rng.standard_normal((6, 99)), np.zeros((6, 20))])
    found = made(drop, np.hstack([np.ones((6, 100))*np.arange(1, 101), np.zeros((6, 20))]))
    edge, weak = edges(found, [0, 7])
    assert edge["above"] and not weak["above"] and edge["low"] < edge["weight"] < edge["high"] and edge["weight"] == pytest.approx(drop[:, 0].mean())
    near = trees.peers(found.activity.sum(0), 50, 10)
    assert sorted(near) == sorted(np.argsort(np.abs(np.log(np.arange(1, 101)) - np.log(51)))[1:11]) and 50 not in near
    assert edge["null"] == pytest.approx(np.quantile(found.weight[trees.peers(found.activity.sum(0), 0)], .95))
    assert trees.strongest_causes(found, 3) == [0] and len(trees.strongest_causes(found, 3, -1.)) == 3
    half = edges(found, [0], slice(1, None, 2))[0]
    assert half["weight"] == pytest.approx(drop[1::2, 0].mean())


def test_agreement_is_rank_correlation():
    rng = np.random.default_rng(1)
    found = made(.1*rng.standard_normal((4, 30)), np.ones((4, 30)))
    found = Causes(found.contexts, found.a, found.drop, found.drop**3 + .01*rng.standard_normal((4, 30)), found.activity)
    told = trees.agreement(found, .02)
    ranks = [rankdata(v) for v in (found.weight, found.gradient.mean(0))]
    assert told["rank correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1]) and told["causes"] == (np.abs(found.weight) >= .02).sum()


GRAPH = {(4, 0): [((3, 1), .5), ((3, 2), .4), ((3, 3), .2), ((3, 4), .1)], (3, 1): [((2, 1), .9), ((2, 2), .3)], (3, 2): [((2, 1), .6), ((2, 5), .005)],
         (3, 3): [((2, 2), .004)], (2, 1): [((1, 0), .7), ((1, 1), .2)], (2, 2): [((1, 9), 1.)]}


def test_below_the_root_only_the_strongest_parent_is_expanded():
    calls = []
    def parents(*node):
        calls.append(node)
        return [{"cause": c, "weight": w} for c,w in GRAPH.get(node, [])]
    tree = grow((4, 0), parents, 3, 3)
    assert [(e["target"], e["cause"]) for e in tree] == [
        ((4, 0), (3, 1)), ((4, 0), (3, 2)), ((4, 0), (3, 3)), ((3, 1), (2, 1)), ((3, 1), (2, 2)), ((3, 2), (2, 1)), ((2, 1), (1, 0)), ((2, 1), (1, 1))]
    assert calls == [(4, 0), (3, 1), (3, 2), (3, 3), (2, 1)]                       # (2, 1) once, (2, 2) never, (3, 4) never
    assert [e["cause"] for e in grow((4, 0), parents, 1, 2)] == [(3, 1), (3, 2)] and grow((9, 9), parents) == []
    at = trees.places((4, 0), tree)
    assert at[4, 0] == (1., .5) and {round(x, 3) for (l,_),(x,_) in at.items() if l == 2} == {.333} and len({*at.values()}) == len(at) == 8
    assert at[3, 1][1] > at[3, 2][1] > at[3, 3][1]
    fig = trees.plot_tree((4, 0), [e | {"cosine": .5} for e in tree], {node: "self  name  kwargs" for node in at})
    assert trees._short("self  name  kwargs", 12) == "self  name" and trees._short("abcdefgh", 4) == "abcd" and trees.places((4, 0), []) == {(4, 0): (0., .5)}
    assert min(t.get_fontsize() for t in fig.axes[0].texts) >= 6.5


def test_a_tree_of_a_chain(llama):
    feature, _ = a_target(llama, 4)
    parents = trees.parents_in(llama, 3, n=5)
    tree = grow((4, feature), parents, 5)
    assert tree and all(e["target"][0] > e["cause"][0] and e["weight"] >= .01 for e in tree) and parents(1, 5) == []
    for e in tree:
        (l, j), (u, k) = e["cause"], e["target"]
        assert e["cosine"] == pytest.approx(float(llama.saes[l].W_dec[j] @ llama.saes[u].W_dec[k]), abs=1e-5)
        assert e["weight"] == pytest.approx(causes(llama, u, k, 5).weight[j])
    label = trees.words(llama, [e["cause"] for e in tree])
    said, lexicon = trees.explanations(preset("quick"), llama, [(1, 5), (4, feature)], 2), TokenLexicon(8)
    found = evidence(preset("quick"), llama.placed[4])
    ids = lexicon.explain([found.shown(feature)])[0].tokens
    assert said[4, feature].split("  ") == list(dict.fromkeys(trees._quoted(trees.printable(t).strip(" ") or "␣") for t in llama.model.str_tokens(ids)))[:2]
    acts = llama.acts(*(first := tree[0]["cause"])[:1], [first[1]])[..., 0]
    assert set(label) == {e["cause"] for e in tree}
    text = trees.printable(llama.model.str_tokens([np.bincount(llama.tokens.ravel(), acts.ravel()).argmax()])[0]).strip(" ") or "␣"
    assert label[first].split("  ")[0] == (text if any(c.isalnum() for c in text) else f"'{text}'")


def test_effects_are_the_causes_seen_from_the_other_end(llama):
    feature, contexts = a_target(llama, 2)
    found = trees.effects(llama, 2, feature, 4, contexts, 40)
    assert found and all(r["contexts"] >= len(contexts)/2 for r in found)
    for r in found[:4]:
        c = np.array([[by_hand(llama, 2, 4, r["feature"], i, t, j) for j in (None, feature)] for i,t in zip(contexts.ids.tolist(), contexts.at.tolist())])
        assert r["share lost"] == pytest.approx((c[:, 0] - c[:, 1]).sum()/c[:, 0].sum(), rel=1e-2, abs=1e-3)


def test_unembedding_is_a_matrix_product_after_the_norms_gain(chain):
    model, f = chain.model, chain.saes[4].W_dec[:5]
    norm, W_U = final_norm(model), model.hf.get_output_embeddings().weight
    centred = f - f.mean(1, keepdim=True) if model.hf.config.model_type != "llama" else f
    torch.testing.assert_close(trees.unembedded(model, f), torch.einsum("nd,d,vd->nv", centred, norm.weight, W_U), atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))*10          # what a small step along f does to real logits, up to what shrinks all of x
        z = lambda x: model.hf.get_output_embeddings()(norm(x))
        size = (x - x.mean()).norm() if model.hf.config.model_type != "llama" else x.norm()
        for row in f:
            away = row - (x[0] @ row/x.norm()**2)*x[0] if model.hf.config.model_type == "llama" else row
            if model.hf.config.model_type != "llama":
                y = x[0] - x.mean()
                away = (row - row.mean()) - ((row - row.mean()) @ y/y.norm()**2)*y
            step = (z(x + .05*away) - z(x - .05*away))[0]/.1*float(size)/32**.5
            torch.testing.assert_close(step, trees.unembedded(model, away[None])[0], atol=.02, rtol=.02)
    share = trees.share_of(torch.eye(5, 12) + .5*torch.eye(5, 12).roll(1, 1), [0, 1], 2)
    np.testing.assert_allclose(share, [1, .5, 0, 0, 0], atol=.51)
    assert share[0] == 1


def test_scale_does_not_matter_to_the_mlp(chain):
    f = chain.saes[1].W_dec[:6]
    out = trees.through_mlp(chain.model, 2, f)
    block, model_type = blocks(chain.model)[2], chain.model.hf.config.model_type
    norm = {"llama": "post_attention_layernorm", "gpt_neox": "post_attention_layernorm", "gpt2": "ln_2"}[model_type]
    with torch.inference_mode(): plain = block.mlp(getattr(block, norm)(1000*f))
    torch.testing.assert_close(out, plain/plain.norm(dim=1, keepdim=True), atol=1e-3, rtol=1e-3)


def test_bad_input_gives_one_sentence(llama):
    feature, contexts = a_target(llama, 4)
    with pytest.raises(SparseCodingError, match="has 0 contexts"): causes(llama, 4, 0)
    with pytest.raises(SparseCodingError, match="no feature 40"): causes(llama, 4, 40)
    with pytest.raises(SparseCodingError, match="in a layer below it"): find_causes(llama, 2, feature, contexts, 4)
    with pytest.raises(SparseCodingError, match="in a layer below it"): causes(llama, 1, 5)
    with pytest.raises(SparseCodingError, match="in a layer below it"): trees.effects(llama, 4, feature, 2, contexts)
    with pytest.raises(SparseCodingError, match="trained at resid_post.1"): Chain(llama.model, {2: llama.saes[1]}, llama.store)
    with pytest.raises(SparseCodingError, match="at least two layers"): Chain(llama.model, {2: llama.saes[2]}, llama.store)
    with pytest.raises(SparseCodingError, match="half"): draw_contexts(np.ones((3, 3)), 2, "some")


EDGES = [
    ("P1-tree", dict(above=[True]*9 + [False], last=True), "holds"), ("P1-tree", dict(above=[True]*9 + [False], last=False), "partly"),
    ("P1-tree", dict(above=[True]*8 + [False]*2, last=True), "partly"), ("P1-tree", dict(above=[True] + [False], last=True), "partly"),
    ("P1-tree", dict(above=[True] + [False]*2, last=True), "does not hold"), ("P1-tree", dict(above=[], last=True), "does not hold"),
    ("P1-unembed", dict(own=.8, as_many=10, n=1000), "holds"), ("P1-unembed", dict(own=.8, as_many=11, n=1000), "does not hold"),
    ("P1-unembed", dict(own=.7, as_many=2, n=1000), "partly"), ("P1-unembed", dict(own=0., as_many=0, n=1000), "does not hold"),
    ("P1-failed", dict(gap=(-.1, .049), outside=.1), "holds"), ("P1-failed", dict(gap=(-.1, .05), outside=.1), "partly"),
    ("P1-failed", dict(gap=(-.1, .04), outside=.11), "partly"), ("P1-failed", dict(gap=(.04, .06), outside=.2), "does not hold"),
]


@pytest.mark.parametrize("claim, rec, verdict", EDGES, ids=[f"{c}, {v}, {i}" for i,(c,_,v) in enumerate(EDGES)])
def test_rules_at_their_edges(claim, rec, verdict):
    assert claim in claims() and claims()[claim].judge(rec) == verdict
