"""Baselines against NumPy, SciPy and brute force, and on a tiny model from end to end."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from sparse_coding.presets import Site, SparseCodingError, preset
from sparse_coding.runs import read_json
from sparse_coding.models import load_model
from sparse_coding.dictionaries import evaluate, fixed, fvu, load_saved, random_rotation, unit_rows
from sparse_coding.firing import in_order
from sparse_coding.study import results, stores, study
from sparse_coding.paper1.baselines import (BASELINES, METHODS, baseline, control_preset, covariance, few_features,
    independent, nearest_recipe, principal, random_weights_model, read_as, train_control, working_k)

from tiny import TEXT, tiny_model


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions(d=6, n=6, seed=0):
    "Rows that are not orthogonal, with readers that undo them."
    rows = unit_rows(randn(n, d, seed=seed))
    return dict(rows=rows, readers=torch.linalg.pinv(rows), mean=randn(d, seed=seed + 1), skew=randn(n, seed=seed + 2))


@pytest.mark.parametrize("sizes", [[500], [1, 0, 499], [0, 7, 193, 300]])
def test_covariance_is_numpys_far_from_the_origin(sizes):
    x = randn(500, 5) @ randn(5, 5, seed=1) + 1e4
    n, mean, cov = covariance(x.split(sizes))
    assert n == 500
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T, bias=True), rtol=1e-8)


def test_empty_streams_are_refused():
    for stream in ([], [torch.empty(0, 3)]):
        with pytest.raises(SparseCodingError, match="empty"): covariance(stream)


def test_principal_directions_are_eigenvectors_with_a_settled_sign():
    cov = torch.cov(randn(5, 400)).double()
    rows, variance = principal(cov)
    torch.testing.assert_close(rows @ cov, variance[:, None]*rows)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5).double())
    assert (variance.diff() <= 0).all()
    assert all(r[r.abs().argmax()] > 0 for r in rows)


def test_random_rotations_belong_to_their_seed():
    a, b = random_rotation(12, 3), random_rotation(12, 4)
    assert torch.equal(a, random_rotation(12, 3)) and not torch.allclose(a, b)
    torch.testing.assert_close(a @ a.T, torch.eye(12).double())


def sources(n=8000):
    rng = np.random.default_rng(0)
    return np.stack([rng.laplace(size=n), rng.exponential(size=n), rng.uniform(-1, 1, n)], 1)


def test_ica_drops_what_the_data_do_not_span():
    "Three sources in five coordinates, one of them constant: three components, and nothing of the data is lost."
    mix = np.random.default_rng(1).normal(size=(5, 3))
    mix[4] = 0
    x = torch.tensor(sources() @ mix.T + 3.).float()
    rows, readers, mean, facts = independent(x)
    assert rows.shape == (3, 5) and readers.shape == (5, 3) and facts["rows"] == 8000
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3).double())
    assert (rows.float() @ unit_rows(torch.tensor(mix.T).float()).T).abs().amax(0).min() > .98
    assert fvu(x, fixed(rows, readers, mean, signed=True)(x)) < 1e-8
    torch.testing.assert_close(rows @ readers, torch.eye(3).double(), atol=1e-4, rtol=0)


def test_ica_says_when_it_was_stopped():
    x = torch.tensor(sources()).float() @ randn(3, 3)
    stopped, done = independent(x, max_iter=1)[3], independent(x)[3]
    assert (stopped["converged"], stopped["iterations"]) == (False, 1)
    assert done["converged"] and 1 < done["iterations"] < 200


@pytest.mark.parametrize("error", [True, False])
def test_ica_goes_on_in_float64_where_float32_blows_up(monkeypatch, error):
    "Rounding makes an eigenvalue negative: scikit-learn either goes on with rows of 10^15, or raises."
    plain, seen = np.linalg.eigh, []
    def eigh(a, *args, **kw):
        seen.append(a.dtype)
        values, vectors = plain(a, *args, **kw)
        if a.dtype == np.float32:
            if error: raise np.linalg.LinAlgError("did not converge")
            values[0] = -1e-6
        return values, vectors
    x = torch.tensor(sources()).float() @ randn(3, 3)
    monkeypatch.setattr("sklearn.decomposition._fastica.linalg.eigh", eigh)
    rows, readers, mean, facts = independent(x)
    assert set(seen) == {np.dtype("float32"), np.dtype("float64")} and facts["converged"]
    assert fvu(x, fixed(rows, readers, mean, signed=True)(x)) < 1e-8


def test_ica_that_cannot_be_done_says_so(monkeypatch):
    def eigh(*args, **kw): raise np.linalg.LinAlgError("did not converge")
    monkeypatch.setattr("sklearn.decomposition._fastica.linalg.eigh", eigh)
    with pytest.raises(SparseCodingError, match="seed 3"): independent(torch.tensor(sources()).float(), seed=3)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_topk_keeps_the_largest_of_both_ends(k):
    found, x = directions(), randn(50, 6, seed=9)
    c = read_as(found, "topk", k).encode(x)
    for row, got in zip(x, c):
        a = ((row - found["mean"]) @ found["readers"]).tolist()
        ends = sorted([*a, *(-v for v in a)], reverse=True)[:k]
        assert sorted(got[got > 0].tolist()) == pytest.approx(sorted(v for v in ends if v > 0), abs=1e-5)


def test_both_ends_lose_nothing_and_orienting_only_turns():
    found, x = directions(), randn(50, 6, seed=9)
    for how in ("nonneg", "signed"): torch.testing.assert_close(read_as(found, how)(x), x, rtol=1e-3, atol=1e-3)
    assert (read_as(found, "nonneg").encode(x) >= 0).all()
    assert fvu(x, read_as(found, "positive")(x)) > .01
    straight, turned = read_as(found, "positive"), read_as(found, "oriented")
    for i, s in enumerate(found["skew"]):
        torch.testing.assert_close(turned.W_dec[i], straight.W_dec[i]*(-1 if s < 0 else 1))
        torch.testing.assert_close(turned.W_enc[:, i], straight.W_enc[:, i]*(-1 if s < 0 else 1))
    for how, k in (("topk", None), ("nonneg", 3), ("sideways", None)):
        with pytest.raises(SparseCodingError, match="cannot be read"): read_as(found, how, k)


def test_few_features_by_brute_force():
    found, x = directions(5, 5), randn(40, 5, seed=5)
    expected = []
    for k in (1, 2, 4):
        hats = []
        for row in x:
            c = (row - found["mean"]) @ found["readers"]
            c[sorted(range(5), key=lambda i: -abs(c[i]))[k:]] = 0
            hats.append(found["mean"] + c @ found["rows"])
        expected.append(fvu(x, torch.stack(hats)))
    assert few_features(found, (1, 2, 4), x.split([1, 30, 9])) == pytest.approx(expected, rel=1e-4)


# on a tiny model -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A preset around a tiny model and a local corpus."
    folder = tmp_path_factory.mktemp("baselines")
    model = tiny_model(folder/"neox", "gpt_neox")
    (folder/"corpus.txt").write_text("\n".join(f"{i}. {TEXT}" for i in range(60)))
    p = preset("quick", model=str(model), corpus=str(folder/"corpus.txt"), row_len=64, n_tokens=4096, n_heldout=1024, layer=1, layers=(1,),
               mlp_layers=(0,), attn_layers=(1,), ratios=(1.,), alphas=(.06,), ratio=1., steps=20, mlp_steps=10, batch_size=128, n_seeds=1)
    return p, load_model(p.model)


def test_every_baseline_belongs_to_its_place_and_survives_the_disk(world, tmp_path):
    p, model = world
    x = torch.cat([*in_order(stores(p, model)[1], p.site)])
    for name in BASELINES:
        d = baseline(p, model, p.site, name)
        again = load_saved(d.save(tmp_path/name))
        assert torch.equal(d.encode(x), again.encode(x)) and torch.equal(d(x), again(x)), name
        torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(d.d_sae))
        signed = name in ("pca", "ica", "pca-uncentred")
        assert bool((d.encode(x) < 0).any()) == signed, name
        with pytest.raises(SparseCodingError, match="cannot be used at"): again.check(model, Site(2))
        with pytest.raises(SparseCodingError, match="differ"): again.check(random_weights_model(p, model), p.site)


def test_pca_of_the_store_is_numpys_of_the_kept_training_rows(world):
    p, model = world
    store = stores(p, model)[0]
    x = store.read(p.site, 0, store.n)[store.keep(p.site)].double().numpy()
    assert len(x) < store.n
    d = baseline(p, model, p.site, "pca")
    assert d.metadata["fit"]["rows"] == len(x)
    np.testing.assert_allclose(d.b_dec, x.mean(0), rtol=1e-4, atol=1e-5)
    right = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    assert np.abs((d.W_dec.numpy()[:4]*right[:4]).sum(1)).min() > 1 - 1e-4
    for method in METHODS:
        turned = baseline(p, model, p.site, f"{method}-oriented")
        np.testing.assert_allclose(turned.b_dec, x.mean(0), rtol=1e-3, atol=1e-4)
        assert (stats.skew((x - turned.b_dec.numpy()) @ turned.W_enc.double().numpy()) > -1e-3).all(), method


def test_k_is_what_the_sae_of_that_site_has_on_average(world):
    p, model = world
    found = [r for r in results(p, model, "sweep") if r["ratio"] == 1 and r["alpha"] == p.alpha]
    assert working_k(p, model, p.site) == max(1, round(found[0]["l0"])) == baseline(p, model, p.site, "pca-topk").k
    mlp = Site(0, "mlp_post")
    found = results(p, model, *(name for name in study(p) if name.startswith("MLP")))
    near = min((r for r in found if r["site"] == str(mlp) and r["alpha"] == p.mlp_alpha and r["seed"] == p.seed and not r["tied"]),
               key=lambda r: abs(np.log(r["ratio"])))
    assert working_k(p, model, mlp) == max(1, round(near["l0"]))


def test_what_cannot_be_had_is_declined(world):
    p, model = world
    with pytest.raises(SparseCodingError, match="no baseline 'nmf'"): baseline(p, model, p.site, "nmf")
    with pytest.raises(SparseCodingError, match="not run at preset quick"): baseline(p, model, Site(0, "mlp_post"), "ica-topk")
    with pytest.raises(SparseCodingError, match="harvest that site"): baseline(p, model, Site(2), "pca")
    with pytest.raises(SparseCodingError, match="no dictionary at"): nearest_recipe(p, Site(2), 0., 1.)


def test_the_random_twin_has_a_seed_of_its_own(world):
    p, model = world
    state = torch.get_rng_state()
    twin = random_weights_model(p, model)
    assert torch.equal(state, torch.get_rng_state())
    assert twin.fingerprint == random_weights_model(p, model).fingerprint
    assert len({twin.fingerprint, model.fingerprint, random_weights_model(preset(seed=1), model).fingerprint}) == 3
    names = lambda m: {k: v.shape for k,v in m.hf.state_dict().items()}
    assert names(twin) == names(model)


def test_the_random_twin_of_a_folded_model_is_folded(world):
    p = preset(fold=True)
    model = load_model(world[0].model, fold=True)
    twin, x = random_weights_model(p, model), torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    assert twin.fingerprint.endswith("-folded")
    resid = twin.run_to(x, Site(1))[Site(1)]
    assert resid.mean(-1).abs().max() < 1e-5*resid.norm(dim=-1).max()


def test_both_twins_are_trained_alike(world):
    "Same text, same counts, activations of length one on average; alphas of the released code's unit come out as eq. (4)'s."
    p, model = world
    store = stores(p, model)[0]
    small = control_preset(p, store)
    assert small.alphas == pytest.approx(p.alphas) and small.n_tokens == p.n_tokens and small.steps == p.steps
    code = control_preset(replace(p, alpha_unit="code", alphas=(1e-3, 2e-3, 3e-3, 4e-3, 5e-3)), store)
    assert len(code.alphas) == 3                                     # every second of five, at most four
    x = store.read(p.site, 0, store.n)[store.keep(p.site)]
    assert code.alphas[0] == pytest.approx(1e-3*x.shape[1]/x.norm(dim=1).double().pow(2).mean().item()**.5, rel=1e-3)
    for m in (model, random_weights_model(p, model)):
        folder = train_control(small, m)
        sae, heldout = load_saved(folder/"000").check(m, p.site), stores(small, m, [p.site])[1]
        found = read_json(folder/"results.json")[0]
        assert evaluate(sae, in_order(heldout, p.site))["fvu"] == pytest.approx(found["fvu"], rel=1e-4)
