"""Moments against SciPy, NumPy and power sums; the counting of silent features by brute force; a trial on a tiny model."""
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats

from sparse_coding.presets import Preset, Site, SparseCodingError
from sparse_coding.stats import wilson
from sparse_coding.models import load_model
from sparse_coding.activations import ActivationStore, batches
from sparse_coding.dictionaries import TiedSAE, UntiedSAE, evaluate
from sparse_coding.firing import central_sums, mean_activation, merged, moments, shape_of
from sparse_coding.engine import Engine, Resampling
from sparse_coding.study import stores
from sparse_coding.paper1.claims import judge_active, judge_mlpdead
from sparse_coding.paper1.alive import (alpha_axis, energy_shares, fig16, follow, frequency_bins, mlp_shares,
    most_alive, picked_alpha, silent, trial, uncentred, unscaled_alpha, with_rule)
from tiny import tiny_model


def identity(d):
    "A dictionary whose codes are the positive part of its input."
    sae = TiedSAE(d, d, norm="project")
    sae.M.data = torch.eye(d)
    return sae


def columns(n=5000):
    "Codes as they occur: dense, sparse, firing three times, once, never, and with a mean of a million deviations."
    rng = np.random.default_rng(0)
    c = np.zeros((n, 6))
    c[:, 0] = rng.exponential(size=n)
    c[:, 1] = rng.exponential(size=n)*(rng.random(n) < .02)
    c[[5, 77, 4999], 2] = .3, 2., 1.
    c[123, 3] = 1e-3
    c[:, 5] = 1e6 + rng.exponential(size=n)
    return c


@pytest.mark.parametrize("sizes", [[5000], [1]*20 + [4980], [64]*78 + [8], [4000, 1, 999]])
def test_streamed_moments_are_scipys(sizes):
    c = columns()
    parts = [central_sums(p) for p in torch.from_numpy(c).split(sizes)]
    sums = parts[0]
    for part in parts[1:]: sums = merged(sums, part)
    found = shape_of(sums)
    assert sums.n == 5000
    for j in (0, 1, 2, 3, 5):
        x = c[:, j]
        # about the mean, in two passes; for the last column the data themselves hold only ten digits of their deviations
        rtol = 1e-6 if j == 5 else 1e-9
        assert np.isclose(found["mean"][j], x.mean(), rtol=1e-12) and np.isclose(found["var"][j], x.var(), rtol=rtol)
        assert np.isclose(found["skew"][j], stats.skew(x), rtol=rtol)
        assert np.isclose(found["kurtosis"][j], stats.kurtosis(x, fisher=False), rtol=rtol)
    assert found["skew"][4].isnan() and found["kurtosis"][4].isnan() and found["var"][4] == 0


def test_the_released_convention_is_power_sums_about_zero_with_a_floor():
    c = columns()[:, :5]
    found = shape_of(central_sums(torch.from_numpy(c)))
    var = (c**2).mean(0) - c.mean(0)**2
    assert np.allclose(found["raw_skew"], (c**3).mean(0)/np.maximum(var**1.5, 1e-8), rtol=1e-6)
    assert np.allclose(found["raw_kurtosis"], (c**4).mean(0)/np.maximum(var**2, 1e-8), rtol=1e-6)
    assert var[3]**1.5 < 1e-8 < var[2]**1.5                                     # the floor decides for one of them
    assert found["raw_skew"][3] < .1 < found["skew"][3]                         # and hides that it is as skewed as a feature can be


def test_a_column_that_does_not_vary_has_no_skew():
    x = torch.full((1000, 1), .1)                                               # whose float64 mean is not exactly .1
    found = shape_of(merged(central_sums(x[:300]), central_sums(x[300:])))
    assert found["skew"].isnan() and found["kurtosis"].isnan()


def test_moments_of_a_dictionary_count_firings_and_do_not_keep_the_stream():
    x = torch.from_numpy(columns()[:, :5]).float()
    alive = weakref.WeakSet()
    class Batch:                                                                # tensors cannot be told apart by a WeakSet
        pass
    most = 0
    def stream():
        nonlocal most
        for part in x.split(100):
            part, mark = part.clone(), Batch()
            part.mark = mark
            alive.add(mark)
            del mark
            most = max(most, len(alive))
            yield part
    found = moments(identity(5), stream())
    assert most <= 2 and int(found["n"]) == 5000
    assert found["fires"].tolist() == (x > 0).sum(0).tolist()
    for bad in ([], [torch.zeros(0, 5)]):
        with pytest.raises(SparseCodingError, match="empty"): moments(identity(5), bad)


def test_wilson_against_its_equation():
    "The ends are the shares p whose score test is just significant: (k/n - p)^2 = z^2 p(1-p)/n."
    z = stats.norm.ppf(.975)
    for k,n in ((0, 5), (3, 7), (95, 100), (576, 576)):
        low, high = wilson(k, n)
        roots = np.sort(np.roots([1 + z*z/n, -2*k/n - z*z/n, (k/n)**2]).real)
        assert np.allclose([low, high], roots.clip(0, 1), atol=1e-9)


def test_rules_of_the_ledger():
    active = lambda value, low: judge_active(dict(measured=value, ci95=(low, 1.)))
    assert [active(.97, .951), active(.97, .949), active(.51, .4), active(.5, .4)] == ["holds", "partly", "partly", "does not hold"]
    assert judge_active(dict(measured=None)) == judge_mlpdead(dict(measured=None)) == "not comparable"
    dead = lambda d, a: judge_mlpdead(dict(measured=dict(layers=[0, 3, 5], dead=d, alive=a)))
    assert dead([0., .2, .3], [.9, .4, .3]) == "holds"
    assert dead([0., .2, .05], [.9, .4, .3]) == "partly"                        # one later layer without dead features
    assert dead([0., 0., 0.], [.5, .6, .4]) == "does not hold"


def result(**changes): return {**dict(site="mlp_post.0", ratio=2., alpha=0., tied=True, seed=0, alive=50, d_sae=100, frac_alive=.8, d_in=50), **changes}


def test_shares_of_the_mlp_take_the_right_dictionaries():
    p = Preset(mlp_ratios=(1., 2.), mlp_alpha=.1)
    wrong = [result(site="mlp_post.9", alive=1, frac_alive=0., **c) for c in (dict(tied=False), dict(seed=1), dict(ratio=1.), dict(alpha=.3))]
    right = [result(), result(alpha=.1, alive=70), result(site="mlp_post.9", frac_alive=.6), result(site="mlp_post.9", alpha=.1, alive=20)]
    found = mlp_shares(p, wrong + right[::-1] + wrong)
    assert found["layers"] == [0, 9] and found["alive"] == [.7, .2] and np.allclose(found["dead"], [.2, .4])
    assert mlp_shares(p, wrong + right[:2]) is None and mlp_shares(p, right[:3]) is None


def test_choices_where_nothing_qualifies():
    rows = [result(alpha=a, alive=k) for a,k in ((0., 100), (.1, 94))]
    assert picked_alpha(rows, 2.) is None and picked_alpha(rows, 2., .9) == .1 and picked_alpha(rows, 1.) is None
    assert most_alive(rows, 4.) is None and most_alive(rows, 2.)["alpha"] == .1


def test_unscaled_alpha_has_the_same_minimum():
    "The scaled loss is a multiple of the unscaled one, for any dictionary without biases."
    x, sae = torch.randn(64, 6)*5, TiedSAE(6, 9).requires_grad_(False)
    square = float(x.pow(2).sum(-1).mean())
    loss = lambda x, a: float((x - sae(x)).pow(2).sum(-1).mean() + a*sae.encode(x).sum(-1).mean())
    a = unscaled_alpha(.3, square, 6)
    assert np.isclose(loss(x*square**-.5, .3)*square, loss(x, a["eq4"]), rtol=1e-5) and np.isclose(a["code"]*6, a["eq4"])


@pytest.mark.parametrize("alphas", [[0., .01, .1], [.01, .1], [.05], [0., .05]])
def test_figure_16_with_few_or_many_alphas(alphas):
    fig = fig16({"a": [result(alpha=a, ratio=r) for a in alphas for r in (1., 2.)], "b": [result(alpha=a) for a in alphas]})
    for ax in fig.axes:
        x = np.concatenate([l.get_xdata() for l in ax.lines if len(l.get_xdata()) and l.get_linestyle() != "--"])
        assert (x > 0).all() and len(set(x)) == len(alphas)
    assert alpha_axis(fig.axes[0], alphas) < min(a for a in alphas if a > 0)
    plt.close(fig)


def test_frequency_bins_lose_nobody():
    rng = np.random.default_rng(1)
    for n in (777, 1000, 16_384):
        counts = torch.from_numpy(rng.integers(0, n + 1, 500)*(rng.random(500) < .5))
        counts[:3] = torch.tensor([1, n, 0])
        edges, share, never = frequency_bins(counts, n)
        assert np.isclose(share.sum() + never, 1) and 10**edges[0] <= 1/n and len(edges) == len(share)


def test_silence_by_brute_force():
    fired = torch.from_numpy(np.random.default_rng(0).poisson(.5, (7, 3, 40)))
    now, ever = silent(fired)
    for w,s in np.ndindex(7, 3):
        assert now[w, s] == np.mean([fired[w, s, j] == 0 for j in range(40)])
        assert ever[w, s] == np.mean([all(fired[v, s, j] == 0 for v in range(w, 7)) for j in range(40)])


def normal(start): return (torch.randn(64, 8, generator=torch.Generator().manual_seed(i))/8**.5 for i in range(start, 100))


def test_following_does_not_change_the_training():
    a, b = TiedSAE(8, 16, seed=1), TiedSAE(8, 16, seed=1)
    fired = follow([a], [.05], normal, 25, 10, lr=.01)
    engine = Engine([b], [.05], .01)
    for _,x in zip(range(25), normal(0)): engine.step(x)
    torch.testing.assert_close(a.M, b.M, rtol=0, atol=1e-6)
    assert fired.shape == (2, 1, 16)                                            # whole windows only
    assert int(fired.sum()) <= int(engine.learners[0].fired.sum())


def test_only_what_was_silent_in_the_window_before_is_replaced():
    sae = TiedSAE(8, 16, seed=0)
    sae.b_enc.data[:3] = -50.
    follow([sae], [.0], normal, 20, 10, Resampling(every=20, times=1, batches=2))
    assert sae.b_enc[:3].tolist() == [0., 0., 0.] and (sae.b_enc[3:] != 0).all()


def test_uncentred_for_separate_weights():
    sae, mean, x = UntiedSAE(5, 7, seed=2), torch.arange(5.), torch.randn(30, 5)
    sae.b_enc.data.normal_(); sae.b_dec.normal_()
    raw = uncentred(sae.scaled(3.), mean)
    torch.testing.assert_close(raw.encode(x), sae.encode(3*(x - mean))/3)
    torch.testing.assert_close(raw(x), sae(3*(x - mean))/3 + mean)


@pytest.fixture
def tiny(own_cache, tmp_path):
    "A tiny model, its preset, and stores of one layer."
    text = tmp_path/"text.txt"
    text.write_text("\n\n".join(f"The river {i} runs from mountain {i*i} to the sea, and {i} people live by it." for i in range(1500)))
    p = Preset(model=str(tiny_model(tmp_path/"tiny", "llama")), corpus=str(text), row_len=32, n_tokens=4096, n_heldout=1024, batch_size=128)
    model = load_model(p.model)
    return p, model, *stores(p, model, [Site(1)])


def test_a_trial_measures_what_it_trained(tiny):
    p, model, store, heldout = tiny
    site, kept = Site(1), with_rule(store)
    found, fired = trial(p, kept, {"all": with_rule(heldout, False), "kept": with_rule(heldout)}, site, [.01, .2], 30, 10, centre=True)
    assert fired.shape == (3, 2, 64) and [f["alpha"] for f in found] == [.01, .2]
    assert found[0]["all"]["n"] == 1024 and found[0]["kept"]["n"] < 1024 and found[0]["kept"]["l0"] > found[1]["kept"]["l0"]
    mean = torch.cat([x for x in kept.read(site, 0, kept.n)[kept.keep(site)].split(100)]).mean(0)
    torch.testing.assert_close(mean_activation(kept, site), mean, rtol=1e-4, atol=1e-4)
    sae, scale = TiedSAE(32, 64), (kept.mean_square(site) - float(mean @ mean))**-.5
    engine = Engine([sae], [.01], lr=p.lr)
    for x in batches(kept, site, 128, 0, 0, 30): engine.step((x - mean)*scale)
    x = with_rule(heldout).read(site, 0, 1024)[with_rule(heldout).keep(site)]
    again = evaluate(sae.scaled(scale), [x - mean])
    assert np.isclose(again["fvu"], found[0]["kept"]["fvu"], rtol=1e-3) and np.isclose(again["l0"], found[0]["kept"]["l0"], rtol=1e-2)


def test_shares_of_energy_against_the_store(tiny):
    p, model, store, heldout = tiny
    found = energy_shares(p, model, n_rows=8)
    square = heldout.norms(Site(1), 0, 8*32).double().square().view(8, 32)
    assert len(found["first"]) == model.n_layers
    assert np.isclose(found["first"][1], square[:, 0].sum()/square.sum(), rtol=1e-3)
    assert all(f <= d + 1e-12 for f,d in zip(found["first"], found["dropped"])) and min(found["rows"]) >= 1/32


def test_with_rule_forgets_the_rule_it_was_given(tiny):
    store = tiny[2]
    strange = ActivationStore(store.folder, drop_first=False, max_norm=.5)
    assert bool(with_rule(strange, False).keep(Site(1)).all())
    assert torch.equal(with_rule(strange).keep(Site(1)), store.keep(Site(1)))
