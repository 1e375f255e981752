"""Training against a plain NumPy loss with finite differences, and against a real kill."""
import os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_coding.presets import SparseCodingError
from sparse_coding.dictionaries import TiedSAE, UntiedSAE
from sparse_coding.engine import Resampling, sae_loss
from sparse_coding.trainer import ahead, read_log, train


def numpy_loss(M, b, x, alpha):
    "Eq. (4) for a tied dictionary whose rows are divided by their length, written without torch."
    W = M/np.linalg.norm(M, axis=1, keepdims=True)
    c = np.maximum(x @ W.T + b, 0)
    return ((x - c @ W)**2).sum(1).mean() + alpha*c.sum(1).mean()


def test_loss_and_gradient_agree_with_numpy_and_finite_differences():
    rng = np.random.default_rng(0)
    M, b, x = rng.normal(size=(7, 5)), .1*rng.normal(size=7), rng.normal(size=(40, 5))
    sae = TiedSAE(5, 7).double()
    sae.M.data, sae.b_enc.data = torch.tensor(M), torch.tensor(b)
    loss = sae_loss(sae, torch.tensor(x), .3)[0]
    loss.backward()
    assert abs(loss.item() - numpy_loss(M, b, x, .3)) < 1e-12
    h = 1e-6
    for grad,where in ((sae.M.grad.numpy(), M), (sae.b_enc.grad.numpy(), b)):
        for i in np.ndindex(where.shape):
            where[i] += h; up = numpy_loss(M, b, x, .3)
            where[i] -= 2*h; down = numpy_loss(M, b, x, .3)
            where[i] += h
            assert abs((up - down)/(2*h) - grad[i]) < 1e-6


RUN = """
import sys, time, torch
from pathlib import Path
from sparse_coding.dictionaries import TiedSAE, TopKSAE, UntiedSAE
from sparse_coding.engine import Resampling
from sparse_coding.trainer import train
saes = [TiedSAE(16, 32, seed=0), UntiedSAE(16, 24, pre_bias=True, norm="project", seed=1), TopKSAE(16, 40, k=3, seed=2)]
def stream(start):
    for step in range(start, 120):
        time.sleep(float(sys.argv[2]))
        yield torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
train(saes, [.05, .5, 0.], stream, 120, Path(sys.argv[1]), lr=.01, save_every=20, resampling=Resampling(every=30, window=15, batches=2))
"""


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    run = lambda folder, wait: [sys.executable, "-c", RUN, str(tmp_path/folder), str(wait)]
    subprocess.run(run("whole", 0), check=True, capture_output=True)
    victim = subprocess.Popen(run("torn", .05), stderr=subprocess.DEVNULL)
    while not (tmp_path/"torn"/"step-40.safetensors").exists(): time.sleep(.01)
    victim.send_signal(signal.SIGKILL); victim.wait()
    subprocess.run(run("torn", 0), check=True, capture_output=True)
    for name in ("step-120.safetensors", "log.jsonl"):
        assert (tmp_path/"whole"/name).read_bytes() == (tmp_path/"torn"/name).read_bytes()
    assert [p.name for p in (tmp_path/"torn").glob("step-*")] == ["step-120.safetensors"]


def test_one_dictionary_in_company_trains_as_it_does_alone(tmp_path):
    "Sharing a stream and an optimiser must not make dictionaries influence each other."
    stream = lambda start: (torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(start, 30))
    alone, a, b = TiedSAE(16, 32, seed=3), TiedSAE(16, 32, seed=3), TiedSAE(16, 48, seed=4)
    train([alone], [.1], stream, 30, tmp_path/"alone")
    train([b, a], [.5, .1], stream, 30, tmp_path/"both")
    torch.testing.assert_close(a.M, alone.M, rtol=0, atol=1e-6)
    assert np.allclose(read_log(tmp_path/"alone")[0]["fvu"], read_log(tmp_path/"both")[1]["fvu"], atol=1e-6)


def test_reading_ahead_keeps_order_and_hands_on_what_goes_wrong():
    def stream():
        yield from range(3)
        raise OSError("the disk is gone")
    got = []
    with pytest.raises(OSError, match="disk"):
        for x in ahead(stream()): got.append(x)
    assert got == [0, 1, 2]


def test_dead_features_are_replaced_on_schedule_and_the_log_says_so(tmp_path):
    sae = TiedSAE(8, 16, seed=0)
    sae.b_enc.data[:4] = -50.
    stream = lambda start: (torch.randn(32, 8, generator=torch.Generator().manual_seed(i)) for i in range(start, 100))
    train([sae], [.01], stream, 50, tmp_path, resampling=Resampling(every=20, times=1, window=10, batches=2))
    lines = [l for l in (tmp_path/"log.jsonl").read_text().splitlines() if "replaced" in l]
    assert lines == ['{"step": 20, "sae": 0, "replaced": 4}'] and sae.b_enc.min() > -1 and len(read_log(tmp_path)[0]["loss"]) == 5


def test_a_checkpoint_of_other_dictionaries_is_refused(tmp_path):
    stream = lambda start: (torch.randn(32, 8) for _ in range(start, 100))
    train([TiedSAE(8, 16)], [.1], stream, 10, tmp_path)
    with pytest.raises(SparseCodingError, match="other dictionaries"): train([TiedSAE(8, 20)], [.1], stream, 20, tmp_path)


def test_global_settings_are_left_as_they_were(tmp_path):
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    stream = lambda start: (torch.randn(32, 8) for _ in range(start, 100))
    train([TiedSAE(8, 16)], [.1], stream, 10, tmp_path)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
