"""What many GPUs need of the data path: slices of a batch, few open files, a checkpoint that is
read once, and advice before time is lost."""
import os
import pickle
import resource
import sys
from argparse import Namespace

import pytest
import torch
from test_data import DROP, assert_same, cache, noise, png, tar_of, train_batches  # noqa: F401
from test_probe_official import Squares

from data import open_data, prefetch
from vtp_min.extras import probe_official, shards, slices
from vtp_min.extras import workers as worker_processes
from vtp_min.extras.run_folder import fingerprints
from vtp_min.run import Run

MEDIUM = DROP | {"batch": 16, "batch_ssl": 8, "batch_rec": 4}


# ---------------------------------------------------------------- slices
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("changes", [
    {}, {"drop_rec": 0.3}, {"clip": False}, {"ssl": False}, {"rec": False},
    {"clip": False, "ssl": False}, {"rank": 1, "batch": 32, "batch_ssl": 16, "batch_rec": 8,
                                    "world_size": 2}], ids=str)
def test_slices_are_joined_to_the_batch_in_every_bit(changes, n):
    batches = train_batches(**MEDIUM | changes)
    parts = map(slices.SlicedBatches(batches, n).__getitem__, range(2 * n, 4 * n))
    for step, found in enumerate(slices.one_ahead(parts, n, 2), 2):
        assert_same(batches[step], found)


def test_slices_come_from_workers_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(slices, "MAX_IMAGES", 4)
    batches = train_batches(**MEDIUM)
    assert slices.number_of_slices(batches) == 4
    for workers in (1, 2):
        found = list(prefetch(batches, 2, 5, workers))
        for step, batch in enumerate(found, 2):
            assert_same(batches[step], batch)
        assert len(found) == 3


def test_unreadable_samples_are_replaced_alike_in_a_slice(monkeypatch, tmp_path):
    members = {}
    for i in range(6):
        members |= {f"{i}.png": png(noise(16, i)) if i % 2 else b"none", f"{i}.txt": b"text"}
    batches = train_batches(open_data(tar_of(tmp_path / "x.tar", members)), **MEDIUM)
    wanted, = prefetch(batches, 0, 1)
    monkeypatch.setattr(slices, "MAX_IMAGES", 4)
    found, = prefetch(batches, 0, 1, workers=1)
    assert len(wanted.bad) > 2
    assert_same(wanted, found)


def test_a_slice_has_at_most_64_images_of_size_l_and_an_equal_part_of_each_subset():
    L = train_batches(batch=16384, batch_ssl=4096, batch_rec=2048, image=256, local_image=112,
                      n_local=8, patch=16, world_size=8, rank=3)
    assert slices.number_of_slices(L) == 32
    assert slices.number_of_slices(train_batches()) == 1               # small batches are whole
    odd = train_batches(batch=400, batch_ssl=25, batch_rec=25)
    assert slices.number_of_slices(odd) == 25                          # 16 images each
    # 24 MB for a slice, of which 9 wait if there are 4 workers; the whole batch has 758 MB
    assert slices.shared_memory(L, 32, 4) / 9 == pytest.approx(23.7e6, rel=0.01)
    assert slices.shared_memory(L, 1, 4) / 9 == pytest.approx(758e6, rel=0.01)


def test_a_caller_that_stops_early_does_not_wait_for_the_rest_of_a_batch(monkeypatch):
    monkeypatch.setattr(slices, "MAX_IMAGES", 1)
    stream = prefetch(train_batches(**MEDIUM), 0, 10 ** 6, workers=1)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_an_error_in_a_slice_has_the_message_that_it_has_without_workers(monkeypatch, tmp_path):
    monkeypatch.setattr(slices, "MAX_IMAGES", 4)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="^100 samples in a row"):
        list(prefetch(train_batches(open_data(tmp_path), **MEDIUM), 0, 3, workers=1))


@pytest.mark.parametrize("free, is_noted", [(10 ** 4, True), (10 ** 9, False)])
def test_too_little_shared_memory_is_noted_before_the_start(monkeypatch, capsys, free, is_noted):
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(slices.shutil, "disk_usage", lambda path: Namespace(free=free))
    slices.check_shared_memory(train_batches(), 1, workers=4)
    printed = capsys.readouterr().out
    assert ("--shm-size=1g" in printed and "--workers" in printed) == is_noted


# ---------------------------------------------------------------- workers
@pytest.mark.parametrize("cores, processes, cuda, wanted", [
    (2, 1, True, 0), (4, 1, True, 0), (6, 1, True, 5), (192, 8, True, 23), (32, 8, True, 0),
    (128, 1, True, 32), (128, 1, False, 4), (5, 1, False, 4), (4, 1, False, 0)])
def test_the_default_is_a_worker_for_each_core_of_a_process_less_one(
        monkeypatch, cores, processes, cuda, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert worker_processes.default_workers() == wanted


def test_a_long_wait_for_data_is_reported_once_with_the_number_of_workers_to_try(
        monkeypatch, capsys):
    monkeypatch.setattr(worker_processes, "cores_per_process", lambda: 8)
    warn = worker_processes.wait_warning(workers=2)
    for share in (0.1, 0.5, 0.2):                  # the first interval that is too slow may be the
        warn(share)                                # start of the workers
    assert capsys.readouterr().out == ""
    for share in (0.3, 0.4):
        warn(share)
    printed = capsys.readouterr().out
    assert printed.count("30% of the time") == 1 and "--workers 7" in printed
    warn = worker_processes.wait_warning(workers=7)
    for _ in range(2):
        warn(0.3)
    assert "all 8 cores" in capsys.readouterr().out


# ---------------------------------------------------------------- tars
def write_tars(folder, n_tars=5, n_pairs=4):
    """-> pattern of the tars; caption k of tar n is "n k" """
    for n in range(n_tars):
        members = {}
        for k in range(n_pairs):
            members |= {f"{k}.png": png(noise(8, k)), f"{k}.txt": f"{n} {k}".encode()}
        tar_of(folder / f"x-{n}.tar", members)
    return str(folder / "x-*.tar")


def captions(source):
    return [source.load(i)[1] for i in range(len(source))]


OPENED = None                                      # names of opened files, while a test counts


def count(event, arguments):
    if OPENED is not None and event == "open":
        OPENED.append(os.fspath(arguments[0]))


sys.addaudithook(count)                            # called for each file that Python opens


def opened_by(function):
    """-> names of the tars and index files that a function opens"""
    global OPENED
    OPENED = []
    try:
        function()
        return [name for name in OPENED if str(name).endswith((".tar", ".index", ".joined"))]
    finally:
        OPENED = None


def test_a_sample_opens_no_file_that_is_open_and_a_later_start_opens_one_index(tmp_path):
    pattern = write_tars(tmp_path)
    source = open_data(pattern)
    assert len(opened_by(lambda: captions(source))) == 5 + 1           # tars, the joined index
    assert opened_by(lambda: captions(source)) == []
    assert len(opened_by(lambda: open_data(pattern))) == 1


def test_the_number_of_open_tars_is_bounded(tmp_path, monkeypatch):
    source = open_data(write_tars(tmp_path))
    monkeypatch.setattr(shards, "open_file_limit", lambda: 2)
    wanted = [f"{n} {k}" for n in range(5) for k in range(4)]
    assert captions(source) == captions(source) == wanted
    assert [*source.open_tars.files] == [str(tmp_path / f"x-{n}.tar") for n in (3, 4)]


def test_the_limit_of_open_files_is_raised_at_most_to_the_hard_limit(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.append(pair))
    assert shards.open_file_limit() == 2048 and limits == [(4096, 4096)]

    def refuse(kind, pair):
        raise ValueError("not allowed to raise maximum limit")
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert shards.open_file_limit() == 512


def test_a_source_of_tars_can_be_sent_to_another_process(tmp_path):
    source = open_data(write_tars(tmp_path))
    wanted = captions(source)
    sent = pickle.dumps(source)
    assert len(sent) < 4000
    assert captions(pickle.loads(sent)) == captions(source) == wanted


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-20],
                                    lambda content: bytes(len(content))])
def test_a_damaged_joined_index_is_made_again(tmp_path, cache, damage):          # noqa: F811
    pattern = write_tars(tmp_path)
    wanted = captions(open_data(pattern))
    file, = cache.glob("*.joined")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert captions(open_data(pattern)) == wanted and file.read_bytes() == whole


def test_a_changed_or_missing_tar_changes_the_joined_index(tmp_path, capsys):
    pattern = write_tars(tmp_path)
    open_data(pattern)
    tar_of(tmp_path / "x-1.tar", {"new.png": png(noise(8)), "new.txt": b"a new caption"})
    (tmp_path / "x-4.tar").unlink()
    (tmp_path / "x-2.tar").write_bytes(b"no tar" * 1000)
    capsys.readouterr()
    for _ in range(2):                             # indexed anew, then read from the cache
        source = open_data(str(tmp_path / "x-{0..4}.tar"))
        assert captions(source) == [*(f"0 {k}" for k in range(4)), "a new caption",
                                    *(f"3 {k}" for k in range(4))]
        assert "2 of 5 tars are damaged or missing" in capsys.readouterr().out


def test_a_run_recognises_tars_that_have_moved_and_notices_others_with_equal_pairs(tmp_path):
    found = []
    for name, extra in (("a", b""), ("b", b""), ("c", bytes(20_000))):
        (tmp_path / name).mkdir()
        write_tars(tmp_path / name, n_tars=2)
        member = {"0.png": png(noise(8)), "0.txt": b"0", **({"notes": extra} if extra else {})}
        tar_of(tmp_path / name / "x-2.tar", member)
        found.append(fingerprints({"data": open_data(str(tmp_path / name / "x-*.tar"))}))
    assert found[0] == found[1] != found[2]
    assert found[0]["data"].startswith("9 samples")


# ---------------------------------------------------------------- addresses
@pytest.mark.parametrize("spec, command", [
    ("s3://bucket/cc/{00..99}.tar", "aws s3 sync s3://bucket/cc DIR"),
    ("gs://bucket/imagenet", "gcloud storage rsync -r gs://bucket/imagenet DIR"),
    ("https://host/x.tar", "wget -r https://host"), ("hdfs://host/x", "hdfs dfs -get"),
    ("pipe:cat x.tar", "the command after pipe:"), ("other://x", "rclone")])
def test_an_address_is_answered_with_a_command_that_copies_the_data(spec, command):
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="is an address.*Mount") as error:
            open_data(spec, split, whole=True)
        assert command in str(error.value)


def test_a_folder_whose_name_contains_a_colon_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:cat" / "a").mkdir(parents=True)
    noise(8).save(tmp_path / "pipe:cat" / "a" / "0.png")
    assert len(open_data("pipe:cat")) == 1


# ---------------------------------------------------------------- the official probe
def test_the_official_probe_says_how_long_decoding_takes_before_it_starts(monkeypatch, capsys):
    class Slow(Squares):
        def load(self, index, rng=None):
            return super().load(0, rng)
    monkeypatch.setattr(probe_official, "cores_per_process", lambda: 12)
    clock = iter([0.0, 0.08])                      # seconds: 8 images in 0.08 seconds
    monkeypatch.setattr(probe_official.time, "perf_counter", lambda: next(clock))
    args = Namespace(seed=0, workers=0, run="runs/x")
    probe_official.print_time_to_decode(Slow(), 8, 1_260_000, args)
    printed = capsys.readouterr().out
    assert "1,260,000 training images" in printed and "10.0 ms" in printed
    assert "about 3:30:00" in printed and "--workers 11" in printed and "torchrun" in printed
    assert "about 19:05" in printed                # with 11 workers
    clock = iter([0.0, 0.08])
    probe_official.print_time_to_decode(Slow(), 8, 1000, args)
    assert capsys.readouterr().out == ""           # ten seconds need no advice


# ---------------------------------------------------------------- checkpoints
def resident(kind):
    """-> resident memory of this process in MB. kind: RssAnon, or RssFile for mapped files"""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(kind))
    return int(line.split()[1]) / 1000


def mapped_files():
    with open("/proc/self/maps") as file:
        return file.read()


linux = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="/proc exists on Linux only")


@linux
def test_a_checkpoint_takes_no_memory_until_it_is_restored_and_is_released_afterwards(tmp_path):
    module = torch.nn.Linear(1500, 1500)           # 9 MB, and 18 MB of AdamW
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.randn(2, 1500)).sum().backward()
    optimizer.step()
    state = {"module": module, "optimizer": optimizer}
    settings = {"lr": 1.0}
    Run(tmp_path, settings).save(1, state)
    moments = optimizer.state[module.weight]["exp_avg"].clone()
    weight = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    before = resident("RssAnon")
    run = Run(tmp_path, settings)
    assert run.step == 1 and resident("RssAnon") - before < 9
    assert "last.pt" in mapped_files()
    new = torch.optim.AdamW(module.parameters(), fused=True)
    run.restore({"module": module, "optimizer": new})
    assert torch.equal(module.weight, weight)
    assert torch.equal(new.state[module.weight]["exp_avg"], moments)
    assert "last.pt" not in mapped_files()


@linux
def test_a_checkpoint_is_read_once(tmp_path):
    """Checksums are verified on one process, and tensors are mapped, not read."""
    module = torch.nn.Linear(300, 300)
    Run(tmp_path, {}).save(1, {"module": module})
    size = os.path.getsize(tmp_path / "last.pt")

    def bytes_read():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])
    before = bytes_read()
    run = Run(tmp_path, {})
    run.restore({"module": module})
    assert bytes_read() - before < 1.3 * size
