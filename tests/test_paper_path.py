"""The `paper` preset's code path, offline: the same cells on a tiny random GPT-NeoX and a local corpus, with small counts."""
import json, os, subprocess
from pathlib import Path

import pytest

from command import COMMAND
from sparse_coding.tools.runner import choose, page_name
from tiny import tiny_model

COUNTS = dict(size="quick", n_tokens=16_384, n_heldout=8_192, ratios=[1, 2], alphas=[1e-4, 3e-4, 1e-3, 3e-3], ratio=2, alpha=3e-3, steps=60,
              mlp_ratios=[.25, 1], mlp_alphas=[1e-4, 3e-4, 1e-3, 3e-3], mlp_alpha=3e-3, mlp_steps=40, n_seeds=2, batch_size=256,
              attn_tokens=16_384, attn_k=8)


@pytest.fixture(scope="module")
def tiny_neox(tmp_path_factory):
    "A random GPT-NeoX with its tokenizer, and this project's own sources as text."
    folder = tmp_path_factory.mktemp("paper")
    model = tiny_model(folder/"neox", "gpt_neox")
    files = sorted(Path(__file__).parent.parent.glob("sparse_coding/**/*.py"))*3
    with open(folder/"corpus.jsonl", "w") as f:
        for i,path in enumerate(files):
            text = path.read_text()
            f.writelines(json.dumps({"text": text[k:k + 2000]}) + "\n" for k in range(0, len(text), 2000))
    return model, folder/"corpus.jsonl"


def test_all_notebooks_at_paper_settings(tiny_neox, tmp_path):
    "One command, as on a machine with a GPU; the figures and the table of claims are there at the end."
    model, corpus = tiny_neox
    sets = [f"--set={k}={json.dumps(v)}" for k,v in COUNTS.items()]
    command = [*COMMAND, "reproduce", "--preset", "paper", "--model", str(model), "--corpus", str(corpus), "--layers", "1,2",
               "--out", str(tmp_path), *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert {page_name(p) for p in (tmp_path/"notebooks").rglob("*.ipynb")} == set(map(page_name, choose()))
    assert (tmp_path/"figures"/"fig6.png").exists() and "P1-recover" in (tmp_path/"claims.md").read_text()
