"""Searching for features against brute force over all codes; purity by hand; ablation against a plain forward hook."""
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sparse_coding.paper1 import what_it_reads as case_studies, what_it_does as effects
from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.stats import share_ci
from sparse_coding.ledger import claims
from sparse_coding.models import load_model, unembedded
from sparse_coding.corpora import load_rows
from sparse_coding.activations import load_store
from sparse_coding.dictionaries import fixed
from sparse_coding.splicing import Placed, ablate
from sparse_coding.evidence import FragmentStore
from sparse_coding.paper1.what_it_reads import (about, active_on, candidates, next_tokens, overlap, own_purity,
    plot_tokens, purity, ranges, recall, token_group, token_mass)
from sparse_coding.paper1.what_it_does import announced, effect, expected, steered
from tiny import sparse, tiny_model

SITE = Site(2)


def at(model, store=None, sae=None): return Placed(model, sparse() if sae is None else sae, store, SITE)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder/"text.txt").write_text("\n".join(" ".join(f"it's {(i*j) % 37} apples." for j in range(150)) for i in range(6)))
    model = load_model(str(tiny_model(folder/"model", request.param)))
    store = load_store(model, load_rows(str(folder/"text.txt"), model, "train", None, 64, heldout=0.), SITE)
    return model, FragmentStore(store.folder, model.eot_id)


@pytest.fixture(scope="module")
def codes(tiny):
    _, store = tiny
    with torch.no_grad(): c = sparse().encode(store.read(SITE, 0, store.n)).view(-1, 64, 48)
    return c*store.keep(SITE).view(-1, 64, 1)


def test_mass_is_the_sum_over_tokens(tiny, codes):
    model, store = tiny
    tokens = torch.from_numpy(np.array(store.tokens, np.int64))
    for ids in (tokens, torch.from_numpy(next_tokens(store.tokens).astype(np.int64))):
        mass = token_mass(at(model, store), None if ids is tokens else ids.numpy())
        for t in ids.unique()[:40].tolist():
            if t >= 0: torch.testing.assert_close(mass[t], codes[ids == t].sum(0), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(mass.sum(0), codes[ids >= 0].sum(0), rtol=1e-3, atol=1e-2)


def test_negative_codes_have_no_mass(tiny):
    model, store = tiny
    both = fixed(torch.eye(32), signed=True), fixed(-torch.eye(32))
    positive, negative = (token_mass(at(model, store, sae)) for sae in both)
    assert (positive >= 0).all() and (negative >= 0).all()
    x = store.read(SITE, 0, store.n)[store.keep(SITE)]
    torch.testing.assert_close(positive.sum(0) - negative.sum(0), x.sum(0), rtol=1e-3, atol=.5)


def test_groups_match_whole_tokens(tiny):
    model, _ = tiny
    ids = token_group(model, r" ?[Ii]t")
    assert ids and all(model.str_tokens([i])[0].strip().lower() == "it" for i in ids)
    assert token_group(model, "no such token") == []


def test_candidates_are_pure_and_not_rare():
    mass = torch.tensor([[50., 1., 40., 0.], [50., 0., 60., 0.], [0., 0., 900., 7.]])
    assert [r["feature"] for r in candidates(mass, [0, 1])] == [0, 2]          # 1 has half a percent of the group, 3 nothing
    assert candidates(mass, [0, 1, 99], 1) == [{"feature": 0, "purity": 1., "share": pytest.approx(100/201)}]
    for ids in ([], [77]):
        with pytest.raises(SparseCodingError, match="No feature fires"): candidates(mass, ids)


def test_prompt_search_is_the_last_token(tiny):
    model, _ = tiny
    prompt = "it's 3 apples"
    c = sparse().encode(model.run_to(model.tokenize(prompt), SITE)[SITE][0, -1])
    table = active_on(at(model), prompt, torch.zeros(48), n=5)
    assert [r["feature"] for r in table] == c.argsort(descending=True)[:5].tolist()
    everywhere = torch.zeros(48)
    everywhere[table[0]["feature"]] = .5
    assert [r["feature"] for r in active_on(at(model), prompt, everywhere, n=4)] == [r["feature"] for r in table[1:]]


def test_explanations_are_searched_as_text():
    said = {3: "' river' 2", 5: "' the' 3", 9: "' riverbank' 1"}
    assert [r["feature"] for r in about(said, "river")] == [3, 9] and about(said, "moon") == [] and len(about(said, ".", 1)) == 1


def test_purity_recall_and_their_intervals():
    acts, inside = np.array([[4., 0, 1], [0, 5, 0]]), np.array([[True, True, False], [False, True, False]])
    assert purity(acts, inside)[0] == pytest.approx(.9) and recall(acts, inside)[0] == pytest.approx(2/3)
    assert purity(acts, inside, .5)[0] == 1.                                 # the 1 is below half of 5
    assert np.isnan(purity(0*acts, inside)[0]) and np.isnan(recall(acts, inside & False)[0])
    rng = np.random.default_rng(1)
    whole = rng.integers(1, 9, 400).astype(float)
    value, (low, high) = share_ci(rng.binomial(whole.astype(int), .3).astype(float), whole)
    assert low < .3 < high and .25 < low < value < high < .35
    draws = [share_ci(rng.binomial(w := rng.integers(1, 9, 60), .3).astype(float), w.astype(float))[1] for _ in range(200)]
    assert .85 < np.mean([low < .3 < high for low,high in draws]) <= 1       # about 95%


def test_ranges_cover_every_firing():
    acts = np.array([0., -1., .1, 2.5, 5., 9.99, 10.])
    assert ranges(acts).tolist() == [-1, -1, 0, 2, 4, 9, 9] and (ranges(np.zeros(3)) == -1).all()


def test_overlap_by_hand():
    acts = np.array([[[1., 0], [1, 1], [0, 1], [0, 0]]])
    assert overlap(acts, np.ones((1, 4), bool)).tolist() == [[1, .5], [.5, 1]]
    assert overlap(acts, np.array([[True, True, False, False]])).tolist() == [[1, .5], [1, 1]]


def test_own_purity_by_hand():
    a = torch.tensor([[5., 0, 1], [1, 0, 1], [0, 0, 1]])
    b = torch.tensor([[3., 0, 1], [1, 0, 1], [0, 1, 2]])
    pure = own_purity(a, b, 1)
    assert pure[0] == .75 and pure[1].isnan() and pure[2] == .25


def test_a_figure_of_a_feature_that_never_fires_can_be_drawn(tiny):
    model, store = tiny
    fig, ax = plt.subplots()
    plot_tokens(ax, np.zeros(store.tokens.shape), store.tokens, model)
    fig.canvas.draw()


@pytest.mark.parametrize("claim, rec, verdict", [
    ("P1-fig4l", dict(upper=(.91, 1), whole=(.6, .7)), "holds"), ("P1-fig4l", dict(upper=(.89, 1), whole=(.6, .7)), "partly"), ("P1-fig4l", dict(upper=(.89, 1), whole=(.4, .7)), "does not hold"),
    ("P1-notall", dict(recall=(.5, .89), others=1), "holds"), ("P1-notall", dict(recall=(.5, .89), others=0), "partly"), ("P1-notall", dict(recall=(.5, .91), others=2), "does not hold"),
    ("P1-poly", dict(side=(.1, .4), feature_purity=(.5, .6)), "holds"), ("P1-poly", dict(side=(.1, .55), feature_purity=(.6, .7)), "partly"), ("P1-poly", dict(side=(.5, .7), feature_purity=(.6, .7)), "does not hold"),
    ("P1-others", dict(purities={"a": (.6, .7), "b": (.6, .7)}), "holds"), ("P1-others", dict(purities={"a": (.6, .7), "b": (.4, .7)}), "partly"), ("P1-fig12/13", dict(purities={"a": (.4, .7)}), "does not hold"),
    ("P1-outlier", dict(coordinates=[3], features=[1]), "holds"), ("P1-outlier", dict(coordinates=[3], features=[]), "partly"), ("P1-outlier", dict(coordinates=[], features=[]), "does not hold"),
    ("P1-typical", dict(medians={"sae": (.6, .7), "random": (.1, .2), "basis": (.1, .3)}), "holds"), ("P1-typical", dict(medians={"sae": (.4, .7), "random": (.1, .2), "basis": (.1, .3)}), "partly"),
    ("P1-typical", dict(medians={"sae": (.2, .7), "random": (.1, .25), "basis": (.1, .3)}), "does not hold"),
    ("P1-fig4r", dict(ci95=(.1, .2), rank=1), "holds"), ("P1-fig4r", dict(ci95=(.1, .2), rank=2), "partly"), ("P1-fig4r", dict(ci95=(-.1, .2), rank=9), "does not hold")])
def test_rules_at_their_edges(claim, rec, verdict): assert claim in claims() and claims()[claim].judge(rec) == verdict


# what a feature does

@torch.inference_mode()
def test_ablation_is_a_plain_hook(tiny, codes):
    "Against a forward hook that subtracts the vector by hand, the logits and log-probabilities read off one by one."
    model, store = tiny
    feature = int((codes > 0).sum((0, 1)).argmax())
    tokens, keep, sae = np.asarray(store.tokens[:3]), store.keep(SITE).view(store.tokens.shape)[:3], sparse()
    got = effect(at(model, sae=sae), feature, tokens, keep.numpy(), size=2)
    ids = torch.from_numpy(tokens.astype(np.int64))
    def by_hand(module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        c = torch.relu(x @ sae.W_dec[feature] + sae.b_enc[feature])*keep
        new = x - c[..., None]*sae.W_dec[feature]
        return (new, *out[1:]) if isinstance(out, tuple) else new
    plain = model.hf(ids).logits
    handle = model.blocks[SITE.layer].register_forward_hook(by_hand)
    ablated = model.hf(ids).logits
    handle.remove()
    drops, changes, following = [], [], []
    for i in range(3):
        for t in range(63):
            if keep[i, t] and codes[i, t, feature] > 0:
                drops.append(float(plain[i, t].log_softmax(-1)[ids[i, t + 1]] - ablated[i, t].log_softmax(-1)[ids[i, t + 1]]))
                changes.append(plain[i, t] - ablated[i, t])
                following.append(int(ids[i, t + 1]))
    assert got.next.tolist() == following and len(following) > 5
    np.testing.assert_allclose(got.drop, drops, atol=2e-3)
    changes = torch.stack(changes).mean(0)
    torch.testing.assert_close(got.logits, changes - changes.mean(), atol=2e-3, rtol=2e-3)


def test_an_inactive_feature_changes_nothing(tiny, codes):
    model, store = tiny
    x, sae = store.read(SITE, 0, 64), sparse()
    off = (sae.encode(x) == 0).all(0).nonzero()[:, 0].tolist()
    assert off and torch.equal(ablate(sae, x, off), x)
    with pytest.raises(SparseCodingError, match="fires nowhere"):
        effect(at(model, sae=sae), off[0], store.tokens[:1], np.ones((1, 64), bool))


def test_several_features_are_taken_out_at_once(tiny):
    _, store = tiny
    x, sae = store.read(SITE, 0, 64), sparse()
    c = sae.encode(x)
    torch.testing.assert_close(ablate(sae, x, [1, 5]), x - c[:, [1]]*sae.W_dec[1] - c[:, [5]]*sae.W_dec[5])
    keep = torch.arange(64) % 2 == 0
    torch.testing.assert_close(ablate(sae, x, [1], keep)[1::2], x[1::2])


@torch.inference_mode()
def test_steering_at_strength_nothing_is_the_model(tiny):
    model, store = tiny
    tokens, d = np.asarray(store.tokens[:4, :9]), sparse().W_dec[3]
    got = steered(model, SITE, d, tokens, [0., 2.])
    torch.testing.assert_close(got[0], model.logits(tokens)[:, -1].log_softmax(-1), atol=1e-3, rtol=1e-3)
    def add(x): return torch.cat([x[:, :-1], x[:, -1:] + 2*d], 1)
    torch.testing.assert_close(got[1], model.run_with(tokens, {SITE: add})[:, -1].log_softmax(-1), atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_what_the_model_expects(tiny):
    model, store = tiny
    tokens = np.asarray(store.tokens[:5])
    plain = model.hf(torch.from_numpy(tokens.astype(np.int64))).logits.softmax(-1)
    torch.testing.assert_close(expected(model, tokens, [3, 1], size=2), plain[..., [3, 1]], atol=1e-5, rtol=1e-3)


def test_what_a_feature_announces():
    mass = torch.tensor([[2., 6, 9], [8, 6, 1]])
    assert [(r["feature"], r["next token"]) for r in announced(mass, torch.tensor([200, 200, 5]))] == [(0, 1), (1, 0)]
    assert announced(mass, torch.tensor([1, 1, 1])) == []
