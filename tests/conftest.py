"What holds for all tests: no network, one thread, and what is left out."

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is wrong
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run side by side

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    import torch

    skip = {}
    if not torch.cuda.is_available():
        skip["gpu"] = pytest.mark.skip(reason="needs a GPU")
    if not config.getoption("--slow"):
        skip["slow"] = pytest.mark.skip(reason="takes more than a minute: pytest --slow")
    for item in items:
        for name in skip.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(skip[name])
