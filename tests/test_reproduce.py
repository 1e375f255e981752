"""The command line as its user meets it: exit statuses, one sentence for bad input, Ctrl-C."""
import io, json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest

from sparse_coding.presets import SparseCodingError, preset
from sparse_coding.tools import command_line, costs, runner
from command import COMMAND as RUN
from tiny import tiny_model


def run(*args, **env): return subprocess.run([*RUN, *args], capture_output=True, encoding="utf-8", timeout=200, env={**os.environ, **env})


@pytest.mark.parametrize("args, sentence", [
    (["estimate", "--preset", "huge"], "Unknown preset 'huge'"),
    (["reproduce", "--only", "77"], "begins with '77'"),
    (["estimate", "--set", "alphas=[-1]"], "negative"),
    (["estimate", "--set", "drop=1"], "no field 'drop'"),
    (["estimate", "--layers", "nine"], "--layers takes numbers"),
    (["estimate", "--layers", "99,100"], "no layer 99"),
    (["estimate", "--layers", "9"], "compares layers and needs two"),
    (["estimate", "--layers", "9,9"], "9 twice"), (["estimate", "--layers", ""], "--layers takes numbers"),
    (["estimate", "--set", "steps=2.5"], "steps = 2.5"), (["estimate", "--set", "corpus=code"], "with the quotes"),
    (["estimate", "--model", ""], "model = ''"), (["estimate", "--corpus", "/no/such.jsonl"], "/no/such.jsonl does not exist"),
    (["reproduce", "--only", "01,,"], "begins with ''"), (["reproduce", "--timeout", "0"], "above 0"),
    (["reproduce", "--out", "/proc/none"], "choose a folder with --out"), (["report", "--out", "/no/run"], "no folder /no/run"),
    (["estimate", "--model", "gpt2"], "embedded"),
], ids=lambda a: " ".join(a[:3]) if isinstance(a, list) else "")
def test_bad_input_costs_one_sentence(args, sentence, capsys, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "SPARSE_CODING_PRESET"): monkeypatch.setenv(name, "1")            # as they were, afterwards
    monkeypatch.delenv("SPARSE_CODING_PRESET")
    try: status = command_line.main(args)
    except SystemExit as e: status = e.code                                                         # of argparse
    said = capsys.readouterr().err
    assert status == 2 and sentence in said and "Traceback" not in said


def test_a_process_that_is_asked_for_what_cannot_be_ends_with_a_status():
    done = run("estimate", "--layers", "nine")
    assert done.returncode == 2 and "--layers takes numbers" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("env, sentence", [
    (dict(SPARSE_CODING_SET="steps=3"), "SPARSE_CODING_SET=steps=3 cannot be read"), (dict(SPARSE_CODING_DEVICE="gpu"), "SPARSE_CODING_DEVICE=gpu"),
    (dict(SPARSE_CODING_CACHE="/proc/none"), "set SPARSE_CODING_CACHE")])
def test_bad_environment_costs_one_sentence(env, sentence):
    done = run("estimate", **env)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A folder with a model of six layers and a text in many paragraphs."
    folder = tmp_path_factory.mktemp("small")
    tiny_model(folder/"model", "llama")
    (folder/"text.txt").write_text("\n\n".join(f"Paragraph {i}." for i in range(200)), encoding="utf-8")
    (folder/"one.txt").write_text("Paragraph.", encoding="utf-8")
    return folder


@pytest.mark.parametrize("changes, says", [
    (dict(), "layer = 9: there is no layer 9, .* has layers 0 to 5. Choose others with --layers"),
    (dict(attn_layers=[3, 17]), "attn_layers = .3, 17.: there is no layer 17"), (dict(mlp_layers=[6]), "mlp_layers = .6,."),
    (dict(row_len=1024), "row_len = 1024 is longer than the context"), (dict(attn_row_len=600), "attn_row_len = 600"),
    (dict(attn_k=200), "attn_k = 200 is more than the 64 features"), (dict(layers=[3]), "compares layers"),
    (dict(alphas=[.06]), "compares alphas"), (dict(ratios=[2.]), "compares ratios"), (dict(corpus="one.txt"), "all fall into"),
    (dict(corpus="none.txt"), "does not exist"), (dict(model="none/"), "none")], ids=lambda a: str(a)[:25])
def test_what_model_and_text_do_not_have_is_refused_before_the_start(small, monkeypatch, changes, says):
    monkeypatch.chdir(small)
    fits = {} if not changes else dict(layer=3, layers=[1, 3], mlp_layers=[0, 3], attn_layers=[3])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    p = preset(**dict(model="./model", corpus="./text.txt") | fits | changes)
    with pytest.raises(SparseCodingError, match=says) as e: costs.estimate(p, runner.notebooks())
    assert "\n" not in str(e.value)


def test_paths_are_absolute_and_embedded_names_are_no_paths(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    monkeypatch.setenv("SPARSE_CODING_SET", json.dumps(dict(model="model", corpus="text.txt")))
    asked = lambda *args: command_line.preset_from(command_line.parser().parse_args(["estimate", *args]))
    assert (asked().model, asked().corpus) == (str(small/"model"), str(small/"text.txt"))
    for name in ("code", "embedded"): (small/name).mkdir(exist_ok=True)
    p = asked("--model", "embedded", "--corpus", "code")
    assert (p.model, p.corpus) == ("embedded", "code") and "write ./code" in capsys.readouterr().err
    assert asked("--corpus", "./code").corpus == str(small/"code")


def page(folder, *sources):
    "A notebook with these cells."
    path = folder/"page"/"99_demo.ipynb"
    path.parent.mkdir(exist_ok=True, parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]), path)
    return path


def test_this_interpreter_runs_the_notebooks(tmp_path, monkeypatch):
    "Whatever kernel is installed under the name python3, and wherever the home folder is."
    spec = tmp_path/"jupyter"/"kernels"/"python3"
    spec.mkdir(parents=True)
    (spec/"kernel.json").write_text(json.dumps(dict(argv=["/opt/gone/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                                    display_name="x", language="python")), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/"cache"))
    env = runner.environment(preset(), tmp_path, tmp_path/"claims.json")
    show = "import sys; from sparse_coding.engine import kernel\n@kernel\ndef f(x): return x + 1\nprint(sys.executable, f(1), f._cache.cache_path)"
    runner.execute(page(tmp_path, show), tmp_path/"out.ipynb", env)
    said = nbformat.read(tmp_path/"out.ipynb", 4).cells[0].outputs[0]["text"].split()
    assert said[:2] == [sys.executable, "2"] and said[2].startswith(str(tmp_path/"cache"))


def test_a_kernel_that_cannot_start_is_told(tmp_path, monkeypatch):
    for broken in ("/opt/gone/bin/python", "/bin/false"):
        monkeypatch.setattr(runner, "get_kernel_dict", lambda: dict(argv=[broken, "{connection_file}"], display_name="x", language="python"))
        with pytest.raises(SparseCodingError, match="page/99_demo stopped: its kernel, .* did not start") as e:
            runner.execute(page(tmp_path, "1"), tmp_path/"out.ipynb")
        assert "\n" not in str(e.value)


def test_a_check_that_fails_says_what_was_expected(tmp_path):
    for source, says in [("from fastcore.test import test_eq\nx = 4\ntest_eq(x, 3)", r"does not hold for this model and text: test_eq\(x, 3\) \(==: 4 3\)"),
                         ("x = 4\nassert x == 3, 'three'", r"assert x == 3, 'three' \(three\)"), ("def f():\n    assert False\nf()", r"text: f\(\)")]:
        with pytest.raises(SparseCodingError, match=says) as e: runner.execute(page(tmp_path, source), tmp_path/"out.ipynb")
        assert "\n" not in str(e.value)


def test_damaged_files_are_named(tmp_path):
    (tmp_path/"page").mkdir()
    (tmp_path/"page"/"99_demo.ipynb").write_text("<<<<<<< HEAD\n{}", encoding="utf-8")
    with pytest.raises(SparseCodingError, match="99_demo.ipynb cannot be read as a notebook"): runner.code_of(tmp_path/"page"/"99_demo.ipynb")
    for name in ("done.json", "claims.json"):
        (tmp_path/name).write_text("[", encoding="utf-8")
        with pytest.raises(SparseCodingError, match=f"{name} is damaged"): runner.results_folder(tmp_path)
        (tmp_path/name).unlink()


def test_the_library_is_read_whatever_the_locale():
    "Some of its pages hold characters that other encodings lack."
    show = "from pathlib import Path; from sparse_coding.tools.runner import done_key, notebooks; from sparse_coding.presets import preset; print(done_key(notebooks()[0], preset()))"
    ask = lambda **env: subprocess.run([sys.executable, "-c", show], capture_output=True, encoding="utf-8", env={**os.environ, **env})
    plain, warned = ask(), ask(PYTHONWARNDEFAULTENCODING="1")
    assert len(plain.stdout.strip()) == 16 and plain.stdout == warned.stdout
    assert not [l for l in warned.stderr.splitlines() if "EncodingWarning" in l and "/sparse_coding/" in l]


def test_what_goes_to_a_file_is_utf8(monkeypatch):
    for name in ("stdout", "stderr"): monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    command_line.write_utf8()
    print("\u2423 \u2191")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode("utf-8").split() == ["\u2423", "\u2191"]


def test_report_is_json_with_every_claim(tmp_path):
    rows = json.loads(run("report", "--json", "--out", str(tmp_path)).stdout)
    assert len(rows) >= 59 and {r["verdict"] for r in rows} == {"not measured"}


def test_done_notebooks_are_not_done_again_and_ctrl_c_is_clean(tmp_path):
    args = ["reproduce", "--only", "plots,dictionaries", "--out", str(tmp_path)]
    first = subprocess.Popen([*RUN, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
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


def test_a_figure_is_drawn_and_the_page_ends_there(tmp_path, monkeypatch):
    out, drawn = tmp_path/"out", 'save_figure(figure, "fig6")'
    path = page(tmp_path, "save_figure = lambda figure, name: print(name)\nfigure = 0", drawn, "1/0")
    with pytest.raises(SparseCodingError, match="ZeroDivisionError"): runner.reproduce(preset(), [path], out)
    runner.reproduce(preset(), [path], out, figure="6")
    assert [c.source for c in nbformat.read(out/"notebooks"/"page"/"99_demo.ipynb", 4).cells][-1] == drawn
    with pytest.raises(SparseCodingError, match="ZeroDivisionError"): runner.reproduce(preset(), [path], out)        # it is not done


def test_an_executed_page_holds_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/"cache"))
    env = runner.environment(preset(), tmp_path, tmp_path/"claims.json")
    runner.execute(page(tmp_path, "import matplotlib.pyplot as plt", "plt.plot([1, 2]);", "plt.figure(), plt.plot([2, 1]);"), tmp_path/"out.ipynb", env)
    shown = [[*o["data"]] for c in nbformat.read(tmp_path/"out.ipynb", 4).cells for o in c.outputs]
    assert ["image/png" in kinds for kinds in shown] == [True, True]


def test_the_pictures_of_a_figure_are_told_from_those_of_others(tmp_path):
    for name in ("fig1", "fig13", "fig13_1", "fig1_toy", "activation_norms"): (tmp_path/f"{name}.png").touch()
    assert [f.stem for f in runner.saved(tmp_path, "1")] == ["fig1", "fig13_1", "fig1_toy"]


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_kernel_outlives_the_command(tmp_path, by):
    "However it ends; a zombie that nobody has waited for is no kernel any more."
    path, told = page(tmp_path, f"import os, time; open({str(tmp_path/'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)"), tmp_path/"pid"
    code = f"from pathlib import Path; from sparse_coding.tools import runner; runner.execute(Path({str(path)!r}), Path({str(tmp_path/'o.ipynb')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (told.exists() and told.read_text()): time.sleep(.1); assert process.poll() is None
    process.send_signal(by)
    process.wait(30)
    status = Path(f"/proc/{told.read_text()}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text(): return
        time.sleep(.1)
    raise AssertionError(status.read_text())
