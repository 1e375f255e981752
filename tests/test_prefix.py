"Prefixes, glances and interventions on tiny random models of three architectures, against brute force."
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.stats import difference, interval
from sparse_coding.models import load_model, final_norm
from sparse_coding.attention import freeze_norm
from sparse_coding.paper2.claims import judge_hypothesis, judge_prefix
from sparse_coding.paper2.long_prefix import (Attending, attending, belonging, by_length, disturbed, first_long,
    induction_heads, induction_scores, logit_parts, matched, pick_pair, prefixed, random_rows, shortened, weights_at)
from tiny import tiny_model


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request, tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", request.param)), device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", "llama")), device="cpu")


def alike(model, a, b):
    "The words are the same but for one space before them and capitals."
    if a == b: return a != model.eot_id
    x, y = (model.str_tokens([i])[0].removeprefix(" ").casefold() for i in (a, b))
    return x == y and bool(x.strip()) and "\ufffd" not in x and model.eot_id not in (a, b)


def brute(model, row, d, s):
    "Walk back from both."
    n = 0
    while s < d and s - 1 - n >= 0 and alike(model, int(row[d - n]), int(row[s - 1 - n])): n += 1
    return n


def test_matched_is_what_walking_back_finds(llama):
    words = llama.tokenize(" the The the bridge store the bridge John john  John the THE store the bridge")[0].tolist()
    rng = np.random.default_rng(0)
    rows = np.array([[0, *(words*9)[:29]], [0, *rng.choice(words, 29)], [0, *rng.choice([*words[:6], 0], 29)]])
    found = matched(llama, rows)
    for r, row in enumerate(rows):
        for d in range(30):
            for s in range(30): assert found[r, d, s] == (brute(llama, row, d, s) if s >= 1 else 0), (r, d, s)
    assert found.max() > 2


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_made_up_prefixes_are_exactly_so_long(llama, length):
    rows = prefixed(llama, length, 20, 48, seed=3)
    assert (rows.tokens[:, 0] == llama.bos_id).all() and (rows.tokens[:, 1:] != llama.eot_id).all()
    for row, d, s in zip(rows.tokens.tolist(), rows.dst.tolist(), rows.src.tolist()):
        assert row[d - length + 1:d + 1] == row[s - length:s] and row[d - length] != row[s - length - 1]
        assert len(set(row)) == 48 - length and s < d - length + 1
    again = prefixed(llama, length, 20, 48, seed=3)
    assert torch.equal(rows.tokens, again.tokens) and not torch.equal(rows.tokens, prefixed(llama, length, 20, 48, seed=4).tokens)


def test_random_rows_hold_no_marks_and_no_token_twice(llama):
    rows = random_rows(llama, 5, 300, np.random.default_rng(0))
    assert not (rows == llama.eot_id).any() and all(len(set(r)) == 300 for r in rows.tolist())
    with pytest.raises(SparseCodingError, match="shorter rows"): random_rows(llama, 1, 10_000, np.random.default_rng(0))


def test_a_glance_sees_what_hooks_see(model):
    rows = prefixed(model, 2, 5, 24)
    pattern, z, x = model.glance(rows.tokens, rows.dst)
    i, seen, last = torch.arange(5), model.attend(rows.tokens, range(model.n_layers)), []
    hook = final_norm(model).register_forward_pre_hook(lambda m, args: last.append(args[0]))
    model.logits(rows.tokens)
    hook.remove()
    assert_close(x, last[0][i, rows.dst], atol=1e-4*float(x.abs().max()), rtol=0)
    for l in range(model.n_layers):
        assert_close(pattern[l], seen[l].pattern[i, :, rows.dst], atol=1e-5, rtol=1e-3)
        real = model.run_to(rows.tokens, Site(l, "attn_z"))[Site(l, "attn_z")][i, rows.dst]
        assert_close(z[l].flatten(1), real, atol=1e-4*float(real.abs().max()), rtol=0)


def test_logit_parts_are_what_a_head_adds_under_a_frozen_norm(model):
    rows = prefixed(model, 2, 4, 24)
    _, z, x = model.glance(rows.tokens, rows.dst)
    token, i = rows.tokens[torch.arange(4), rows.src], torch.arange(4)
    parts, norm, U = logit_parts(model, z, x, token), freeze_norm(final_norm(model), x[:, None]), model.hf.get_output_embeddings()
    for l, k in ((0, 0), (3, 2), (5, 3)):
        written = z[l][:, k].double() @ model.W_O(l)[0][k].double()
        left = x.double() - written
        change = (U(norm(x[:, None])) - U(norm(left[:, None].float())))[i, 0, token]
        assert_close(parts[l, :, k], change, atol=1e-4*float(parts.abs().max()) + 1e-4*float(U(norm(x[:, None])).abs().max()), rtol=0)


def test_by_length_is_the_pattern_at_the_source(model, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path))
    found = by_length(model, (1, 3), 5, 24, seed=2, batch=2)
    assert found["score"].shape == (2, 5, 6, 4) == found["logit"].shape
    for i, length in enumerate((1, 3)):
        rows = prefixed(model, length, 5, 24, 2)
        for l in (0, 4):
            pattern = model.attend(rows.tokens, l)[l].pattern
            assert_close(found["score"][i, :, l], pattern[torch.arange(5), :, rows.dst, rows.src], atol=1e-5, rtol=1e-3)


def test_induction_scores_by_hand(llama):
    once = random_rows(llama, 3, 10, np.random.default_rng(0))
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.long), once, once], 1)
    p = llama.attend(rows, 2)[2].pattern
    want = sum(p[:, :, d, d - 9] for d in range(11, 21)).mean(0)/10
    assert_close(induction_scores(llama, 3, 10)[2], want, atol=1e-5, rtol=1e-4)


def test_attending_finds_what_loops_find(llama):
    tokens = prefixed(llama, 3, 6, 20).tokens.numpy()
    where = attending(llama, tokens, [(1, 2), (3, 0)], at_least=.15, batch=4)
    for (l, k), found in where.items():
        pattern = llama.attend(torch.from_numpy(tokens), l)[l].pattern[:, k]
        want = [(r, d, s) for r in range(6) for d in range(20) for s in range(1, d) if pattern[r, d, s] > .15]
        assert list(zip(found.row, found.dst, found.src)) == want and len(want) > 3
        assert all(n == brute(llama, tokens[r], d, s) for r, d, s, n in zip(found.row, found.dst, found.src, found.prefix))
        assert_close(torch.from_numpy(weights_at(llama, torch.from_numpy(tokens[found.row]), (l, k), found, 3)), torch.from_numpy(found.weight), atol=1e-5, rtol=1e-3)


def four_alike(model, n=12):
    "Rows in which four tokens match, and where."
    rows = prefixed(model, 4, n, 30)
    return rows, Attending(np.arange(n), rows.dst.numpy(), rows.src.numpy(), np.ones(n), np.full(n, 4))


def test_shortening_changes_one_token_and_leaves_one_match(llama):
    rows, where = four_alike(llama)
    new = shortened(llama, rows.tokens.numpy(), where, np.random.default_rng(0))
    changed = new != rows.tokens
    assert (changed.sum(1) == 1).all() and changed[where.row, rows.src - 2].all()
    assert (matched(llama, new.numpy())[where.row, rows.dst, rows.src] == 1).all()


def test_disturbing_leaves_the_match_as_it_is(llama):
    rows, where = four_alike(llama)
    new = disturbed(llama, rows.tokens.numpy(), where, np.random.default_rng(0))
    changed = new != rows.tokens
    assert (changed.sum(1) == 1).all() and not changed[:, 0].any() and not changed[where.row, rows.src].any() and (changed.int().argmax(1) < rows.dst).all()
    assert (matched(llama, new.numpy())[where.row, rows.dst, rows.src] == 4).all()


def test_the_first_place_of_each_row():
    where = Attending(*(np.array(v) for v in ([0, 0, 0, 2], [3, 5, 9, 4], [1, 2, 3, 2], [.4, .5, .6, .7], [1, 2, 5, 0])))
    first = first_long(where)
    assert (first.row.tolist(), first.dst.tolist(), len(first_long(where, 6))) == ([0], [5], 0)


def test_pairs_heads_and_features_are_chosen_as_said():
    score = torch.tensor([[.5, .1, .2], [.6, .5, .25]]).view(2, 1, 1, 3)
    heads = [(0, 0), (0, 1), (0, 2)]
    assert pick_pair({"score": score, "logit": torch.ones_like(score)}, heads) == ((0, 1), (0, 0))
    assert pick_pair({"score": score, "logit": -torch.ones_like(score)}, heads) == ((0, 1), (0, 0))
    against = torch.tensor([1., -1, 1]).expand_as(score)
    assert pick_pair({"score": score, "logit": against}, heads) == ((0, 2), (0, 0))
    assert induction_heads(torch.tensor([[.1, .9], [.5, .35]])) == [(0, 1), (1, 0), (1, 1), (0, 0)]
    assert induction_heads(torch.tensor([[.1, .9], [.5, .35]]), [1], few=1) == [(1, 0), (1, 1)]
    share = torch.tensor([[.9, .1], [.2, .8], [.7, .3]])
    assert belonging(share, 1, torch.tensor([True, False, True])) == [2, 0]


def test_intervals():
    a, b = np.array([2., 4, 6, 8]), np.array([1., 1, 2])
    va, vb = a.var(ddof=1)/4, b.var(ddof=1)/3
    dof = (va + vb)**2/(va**2/3 + vb**2/2)
    from scipy.stats import t
    half = t.ppf(.975, dof)*(va + vb)**.5
    mean, (low, high) = difference(a, b)
    assert np.allclose([mean, low, high], [a.mean() - b.mean(), a.mean() - b.mean() - half, a.mean() - b.mean() + half])
    assert difference([1.], b)[1] is None and interval([3.]) == (3., None) and np.isnan(interval([])[0])


def test_rules():
    rec = dict(score={"short": [.6, .9]}, lost={"long": [.6, .8], "short": [.1, .5]}, doubles={"score": [.1, .5], "logit": [.01, .2]})
    assert judge_prefix(rec) == "holds"
    assert judge_prefix(rec | dict(lost={"long": [.4, .8], "short": [.1, .5]})) == "partly"
    assert judge_prefix(rec | dict(doubles={"score": [.1, .5], "logit": [-.01, .2]})) == "partly"
    assert judge_prefix(rec | dict(score={"short": [.1, .3]}, doubles={"score": [.1, .5], "logit": None}, lost={"long": None, "short": None})) == "does not hold"
    assert judge_hypothesis(dict(ci95=[.1, 2])) == "holds" and judge_hypothesis(dict(ci95=[-.1, 2])) == "does not hold"
