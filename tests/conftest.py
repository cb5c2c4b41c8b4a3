"""The reference's numbers, for all test files."""
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)                                     # the sums of one thread: the processes that tests start have one too

CUT = Path(__file__).parent / "golden"                       # small parts of the sets, kept in the repository
FULL = os.environ.get("VTP_GOLDEN")                          # the folder with all of them, if there is one


@pytest.fixture(params=["cut", "full"])
def golden(request):
    """Folder with arrays computed by the reference code: the same test runs on the cut sets and, where VTP_GOLDEN names them, on the full ones."""
    if request.param == "full" and not FULL:
        pytest.skip("VTP_GOLDEN does not name the folder of the full golden sets")
    return CUT if request.param == "cut" else Path(FULL)


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    """Indexes of tars go to a temporary folder."""
    os.environ["VTP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
