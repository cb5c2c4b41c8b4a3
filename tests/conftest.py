"""What several test files share: the reference's numbers, and a way to run two processes."""
import os
from pathlib import Path

import pytest
import torch

CUT = Path(__file__).parent / "golden"                       # small parts of the sets, kept in the repository
FULL = os.environ.get("VTP_GOLDEN")                          # the folder with all of them, if there is one


@pytest.fixture(params=["cut", "full"])
def golden(request):
    """Folder with arrays computed by the reference code: the same test runs on the cut sets and, where VTP_GOLDEN names them, on the full ones."""
    if request.param == "full" and not FULL:
        pytest.skip("VTP_GOLDEN does not name the folder of the full golden sets")
    return CUT if request.param == "cut" else Path(FULL)


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """two(work, *args): run work(rank, *args) in two gloo processes of one thread -> what each returned"""
    def run(work, *args):
        folder = tmp_path_factory.mktemp("two")
        torch.multiprocessing.spawn(one_of_two, (folder, work, args), nprocs=2)
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return run


def one_of_two(rank, folder, work, args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
