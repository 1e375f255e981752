"""Comparisons at matched L0 and intervals over text, against cases worked out another way."""
import numpy as np
import pytest
import torch

from sparse_coding.presets import SparseCodingError
from sparse_coding.dictionaries import TiedSAE, evaluate
from sparse_coding.trainer import train
from sparse_coding.paper1.choices import common_l0, fvu_at, knee, line, over_text, redrawn, size_slope, tie_ratio


def measured(sae, x, pieces):
    "What 07_training keeps of a dictionary."
    found = evaluate(sae, x.split(len(x)//pieces), per_batch=True)
    return dict(ratio=sae.d_sae/sae.d_in, alpha=.1, tied=True, seed=0, **found)


def test_a_redraw_of_every_piece_once_changes_nothing_and_of_one_piece_gives_that_piece():
    torch.manual_seed(0)
    sae, x = TiedSAE(6, 12, seed=0).requires_grad_(False), torch.randn(400, 6)
    r = measured(sae, x, 4)
    same = redrawn([r], np.ones(4))[0]
    assert np.allclose([same["l0"], same["fvu"]], [r["l0"], r["fvu"]])
    only = redrawn([r], np.array([0, 0, 4, 0]))[0]
    c = sae.encode(x[200:300])
    assert np.isclose(only["l0"], float((c > 0).sum(1).double().mean()))
    error = float((x[200:300] - sae.decode(c)).double().pow(2).sum(1).mean())
    assert np.isclose(only["fvu"], error/float(x.double().var(0, unbiased=False).sum()))


def test_the_interval_over_text_has_the_width_of_a_mean():
    rng = np.random.default_rng(0)
    mse = rng.normal(10, 1, 64)
    r = dict(l0=1., fvu=.5, mse=mse.mean(), batches=[dict(n=100, l0=1., mse=m) for m in mse])
    value, (low, high) = over_text([r], lambda f: f[0]["fvu"], draws=2000)
    expected = 2*1.96*mse.std()/8*.5/mse.mean()
    assert value == .5 and abs((high - low)/expected - 1) < .1


def test_dictionaries_measured_on_other_pieces_are_refused():
    a, b = (dict(l0=1., fvu=.5, mse=1., batches=[dict(n=n, l0=1., mse=1.)]) for n in (5, 6))
    with pytest.raises(SparseCodingError, match="different texts"): over_text([a, b], lambda f: 0.)


def test_what_is_common_to_all_dictionaries_cancels_in_a_ratio():
    rng = np.random.default_rng(1)
    hard = rng.uniform(.5, 2, 32)
    make = lambda tied, factor: [dict(tied=tied, seed=0, alpha=1/l, l0=l, fvu=factor/l, mse=hard.mean()*factor/l,
        batches=[dict(n=10, l0=l, mse=h*factor/l) for h in hard]) for l in (8., 32.)]
    value, (low, high) = over_text(make(True, 1.) + make(False, .9), lambda f: tie_ratio(f, 0))
    assert np.allclose([value, low, high], .9)


def test_knees_are_seen_and_even_curves_are_not():
    l0 = np.geomspace(5, 100, 6)
    even = np.stack([l0, np.exp(-.3*np.log(l0) - .05*np.log(l0)**2)], 1)
    broken = np.stack([l0, np.where(l0 < 20, l0**-.1, 20**.9/l0)], 1)
    assert knee(even) < 1e-8 and knee(broken) > .05
    with pytest.raises(SparseCodingError, match="four points"): knee(even[:3])


def test_reading_off_a_line_agrees_with_numpy_and_stays_on_it():
    l = np.array([[4., .5], [9., .3], [50., .1]])
    for x in (4., 5., 9., 30., 50.): assert np.isclose(np.log(fvu_at(l, x)), np.interp(np.log(x), np.log(l[:, 0]), np.log(l[:, 1])))
    assert np.isnan(fvu_at(l, 51.)) and np.isnan(common_l0([l, l + [100, 0]]))


def test_watch_sees_every_step_once_and_after_a_stop_goes_on(tmp_path):
    stream = lambda start: (torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(start, 100))
    seen = []
    train([TiedSAE(4, 4)], [.1], stream, 12, tmp_path, save_every=6, watch=seen.append)
    train([TiedSAE(4, 4)], [.1], stream, 18, tmp_path, save_every=6, watch=seen.append)
    assert seen == list(range(1, 19))
