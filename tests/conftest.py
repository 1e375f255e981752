"""Every test run starts from an empty cache, shared by all tests of the run, so that nothing left over can make a test pass."""
import os, tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")                            # before torch is loaded: see 85_runner

import pytest


def pytest_configure(config):
    if not hasattr(config, "workerinput"):                                     # the cache belongs to the whole run
        config.sc_cache = tempfile.TemporaryDirectory(prefix="sparse-coding-tests-")
        os.environ["SPARSE_CODING_CACHE"] = config.sc_cache.name
    for name in ("SPARSE_CODING_PRESET", "SPARSE_CODING_SET", "SPARSE_CODING_LEDGER", "SPARSE_CODING_OUT"):
        os.environ.pop(name, None)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_unconfigure(config):
    if hasattr(config, "sc_cache"): config.sc_cache.cleanup()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "A cache of this test's own, for tests that break things in it."
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"
