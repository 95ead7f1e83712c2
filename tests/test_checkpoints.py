"Checkpoints: what goes in comes out, damage is noticed, and nothing is lost half way"

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dlm.training import checkpoints as room
from dlm.training.checkpoints import (
    checkpoints,
    damage,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
)

WEIGHTS = {"w": torch.arange(12.0).view(3, 4), "b": torch.tensor(2.5)}


def save(folder, step, **groups):
    return save_checkpoint(folder / f"checkpoint-{step}", {"network": WEIGHTS, **groups}, {"step": step})


def test_every_kind_of_tensor_comes_back(tmp_path):
    base = torch.randn(4, 6)
    tensors = {
        "whole": base,
        "tied": base,
        "row": base[1],
        "turned": base.T,
        "flat": base.view(-1),
        "scalar": torch.tensor(3),
        "half": torch.randn(5).bfloat16(),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    path = save_checkpoint(tmp_path / "checkpoint-1", {"network": tensors}, {"x": 0.1})
    back = load_checkpoint(path)
    assert back.state == {"x": 0.1}
    assert back.tensors["network"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = back.tensors["network"][name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor.detach())
    assert back.tensors["network"]["tied"] is back.tensors["network"]["whole"]
    assert "tied" not in load_file(path / "network.safetensors")


def test_nan_in_the_state_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path / "checkpoint-1", {"network": WEIGHTS}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "name", "reason"),
    [
        (cut, "network.safetensors", "network.safetensors has"),
        (flip, "network.safetensors", "network.safetensors was altered"),
        (flip, "state.json", "state.json was altered"),
        (lambda p: p.unlink(), "state.json", "state.json is missing"),
        (lambda p: p.unlink(), "manifest.json", "manifest.json is missing"),
        (lambda p: p.write_text(p.read_text()[:20]), "manifest.json", "manifest.json cannot be read"),
        (lambda p: p.write_text("[]"), "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_damage_is_named_and_passed_over_aloud(harm, name, reason, tmp_path, caplog):
    save(tmp_path, 5), save(tmp_path, 10)
    harm(tmp_path / "checkpoint-10" / name)
    assert reason in damage(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="not a whole checkpoint") as error:
        load_checkpoint(tmp_path / "checkpoint-10")
    assert "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).name == "checkpoint-5"
    assert [r.getMessage() for r in caplog.records] == [
        f"passed over checkpoint-10: {damage(tmp_path / 'checkpoint-10')}"
    ]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    cut(save(tmp_path, 1) / "network.safetensors")
    assert latest_checkpoint(tmp_path) is None


def test_steps_are_numbers_not_words(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_prune_never_counts_a_later_damaged_one(tmp_path):
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    cut(tmp_path / "checkpoint-9" / "network.safetensors")
    (tmp_path / ".checkpoint-4.123.partial").mkdir()
    prune(save(tmp_path, 4), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-9"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"


@pytest.mark.parametrize("broken", ["save_file", "write_json", "sha256"])
def test_a_failure_while_writing_leaves_what_was_there(broken, tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, broken, full)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, step)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") is None


def test_loading_runs_no_code(tmp_path):
    path = save(tmp_path, 1)
    for file in path.iterdir():
        head = file.read_bytes()[:2]
        assert head != b"\x80\x02" and head != b"PK", "neither pickle nor zip"
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    assert manifest.keys() == {"network.safetensors", "state.json"}


def optimised(names, steps):
    torch.manual_seed(0)
    layers = {n: nn.Linear(3, 3) for n in ("first", "second", "unused")}
    net = nn.ModuleDict({n: layers[n] for n in names})
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, fused=True)
    for _ in range(steps):
        net["second"](net["first"](torch.eye(3))).square().sum().backward()
        optimizer.step(), optimizer.zero_grad()
    return net, optimizer


def test_optimizer_state_goes_by_name(tmp_path):
    net, optimizer = optimised(["first", "unused", "second"], 3)
    flat = optimizer_tensors(optimizer, dict(net.named_parameters()))
    assert {n.rpartition(".")[2] for n in flat} == {"exp_avg", "exp_avg_sq", "step"}
    assert not any(n.startswith("unused") for n in flat)
    path = save(tmp_path, 1, optimizer=flat)
    other, fresh = optimised(["unused", "second", "first"], 0)
    load_optimizer_tensors(fresh, dict(other.named_parameters()), load_checkpoint(path).tensors["optimizer"])
    back = optimizer_tensors(fresh, dict(other.named_parameters()))
    assert back.keys() == flat.keys() and all(torch.equal(back[n], flat[n]) for n in flat)
    assert float(back["first.weight.step"]) == 3
    with pytest.raises(ValueError, match="optimiser state for first.weight"):
        load_optimizer_tensors(fresh, {"second.weight": other["second"].weight}, flat)
