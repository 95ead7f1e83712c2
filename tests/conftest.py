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


@pytest.fixture
def tokenizer():
    "The characters of Shakespeare"
    from dlm.data.text import corpus_alphabet, tiny_shakespeare
    from dlm.data.tokenizers import character_tokenizer

    return character_tokenizer(corpus_alphabet(tiny_shakespeare()))


@pytest.fixture
def text_run(monkeypatch, tmp_path):
    "Makes a run on Shakespeare, 32 characters at a time, from an objective, changes of the network and training settings"
    from dlm.data.packing import Packing
    from dlm.data.text import tiny_shakespeare
    from dlm.models.dit import DiTConfig
    from dlm.training.run import Run
    from dlm.training.settings import TrainingConfig

    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    shape = dict(hidden_size=32, n_blocks=1, n_heads=2, cond_dim=8, length=32)
    numbers = dict(batch_size=8, precision="fp32", log_every=1)

    def make(objective, network, **training):
        config = DiTConfig(vocab_size=objective.corruption.vocab_size, **shape | network)
        data, training = tiny_shakespeare(held_out=0.002), TrainingConfig(**numbers | training)
        return Run(objective, config, data, Packing(32), training)

    return make
