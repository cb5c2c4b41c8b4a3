"""What a GPU would punish, counted without a GPU: operators for which the host waits, copies, forms
that torch.compile and flash attention accept. study/sync.py says how waits are counted."""
import sys
from pathlib import Path

import pytest
import torch

from vtp_min import losses, vit
from vtp_min.augment import kept_rows
from vtp_min.device import move_to
from vtp_min.model import SIZES, VTPConfig, VTPModel

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import sync                                                                # noqa: E402

torch_version = torch.torch_version.TorchVersion(torch.__version__)
pytestmark = pytest.mark.skipif(sync.OLD_TORCH, reason="PyTorch 2.5 crashes in study/sync.py")

# the host has to know whether losses and gradients are finite, and whether a signal has arrived
ONE_WAIT = {("number to Python", "vtp_min/run.py, agree"): 1}
COPIES = ("asynchronous copy", "vtp_min/device.py, move_to")


def step(kind):
    """-> waits, number of asynchronous copies, Counter of operators of a step"""
    recorder = sync.run(*sync.KINDS[kind])
    waits = dict(recorder.found)
    return waits, waits.pop(COPIES), recorder.kernels


# ---------------------------------------------------------------- the counter
def waits_of(function):
    """-> list of reasons why the host would wait"""
    recorder = sync.Recorder(sync.TREE, warmup=0)
    x = torch.ones(3, device="meta")
    with recorder:
        function(x)
    return [reason for reason, _ in recorder.found]


@pytest.mark.parametrize("function, reason", [
    (lambda x: x.sum().item(), "number to Python"),
    (lambda x: bool(x.sum() > 0), "number to Python"),
    (lambda x: x.tolist(), "number to Python"),
    (lambda x: x.cpu(), "number to Python"),
    pytest.param(lambda x: torch.tensor(1.0, device=x.device), "copy to the device",
                 marks=pytest.mark.skipif(torch_version < "2.15", reason="not visible to a mode")),
    (lambda x: torch.ones(2).to(x.device), "copy to the device"),
    (lambda x: x.copy_(torch.ones(3)), "copy to the device"),
    (lambda x: move_to(torch.ones(2), x.device), "asynchronous copy"),
], ids=["item", "bool", "tolist", "cpu", "tensor", "to", "copy_", "move_to"])
def test_a_wait_is_found(function, reason):
    assert waits_of(function) == [reason]


@pytest.mark.parametrize("function, reason", [
    (lambda x: x.nonzero(), "nonzero"), (lambda x: x[x > 0], "boolean index"),
    (lambda x: x.masked_select(x > 0), "masked_select")], ids=["nonzero", "index", "select"])
def test_a_shape_that_depends_on_values_is_found(function, reason):
    """Meta tensors have no values, so the operator fails after it has been recorded."""
    def fails(x):
        with pytest.raises((NotImplementedError, RuntimeError)):
            function(x)
    assert waits_of(fails) == [reason]


def test_operators_that_do_not_wait_are_not_found():
    index = torch.zeros(2, dtype=torch.long, device="meta")
    assert waits_of(lambda x: x[index] + x.index_select(0, index) * x.mean().clamp(0, 1)) == []


# ---------------------------------------------------------------- the step
@pytest.mark.parametrize("kind, copies", [
    ("plain", 50), ("fast forms", 50), ("fp16 with scaler", 50), ("--micro 8 (2 parts)", 58),
    ("stage 2, fp16", 9), ("dit.py train", 4)])
def test_a_step_waits_once_and_copies_asynchronously(kind, copies):
    waits, n_copies, kernels = step(kind)
    assert waits == ONE_WAIT
    assert n_copies == copies
    assert kernels["_fused_adamw_"] > 0


def test_a_wait_inside_the_backward_pass_or_a_loss_would_be_found(monkeypatch):
    plain = losses.koleo_loss

    def with_wait(x):
        x.register_hook(lambda grad: grad * float(grad.sum()))
        return plain(x) * plain(x.detach()).item()
    monkeypatch.setattr(losses, "koleo_loss", with_wait)
    waits, _, _ = step("plain")
    assert sum(waits.values()) == 1 + 2 * 2                      # two crops


# ---------------------------------------------------------------- kernels
def pico():
    torch.manual_seed(0)
    return VTPModel(VTPConfig.of_size("pico", 32, 8, 64))


def test_attention_gets_what_flash_kernels_accept(monkeypatch):
    """16 bits, equal types, contiguous channels, a head dimension that is a multiple of 8 and at
    most 256, and no mask tensor (vit.attention has no argument for one)"""
    calls = []

    def attention(q, k, v, causal=False):
        calls.append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    monkeypatch.setattr(vit, "attention", attention)
    with torch.autocast("cpu", torch.bfloat16):
        pico()(torch.randn(2, 3, 32, 32), torch.ones(2, 5, dtype=torch.long))
    assert len(calls) == SIZES["pico"]["depth"] + SIZES["pico"]["text_depth"]
    for tensors in calls:
        for x in tensors:
            assert x.dtype == torch.bfloat16 and x.stride(-1) == 1
    for name, size in SIZES.items():
        for width, heads in ((size["D"], size["heads"]), (size["text"], size["text_heads"])):
            assert width % heads == 0 and width // heads % 8 == 0 and width // heads <= 256, name


def test_blocks_are_one_graph_for_torch_compile():
    """fullgraph raises an error at a graph break. The backend "eager" needs no compiler."""
    model = pico()
    x = torch.randn(4, 17, SIZES["pico"]["D"])
    (keep,) = kept_rows(0.5, 1, range(4), 4, 0)
    rope = model.trunk.rope_embed(4, 4, prefix=1)
    text = torch.randn(2, 5, SIZES["pico"]["text"])
    for block, args in ((model.trunk.blocks[0], (x, rope, keep)),
                        (model.text_transformer.resblocks[0], (text,))):
        compiled = torch.compile(block.forward, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(*args), block(*args), atol=1e-6)
