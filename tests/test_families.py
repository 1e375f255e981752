"""Family rules against loops that spell them out, attribution against the model's own z, ablation against a plain hook."""
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sparse_coding.presets import Site
from sparse_coding.ledger import claims
from sparse_coding.models import load_model
from sparse_coding.dictionaries import TopKSAE
from sparse_coding.splicing import Placed
from sparse_coding.paper2.families import (COUNTERFACTUALS, FAMILIES, NEAR, ROOM, Families, Scores, after_the_same,
    attribute_places, counterfactuals, drops, family_scores, specificity, induced_words, masses, matches, members,
    plot_families, plot_specificity, random_like, silenced, successors, sums, thresholds, top_tokens, try_feature,
    usual, word_classes, words_back)
from tiny import contexts, tiny_model


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def model(request, tmp_path_factory):
    return load_model(str(tiny_model(tmp_path_factory.mktemp(request.param)/"model", request.param, n_layers=3)))


def sae_for(model, layer, n=40, k=4):
    return TopKSAE(model.d_in(Site(layer, "attn_z")), n, k, seed=2).requires_grad_(False)


# where a feature reads ------------------------------------------------------------------------------------------------------------------

def test_attribution_adds_up_and_is_where_attention_put_it(model):
    tokens, site = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(1)), Site(1, "attn_z")
    sae, c = sae_for(model, 1), contexts(40, 4, 20, rows=3)[0]
    c.row, c.dfa, c.heads = c.row + 7, torch.zeros(40, 4, 20), torch.zeros(40, 4, model.n_heads)
    c.act[0, 0] = 0                                                            # fired in fewer rows: left alone
    z, seen = model.run_to(tokens, site)[site], model.attend(tokens, 1)[1]
    attribute_places(c, sae.W_enc, seen, 7)
    assert not c.dfa[0, 0].any()
    for f,k in ((1, 0), (5, 3), (39, 1)):
        b, d, w = int(c.row[f, k]) - 7, int(c.pos[f, k]), sae.W_enc[:, f].view(model.n_heads, -1)
        torch.testing.assert_close(c.dfa[f, k].sum(), z[b, d] @ sae.W_enc[:, f], rtol=1e-3, atol=1e-3)
        for back in range(d + 1):
            by_head = [float(seen.pattern[b, h, d, d - back]*(w[h] @ seen.v[b, d - back, h])) for h in range(model.n_heads)]
            assert abs(float(c.dfa[f, k, back]) - sum(by_head)) < 1e-3*(1 + abs(sum(by_head)))
        torch.testing.assert_close(c.heads[f, k], torch.einsum("he,he->h", z[b, d].view(model.n_heads, -1), w), rtol=1e-3, atol=1e-3)
        assert not c.dfa[f, k, d + 1:].any()


def test_promoted_tokens_are_the_top_of_the_direct_path(model):
    sae, (W, _) = sae_for(model, 2), model.W_O(2)
    up, down = top_tokens(Placed(model, sae, site=Site(2, "attn_z")), 3)
    from sparse_coding.models import unembedded
    z = unembedded(model, sae.W_dec[7:8] @ W.flatten(0, 1))[0]
    assert set(up[7].tolist()) == set(z.argsort()[-3:].tolist()) and set(down[7].tolist()) == set(z.argsort()[:3].tolist())


def test_random_directions_read_the_same_centred_vectors(model):
    sae = sae_for(model, 1)
    sae.b_dec += 1.
    like = random_like(sae, 16)
    assert like.d_sae == 16 and torch.equal(like.encode(sae.b_dec[None]), torch.zeros(1, 16))
    torch.testing.assert_close(like.W_enc.norm(dim=0), torch.ones(16))


# words ----------------------------------------------------------------------------------------------------------------------------------

def test_classes_of_words(model):
    classes = word_classes(model)
    assert len(classes) == len(model.hf.get_output_embeddings().weight)
    texts = model.str_tokens(np.arange(len(model.tokenizer)))
    for i in range(0, len(texts), 17):
        for j in range(0, len(texts), 5):
            same = texts[i].removeprefix(" ").lower() == texts[j].removeprefix(" ").lower() and "\ufffd" not in texts[i]
            assert (classes[i] == classes[j]) == (same or i == j)


def test_successors(model):
    classes = word_classes(model)
    after, of = successors(model, classes), {t: classes[i] for i,t in enumerate(model.str_tokens(np.arange(len(model.tokenizer))))}
    assert after[of["3"]] == of["4"] and after[of["a"]] == of["B"] and after[of["z"]] == -2


def test_words_back():
    c, tokens = contexts()
    classes = np.arange(12)*3
    found = words_back(c, tokens, classes)
    for f,k in ((0, 0), (4, 5), (2, 3)):
        for j in range(80):
            s = int(c.pos[f, k]) - j
            assert found[f, k, j] == (3*tokens[c.row[f, k], s] if s > 0 else -1)


def test_usual_leaves_the_context_itself_out():
    words = torch.tensor([[[0, 7], [0, 7], [0, 5], [0, 5], [0, 5], [0, -1]]])
    found = usual(words, torch.tensor([[1., 1, 1, 1, 1, 9]]), 1)[0].tolist()
    assert found[:2] == [5, 5] and found[5] == 5 and set(found[2:5]) <= {5, 7} # two votes each for a context of 5
    alone = usual(torch.tensor([[[0, 3], [0, -1]]]), torch.ones(1, 2), 1)[0].tolist()
    assert alone[0] == -2                                                      # nothing known in any other context
    heavy = usual(torch.tensor([[[0, 3], [0, 4], [0, 4], [0, 3]]]), torch.tensor([[1., 1, 1, 5]]), 1)[0].tolist()
    assert heavy[:3] == [3, 3, 3] and heavy[3] == 4                            # without the heavy one, 4 has two votes


# the rules ------------------------------------------------------------------------------------------------------------------------------

def by_loops(m, words, promoted, suppressed, habit, after):
    "The rules of one context, one source at a time."
    total, here, n = dict.fromkeys(FAMILIES, 0.), words[0], sum(w >= 0 for w in words)
    far = [x for j,x in enumerate(m) if j > NEAR and x > 0]
    spread = math.exp(-sum(x/sum(far)*math.log(x/sum(far)) for x in far)) if far else 1.
    for j,x in enumerate(m):
        if words[j] < 0: continue
        follows = j > 0 and j + 1 < len(words) and words[j + 1] == here
        total["induction"] += x*follows
        total["duplicate token"] += x*(j > 0 and words[j] == here)
        total["previous token"] += x*(j == 1)
        total["local context"] += x*(1 < j <= NEAR)
        total["long-range context"] += x*(j > NEAR and spread >= 4)
        total["name mover"] += x*(j > 0 and words[j] in promoted and not follows)
        total["successor"] += x*(after[words[j]] in promoted)
        total["suppression"] += x*(j > 0 and words[j] in suppressed)
        total["n-gram"] += x*(1 <= j <= 3 and words[j] == habit[j - 1])
        total["own token"] += x*(j == 0)
    if n <= ROOM: total["local context"] = total["long-range context"] = math.nan
    return [total[k] for k in FAMILIES]


def test_rules_against_loops():
    c, tokens = contexts(vocab=40)
    after = np.array([(k + 1) % 40 if k % 3 else -2 for k in range(40)])
    words = words_back(c, tokens, np.arange(40))
    habit = torch.stack([usual(words, torch.ones(5, 6), back) for back in (1, 2, 3)], -1)
    m = masses(c.dfa, words)
    found = sums(m, words, dict(promoted=c.promoted, suppressed=c.suppressed, usual=habit), after)
    assert found.isnan().any() and not found.isnan().all()
    for f in range(5):
        for k in range(6):
            plain = by_loops(m[f, k].tolist(), words[f, k].tolist(), c.promoted[f].tolist(), c.suppressed[f].tolist(), habit[f, k].tolist(), after)
            torch.testing.assert_close(found[f, k], torch.tensor(plain), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_masses_leave_out_negative_parts_and_the_beginning():
    m = masses(torch.tensor([3., -2, 1, 100]), torch.tensor([5, 5, 5, -1]))
    torch.testing.assert_close(m, torch.tensor([.75, 0, .25, 0]))
    assert not masses(torch.zeros(3), torch.tensor([1, 1, 1])).any()


def planted(n=40, k=6):
    "Features that read what followed an earlier mention, each at its own distance, in text where nothing else recurs."
    c, _ = contexts(n, k, 80, rows=n*k)
    tokens = np.arange(n*k*80).reshape(n*k, 80) + 5
    c.row, c.pos, c.act = torch.arange(n*k).view(n, k), torch.full((n, k), 75), torch.ones(n, k)
    c.dfa = torch.zeros(n, k, 80)
    for f in range(n):
        for i in range(k):
            back = 3 + f % 40
            tokens[f*k + i, 75 - back - 1] = tokens[f*k + i, 75]
            c.dfa[f, i, back] = 1.
    return c, tokens


def test_planted_induction_is_found_and_permutation_destroys_it():
    c, tokens = planted()
    classes = np.arange(tokens.max() + 1)
    found = family_scores(c, tokens, classes, np.full(len(classes), -2))
    i = FAMILIES.index("induction")
    assert (found.values[:, i] == 1).all() and found.permuted[:, :, i].mean() < .2
    chance = Scores(torch.rand(40, len(FAMILIES))*.3, found.permuted)
    f = Families(found, chance, thresholds(found, chance))
    assert f.members[:, i].all() and f.studied.all() and f.counted("features")[0][i] == 40 and f.counted("permuted")[0][i] <= 2
    plt.close(plot_families({4: f, 5: f}))


def test_features_with_few_contexts_have_no_score():
    c, tokens = planted(6, 6)
    c.act[2, 3:] = .4                                                          # less than half of the strongest
    classes = np.arange(tokens.max() + 1)
    found = family_scores(c, tokens, classes, np.full(len(classes), -2))
    assert found.values[2].isnan().all() and not found.values[3].isnan().any()


def test_thresholds_have_a_floor_and_heed_both_nulls():
    low, high = torch.full((100, 10), .1), torch.full((100, 10), .8)
    values = torch.zeros(100, 10)
    assert (thresholds(Scores(values, torch.stack([low, low])), Scores(low, low)) == .25).all()
    assert (thresholds(Scores(values, torch.stack([high, low])), Scores(low, low)) == .8).all()
    assert (thresholds(Scores(values, torch.stack([low, low])), Scores(high, low)) == .8).all()
    assert (thresholds(Scores(values, torch.stack([low, low]))) == .25).all()
    assert members(torch.tensor([[.8, .81, torch.nan]]), torch.full((3,), .8)).tolist() == [[False, True, False]]


# one induction feature ------------------------------------------------------------------------------------------------------------------

def test_the_proxy_against_loops():
    words = np.random.default_rng(0).integers(0, 6, (20, 30))
    found = after_the_same(words, 3)
    for r in range(20):
        for d in range(30):
            q = [q for q in range(1, d - 1) if words[r, q] == words[r, d] and words[r, q + 1] == 3]
            assert found[r, d] == bool(q) and matches(words[r], d, 3).tolist() == q


def test_induced_words():
    c, tokens = planted(4, 5)
    words = words_back(c, tokens, np.arange(tokens.max() + 1))
    for k in range(5): words[1, k, 4] = 2                                      # what feature 1 reads, always the same word
    word, share = induced_words(c, words)
    assert word[1] == 2 and share[1] == 1 and abs(share[0] - .2) < 1e-6        # feature 0 reads another one in every context


def test_fit_by_hand():
    acts = np.array([[0, 4., 1, 0], [3, 0, 1, 1]])
    proxy = np.array([[False, True, False, True], [True, False, False, True]])
    found = specificity(acts, proxy)
    assert found["precision, upper half"][0] == 1 and found["precision"][0] == 3/5 and found["recall"][0] == 3/4
    plt.close(plot_specificity(acts, proxy))


def test_counterfactuals_change_what_they_say():
    classes, rng = np.array([0, 1, 1, 2, 3, 4, 5, 6]), np.random.default_rng(0)
    row = np.array([0, 1, 3, 4, 1, 3, 5, 2])                                   # 1 and 2 are one word; its successor by induction is 3, of class 2
    new = counterfactuals(row, 7, 2, classes, np.array([4, 5, 6, 7, 3, 1]), rng)
    assert tuple(new) == COUNTERFACTUALS and (new["unchanged"] == row).all()
    for kind,at in (("another word", [2, 5]), ("another first word", [1, 4]), ("respelled", [1, 4])):
        assert np.flatnonzero(new[kind] != row).tolist() == at, kind
    assert not len(matches(classes[new["another word"]], 7, 2)) and not len(matches(classes[new["another first word"]], 7, 2))
    assert len(matches(classes[new["respelled"]], 7, 2)) == 2
    assert counterfactuals(np.array([0, 3, 4, 5, 3]), 4, 3, classes, np.array([6, 7]), rng)["respelled"] is None


def test_drops_against_a_plain_hook(model):
    site, sae = Site(1, "attn_z"), sae_for(model, 1)
    tokens = torch.randint(1, 300, (5, 16), generator=torch.Generator().manual_seed(4)).numpy()
    dst, target = np.array([15, 7, 9, 12, 3]), np.array([5, 6, 7, 8, 9])
    codes = [sae.encode(model.run_to(tokens[i:i + 1], site)[site])[0, d] for i,d in enumerate(dst)]
    features = np.array([[int(c.argmax()), int(c.argmin())] for c in codes])   # an active one and a silent one
    found = drops(Placed(model, sae, site=site), tokens, dst, target, features, size=2)
    np.testing.assert_allclose(found[:, 1], 0, atol=1e-5)
    for i,d in enumerate(dst):
        f = features[i, 0]
        def without(z): z = z.clone(); z[0, d] -= codes[i][f]*sae.W_dec[f]; return z
        clean, cut = (v[0, d].log_softmax(-1)[target[i]] for v in (model.logits(tokens[i:i + 1]), model.run_with(tokens[i:i + 1], {site: without})))
        assert abs(found[i, 0] - float(clean - cut)) < 1e-4


def test_a_trial(model):
    site, sae, classes = Site(1, "attn_z"), sae_for(model, 1), word_classes(model)
    row = torch.randperm(200, generator=torch.Generator().manual_seed(5))[:16].numpy() + 100
    row[3], row[12] = row[11], row[4]                                          # ... a b ... a
    tokens, word = np.stack([row, row]), int(classes[row[4]])
    f = int(sae.encode(model.run_to(tokens[:1], site)[site])[0, 11].argmax())
    placed = Placed(model, sae, site=site)
    t = try_feature(placed, f, word, tokens, np.array([11, 11]))
    assert (t.acts[:, 0] > 0).all() and t.drop.shape == (2, 2) and silenced(t)["unchanged"] == (0, 2)
    part = model.attend(tokens[:1], 1)[1].by_source(sae.W_enc[:, f], torch.tensor([11]))[0].sum(0)[1:].clamp(min=0)
    assert abs(float(t.on_match[0]) - float(part[3]/part.sum())) < 1e-4       # position 4, the word after the earlier mention
    empty = try_feature(placed, f, word, tokens[:0], np.zeros(0, int))
    assert empty.drop.shape == (0, 2) and silenced(empty)["respelled"] == (0, 0)


# verdicts -------------------------------------------------------------------------------------------------------------------------------

def test_verdicts():
    judge = claims()["P2-families"].judge
    null = dict.fromkeys("abc", (0., .01))
    for above,said in ((3, "holds"), (1, "partly"), (0, "does not hold")):
        assert judge({"features": {k: (.02, .03) if i < above else (.005, .03) for i,k in enumerate("abc")}, "permuted": null}) == said
    good = dict(precision=(.85, .9), recall=(.6, .7), paired=(.1, .2), silent=.9)
    bad = dict(precision=(.7, .9), recall=(.4, .7), paired=(-.1, .2), silent=.5)
    for keys,said in (((), "holds"), (("recall",), "partly"), (("recall", "paired"), "partly"), (("recall", "paired", "silent"), "does not hold"), (tuple(bad), "does not hold")):
        assert claims()["P2-board"].judge(good | {k: bad[k] for k in keys}) == said
