"""The command line as its user meets it: exit statuses, one sentence for bad input, Ctrl-C."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from command import COMMAND as RUN


def run(*args, **env): return subprocess.run([*RUN, *args], capture_output=True, text=True, timeout=200, env={**os.environ, **env})


@pytest.mark.parametrize("args, sentence", [
    (["estimate", "--preset", "huge"], "Unknown preset 'huge'"),
    (["reproduce", "--only", "77"], "begins with '77'"),
    (["estimate", "--set", "alphas=[-1]"], "negative"),
    (["estimate", "--set", "drop=1"], "no field 'drop'"),
    (["estimate", "--layers", "nine"], "--layers takes numbers"),
    (["estimate", "--layers", "99"], "99"),
    (["estimate", "--model", "gpt2"], "embedded"),
], ids=lambda a: " ".join(a[:3]) if isinstance(a, list) else "")
def test_bad_input_costs_one_sentence(args, sentence):
    done = run(*args, HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stderr[-2000:]
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_report_is_json_with_every_claim(tmp_path):
    rows = json.loads(run("report", "--json", "--out", str(tmp_path)).stdout)
    assert len(rows) >= 59 and {r["verdict"] for r in rows} == {"not measured"}


def test_done_notebooks_are_not_done_again_and_ctrl_c_is_clean(tmp_path):
    args = ["reproduce", "--only", "plots,dictionaries", "--out", str(tmp_path)]
    first = subprocess.Popen([*RUN, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = tmp_path/"done.json"
    for _ in range(900):
        if done.exists(): break
        time.sleep(.1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130, err[-2000:]
    assert "goes on from here" in err and "Traceback" not in err
    again = run(*args)
    assert again.returncode == 0 and "foundation/04_plots         done before" in again.stdout
    assert (tmp_path/"notebooks"/"foundation"/"11_dictionaries.ipynb").exists() and "figures" in again.stdout
