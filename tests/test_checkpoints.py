"""A checkpoint of torch.distributed.checkpoint that is torn is named before it is loaded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hf_adalip.checkpoints import check_distributed


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
