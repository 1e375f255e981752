"""The lexicon against a slow one, the rules at their edges, and the arithmetic of comparing methods."""
from types import SimpleNamespace

import numpy as np
import pytest

import sparse_coding.paper1.controls
from sparse_coding.presets import SparseCodingError
from sparse_coding.stats import leads, redrawn_means, with_interval
from sparse_coding.ledger import claims
from sparse_coding.evidence import Examples, Shuffled
from sparse_coding.lexicon import KINDS, ManyLexicons, TokenLexicon, read_lexicon, write_lexicon
from sparse_coding.paper1.explaining import judge_from_environment
from sparse_coding.paper1.scores import slopes


def random_examples(seed, n=5, seq=12, vocab=9):
    rng = np.random.default_rng(seed)
    keep = rng.random((n, seq)) > .15
    return Examples(np.arange(n), rng.integers(0, vocab, (n, seq)), (rng.normal(size=(n, seq))*keep).astype(np.float32), keep)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_lexicon_is_means_by_token(kind, seed):
    e, predicted = random_examples(seed), np.random.default_rng(seed).integers(0, 9, (5, 12))
    acts = {}
    for i in range(5):
        for t in range(12):
            if not e.keep[i, t]: continue
            token = {"token": e.tokens[i, t], "previous": e.tokens[i, t-1] if t else None, "next": e.tokens[i, t+1] if t < 11 else None,
                     "predicted": predicted[i, t]}[kind]
            acts.setdefault(token, []).append(float(e.acts[i, t]))
    acts.pop(None, None)
    best = sorted(((np.mean(v), t) for t,v in acts.items() if np.mean(v) > 0), reverse=True)[:3]
    found = write_lexicon(e, 3, kind, predicted)
    assert found.tokens.tolist() == [t for _,t in best]
    np.testing.assert_allclose(found.means, [m for m,_ in best], rtol=1e-6)
    guess, table = read_lexicon(found, e.blind(), predicted), dict(zip(found.tokens, found.means))
    if kind == "token": assert all(guess[i, t] == table.get(e.tokens[i, t], 0.) for i in range(5) for t in range(12))
    assert set(np.unique(guess)) <= {0., *found.means}


def test_a_feature_that_is_silent_has_an_empty_lexicon():
    e = random_examples(0)
    silent = Examples(e.ids, e.tokens, np.zeros_like(e.acts), e.keep)
    assert len(write_lexicon(silent).tokens) == 0 and not read_lexicon(write_lexicon(silent), e).any()


def test_the_kind_that_predicts_the_spare_fragments_is_chosen():
    rng = np.random.default_rng(0)
    def follows(n, seed):                                      # fires on whatever comes after token 3
        tokens = np.random.default_rng(seed).integers(0, 6, (n, 40))
        acts = np.zeros((n, 40), np.float32)
        acts[:, 1:] = tokens[:, :-1] == 3
        return Examples(np.arange(n), tokens, acts, np.ones((n, 40), bool))
    found = SimpleNamespace(spare=lambda f: follows(10, 7))
    judge = ManyLexicons(found, [0], kinds=("token", "previous", "next"))
    explained = judge.explain([follows(5, 1)])
    assert explained[0].kind == "previous" and explained[0].tokens[0] == 3
    fresh = follows(5, 2)
    np.testing.assert_allclose(judge.simulate(explained, [fresh.blind()])[0], fresh.acts, atol=1e-9)
    with pytest.raises(SparseCodingError, match="1 features, asked to explain 2"): judge.explain([fresh, fresh])


def test_shuffling_moves_every_explanation():
    said = Shuffled(TokenLexicon()).explain([random_examples(s) for s in range(4)])
    plain = TokenLexicon().explain([random_examples(s) for s in range(4)])
    assert [s.means.tolist() for s in said] == [p.means.tolist() for p in plain[-1:] + plain[:-1]]


def made(means, n=150, spread=.2, seed=0):
    rng = np.random.default_rng(seed)
    return {i: [{"score": v, "random": v/2, "top": v} for v in rng.normal(m, spread, n)] for i,m in enumerate(means)}


def test_bootstrap_intervals_cover():
    hits = 0
    for s in range(200):
        _, (low, high) = with_interval(redrawn_means(made([.5], 60, seed=s), draws=800)[0])
        hits += low <= .5 <= high
    assert 175 <= hits <= 199


def test_leads_are_differences_and_the_best_baseline_is_the_hardest():
    found = {"sae": made([.6, .5]), "pca": made([.3, .3], seed=1), "ica": made([.4, .1], seed=2)}
    lead = leads(found)
    assert set(lead) == {"pca", "ica", "best"}
    np.testing.assert_allclose(lead["pca"][:, 0], [np.mean([r["score"] for r in found["sae"][i]]) - np.mean([r["score"] for r in found["pca"][i]]) for i in (0, 1)])
    assert (lead["best"] <= np.minimum(lead["pca"], lead["ica"]) + 1e-12).all()
    line = slopes(np.array([.1, .5, .9]), np.array([[2., 1], [1., 1], [0., 1]]))
    np.testing.assert_allclose(line, [-2.5, 0])
    with pytest.raises(SparseCodingError, match="two different places"): slopes([.5], np.ones((1, 3)))


VERDICTS = [
    ("P1-fig2", dict(leads={"pca": (.1, .2), "ica": (.01, .1)}), "holds"), ("P1-fig2", dict(leads={"pca": (.1, .2), "ica": (-.01, .1)}), "partly"),
    ("P1-fig2", dict(leads={"pca": (-.1, .2)}), "does not hold"),
    ("P1-depth", dict(ci95=(-.5, -.1), lead=[.4, .1]), "holds"), ("P1-depth", dict(ci95=(-.5, -.1), lead=[.4, .3]), "partly"),
    ("P1-depth", dict(ci95=(-.5, .1), lead=[.4, .3]), "does not hold"),
    ("P1-ica", dict(over={"pca": (.1, .2)}, measured={"pca": .15}), "holds"), ("P1-ica", dict(over={"pca": (-.1, .2)}, measured={"pca": .05}), "partly"),
    ("P1-ica", dict(over={"pca": (-.2, .1)}, measured={"pca": -.05}), "does not hold"),
    ("P1-basis", dict(ci95=(-.1, .1)), "holds"), ("P1-basis", dict(ci95=(.01, .1)), "does not hold"),
    ("P1-fig8", dict(leads={"R 1": (.1, .2)}, ci95=(-.02, .04)), "holds"), ("P1-fig8", dict(leads={"R 1": (.1, .2)}, ci95=(-.02, .06)), "partly"),
    ("P1-fig8", dict(leads={"R 1": (-.1, .2)}, ci95=(-.02, .06)), "does not hold"),
    ("P1-fig9", dict(fall=(-.3, -.1), leads={"pca": (.1, .2)}, early=(.1, .3)), "holds"),
    ("P1-fig9", dict(fall=(-.3, -.1), leads={"pca": (-.1, .2)}, early=(.1, .3)), "partly"),
    ("P1-fig9", dict(fall=(-.3, -.1), leads={"pca": (.1, .2)}, early=(-.1, .3)), "partly"),
    ("P1-fig9", dict(fall=(-.3, .1), leads={"pca": (-.1, .2)}, early=(-.1, .3)), "does not hold"),
    ("P1-fig10", dict(leads={"score": {"pca": (.1, .2)}, "random": {"pca": (.1, .2)}}), "holds"),
    ("P1-fig10", dict(leads={"score": {"pca": (.1, .2)}, "random": {"pca": (-.1, .2)}}), "partly"),
    ("P1-fig18", dict(shares={"pca": (-.1, .2), "ica": (0, .1)}), "holds"), ("P1-fig18", dict(shares={"pca": (.2, .4)}), "partly"),
    ("P1-fig18", dict(shares={"pca": (.2, .6)}), "does not hold"),
    ("P1-tab2", dict(intervals=dict(skew=(.1, .2), kurtosis=(.1, .2), mean=(-.1, .1), var=(-.1, .1))), "holds"),
    ("P1-tab2", dict(intervals=dict(skew=(.1, .2), kurtosis=(.1, .2), mean=(.1, .2), var=(-.1, .1))), "partly"),
    ("P1-tab2", dict(intervals=dict(skew=(-.1, .2), kurtosis=(.1, .2), mean=(.1, .2), var=(-.1, .1))), "does not hold"),
    ("P1-nfrag", dict(ci95=(.1, .2)), "holds"), ("P1-nfrag", dict(ci95=(-.1, .2)), "does not hold"),
    ("P1-blind", dict(ci95=(.01, .1), predicted=[.1, .3]), "holds"), ("P1-blind", dict(ci95=(-.01, .1), predicted=[.1, .3]), "partly"),
    ("P1-blind", dict(ci95=(-.01, .1), predicted=[.3, .1]), "does not hold"), ("P1-tab1", {}, "not comparable"), ("P1-toponly", {}, "not comparable"),
]


@pytest.mark.parametrize("claim, rec, verdict", VERDICTS, ids=[f"{c}, {v}" for c,_,v in VERDICTS])
def test_rules_at_their_edges(claim, rec, verdict):
    assert claims()[claim].judge(rec) == verdict


def test_a_judge_spends_one_budget(monkeypatch):
    for k,v in dict(OPENAI_BASE_URL="http://localhost:1/v1", SPARSE_CODING_BUDGET="1000").items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv("SPARSE_CODING_JUDGE", raising=False)
    assert judge_from_environment(None).name == "token lexicon"
    monkeypatch.setenv("SPARSE_CODING_JUDGE", "one-model")
    judge = judge_from_environment(None)
    assert judge.simulator is judge.client and judge.client.budget == 1000
    monkeypatch.setenv("SPARSE_CODING_JUDGE", "explainer, simulator")
    judge = judge_from_environment(None)
    assert [judge.client.model, judge.simulator.model] == ["explainer", "simulator"] and judge.client.budget + judge.simulator.budget == 1000
    assert judge.name == "explainer, simulator"
    monkeypatch.setenv("SPARSE_CODING_JUDGE", "same,same")
    judge = judge_from_environment(None)
    assert judge.simulator is judge.client and judge.client.budget == 1000
    monkeypatch.setenv("SPARSE_CODING_JUDGE", "one,two,three")
    with pytest.raises(SparseCodingError, match="not 3"): judge_from_environment(None)
    monkeypatch.setenv("SPARSE_CODING_BUDGET", "a million")
    with pytest.raises(SparseCodingError, match="number of tokens.*'a million'"): judge_from_environment(None)
