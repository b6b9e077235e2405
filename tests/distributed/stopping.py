"""One rank of a run of which another is asked to stop; see tests/test_recipe_run.py."""

from types import SimpleNamespace

import torch.distributed as dist
from accelerate import Accelerator

from hf_adalip.recipe.run import any_asked_to_stop


def main():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    run = SimpleNamespace(stop_asked=False)
    assert not any_asked_to_stop(run, accelerator, 20)
    run.stop_asked = accelerator.process_index == 1
    assert not any_asked_to_stop(run, accelerator, 39)  # asked of nobody
    assert any_asked_to_stop(run, accelerator, 40)
    assert any_asked_to_stop(run, accelerator)  # and at the end of an epoch, at any step
    dist.destroy_process_group()
