"""Fixtures for all test files: the stored outputs of the reference code, and the two forms of the
core's functions, textbook and fast."""
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from data import map_rows
from vtp_min.extras import cost, fast

# The processes that tests start use one thread, too. With equal numbers of threads, sums have the
# same order, so results can be compared to the bit.
torch.set_num_threads(1)

CUT = Path(__file__).parent / "golden"             # small parts of the sets, in the repository
FULL = os.environ.get("VTP_GOLDEN")                # the folder of the full sets, or None


@pytest.fixture(params=["cut", "full"])
def golden(request):
    """A folder of arrays that the reference code computed.

    A test that uses it runs twice: on the parts in tests/golden, and on the full sets. The second
    run is skipped unless the environment variable VTP_GOLDEN names the folder of the full sets.
    """
    if request.param == "full" and not FULL:
        pytest.skip("VTP_GOLDEN does not name the folder of the full golden sets")
    return CUT if request.param == "cut" else Path(FULL)


def reset():
    """Begin with the same draws, and with float32 (--precision fp64 changes the default)"""
    torch.set_default_dtype(torch.float32)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def same_draws_in_every_file():
    reset()


@pytest.fixture(autouse=True)
def same_draws_in_every_test(same_draws_in_every_file):
    """A test that draws numbers without a seed of its own draws the same numbers in every run.

    Which process runs which files, and after which others, is decided anew in each run.
    """
    reset()


HANDLERS = {number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def signal_handlers_are_restored():
    """A training in this process handles signals, also after its end."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def steps_of_equal_shapes_are_counted_once():
    """train.py counts the FLOPs of its step, which takes a second, longer than the steps of most
    tests. Trainings in this process whose steps have equal shapes share the count."""
    count, counted = cost.step_flops, {}

    def step_flops(config, batch, *others):
        shapes = {name: x.shape for name, x in vars(batch).items() if torch.is_tensor(x)}
        key = repr((config, shapes, map_rows(batch.keep, len), others))
        if key not in counted:
            counted[key] = count(config, batch, *others)
        return counted[key]

    cost.step_flops = step_flops
    yield
    cost.step_flops = count


# fast.install returns a function that restores the functions which it replaced. Here these are the
# textbook forms, because no test has run yet.
restore_textbook_forms = fast.install()
restore_textbook_forms()


@pytest.fixture(autouse=True)
def textbook_forms():
    """Each test begins with the textbook forms, even if an earlier test has installed the fast
    forms in this process (train.py does so on a CPU)."""
    restore_textbook_forms()
    yield
    restore_textbook_forms()


@pytest.fixture(params=["plain", "fast"])
def form(request, textbook_forms):
    """A test that uses it runs twice: on the textbook forms, and on those of extras/fast.py.

    Functions are replaced in their modules, so the test must call them through the module:
    losses.cross_entropy, vit.rotate.
    """
    if request.param == "fast":
        fast.install()
    return request.param


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Indexes of tars are cached in a temporary folder, not in the user's cache."""
    os.environ["VTP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first, so that no test process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_many.py")
