"""The toy page's functions against loops, sets and closed forms."""
import numpy as np
import pytest
import torch

from sparse_coding.presets import SparseCodingError
from sparse_coding.ledger import claims, verdict
from sparse_coding.corpora import readable
from sparse_coding.dictionaries import TiedSAE
from sparse_coding.paper1.overview import (ToyFeatures, by_range, distinct_tokens, interference, mean_by_token,
    mmcs_null, neuron_basis, represented, strongest_rows, train_superposition)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def test_strongest_equals_sorting_everything_at_once():
    x = torch.randn(20_000, 4, generator=generator())         # more than one chunk
    d = TiedSAE(4, 6).requires_grad_(False)
    values, found = strongest_rows(d, x, k=25)
    c = d.encode(x)
    torch.testing.assert_close(values, c.sort(0, descending=True).values[:25])
    torch.testing.assert_close(c.gather(0, found), values)
    assert strongest_rows(d, x[:10], k=25)[0].shape == (10, 6)


def test_distinct_tokens_equals_counting_a_set():
    ids, found = torch.randint(5, (100,), generator=generator()), torch.randint(100, (8, 30), generator=generator(1))
    assert distinct_tokens(ids, found).tolist() == [len(set(ids[f].tolist())) for f in found.T]


def test_mean_by_token_equals_a_loop():
    ids, v = torch.randint(9, (60,), generator=generator()), torch.rand(60, generator=generator(1))
    loop = {t: v[ids == t].double().mean().item() for t in range(9) if (ids == t).sum() >= 3}
    expected = sorted(loop.items(), key=lambda item: -item[1])[:4]
    found = mean_by_token(ids, v, k=4)
    assert [t for t, _ in found] == [t for t, _ in expected]
    np.testing.assert_allclose([m for _, m in found], [m for _, m in expected])


def test_ranges_hold_every_active_row_once_and_in_order():
    v = torch.randn(200, generator=generator())
    parts = by_range(v, parts=3)
    rows = torch.cat([r for _, _, r in parts])
    assert sorted(rows.tolist()) == (v > 0).nonzero()[:, 0].tolist() and (v[rows].diff() <= 0).all()
    assert parts[0][1] == v.max().item() and parts[-1][0] == 0
    assert all(lo < v[i] <= hi for lo, hi, r in parts for i in r)


def test_neuron_basis_is_the_positive_part():
    x = torch.randn(10, 3, generator=generator())
    torch.testing.assert_close(neuron_basis(3).encode(x), x.clamp(min=0))


def test_readable_shows_what_cannot_be_seen():
    assert readable(" a\n") == "␣a↵" and readable("$") == r"\$"


def test_interference_by_loops():
    W = torch.randn(7, 3, generator=generator())*torch.linspace(.1, .9, 7)[:, None]
    unit = W/W.norm(dim=1, keepdim=True)
    there = [i for i in range(7) if W[i].norm() > .5]
    loop = [sum((unit[i] @ W[j]).item()**2 for j in range(7) if j != i) for i in there]
    assert 0 < len(there) < 7 and represented(W).item() == len(there)
    np.testing.assert_allclose(interference(W).item(), np.mean(loop), rtol=1e-5)
    torch.testing.assert_close(interference(torch.stack([W, W]))[1], interference(W))


def test_superposition_needs_sparse_features():
    W = train_superposition([1., .02], n=6, m=2, seeds=2, steps=1500)
    dense, sparse = represented(W)
    assert W.shape == (2, 2, 6, 2) and dense.max() <= 2 < sparse.min()
    short = dict(density=[1., .02], n=6, m=2, seeds=2, steps=20)
    torch.testing.assert_close(train_superposition(**short), train_superposition(**short))


def test_the_ledger_judges_superposition_by_our_rule():
    rec = {"measured": dict(m=5, sparse=[6, 7], dense=[5, 4])}
    assert verdict(claims()["P1-superpos"], rec) == "holds"
    assert verdict(claims()["P1-superpos"], {"measured": dict(m=5, sparse=[5, 7], dense=[5, 4])}) == "partly"
    assert verdict(claims()["P1-superpos"], {"measured": dict(m=5, sparse=[6, 7], dense=[5, 6])}) == "partly"


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_null_in_three_dimensions_is_archimedes(n):
    "On the sphere a coordinate is uniform on (-1, 1), so the best of n has mean (n-1)/(n+1)."
    assert abs(mmcs_null(n, 3) - (n - 1)/(n + 1)) < 1e-4


def test_null_by_simulation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2000, 20, 6)), rng.normal(size=(2000, 6))
    cos = np.einsum("snd,sd->sn", a, b)/np.linalg.norm(a, axis=2)/np.linalg.norm(b, axis=1, keepdims=True)
    assert abs(cos.max(1).mean() - mmcs_null(20, 6)) < .01


@pytest.mark.parametrize("values, second_moment", [("uniform", 1/3), ("product", 1/9)])
def test_energy_of_toy_samples(values, second_moment):
    toy = ToyFeatures(d=20, n=10, active=2., decay=.8, values=values, noise=.2, seed=3)
    x, a = toy.sample(200_000, generator())
    mean = toy.p.double()*(.5 if values == "uniform" else .25)
    spread = toy.p.double()*second_moment - mean**2           # independent amounts: variances add
    expected = spread.sum() + (mean @ toy.features.double()).pow(2).sum() + 20*.2**2
    np.testing.assert_allclose(x.double().pow(2).sum(1).mean(), expected, rtol=.01)
    torch.testing.assert_close((a > 0).double().mean(0), toy.p.double(), atol=.005, rtol=0)


def test_toy_features_are_unit_follow_their_seed_and_fill_uneven_groups():
    a, b, c = ToyFeatures(seed=1), ToyFeatures(seed=1, noise=.1), ToyFeatures(seed=2)
    assert torch.equal(a.features, b.features) and not torch.equal(a.features, c.features)
    torch.testing.assert_close(a.features.norm(dim=1), torch.ones(64))
    uneven = ToyFeatures(n=10, group=4, correlation=.9)
    torch.testing.assert_close(uneven.presence(100_000, generator()).double().mean(0), uneven.p.double(), atol=.006, rtol=0)
    x, truth = a.sample(100, generator())
    torch.testing.assert_close(x, truth @ a.features)


def test_toy_features_refuse_the_impossible():
    with pytest.raises(SparseCodingError, match="lower active"): ToyFeatures(n=4, active=5.)
    with pytest.raises(SparseCodingError, match="uniform"): ToyFeatures(values="gaussian")
