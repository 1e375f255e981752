"Recursive attribution on tiny random models: everything adds up, edges are derivatives, ablation does what it says."
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.models import load_model
from sparse_coding.partial_runs import run_z
from sparse_coding.dictionaries import TopKSAE, UntiedSAE
from sparse_coding.splicing import Placed
from sparse_coding.paper2.claims import judge_rdfa
from sparse_coding.paper2.recursive import (Means, Node, corpus_means, deviations, draw_roots, induction_root,
    kept_shares, orders, plot_faithfulness, plot_graph, plot_step, rebuild, trace, trace_back)
from tiny import tiny_model

LAYERS = (1, 3, 4)


def dictionaries(model, kind=TopKSAE):
    "Untrained, with biases that are not zero."
    out = {}
    for l in LAYERS:
        d, g = model.d_in(Site(l, "attn_z")), torch.Generator().manual_seed(l)
        sae = TopKSAE(d, 3*d, 6, seed=l) if kind is TopKSAE else UntiedSAE(d, 3*d, norm="project", seed=l)
        sae.requires_grad_(False)
        sae.b_enc.copy_(.1*torch.randn(3*d, generator=g) - (0 if kind is TopKSAE else .3))
        if kind is TopKSAE: sae.b_dec.copy_(.1*torch.randn(d, generator=g))
        out[l] = sae
    return out


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request, tmp_path_factory):
    return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", request.param)), device="cpu")


@pytest.fixture(scope="module")
def traced(model):
    tokens = torch.tensor([0, *torch.randint(1, 300, (8,), generator=torch.Generator().manual_seed(1)).tolist()*2])
    return trace(model, dictionaries(model), tokens)


def strongest(t, layer=4, position=14): return t.at(layer, position)[0]


def test_parts_add_up_to_what_every_layer_reads(model, traced):
    resid = model.resid_pre(traced.tokens, LAYERS)
    for l in LAYERS:
        x = traced.parts[traced.below(l)].sum(0) + sum(a.codes @ a.write for k,a in traced.active.items() if k < l)
        assert_close(x, resid[l][0], atol=1e-4*float(resid[l].abs().max()), rtol=0)


def test_codes_are_those_of_the_dictionary(model, traced):
    saes = dictionaries(model)
    for l,a in traced.active.items():
        z = model.run_to(traced.tokens, Site(l, "attn_z"))[Site(l, "attn_z")][0]
        codes = saes[l].encode(z)
        assert_close(a.codes, codes[:, a.ids])
        assert codes.sum() == pytest.approx(float(a.codes.sum()), rel=1e-4)        # none left out
        on = a.codes > 0
        assert_close((z @ a.read.T + a.bias)[on], a.codes[on], atol=1e-4, rtol=1e-4)
        assert [n.feature for n in traced.at(l, 5)] == codes[5].argsort(descending=True)[:int((codes[5] > 0).sum())].tolist()


@pytest.mark.parametrize("depth,width", [(1, 3), (2, 1), (3, 3), (9, 50)])
def test_contributions_add_up_however_far_it_is_traced(traced, depth, width):
    g = trace_back(traced, strongest(traced), depth, width)
    assert g.total == pytest.approx(g.activation, rel=1e-3)
    assert max(s.depth for s in g.steps) <= depth
    assert len(g.steps) == 1 if depth == 1 else len(g.steps) > 1


def test_depth_is_counted_along_the_strongest_path(traced):
    g = trace_back(traced, strongest(traced), depth=3, width=4)
    assert g.steps[0].depth == 1 and {s.node.layer for s in g.steps} == set(LAYERS)
    for s in g.steps[1:]:
        parents = [r for r in g.steps if r.node.layer > s.node.layer and r.depth < 3]
        assert s.depth == 1 + max(parents, key=lambda r: abs(g.edge(s.node, s.column, r))).depth


def test_relu_dictionaries_without_a_decoder_bias(model):
    t = trace(model, dictionaries(model, UntiedSAE), torch.arange(10, 22))
    g = trace_back(t, t.at(4, 9)[0])
    assert g.total == pytest.approx(g.activation, rel=1e-3)


def test_a_contribution_is_a_derivative_times_a_part(model, traced):
    "Against autograd through the frozen attention, written out by hand, for one step."
    root = strongest(traced)
    g, a, l = trace_back(traced, root, depth=1), traced.active[root.layer], root.layer
    x = traced.resid[l].clone().requires_grad_()
    norm, seen, (W, b) = traced.norms[l], traced.attended[l], model.W_V(l)
    centred = x - x.mean(-1, keepdim=True) if norm.centred else x
    v = torch.einsum("sm,kme->ske", centred*norm.gain/norm.scale[0] + norm.shift, W) + b
    z = torch.einsum("ks,ske->ke", seen.pattern[0, :, root.position].clone(), v).flatten()
    f = z @ a.read[traced.column(root)] + a.bias[traced.column(root)]
    grad, = torch.autograd.grad(f, x)
    assert float(f.detach()) == pytest.approx(g.activation, rel=1e-3)
    for n,c,value in zip(g.nodes, g.columns, g.values):
        if n.kind == "feature": part = traced.active[n.layer].write[c]*traced.active[n.layer].codes[n.position, c]
        else: part = traced.parts[traced.names.index((n.kind, n.layer)), n.position]
        assert float(grad[n.position] @ part) == pytest.approx(float(value), abs=1e-4*g.activation)


def test_the_factor_of_a_traced_feature_is_a_finite_difference(model, traced):
    "Add to a traced feature's output, everything frozen, and see the root grow by its factor: also through features in between."
    g = trace_back(traced, strongest(traced), depth=3, width=2)
    for start in g.steps[1:]:
        grown = {start.node: 1.}
        for s in sorted((s for s in g.steps if s.node.layer > start.node.layer), key=lambda s: s.node.layer):
            grown[s.node] = sum(v*float(s.u[n.position] @ traced.active[n.layer].write[traced.column(n)]) for n,v in grown.items() if n.layer < s.node.layer)
        assert grown[g.root] == pytest.approx(start.factor, rel=1e-2, abs=1e-6)


def test_edges_add_up_to_contributions(traced):
    g = trace_back(traced, strongest(traced), depth=3, width=2)
    for i in g.order[:40]: assert sum(g.edge(g.nodes[i], g.columns[i], s) for s in g.steps) == pytest.approx(float(g.values[i])/g.activation, abs=1e-4)


def test_nothing_after_the_root_or_at_the_start_is_a_leaf(traced):
    g = trace_back(traced, strongest(traced, position=9))
    assert {n.position for n in g.nodes} <= set(range(1, 10))
    assert len(set(g.nodes)) == len(g.nodes) and not {s.node for s in g.steps} & set(g.nodes)


def test_completeness(traced):
    g = trace_back(traced, strongest(traced))
    whole, none = g.completeness(len(g.nodes)), g.completeness(0)
    assert whole["activation"] == pytest.approx(1, rel=1e-3) and whole["absolute"] == pytest.approx(1, rel=1e-3)
    assert none["activation"] == pytest.approx((g.bias + g.start)/g.activation, abs=1e-5)
    sizes = [g.completeness(n)["absolute"] for n in range(0, len(g.nodes), 20)]
    assert sizes == sorted(sizes)


@pytest.fixture(scope="module")
def means(model):
    return corpus_means(model, dictionaries(model), np.random.default_rng(0).integers(1, 300, (5, 17)), batch=2)


def test_means_are_means(model, means):
    tokens, saes = np.random.default_rng(0).integers(1, 300, (5, 17)), dictionaries(model)
    z = model.run_to(tokens, Site(3, "attn_z"))[Site(3, "attn_z")]
    assert_close(means.codes[3], saes[3].encode(z)[:, 1:].mean((0, 1)), atol=1e-5, rtol=1e-3)
    x = model.resid_pre(tokens, [4])[4][:, 1:].mean((0, 1))
    below = sum(v for k,v in means.parts.items() if k in ("embedding", "position") or int(k.split()[1]) < 4)
    assert_close(below, x, atol=1e-4*float(x.abs().max()), rtol=1e-3)


def test_all_kept_is_everything_and_frozen_is_linear(traced, means):
    g = trace_back(traced, strongest(traced), depth=3, width=2)
    kept = torch.ones(2, len(g.nodes), dtype=torch.bool)
    kept[1, g.order[0]] = False
    for frozen in (True, False): assert float(rebuild(g, means, kept, frozen)[0]) == pytest.approx(1, abs=5e-3)
    one, dev = trace_back(traced, strongest(traced), depth=1), None
    dev, u = deviations(one, means), one.steps[0].u
    kept = torch.ones(1, len(one.nodes), dtype=torch.bool)
    kept[0, (i := one.order[3])] = False                                       # nothing in between that could be cut at zero
    expected = 1 - float(u[one.nodes[i].position] @ dev[i])/one.activation
    assert float(rebuild(one, means, kept, True)[0]) == pytest.approx(max(expected, 0), abs=2e-3)


def test_with_all_at_their_means_the_stream_is_the_mean(model, traced, means):
    "By hooks in the whole model: every layer's output at its mean, but for the beginning of text."
    g = trace_back(traced, strongest(traced), depth=1)
    layer, end = g.root.layer, g.root.position + 1
    none = torch.zeros(1, len(g.nodes), dtype=torch.bool)
    def to_mean(name): return lambda x: torch.cat([x[:, :1], means.parts[name].expand_as(x[:, 1:])], 1)
    edits = {Site(l, kind): to_mean(f"{name} {l}") for l in range(layer) for name,kind in (("attention", "attn_out"), ("MLP", "mlp_out"))}
    embed = lambda m, args: (to_mean("embedding")(args[0]) if not hasattr(model.hf.base_model, "wpe") else
                             torch.cat([args[0][:, :1], (means.parts["embedding"] + means.parts["position"]).expand_as(args[0][:, 1:])], 1), *args[1:])
    handle = model.blocks[0].register_forward_pre_hook(embed)
    try:
        with model._hooks(edits): z = model.run_to(traced.tokens[:, :end], Site(layer, "attn_z"))[Site(layer, "attn_z")]
    finally: handle.remove()
    a, k = traced.active[layer], g.steps[0].column
    expected = float((z[0, -1] @ a.read[k] + a.bias[k]).clamp(min=0))/g.activation
    assert float(rebuild(g, means, none, False)[0]) == pytest.approx(expected, abs=2e-3)


def test_a_layer_runs_on_a_given_stream(model, traced):
    for l in (*LAYERS, 0):
        x, site = model.resid_pre(traced.tokens, [l])[l], Site(l, "attn_z")
        assert_close(run_z(model, l, x), model.run_to(traced.tokens, site)[site], atol=1e-4, rtol=1e-3)


def test_orders_are_permutations_and_matched_ones_keep_kinds(traced, means):
    g = trace_back(traced, strongest(traced))
    found = orders(g, deviations(g, means), seed=3)
    for many in found.values():
        for order in many: assert sorted(order) == list(range(len(g.nodes)))
    key = lambda i: (g.nodes[i].kind, g.nodes[i].layer)
    for order in found["same kinds"]: assert list(map(key, order)) == list(map(key, found["contribution"][0])) and order != g.order
    assert orders(g, deviations(g, means), seed=3) == found


def test_shares_end_at_one(traced, means):
    g = trace_back(traced, strongest(traced), depth=2, width=2)
    left = kept_shares(g, means, [0, 5, len(g.nodes)])
    for v in left.values(): assert v.shape == (2, 3) and v[:, -1] == pytest.approx([1, 1], abs=5e-3)
    assert left["contribution"][:, 0] == pytest.approx(left["random"][:, 0], abs=1e-6)


def test_an_induction_feature_is_found_where_something_is_repeated(model, traced):
    "The eight tokens come twice: from the second on, what followed the first."
    root = induction_root(traced)
    assert root.position >= 9 and root.layer in LAYERS[1:]
    taken = traced.attended[root.layer].by_source(traced.active[root.layer].read[traced.column(root)], torch.tensor([root.position]))[0].sum(0).abs()
    share = float(taken[root.position - 7]/taken.sum())
    for l in LAYERS[1:]:
        for n in traced.at(l, 12)[:3]:
            other = traced.attended[l].by_source(traced.active[l].read[traced.column(n)], torch.tensor([12]))[0].sum(0).abs()
            assert float(other[5]/other.sum()) <= share + 1e-6
    with pytest.raises(SparseCodingError, match="occurs twice"): induction_root(trace(model, dictionaries(model), torch.arange(20, 30)))


def test_refusals(model, traced):
    saes = dictionaries(model)
    with pytest.raises(SparseCodingError, match="empty text"): trace(model, saes, "")
    with pytest.raises(SparseCodingError, match="out of range"): trace(model, {99: saes[1]}, "a")
    other = TopKSAE(32, 64, 4)
    other.metadata["site"] = "resid_post.3"
    with pytest.raises(SparseCodingError, match="trained at resid_post.3"): trace(model, {3: other}, "a")
    silent = next(j for j in range(200) if j not in {n.feature for n in traced.at(4, 14)})
    with pytest.raises(SparseCodingError, match="is silent"): trace_back(traced, Node("feature", 4, 14, silent))
    with pytest.raises(SparseCodingError, match="no token 99"): trace_back(traced, Node("feature", 4, 99, 0))
    with pytest.raises(SparseCodingError, match="is none"): trace_back(traced, Node("MLP", 4, 3))


def test_text_begins_with_the_beginning(model):
    t = trace(model, dictionaries(model), "When Mary")
    assert int(t.tokens[0, 0]) == model.bos_id and "".join(t.words[1:]) == "When Mary"


def test_a_model_with_something_else_in_its_blocks_is_refused(model, monkeypatch):
    import sparse_coding.paper2.recursive as recursive
    real = recursive._plain_parts
    monkeypatch.setattr(recursive, "_plain_parts", lambda *a: {k: 1.1*v if k[0] == "MLP" else v for k,v in real(*a).items()})
    with pytest.raises(SparseCodingError, match="do not add up"): trace(model, dictionaries(model), "When Mary and John")


class Store:
    "Held-out activations, as `draw_roots` reads them."
    def __init__(self, x, keep): self.x, self.kept, self.row_len = x, keep, x.shape[1]
    def check(self, model): return self
    def keep(self, site): return self.kept.flatten()
    def read(self, site, a, b): return self.x.flatten(0, 1)[a:b]


def test_roots_are_drawn_in_the_upper_half_of_their_range(model):
    sae, g = dictionaries(model)[3], torch.Generator().manual_seed(0)
    x, keep = torch.randn(6, 30, sae.d_in, generator=g), torch.rand(6, 30, generator=g) > .2
    codes = sae.encode(x)*keep[..., None]
    roots = draw_roots(Placed(model, sae, Store(x, keep), Site(3, "attn_z")), 10, span=(8, 25), seed=1)
    assert len(roots) == 10 == len({r.feature for _,r in roots})
    for row,n in roots:
        assert 8 <= n.position < 25 and n.layer == 3
        c = codes[:, 8:25, n.feature]
        assert float(codes[row, n.position, n.feature]) >= float(c.max())/2 > 0


def test_figures_show_what_was_computed(traced, means):
    import matplotlib.pyplot as plt
    g = trace_back(traced, strongest(traced), depth=3, width=2)
    texts = [t.get_text() for t in plot_graph(g, 12).axes[0].texts]
    for n in [s.node for s in g.steps] + [g.nodes[i] for i in g.order[:12]]: assert any(text.startswith(f"{n} ") for text in texts), n
    top, low = plot_step(g).axes[:2]
    assert sum(bar.get_height() for bar in low.patches) == pytest.approx(1, rel=1e-3)
    plt.close("all")


def test_the_rule():
    way = lambda gap, kept: {"gap": (gap, gap + .2), "kept": (kept, kept + .2)}
    judge = lambda adds, frozen, run: judge_rdfa(dict(adds_up=adds, frozen=way(*frozen), run=way(*run)))
    assert judge(.001, (.3, .6), (.3, .6)) == "holds"
    assert judge(.001, (.3, .6), (.3, .4)) == "partly"
    assert judge(.001, (.3, .6), (-.1, .6)) == "partly"
    assert judge(.02, (.3, .6), (.3, .6)) == "does not hold"
    assert judge(.001, (-.1, .6), (-.1, .6)) == "does not hold"
