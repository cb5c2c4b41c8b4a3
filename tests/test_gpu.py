"""study/gpu.py: each line runs on a CPU, is stored when it is finished, and faults are reported."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import dit                                                                 # noqa: E402
import eval as evaluation                                                  # noqa: E402
import gpu                                                                 # noqa: E402
import gpu_lines                                                           # noqa: E402
import gpu_tools                                                           # noqa: E402
import train                                                               # noqa: E402
from gpu_lines import Found                                                # noqa: E402
from gpu_tools import PythonReads                                          # noqa: E402
from vtp_min import losses                                                 # noqa: E402


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All lines, measured once -> JSON file"""
    out = tmp_path_factory.mktemp("gpu") / "cpu.json"
    run("--out", out)
    return out


def run(*arguments):
    return gpu.main(["--device", "cpu", *map(str, arguments)])


def rows_of(out):
    return json.loads(out.read_text())["rows"]


def a_line(function, seconds=60):
    """A function of a Machine -> a line of the table"""
    function.__doc__ = function.__doc__ or "A line of a test"
    function.seconds, function.advice = seconds, {"fail": "Do this.", "slow": "Do that."}
    return function


def passing(m):
    return Found("1", "2", "pass", {"x": 1})


def broken(m):
    raise RuntimeError("no\nkernel | image")


# ---------------------------------------------------------------- the whole
def test_every_line_passes_on_this_cpu(measured):
    rows = rows_of(measured)
    assert [*rows] == [*gpu.LINES]
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(rows, "pass")
    for row in rows.values():
        assert row["value"] and row["limit"] and row["numbers"] and row["do"] == ""


def test_the_table_has_a_row_for_each_line(measured):
    text = measured.with_suffix(".txt").read_text().splitlines()
    assert "study/gpu.py" in text[0] and f"{len(gpu.LINES)} pass" in text[0]
    table = [row.split(" | ") for row in text if row.startswith("| ")]
    assert [cells[0].strip("| ") for cells in table] == ["line", *gpu.LINES]
    assert {len(cells) for cells in table} == {5}


def test_a_second_call_measures_nothing(measured, monkeypatch):
    before = measured.read_bytes()
    monkeypatch.setattr(gpu, "LINES", {name: a_line(broken) for name in gpu.LINES})
    assert run("--out", measured) == 0
    assert measured.read_bytes() == before


def test_a_wrong_loss_is_found_by_the_golden_arrays(tmp_path, monkeypatch):
    """KoLeo is made 0.1 % too large."""
    koleo = losses.koleo_loss
    monkeypatch.setattr(losses, "koleo_loss", lambda x: 1.001 * koleo(x))
    out = tmp_path / "cpu.json"
    assert run("golden", "--out", out) == 1
    row = rows_of(out)["golden"]
    assert row["state"] == "fail" and row["do"] == gpu.LINES["golden"].advice["fail"]
    assert 0.5e-3 < row["numbers"]["losses in fp32"] < 2e-3
    assert row["numbers"]["fp32"] < 1e-4
    assert row["do"] in out.with_suffix(".txt").read_text()


def test_all_lines_together_take_at_most_thirty_minutes_and_say_what_to_do():
    assert sum(function.seconds for function in gpu.LINES.values()) <= 1800
    for function in gpu.LINES.values():
        assert function.__doc__ and function.advice["fail"]


# ---------------------------------------------------------------- storing and faults
def test_an_exception_is_a_failed_line_and_the_next_line_is_measured(tmp_path, monkeypatch):
    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(broken), "b": a_line(passing)})
    assert run("--out", out) == 1
    rows = rows_of(out)
    assert rows["a"]["state"] == "fail" and rows["a"]["do"] == "Do this."
    assert rows["b"]["state"] == "pass"
    assert "| a | RuntimeError: no kernel / image |" in out.with_suffix(".txt").read_text()


def test_what_a_machine_lacks_is_not_a_failure(tmp_path, monkeypatch):
    def lacking(m):
        raise gpu.NotRun("one device")

    monkeypatch.setattr(gpu, "LINES", {"a": a_line(lacking)})
    assert run("--out", tmp_path / "cpu.json") == 0
    row = rows_of(tmp_path / "cpu.json")["a"]
    assert (row["state"], row["value"]) == ("not run", "one device")


def test_ctrl_c_keeps_the_finished_lines_and_the_same_command_continues(tmp_path, monkeypatch):
    def interrupted(m):
        raise KeyboardInterrupt

    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(passing), "b": a_line(interrupted)})
    assert run("--out", out) == 130
    assert [*rows_of(out)] == ["a"]
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(broken), "b": a_line(passing)})
    assert run("--out", out) == 0
    assert [*rows_of(out)] == ["a", "b"]


def test_a_line_in_which_the_process_ended_is_stored_as_failed_and_skipped(tmp_path, monkeypatch):
    class Killed(BaseException):
        """Stands for a signal that cannot be caught"""

    def killed(m):
        raise Killed

    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(killed), "b": a_line(passing)})
    with pytest.raises(Killed):
        run("--out", out)
    assert run("--out", out) == 1
    rows = rows_of(out)
    assert rows["a"]["state"] == "fail" and "process ended" in rows["a"]["value"]
    assert rows["b"]["state"] == "pass"


def test_a_device_that_is_lost_ends_the_process_and_the_same_command_continues(tmp_path,
                                                                               monkeypatch):
    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(broken), "b": a_line(passing)})
    with monkeypatch.context() as lost:
        lost.setattr(gpu, "clean_up", lambda device: False)
        assert run("--out", out) == 1
    assert [*rows_of(out)] == ["a"]
    assert run("--out", out) == 1                          # of line a, which is not repeated
    assert rows_of(out)["b"]["state"] == "pass"


def test_fresh_measures_the_named_lines_again_and_keeps_the_others(tmp_path, monkeypatch):
    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(passing), "b": a_line(passing)})
    assert run("--out", out) == 0
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(broken), "b": a_line(broken)})
    assert run("b", "--fresh", "--out", out) == 1
    assert {name: row["state"] for name, row in rows_of(out).items()} == {"a": "pass", "b": "fail"}


def test_lines_of_another_machine_are_not_mixed(tmp_path, monkeypatch):
    out = tmp_path / "cpu.json"
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(passing)})
    run("--out", out)
    monkeypatch.setattr(gpu, "machine_text", lambda device: "another CPU")
    with pytest.raises(SystemExit, match="another machine.*--fresh"):
        run("--out", out)
    assert run("--out", out, "--fresh") == 0


def test_an_unknown_line_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        run("speed")
    assert "unknown line speed; wanted some of golden, processes" in capsys.readouterr().err


def test_nan_is_no_small_difference():
    rows = [{"loss": 1.0, "dino": 1.0, "seconds": 9}, {"loss": 1.0, "dino": float("nan")}]
    assert gpu_tools.apart(rows[:1], [{"loss": 1.0, "dino": 2.0, "seconds": 1}]) == 0.5
    assert not gpu_tools.apart(rows, [{"loss": 1.0, "dino": 1.0}] * 2) <= 1e9
    x = torch.ones(2)
    assert not gpu_tools.largest_error([(x, x), (x * torch.nan, x), (x, x)]) <= 1e9


def test_operators_that_wait_for_the_device_are_counted_by_place():
    x = torch.arange(4.0)
    with PythonReads() as reads:
        x.sum().item()
        if x.mean() > 1:
            x[x > 1]
        x.nonzero()
        x.to("meta")                                       # another device
        x.double()                                         # none of these waits
        x[x.long()]
        x.to("meta", non_blocking=True)
    assert reads.places.total() == 5 and len(reads.places) == 5


def test_a_read_in_a_loss_is_counted_in_a_training_step(monkeypatch):
    koleo = losses.koleo_loss
    monkeypatch.setattr(losses, "koleo_loss", lambda x: koleo(x) * float(x.isfinite().all()))
    found = gpu_lines.synchronisations(gpu.Machine(torch.device("cpu"), None))
    assert found.state == "slow" and found.value.startswith("2 a step")       # two global crops
    place, = found.numbers["places"]
    assert place.startswith("test_gpu.py:")                # of the function above


def test_the_limit_of_time_ends_a_line(tmp_path, monkeypatch):
    def endless(m):
        while True:
            pass

    monkeypatch.setattr(gpu.Machine, "small", False)       # a CPU has no limit of time
    m = gpu.Machine(torch.device("cpu"), None)
    monkeypatch.setattr(gpu, "LINES", {"a": a_line(endless, seconds=1)})
    row = gpu.measure(m, "a")
    assert (row["state"], row["value"]) == ("slow", "not finished within 1 s")
    assert "study/gpu.py a --fresh" in row["do"]


def test_the_batch_of_a_gpu_follows_from_the_count_of_bytes(monkeypatch):
    """A count of 2 GB and 0.5 GB per image, and a reserve of 1.5 GB; a fifth of the memory is kept
    free."""
    def counted(m, flags):
        return 2e9 + 0.5e9 * int(flags[flags.index("--batch") + 1])

    monkeypatch.setattr(gpu_tools, "counted", counted)
    m = gpu.Machine(torch.device("cuda"), None)
    images = {1000: 128, 40: 56, 10: 8, 9: 0}                # {free GB: images}
    for free, wanted in images.items():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 1e9, 80e9))
        assert m.images_that_fit("S") == wanted
    with pytest.raises(gpu.NotRun, match="do not fit"):
        gpu_lines.batch_of_S(m)


@pytest.mark.parametrize("size", ["nano", "S", "B", "L"])
def test_train_py_accepts_the_flags_that_a_gpu_gets(size):
    m = gpu.Machine(torch.device("cuda"), None)
    for batch in (8, 24, 104, 128):
        args = train.arguments(gpu_tools.flags(m, size, batch))
        assert train.train_batches(args, depth=1).images_per_step == batch
        assert (args.image, args.patch, args.size) == (256, 16, size)


def test_the_scripts_accept_the_commands_that_a_gpu_gets(monkeypatch):
    parsers = {"train.py": train.arguments, "dit.py": dit.parse,
               "eval.py": lambda words: evaluation.arguments()}      # it reads sys.argv
    commands = [*gpu_lines.whole_commands(gpu.Machine(torch.device("cuda:0"), Path("runs/x")))]
    assert len(commands) == 7
    for script, *words in commands:
        words = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", [script, *words])
        assert parsers[script](words).device == "cuda:0"
