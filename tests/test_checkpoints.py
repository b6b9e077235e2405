"""A checkpoint of torch.distributed.checkpoint that is torn is named before it is loaded."""

from __future__ import annotations

import collections
import errno
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from hf_adalip.errors import UsageError
from hf_adalip.recipe import checkpoints
from hf_adalip.recipe.checkpoints import (
    SaveError,
    check_contents,
    check_distributed,
    find_checkpoint,
    read_checkpoint,
    replacing,
    saving,
    whole,
    write_manifest,
)
from hf_adalip.recipe.image.options import TrainingArguments

LATEST = TrainingArguments(resume_from_checkpoint="latest")


def save(folder, name, step):
    (folder / name).mkdir()
    (folder / name / "model.bin").write_bytes(b"x" * (3 << 20))
    write_manifest(folder / name, step, {})
    return folder / name


def test_the_newest_that_is_whole_is_resumed_from_and_older_ones_are_not_read(
    tmp_path, monkeypatch, capsys
):
    for name, step in (("step_9", 9), ("epoch_0", 8), ("step_10", 10)):
        save(tmp_path, name, step)
    (tmp_path / "step_10" / "model.bin").write_bytes(b"y" * (3 << 20))
    hashed, sha256 = [], checkpoints._sha256
    monkeypatch.setattr(checkpoints, "_sha256", lambda path: hashed.append(path) or sha256(path))
    path, manifest = find_checkpoint(LATEST, tmp_path)
    assert (path.name, manifest["step"]) == ("step_9", 9)
    assert [path.parent.name for path in hashed] == ["step_10", "step_9"]
    warning = f"warning: {tmp_path / 'step_10' / 'model.bin'} is damaged; going on from {path}"
    assert capsys.readouterr().err.strip() == warning


def test_killed_in_the_first_save_it_begins_again(tmp_path, capsys):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    assert find_checkpoint(LATEST, tmp_path) is None
    assert "checkpoint.json is missing; starting from the beginning" in capsys.readouterr().err
    (tmp_path / "all_results.json").write_text("{}")
    with pytest.raises(UsageError, match=r"nothing to resume in .*checkpoint.json is missing"):
        find_checkpoint(LATEST, tmp_path)


@pytest.mark.parametrize("manifest", ["{", "[]", '{"step": 1}', '{"files": 3}'])
def test_a_damaged_manifest_is_named_and_nothing_begins_anew(tmp_path, manifest):
    (save(tmp_path, "step_1", 1) / "checkpoint.json").write_text(manifest)
    with pytest.raises(UsageError, match=r"nothing to resume in .*checkpoint.json cannot be read"):
        find_checkpoint(LATEST, tmp_path)


@pytest.fixture
def saved(tmp_path):
    state = {"a": torch.randn(300), "b": {"c": torch.randn(20, 30), "step": 3}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    check_distributed(tmp_path)
    check_distributed(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_torn_file_is_named(saved, name, kept):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=name):
        check_distributed(saved)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        check_distributed(saved)


class Code:
    """What pickle calls when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "named"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (getattr, "builtins.getattr")],
)
def test_metadata_with_code_is_refused_and_not_run(saved, tmp_path, function, named):
    ran = tmp_path / "ran"
    arguments = {
        "mkdir": [str(ran)],
        "eval": [f"open({str(ran)!r}, 'w')"],
        "getattr": [pathlib.Path(ran), "touch"],
    }[function.__name__]
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = collections.OrderedDict(x=Code(function, *arguments))
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"\.metadata has {named} in it"):
        check_distributed(saved)
    assert not ran.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_of_every_kind_of_tensor_is_read(tmp_path, protocol):
    dtypes = (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    state = {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in dtypes}
    state |= {"list": [torch.ones(2), {"a": (1, "b")}], "last": torch.ones(1, 2, 2, 2)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    check_distributed(tmp_path)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin"])
@pytest.mark.parametrize("function", [os.mkdir, Code])
def test_a_file_with_code_is_told_from_a_damaged_one(tmp_path, name, function):
    (tmp_path / "saved").mkdir()
    torch.save({"x": Code(function, str(tmp_path / "ran"))}, tmp_path / "saved" / name)
    with pytest.raises(UsageError, match=f"{name} has more in it than tensors and numbers"):
        check_contents(tmp_path / "saved", [])
    assert not (tmp_path / "ran").exists()


def test_an_edited_manifest_is_told_from_a_good_one(tmp_path):
    path = save(tmp_path, "step_1", 1)
    assert read_checkpoint(path)["step"] == 1
    manifest = json.loads((path / "checkpoint.json").read_text())
    before = manifest.pop("sha256")
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "step": 2, "sha256": before}))
    with pytest.raises(UsageError, match=r"checkpoint\.json is damaged: it is not as it was"):
        read_checkpoint(path)
    (path / "checkpoint.json").write_text(json.dumps({"sha256": before, **manifest}))
    assert read_checkpoint(path)["step"] == 1
    (path / "checkpoint.json").write_text(json.dumps(manifest))  # of before there was one
    assert read_checkpoint(path)["step"] == 1


def states():
    return {
        "random_state": random.getstate(),
        "numpy_random_seed": np.random.get_state(),  # noqa: NPY002 (as accelerate saves it)
        "torch_manual_seed": torch.get_rng_state(),
    }


def without(key, value=...):
    return {k: v for k, v in {**states(), key: value}.items() if v is not ...}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("random_states_0.pkl", b""),
        ("random_states_0.pkl", b"garbage"),
        ("random_states_0.pkl", {}),
        ("random_states_0.pkl", [1]),
        *(("random_states_0.pkl", without(key)) for key in states()),
        *(("random_states_0.pkl", without(key, (1, 2, 3))) for key in states()),
        ("random_states_0.pkl", without("torch_manual_seed", torch.zeros(3, dtype=torch.uint8))),
        ("rng_state.pth", {"python": random.getstate()}),
        ("optimizer.bin", b"PK\3\4 and no more"),
        ("optimizer.pt", b""),
        ("model.safetensors", b"\xff" * 20),
        ("trainer_state.json", b"{"),
    ],
)
def test_a_file_that_was_not_whole_when_it_was_saved_is_named(tmp_path, name, content):
    """Its checksum is right: it is what was saved."""
    torch.save(states(), tmp_path / "random_states_0.pkl")
    write_manifest(tmp_path, 1, {})
    check_contents(tmp_path, ["random_states_0.pkl"])
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    write_manifest(tmp_path, 1, {})
    read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=f"{name} is damaged"):
        check_contents(tmp_path, [])
    (tmp_path / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        check_contents(tmp_path, [name])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "quota exceeded"),
        (OSError(errno.EFBIG, "x"), "File too large for ulimit -f"),
        (ValueError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "no space"),
        (OSError(errno.EACCES, "x"), None),
        (ValueError("x (os error 13)"), None),
        (RuntimeError("x"), None),
    ],
)
def test_what_is_no_room_and_what_is_not(tmp_path, error, reason):
    def write(path):
        path.write_text("half")
        try:
            raise error
        finally:
            (tmp_path / "other").touch()

    (tmp_path / "file").write_text("before")
    with pytest.raises(type(error) if reason is None else SaveError) as raised:
        whole(tmp_path / "file", write)
    assert reason is None or f"{tmp_path / 'file'} could not be written: " in str(raised.value)
    assert reason is None or reason in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other"}
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_a_device_that_is_full(tmp_path):
    no_room = pytest.raises(SaveError, match=f"^{tmp_path} could not be written: No space left")
    with open("/dev/full", "wb", buffering=0) as full, no_room, saving(tmp_path):
        torch.save(torch.ones(3), full)
    with pytest.raises(SaveError, match="could not be written: No space left on device"):
        whole(tmp_path / "x", lambda path: pathlib.Path("/dev/full").write_text("x"))


def test_files_are_replaced_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    no_room = pytest.raises(SaveError, match=rf"^{tmp_path}/b could not be written")
    with no_room, replacing(tmp_path) as folder:
        whole(folder / "a", lambda path: path.write_text("new"))
        whole(folder / "b", lambda path: pathlib.Path("/dev/full").write_text("new"))
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old", "old"]
    with replacing(tmp_path) as folder:
        for name in ("a", "c/d"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert [(tmp_path / name).read_text() for name in ("a", "b", "c/d")] == ["new", "old", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


BARE = """
import sys
class TorchAlone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("accelerate", "huggingface_hub", "transformers", "yaml"):
            raise ImportError(f"No module named {name}")
sys.meta_path.insert(0, TorchAlone())
"""


@pytest.mark.slow
def test_what_is_for_torch_alone_needs_nothing_more():
    """And what does need more says which extra has it."""
    use = "from hf_adalip.recipe.checkpoints import check_distributed; check_distributed('nowhere')"
    publish = (
        "from hf_adalip.cli import main; sys.argv += 'publish . --repo_id a/b'.split(); main()"
    )
    for code, message in ((use, "nowhere"), (publish, "pip install 'hf-adalip[recipes]'")):
        command = [sys.executable, "-c", BARE + code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]
