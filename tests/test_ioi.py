"""Patching against plain forward passes, ACDC against all subsets of a few features, and what both promise when interrupted."""
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from sparse_coding import prompts, search
from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.ledger import claims
from sparse_coding.models import load_model
from sparse_coding.dictionaries import fixed, random_rotation
from sparse_coding.splicing import Placed
from sparse_coding.prompts import Pairs
from sparse_coding.search import Patching, acdc, acdc_plainly, attribution, midpoints, ranked
from sparse_coding.paper1 import fewest_features as localise
import tiny
from tiny import tiny_model

LAYER = 2


def made_pairs(n=6, seq=9, at=(3, 5), seed=0):
    "Random sentences that differ in one token, at one of two places."
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.integers(1, 300, (n, seq)))
    target, where = base.clone(), [at[i % 2] for i in range(n)]
    target[range(n), where] = (base[range(n), where] + 7) % 300
    return Pairs(base, target, base[range(n), where], target[range(n), where], base[:, -2], tuple(("ABBA", "BABA")[i % 2] for i in range(n)))


def sparse(**how): return tiny.sparse(**{"bias": -.4, "most": 2., **how})


def patching(model, n=6, sae=None): return Patching(Placed(model, sparse() if sae is None else sae, site=Site(LAYER)), made_pairs(n))


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def model(request, tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp("ioi")/request.param, request.param)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp("ioi")/"llama", "llama")))


@torch.inference_mode()
def test_patching_is_the_plain_forward_pass_with_the_stream_edited(model):
    case = patching(model)
    pairs, sae = case.pairs, case.sae
    assert 0 < len(case.live) < sae.d_sae and case.start[:, case.live].min(1).values.tolist() == [3, 5]*3
    F = case.live[::2]
    x, bar = (model.run_to(t, Site(LAYER))[Site(LAYER)] for t in (pairs.base, pairs.target))
    def patched(x): return x + (sae.encode(bar) - sae.encode(x))[..., F] @ sae.W_dec[F]
    want = model.splice(pairs.base, Site(LAYER), patched)[:, -1]
    torch.testing.assert_close(case.logits(case.edit(F)), want, atol=1e-4, rtol=1e-4)
    y = model.logits(pairs.target)[:, -1]
    np.testing.assert_allclose(case.kl(case.edit(F)), entropy(want.double().softmax(-1), y.double().softmax(-1), axis=1), rtol=2e-3, atol=1e-5)
    rows = torch.tensor([4, 1, 1])
    torch.testing.assert_close(case.kl(case.edit(F)[rows], rows), case.kl(case.edit(F))[rows], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(case.magnitude(case.edit(F)), (patched(x) - x).norm(dim=-1).mean(1).double(), rtol=1e-4, atol=1e-5)
    edit = torch.zeros_like(x).index_fill_(1, torch.tensor([1]), .3)                          # before anything differs
    torch.testing.assert_close(case.logits(edit), model.splice(pairs.base, Site(LAYER), lambda x: x + edit)[:, -1], atol=1e-4, rtol=1e-4)
    assert model.hf.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_a_path_is_one_plain_patch_per_visit(model):
    "Each visit's divergence from whole rows of its own, whatever was expected to go before it; and the keys it leaves."
    case, rng = patching(model), np.random.default_rng(5)
    state, todo = search.start_search(case, case.live), rng.permutation(case.live).tolist()
    goes = {j: bool(rng.random() < .6) for j in todo}
    path, _ = search.try_path(case, state, todo, 0., {j: -1. if g else 1. for j,g in goes.items()}, 10_000)
    kept = list(todo)
    assert [j for j,*_ in path] == todo
    for j,hit,edit,_,kl in path:
        without = [i for i in kept if i != j]
        torch.testing.assert_close(edit, case.edit(without)[hit], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kl, case.kl(case.edit(without))[hit], atol=1e-5, rtol=1e-4)
        if goes[j]: kept = without
    tau = float(np.median([float((kl - state["kl"][hit]).sum())/6 for _,hit,_,_,kl in path]))
    dropped = search.sweep_once(case, state, list(todo), tau, dict.fromkeys(todo, 0.), 40)
    again = search.start_search(case, state["kept"])
    assert dropped and state["kept"]
    for mine, fresh in zip(state["keys"].values(), again["keys"].values()):
        for a,b in zip(mine, fresh): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@torch.inference_mode()
def test_all_features_of_an_invertible_dictionary_are_the_target(model):
    case = patching(model, sae=fixed(random_rotation(32, 1), signed=True))
    torch.testing.assert_close(case.x + case.edit(case.live), case.x + case.change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(case.logits(case.edit(case.live)), model.logits(case.pairs.target)[:, -1], atol=2e-4, rtol=1e-4)
    assert case.kl(case.edit(case.live)).max() < 1e-5


@torch.inference_mode()
def test_features_with_equal_codes_change_nothing(llama):
    case = patching(llama)
    dead = [j for j in range(48) if j not in case.live]
    assert dead and torch.equal(case.edit(dead), torch.zeros_like(case.edit([])))
    torch.testing.assert_close(case.logits(case.edit(dead)), llama.logits(case.pairs.base)[:, -1], atol=1e-4, rtol=1e-5)
    for j in case.live:
        gone = ~case.hits[:, j]
        if gone.any(): assert not case.edit([j])[gone].any()


def test_only_the_residual_stream_is_patched(llama):
    with pytest.raises(SparseCodingError, match="not mlp_out.2"):
        Patching(Placed(llama, sparse(), site=Site(LAYER, "mlp_out")), made_pairs())


def eight(llama, n=5):
    "A case of eight features, some of which stand in for each other."
    case = patching(llama, n)
    case.live = sorted(case.live, key=lambda j: -float(case.delta[..., j].abs().sum()))[:8]
    return case


@pytest.fixture(scope="module")
def table(llama):
    "The divergence of all 256 subsets of eight features, one plain patch each."
    case = eight(llama)
    subsets = chain.from_iterable(combinations(sorted(case.live), k) for k in range(9))
    with torch.inference_mode(): return {frozenset(F): float(case.kl(case.edit(list(F))).mean()) for F in subsets}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("positions", [1, 30, 10_000])
def test_acdc_replays_the_rule_on_all_subsets(llama, table, seed, positions):
    assert len(table) == 256
    spread = max(table.values()) - min(table.values())
    thresholds = np.array([1e-4, .003, .03, .1, .3])*spread
    trace = acdc_plainly(lambda F: table[frozenset(F)], eight(llama).live, thresholds, seed)
    curve = acdc(eight(llama), thresholds, seed, positions=positions)
    assert len(trace) > 3 and curve.features[::-1][:len(trace) - 1] == [j for _,j,_ in trace[1:]]
    np.testing.assert_allclose(curve.kl.mean(1), [table[frozenset(curve.features[:k])] for k in range(9)], atol=1e-6)
    assert curve.count.tolist() == list(range(9)) and sorted(curve.features) == sorted(eight(llama).live)


@torch.inference_mode()
def test_a_curve_says_what_its_sets_do(llama):
    case = patching(llama)
    with torch.inference_mode(False): curve = acdc(case, (1e-4, 1e-2, .3), seed=2)
    for k in range(0, len(curve.count), 5):
        edit = case.edit(curve.features[:k])
        np.testing.assert_allclose(curve.kl[k], case.kl(edit), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(curve.edit[k], case.magnitude(edit), rtol=1e-4, atol=1e-5)
    again = ranked(case, curve.features, [3, 5])
    np.testing.assert_allclose(again.kl, curve.kl[[0, 3, 5]], rtol=1e-3, atol=1e-5)


def test_an_interrupted_search_goes_on_from_its_last_sweep(llama, tmp_path, monkeypatch):
    thresholds = (1e-4, 1e-3, 1e-2, .1)
    whole, real, calls = acdc(eight(llama), thresholds, 3), search.sweep_once, []
    def stops(*a):
        calls.append(a[3])
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(search, "sweep_once", stops)
    with pytest.raises(KeyboardInterrupt): acdc(eight(llama), thresholds, 3, tmp_path)
    again = acdc(eight(llama), thresholds, 3, tmp_path)
    assert calls[2] not in calls[:2] and thresholds[0] not in calls[3:] and thresholds[1] not in calls[3:]
    assert again.features == whole.features
    np.testing.assert_allclose(again.kl, whole.kl, rtol=1e-4, atol=1e-6)


def test_attribution_is_the_derivative_and_integrated_gradients_add_up(llama):
    case = patching(llama, 4)
    slope = attribution(case)
    assert not slope[[j for j in range(48) if j not in case.live]].any()
    with torch.inference_mode():
        for j in sorted(case.live, key=lambda j: -float(slope[j].abs()))[:5]:
            e, h = case.edit([j]), 3e-3
            numeric = float((case.kl(h*e).mean() - case.kl(-h*e).mean())/(2*h))
            assert abs(numeric - float(slope[j])) < .02*abs(numeric) + 1e-4
        change = float(case.kl(case.edit(case.live)).mean() - case.kl(case.edit([])).mean())
    assert abs(float(attribution(case, midpoints(64)).sum()) - change) < .02*abs(change) + 1e-3


def test_pairs_need_names_of_one_token(llama):
    with pytest.raises(SparseCodingError, match="three names that are one token"): prompts.ioi_pairs(llama, names=("Mary", "Wilhelmina"))


def curve(kl, edit=None, count=None):
    kl = np.array(kl, float)
    count = np.arange(len(kl)) if count is None else np.array(count)
    return search.Curve(count, np.repeat(kl[:, None], 4, 1), np.repeat((count if edit is None else np.array(edit, float))[:, None], 4, 1)*1., list(range(count[-1])))


def test_areas_have_the_sign_of_the_lead_and_curves_end_where_the_shorter_does():
    ahead, behind = curve([4, 1, 0, 0, 0]), curve([4, 3, 2, 1, 0, 0, 0])
    for over in ("count", "edit"):
        m, (low, high) = localise.area_between([ahead], [behind], over)
        assert m > 0 and low <= m <= high and abs(localise.area_between([behind], [ahead], over)[0] + m) < 1e-12
    assert localise.shared_grid([ahead, behind])[-1] == pytest.approx(4)
    assert localise.needed(behind) == pytest.approx(2) and np.isnan(localise.needed(curve([4, 3.5, 3])))


VERDICTS = [
    ("P1-fig3l", dict(intervals={"a": (.1, .2), "b": (-.1, .2)}, working="a"), "holds"), ("P1-fig3l", dict(intervals={"a": (.1, .2), "b": (-.1, .2)}, working="b"), "partly"),
    ("P1-fig3r", dict(intervals={"a": (-.1, .2), "b": (-.1, .2)}, working="b"), "does not hold"),
    ("P1-alpha0", dict(intervals={"count": (-.2, .1), "edit": (-.3, -.1)}), "holds"), ("P1-alpha0", dict(intervals={"count": (.1, .2), "edit": (-.3, -.1)}), "partly"),
    ("P1-alpha0", dict(intervals={"count": (.1, .2), "edit": (.1, .3)}), "does not hold"),
    ("P1-floor", dict(steps=[(.1, .2), (.01, .2)], whole=(.1, .3)), "holds"), ("P1-floor", dict(steps=[(.1, .2), (-.01, .2)], whole=(.1, .3)), "partly"),
    ("P1-floor", dict(steps=[(-.1, .2)], whole=(-.1, .3)), "does not hold"),
    ("P1-fig17", dict(intervals={"3, count": (.1, .2), "3, edit": (.1, .2)}), "holds"), ("P1-fig17", dict(intervals={"3, count": (-.1, .2), "3, edit": (.1, .2)}), "partly"),
    ("P1-fig17", dict(intervals={"3, count": (-.1, .2)}), "does not hold"),
]


@pytest.mark.parametrize("claim, rec, verdict", VERDICTS, ids=[f"{c}, {v}" for c,_,v in VERDICTS])
def test_rules_at_their_edges(claim, rec, verdict):
    assert claim in claims() and claims()[claim].judge(rec) == verdict


def test_pairs_differ_in_one_token_and_have_one_length(llama):
    pairs = prompts.ioi_pairs(llama, 9, seed=3)
    assert pairs.base.shape == pairs.target.shape and (pairs.base != pairs.target).sum(1).tolist() == [1]*9
    assert sorted(pairs.order) == ["ABBA"]*5 + ["BABA"]*4
    for base, target, io, new, s, order in zip(pairs.base.tolist(), pairs.target.tolist(), pairs.io.tolist(), pairs.new.tolist(), pairs.s.tolist(), pairs.order):
        assert base.count(io) == 1 and target.count(new) == 1 and base.count(s) == target.count(s) == 2 and new not in base
        assert (base.index(io) < base.index(s)) == (order == "ABBA")
    assert torch.equal(prompts.ioi_pairs(llama, 9, seed=3).base, pairs.base) and not torch.equal(prompts.ioi_pairs(llama, 9, seed=4).base, pairs.base)
    assert pairs[2:4].order == pairs.order[2:4] and torch.equal(pairs[[0, 5]].target, pairs.target[[0, 5]])
    with pytest.raises(SparseCodingError, match="could be made"): prompts.ioi_pairs(llama, 9, templates=("{A} and {B}",))


def test_the_embedded_model_does_the_task():
    rows = prompts.gate(model := load_model(), prompts.ioi_pairs(model, 12, seed=1))
    assert [r["order"] for r in rows] == ["ABBA", "BABA"] and all(r["accuracy"] >= .65 and r["logit difference"] > 1 for r in rows)
