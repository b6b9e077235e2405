"""A checkpoint of torch.distributed.checkpoint that is torn is named before it is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hf_adalip import checkpoints
from hf_adalip.checkpoints import check_distributed, find_checkpoint, write_manifest
from hf_adalip.options import TrainingArguments, UsageError

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


BARE = """
import sys
class TorchAlone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("accelerate", "huggingface_hub", "transformers", "yaml"):
            raise ImportError(f"No module named {name}")
sys.meta_path.insert(0, TorchAlone())
"""


def test_what_is_for_torch_alone_needs_nothing_more():
    """And what does need more says which extra has it."""
    use = "from hf_adalip.checkpoints import check_distributed; check_distributed('nowhere')"
    publish = (
        "from hf_adalip.cli import main; sys.argv += 'publish . --repo_id a/b'.split(); main()"
    )
    for code, message in ((use, "nowhere"), (publish, "pip install 'hf-adalip[recipes]'")):
        command = [sys.executable, "-c", BARE + code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]
