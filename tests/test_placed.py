"""A dictionary where it lives: its site, its codes and what its replacements do, against hooks of the model itself."""
import numpy as np
import pytest
import torch

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.models import load_model
from sparse_coding.corpora import load_rows
from sparse_coding.activations import load_store
from sparse_coding.splicing import Placed
from tiny import TEXT, sparse, tiny_model

SITE = Site(2)


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2"])
def model(request, tmp_path_factory):
    return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/request.param, request.param)), device="cpu")


@pytest.fixture
def sae(model):
    sae = sparse(model.d_model)
    sae.metadata = dict(site=str(SITE), model_name=model.name, model_fingerprint=model.fingerprint)
    return sae


@pytest.fixture(scope="module")
def tokens(): return torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def test_the_site_is_read_off_the_metadata(model, sae):
    assert Placed(model, sae).site == SITE
    sae.metadata = {"site": "attn_out.4"}
    assert Placed(model, sae).site == Site(4, "attn_out")


def test_it_refuses_what_does_not_belong_together(model, sae):
    with pytest.raises(SparseCodingError, match="without text"): Placed(model, sae).acts([0])
    sae.metadata["model_fingerprint"] = "another"
    with pytest.raises(SparseCodingError, match="trained on"): Placed(model, sae)
    sae.metadata = {}
    with pytest.raises(SparseCodingError, match="does not say where"): Placed(model, sae)
    sae.metadata = {"site": f"resid_post.{model.n_layers}"}
    with pytest.raises(SparseCodingError, match="out of range"): Placed(model, sae)


def test_codes_are_those_of_the_running_model(model, sae, tokens):
    c = Placed(model, sae).codes(tokens)
    assert torch.equal(c, sae.encode(model.run_to(tokens, SITE)[SITE])) and (c > 0).any()
    hidden = model.hf(tokens, output_hidden_states=True).hidden_states[SITE.layer + 1]
    assert torch.allclose(c, sae.encode(hidden), atol=1e-5)


@torch.no_grad()
def by_hand(model, sae, tokens, j):
    "Logits with the part of one feature taken out by a hook of our own."
    def hook(module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        new = x - torch.relu(x @ sae.W_enc + sae.b_enc)[..., j, None]*sae.W_dec[j]
        return (new, *out[1:]) if isinstance(out, tuple) else new
    handle = model.blocks[SITE.layer].register_forward_hook(hook)
    try: return model.hf(tokens).logits
    finally: handle.remove()


def test_without_a_feature_moves_the_output_as_a_hook_by_hand_does(model, sae, tokens):
    at = Placed(model, sae)
    strongest = int(at.codes(tokens).sum((0, 1)).argmax())
    less, plain = at.spliced(tokens, at.without(strongest)), model.logits(tokens)
    assert (less - plain).abs().max() > 1e-2
    assert torch.allclose(less, by_hand(model, sae, tokens, strongest), atol=1e-4)
    silent = sae.b_enc.argmin().item()
    sae.b_enc[silent] = -1e3
    assert torch.allclose(at.spliced(tokens, at.without(silent)), plain, atol=1e-4)


def test_splicing_puts_the_reconstruction_where_it_is_asked_for(model, sae, tokens):
    at, keep = Placed(model, sae), torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < .5
    x = model.run_to(tokens, SITE)[SITE]
    assert torch.allclose(at.spliced(tokens), model.run_from(SITE.layer, sae(x)), atol=1e-4)
    mixed = torch.where(keep[..., None], sae(x), x)
    assert torch.allclose(at.spliced(tokens, keep=keep), model.run_from(SITE.layer, mixed), atol=1e-4)
    assert torch.allclose(at.spliced(tokens, lambda x: x), model.logits(tokens), atol=1e-4)


def test_activations_of_a_text_are_those_of_the_store(model, sae, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/"cache"))
    (tmp_path/"text.txt").write_text(f"{TEXT}\n\n"*3, encoding="utf-8")
    rows = load_rows(str(tmp_path/"text.txt"), model, "train", None, 16, heldout=0.)
    store = load_store(model, rows, SITE, dtype="float32")
    found, keep = Placed(model, sae, store).acts([1, 0]), store.keep(SITE).view(-1, 16)
    running = Placed(model, sae).codes(torch.from_numpy(np.array(rows.tokens)))[..., [1, 0]]
    assert torch.allclose(found, running*keep[..., None], atol=1e-4) and not found[:, 0].any()
