"""Both ways of taking a step against automatic differentiation in double precision, for inputs drawn afresh."""
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings as hypothesis_settings, strategies as st

from sparse_coding.presets import SparseCodingError
from sparse_coding.runs import best_matmul
from sparse_coding.dictionaries import TiedSAE, TopKSAE, UntiedSAE
from sparse_coding.engine import Engine, Settings, adam_constants, adam_row, draw_badly_reconstructed, sae_loss

MAKE = {"tied": lambda *s, norm, **k: TiedSAE(*s, norm=norm, **k), "untied": lambda *s, **k: UntiedSAE(*s, **k),
        "pre_bias": lambda *s, **k: UntiedSAE(*s, pre_bias=True, **k), "topk": lambda d, h, **k: TopKSAE(d, h, max(1, h//4), **k)}


def set_at_random(sae, g, quiet):
    "Biases that matter, rows of any length where they may have one, and some features that are never active."
    for b in (sae.b_enc, *([sae.b_dec] if sae.pre_bias else [])): b.data = .2*torch.randn(b.shape, generator=g)
    if sae.norm == "in_loss": sae.M.data *= .5 + torch.rand(sae.d_sae, 1, generator=g)
    sae.b_enc.data[torch.rand(sae.d_sae, generator=g) < quiet] = -1e6
    return sae


def autograd(sae, x, alpha):
    "Loss and gradients in float64; where rows are kept at length one, without the part along them."
    sae_loss(sae, x, alpha)[0].backward()
    grads = {n: q.grad.clone() for n,q in sae.named_parameters()}
    if sae.norm == "project": grads["M"] -= (grads["M"]*sae.M).sum(-1, keepdim=True).detach()*sae.M.detach()
    return grads


@hypothesis_settings(deadline=None, max_examples=100)
@given(kind=st.sampled_from(sorted(MAKE)), norm=st.sampled_from(["in_loss", "project"]), way=st.sampled_from(["dense", "sparse", "screened"]), batch=st.integers(1, 70),
       d_in=st.integers(4, 40), d_sae=st.integers(2, 90), threads=st.integers(1, 3), block=st.sampled_from([3, 256]), seed=st.integers(0, 2**31),
       alpha=st.sampled_from([0., .03, 2.]), quiet=st.sampled_from([0., .5, 1.]), outlier=st.sampled_from([1., 1000.]), silent=st.booleans())
def test_gradients_of_a_step(kind, norm, way, batch, d_in, d_sae, threads, block, seed, alpha, quiet, outlier, silent):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=g)
    x[:, 0] *= outlier
    make = lambda: set_at_random(MAKE[kind](d_in, d_sae, norm=norm, seed=seed), torch.Generator().manual_seed(seed), quiet)
    sae, exact = make(), make().double()
    if silent: x[0] = sae.b_dec.detach() if sae.pre_bias else 0.
    a = (x.double() - exact.b_dec*exact.pre_bias) @ exact.W_enc + exact.b_enc
    size = x.norm(dim=-1, keepdim=True)*exact.W_enc.norm(dim=0) + 1.
    top = a.sort(dim=-1, descending=True).values
    assume((a.abs() > 1e-6*size).all() and (kind != "topk" or d_sae <= sae.k or (top[:, sae.k-1] - top[:, sae.k]).min() > 1e-6*size.max()))
    engine = Engine([sae], [alpha], setting=Settings(best_matmul(), threads, 0. if way == "dense" else 1.01, 1.01*(way == "screened"), block))
    found, grads = engine.step(x)[0], autograd(exact, x.double(), alpha)
    loss, error, c = sae_loss(make().double(), x.double(), alpha)
    large = (c.norm() + x.norm())*2*(error/batch)**.5            # of sums whose terms may cancel, as they do where only lengths would change
    assert abs(float(found["loss"]) - loss) <= 1e-5*abs(loss) and float(found["l0"]) == pytest.approx((c > 0).sum(-1).double().mean().item())
    assert torch.equal(engine.learners[0].fired, (c > 0).sum(0))
    for name,q in sae.named_parameters():
        got = engine.learners[0].opt.state[q]["exp_avg"].double()*10
        assert (got - grads[name]).norm() <= (1e-5 if name in ("M", "W_enc") else 5e-5)*max(grads[name].norm(), .05*large), name


@pytest.mark.parametrize("dense_above", [0., 1.01])
def test_one_step_moves_as_torch_adam_does(dense_above):
    g = torch.Generator().manual_seed(0)
    for make in (lambda: TiedSAE(12, 30), lambda: UntiedSAE(12, 30, pre_bias=True, norm="project")):
        sae, exact = make(), make().double()
        engine, opt = Engine([sae], [.1], lr=.01, setting=Settings("highest", 2, dense_above)), torch.optim.Adam(exact.parameters(), .01)
        for _ in range(20):
            x = torch.randn(64, 12, generator=g)
            engine.step(x)
            opt.zero_grad()
            for q,grad in zip(exact.parameters(), autograd(exact, x.double(), .1).values()): q.grad = grad
            opt.step(); exact.project_()
        for q,r in zip(sae.parameters(), exact.parameters()): torch.testing.assert_close(q.double(), r, rtol=0, atol=2e-5)


def test_adam_kernel_keeps_the_digits_of_float64():
    "1 - beta2 computed in float32 would be off by 5e-5 of itself."
    rng = np.random.default_rng(0)
    q, m, v = (np.zeros(50, "f") for _ in range(3))
    exact = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.Adam([exact], 1e-3)
    for t in range(1, 301):
        G = (rng.normal(size=50)*np.logspace(-6, 3, 50) + .3).astype("f")
        adam_row(q, G, m, v, adam_constants(t, 1e-3, (.9, .999)))
        exact.grad = torch.tensor(G).double(); opt.step()
    assert np.linalg.norm(q - exact.detach().numpy()) < 2e-6*np.linalg.norm(exact.detach().numpy())


def test_a_list_that_is_too_short_sends_the_batch_the_dense_way():
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    one, other = (Engine([TiedSAE(12, 300)], [.1], setting=Settings("highest", 2, above)) for above in (.001, 0.))
    one.learners[0].density = 0.                                # expects next to nothing, meets half of all pairs
    one.step(x), other.step(x)
    assert one.sparse_step(one.learners[0], x) is None
    for key,v in one.tensors().items(): assert torch.equal(v, other.tensors()[key]), key


def test_the_number_of_threads_changes_only_rounding():
    runs = []
    for threads in (1, 2, 3):
        sae = TiedSAE(24, 96)
        engine, g = Engine([sae], [.2], setting=Settings("highest", threads, 1.01)), torch.Generator().manual_seed(0)
        for _ in range(30): engine.step(torch.randn(100, 24, generator=g))
        runs.append(sae.M.detach())
    for other in runs[1:]: torch.testing.assert_close(other, runs[0], rtol=0, atol=1e-5)


def test_a_nan_comes_out_as_a_nan():
    x = torch.randn(64, 12)
    x[7, 3] = float("nan")
    loss = lambda x, sae, *way: float(Engine([sae], [.1], setting=Settings("highest", 2, *way)).step(x)[0]["loss"])
    for way in ((0.,), (1.01,), (1.01, 1.01)):
        assert np.isnan(loss(x, TiedSAE(12, 30), *way))
        broken = TiedSAE(12, 30)
        broken.M.data[3, 2] = float("nan")
        assert np.isnan(loss(torch.randn(64, 12), broken, *way))


def test_drawing_without_replacement_takes_each_once_and_no_more_than_there_are():
    sae, g = TiedSAE(4, 2), torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, generator=g)
    drawn = draw_badly_reconstructed(sae, [x[:5], x[5:]], 20, g)
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, x.tolist()))


def test_bad_input_is_one_clear_sentence():
    with pytest.raises(SparseCodingError, match="as many alphas"): Engine([TiedSAE(4, 4)], [.1, .2])


@pytest.mark.parametrize("dense_above", [0., 1.01])
def test_the_frozen_clock_keeps_the_correction_of_the_first_step(dense_above):
    sae, g = TiedSAE(12, 30), torch.Generator().manual_seed(0)
    engine = Engine([sae], [.1], lr=.01, frozen_step=True, setting=Settings("highest", 2, dense_above))
    for _ in range(20):
        before = sae.b_enc.detach().clone()
        engine.step(torch.randn(64, 12, generator=g))
    m, v = (engine.learners[0].opt.state[sae.b_enc][k] for k in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(before - sae.b_enc.detach(), .01*10*m/((1000*v).sqrt() + 1e-8), rtol=1e-3, atol=1e-7)
