"""What heads' features have in common against loops, made-up prompts against the text they come from, ablation against a plain hook."""
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.ledger import claims
from sparse_coding.models import load_model
from sparse_coding.paper2.families import FAMILIES, Families, Scores
from sparse_coding.paper2.heads import (Kinship, chance_pairs, groups, kinship, made_up, mean_words, plot_heads,
    plot_jobs, polysemantic, reads, shared, top_features, two_jobs, without_heads)
import tiny
from tiny import tiny_model


def contexts(f=8, n=5, seq=60, vocab=30, rows=20, seed=0):
    "Places with text before and behind, some too weak to count."
    return tiny.contexts(f, n, seq, vocab, rows, seed, first=6, end=seq - 2, weakest=.3)


def related_in(matrix): return lambda ids: matrix[ids][:, ids]


def test_top_features_pass_over_those_that_may_not_be_chosen():
    h = torch.tensor([[.9, .1], [.8, .2], [.1, .9], [.5, .5], [0., 1.]])
    assert top_features(h, torch.tensor([True, False, True, True, True]), 2).tolist() == [[0, 3], [4, 2]]
    assert top_features(h, torch.tensor([True, False, False, False, False]), 3).tolist() == [[0], [0]]


def test_mean_words_against_loops():
    c, tokens = contexts()
    E = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    fired, read = mean_words(c, tokens, E)
    centre = E[tokens.ravel()].mean(0)
    for f in range(8):
        here, there, n, m = np.zeros(7), np.zeros(7), 0., 0.
        strongest = float(c.act[f].max())
        for k in range(5):
            a, r, d = float(c.act[f, k]), int(c.row[f, k]), int(c.pos[f, k])
            if a < strongest/2: continue
            here, n = here + a*E[tokens[r, d]], n + a
            positive = [max(float(c.dfa[f, k, j]), 0.) for j in range(d)]
            for j in range(d): there, m = there + a*positive[j]/sum(positive)*E[tokens[r, d - j]], m + a*positive[j]/sum(positive)
        for found,plain in ((fired[f], here/n - centre), (read[f], there/m - centre)):
            np.testing.assert_allclose(found.numpy(), plain/np.linalg.norm(plain), atol=1e-4)


def test_chance_pairs_are_of_other_heads_and_fire_as_often():
    g = torch.Generator().manual_seed(0)
    h, fires, usable = torch.rand(60, 4, generator=g), torch.randint(1, 500, (60,), generator=g), torch.rand(60, generator=g) > .3
    a, b = chance_pairs(h, fires, usable)
    first = h.argmax(1)
    assert sorted(a.tolist()) == usable.nonzero()[:, 0].tolist() and usable[b].all() and (first[a] != first[b]).all()
    for i,j in zip(a.tolist(), b.tolist()):
        others = [abs(np.log(int(fires[i])) - np.log(int(fires[k]))) for k in range(60) if usable[k] and first[k] != first[i]]
        assert abs(abs(np.log(int(fires[i])) - np.log(int(fires[j]))) - min(others)) < 1e-5
    assert len(chance_pairs(torch.tensor([[1., 0], [1, 0]]), torch.tensor([3, 4]), torch.tensor([True, True]))[0]) == 0


def test_kinship_finds_planted_relations():
    c, tokens = contexts(f=40, n=6, vocab=200, rows=80)
    E = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32)
    tokens[c.row[0], c.pos[0]] = tokens[c.row[1], c.pos[1]] = 7                # both fire on one word
    values = torch.zeros(40, len(FAMILIES))
    values[[4, 5], 2] = .9
    low = Scores(values, torch.zeros(2, 40, len(FAMILIES)))
    k = kinship(c, Families(low, low, torch.full((len(FAMILIES),), .25)), torch.rand(40, 4, generator=torch.Generator().manual_seed(2)), torch.arange(40) + 3, torch.ones(40).bool(), tokens, E)
    assert k.alike(torch.tensor([0, 1]))[0, 1] and k.related(torch.tensor([0, 1]))[0, 1] and not k.family(torch.tensor([0, 1])).any()
    assert k.family(torch.tensor([4, 5, 6])).tolist() == [[True, True, False], [True, True, False], [False]*3]
    ids = torch.arange(8, 40)
    assert k.alike(ids).float().mean() < .2 and reads(Families(low, low, None))[:, 2].nonzero()[:, 0].tolist() == [4, 5]


def test_groups_are_drawn_around_one_feature():
    star = torch.zeros(6, 6).bool()
    star[0, 1:5] = star[1:5, 0] = True                                         # 1 to 4 have only 0 in common
    assert groups(star) == [[0, 1, 2, 3, 4], [5]]
    chain = torch.diag(torch.ones(5), 1).bool()
    chain = chain | chain.T
    assert [len(g) for g in groups(chain)] == [3, 3] and sorted(sum(groups(chain), [])) == list(range(6))
    assert groups(torch.zeros(3, 3).bool()) == [[0], [1], [2]]


def test_polysemantic_needs_a_fifth_left_out():
    for out,said in ((1, False), (2, True)):
        m = torch.ones(10, 10).bool()
        m[:out], m[:, :out] = False, False
        assert polysemantic(related_in(m), torch.arange(10)[None]).tolist() == [said]


def test_shared_pairs():
    m = torch.zeros(5, 5).bool()
    m[0, 1] = m[1, 0] = True
    m.fill_diagonal_(True)
    torch.testing.assert_close(shared(related_in(m), torch.tensor([[0, 1, 2], [2, 3, 4]])), torch.tensor([1/3, 0.]))


def test_two_jobs_takes_the_head_with_most_in_two_groups():
    own = torch.zeros(30, len(FAMILIES)).bool()
    own[0:7, 0] = own[7:10, 1] = True                                          # head 0: groups of 7 and 3
    own[10:15, 2] = True                                                       # head 1: 5 and five single ones
    own[20:29, 3] = True                                                       # head 2: 9 of 10, a candidate
    kin = Kinship(own, (torch.eye(30), torch.eye(30)), .5)
    layer, head, a, b = two_jobs({3: kin}, {3: torch.arange(30).view(3, 10)})
    assert (layer, head, a.tolist(), b.tolist()) == (3, 0, list(range(7)), [7, 8, 9])
    with pytest.raises(SparseCodingError, match="two jobs"): two_jobs({3: Kinship(torch.ones(10, 1).bool(), (torch.eye(10),)*2, .5)}, {3: torch.arange(10)[None]})


def test_made_up_prompts_keep_what_is_read_and_nothing_else():
    c, _ = contexts(f=3, n=5, seq=60, rows=15)
    tokens = np.arange(15*60).reshape(15, 60)
    made = made_up(tokens, c, torch.tensor([0, 2]), 8, np.random.default_rng(0))
    assert len(made) == min(8, int((c.counts[[0, 2]] & (c.pos[[0, 2]] + 1 < 60)).sum()))
    for prompt,target in made:
        row, d = divmod(prompt[-1], 60)
        f, k = next((f, k) for f in (0, 2) for k in range(5) if (int(c.row[f, k]), int(c.pos[f, k])) == (row, d))
        s = d - int(c.dfa[f, k, :d].argmax())
        assert prompt[0] == tokens[row, 0] and target == tokens[row, d + 1] and tokens[row, s] in prompt
        around = {tokens[row, x] for x in (*range(max(s - 3, 1), d + 1),)} if d - s <= 12 else {tokens[row, x] for x in (*range(max(s - 3, 1), s + 3), *range(d - 5, d + 1))}
        assert sum(t in around for t in prompt[1:]) >= len(around) and len(prompt) == 11 + len(around) + 10*(d - s > 12)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def model(request, tmp_path_factory):
    return load_model(str(tiny_model(tmp_path_factory.mktemp(request.param)/"model", request.param, n_layers=3)))


@pytest.mark.parametrize("layer", [0, 2])
def test_without_heads_against_a_plain_hook(model, layer):
    g, site = torch.Generator().manual_seed(layer), Site(layer, "attn_z")
    prompts = [(torch.randint(1, 300, (n,), generator=g).tolist(), n) for n in (9, 5, 12)] # of different lengths: what fills up must not matter
    mean = torch.randn(model.d_in(site), generator=g)
    found = without_heads(model, layer, prompts, mean, size=2)
    assert found.shape == (3, model.n_heads)
    d = model.d_in(site)//model.n_heads
    for i,(ids,target) in enumerate(prompts):
        for k in range(model.n_heads):
            def cut(z): z = z.clone(); z[:, 1:, k*d:(k + 1)*d] = mean[k*d:(k + 1)*d]; return z
            clean, gone = (v[0, -1].log_softmax(-1)[target] for v in (model.logits(torch.tensor([ids])), model.run_with(torch.tensor([ids]), {site: cut})))
            assert abs(float(found[i, k]) - float(clean - gone)) < 1e-3


def test_figures_can_be_drawn():
    plt.close(plot_heads({1: np.zeros((4, len(FAMILIES))), 2: np.ones((4, len(FAMILIES)))}, {1: np.array([True] + [False]*3), 2: np.zeros(4, bool)}))
    plt.close(plot_jobs([torch.randn(6, 4), torch.randn(1, 4)], 2))


def test_verdicts():
    judge = claims()["P2-poly"].judge
    assert [judge(dict(measured=m, fifty=f)) for m,f in ((.95, .9), (.95, .8), (.6, .95), (.5, .95))] == ["holds", "partly", "partly", "does not hold"]
    judge = claims()["P2-heads"].judge
    said = [judge(dict(ci95=(low, .5), deep_score=d, first_score=.2)) for low,d in ((.1, .1), (-.1, .1), (.1, .3), (-.1, .3))]
    assert said == ["holds", "partly", "partly", "does not hold"]
