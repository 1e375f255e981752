"""Losses with a reconstruction in place, against hooks and losses of the Hugging Face model itself."""
import numpy as np
import pytest
import torch

from sparse_coding.presets import Site
from sparse_coding.stats import median_ci
from sparse_coding.models import load_model
from sparse_coding.dictionaries import TiedSAE
from sparse_coding.splicing import ce_metrics, replacements, row_kl, row_losses, spliced_losses
from tiny import tiny_model


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2"])
def model(request, tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp(request.param), request.param)))


def test_losses_are_those_the_model_computes_itself(model):
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    own = [model.hf(t[None], labels=t[None]).loss.item() for t in tokens]
    assert np.allclose(row_losses(model.logits(tokens), tokens), own, atol=1e-5)


def test_spliced_loss_agrees_with_a_hook_written_by_hand(model):
    "The block's output is replaced where `keep` says so, everything else by Hugging Face's own code."
    tokens = np.random.default_rng(0).integers(0, 300, (3, 20))
    keep = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < .7
    sae = TiedSAE(model.d_model, 3*model.d_model, seed=0).requires_grad_(False)
    found = spliced_losses(model, Site(2), tokens, keep, replacements(sae, torch.full((model.d_model,), .3)), batch=2)
    blocks = model.hf.gpt_neox.layers if hasattr(model.hf, "gpt_neox") else model.hf.model.layers if hasattr(model.hf, "model") else model.hf.transformer.h

    def by_hand(new, only):
        def hook(module, args, out):
            x = out[0] if isinstance(out, tuple) else out
            y = x.clone()
            for b,s in np.ndindex(*x.shape[:2]):
                if keep[row + b, s] or not only: y[b, s] = new(x[b, s])
            return (y, *out[1:]) if isinstance(out, tuple) else y
        losses, handle = [], blocks[2].register_forward_hook(hook)
        for row in range(3):
            t = torch.from_numpy(tokens[row:row+1])
            losses.append(model.hf(t, labels=t).loss.item())
        handle.remove()
        return losses

    W, b = sae.W_dec, sae.b_enc
    reconstruct = lambda v: torch.clamp(W @ v + b, min=0) @ W
    for name,new,only in (("sae", reconstruct, True), ("sae everywhere", reconstruct, False), ("zero", lambda v: 0*v, True),
                          ("mean", lambda v: 0*v + .3, True)):
        assert np.allclose(found[name], by_hand(new, only), atol=1e-4), name


def test_kl_agrees_with_torch():
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    each = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b))
    torch.testing.assert_close(row_kl(a, b), each.mean(1))


def test_no_score_where_there_is_nothing_to_divide_by():
    made = dict(none=[3., 3.1, 2.9], sae=[3., 3.1, 2.9], zero=[3.05, 3.2, 2.95], kl=[0., 0., 0.])
    assert ce_metrics(made)["ce_loss_score"] is None
    assert ce_metrics(made | dict(zero=[9., 9.1, 8.9]))["ce_loss_score"] == 1


def test_the_interval_of_a_median_covers_it():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        low, high = median_ci(rng.normal(size=80), draws=300)[1]
        hits += low <= 0 <= high
    assert hits >= 50
