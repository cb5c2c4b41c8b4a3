"""Fixtures for all test files: the reference's arrays; the plain and the fast forms."""
import os
from pathlib import Path

import pytest
import torch

from vtp_min.extras import fast

torch.set_num_threads(1)                           # processes that tests start have one thread too

CUT = Path(__file__).parent / "golden"             # small parts of the sets, in the repository
FULL = os.environ.get("VTP_GOLDEN")                # the folder of the full sets, if there is one


@pytest.fixture(params=["cut", "full"])
def golden(request):
    """A folder of arrays that the reference code computed: the cut sets, then the full ones if the
    environment variable VTP_GOLDEN names their folder."""
    if request.param == "full" and not FULL:
        pytest.skip("VTP_GOLDEN does not name the folder of the full golden sets")
    return CUT if request.param == "cut" else Path(FULL)


restore_textbook_forms = fast.install()            # nothing is installed before this line
restore_textbook_forms()


@pytest.fixture(autouse=True)
def textbook_forms():
    """Each test begins with the textbook forms, whatever a run within this process installed."""
    restore_textbook_forms()
    yield
    restore_textbook_forms()


@pytest.fixture(params=["plain", "fast"])
def form(request, textbook_forms):
    """The textbook forms of the core, then those of extras/fast.py in their place.

    A test sees them only if it calls them through their module: losses.dino_loss, vit.rotate.
    """
    if request.param == "fast":
        fast.install()
    return request.param


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Indexes of tars go to a temporary folder."""
    os.environ["VTP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
