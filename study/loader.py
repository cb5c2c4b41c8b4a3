"""What many GPUs ask of the data path, measured with one process: this version beside an older one.

    git worktree add /tmp/before 4bf0809
    python study/loader.py /tmp/before | tee study/loader.txt

    tars     files opened at a start and per sample, 64 tars of 32 pairs
    batches  one of 8 processes of --size L with an 8th of its batch: size of what a worker sends,
             shared memory while workers are ahead, and a hash of all pixels
    samples  processor time of one core per sample, JPEG of 384 px to 256 and 112 px
    resume   memory and bytes read when 2 processes continue from a checkpoint of 192 MB

Each part runs in a process of its own for each version. Processor times and counts do not depend on
the load of the machine; seconds until the first batch do. Linux only; two minutes on idle cores.
"""
import argparse
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parents[1]
SIZES = dict(batch=2048, batch_ssl=512, batch_rec=256, image=256, local_image=112, n_local=8,
             patch=16, world_size=8)          # an 8th of the batches of --size L
WORKERS = 2
STEPS = 6


# ---------------------------------------------------------------- data
def smooth_image(i, size=(384, 288)):
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(256, size=(36, 48, 3), dtype=np.uint8))
    return coarse.resize(size, Image.BICUBIC)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tars(folder, n_tars=64, n_pairs=32):
    content = jpeg(smooth_image(0, (48, 36)))
    for n in range(n_tars):
        with tarfile.open(folder / f"{n:03d}.tar", "w") as tar:
            for k in range(n_pairs):
                for name, data in ((f"{k}.jpg", content), (f"{k}.txt", b"a caption")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "*.tar")


def write_images(folder, n=64):
    for i in range(n):
        path = folder / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(smooth_image(i)))
    return str(folder)


def process_ms(call, n):
    """Processor time of call(i), i = 0 .. n - 1, after a warm-up -> ms per call"""
    call(0)
    start = time.process_time()
    for i in range(n):
        call(i)
    return 1000 * (time.process_time() - start) / n


# ---------------------------------------------------------------- parts
def tars(folder):
    """-> {row: value}"""
    import data
    # in this process, so that the files which are opened can be counted
    data.map_in_workers = lambda function, items, workers: map(function, items)
    open_data = data.open_data
    pattern = write_tars(folder)
    os.environ["VTP_CACHE"] = str(folder / "cache")
    counting, opened = [], []

    def count(event, arguments):
        if counting and event == "open" and str(arguments[0]).startswith(str(folder)):
            opened.append(arguments[0])
    sys.addaudithook(count)                    # called for each file that Python opens
    counting.append(True)
    rows = {}
    open_data(pattern)
    opened.clear()
    source = open_data(pattern)
    rows["files opened by a later start"] = len(opened)
    order = random.Random(0).choices(range(len(source)), k=10_000)
    opened.clear()
    for index in order:
        source.load(index)
    rows["files opened per sample, 10,000 samples"] = len(opened) / len(order)
    counting.clear()
    rows["ms per sample of 48 px"] = process_ms(lambda i: source.load(order[i]), 2000)
    return rows


def tensor_bytes(batch):
    return sum(x.nbytes for x in vars(batch).values() if torch.is_tensor(x))


def used_shared_memory():
    info = os.statvfs("/dev/shm")
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def batches(folder):
    from data import TrainBatches, open_data, prefetch
    from vtp_min.extras import workers
    source = open_data(write_images(folder))
    train = TrainBatches(source, lambda texts: torch.ones(len(texts), 77, dtype=torch.long), 0,
                         clip=True, ssl=True, rec=True, **SIZES)
    sent = []
    receive = workers.receive

    def measured(loader):
        for result in receive(loader):
            sent.append(tensor_bytes(result))
            yield result
    workers.receive = measured
    idle = used_shared_memory()
    start = time.perf_counter()
    stream = prefetch(train, 0, STEPS, WORKERS)
    pixels = hashlib.sha256()
    first, used = None, []
    for batch in stream:
        if first is None:
            first = time.perf_counter() - start
            # until the workers have to wait: no change for longer than the first batch took
            changed = time.perf_counter()
            while time.perf_counter() - changed < 1.5 * first:
                time.sleep(0.1)
                used.append(used_shared_memory() - idle)
                if used[-1] != used[max(len(used) - 2, 0)]:
                    changed = time.perf_counter()
        for x in (batch.image, batch.crops, batch.locals, batch.mask_index, batch.rec):
            pixels.update(x.numpy().tobytes())
    return {"MB that a worker sends at once": max(sent) / 1e6,
            "MB of shared memory, 2 workers": max(used) / 1e6,
            "seconds until the first batch": first,
            "hash of 6 batches": pixels.hexdigest()[:12]}


def samples(folder):
    from data import TrainBatches, open_data
    from vtp_min.extras import fast
    fast.install()
    torch.set_num_threads(1)
    source = open_data(write_images(folder))
    settings = SIZES | dict(batch=64, batch_ssl=64, batch_rec=64, world_size=1)
    clean = TrainBatches(source, None, 0, clip=False, ssl=False, rec=True, **settings)
    crops = TrainBatches(source, None, 0, clip=False, ssl=True, rec=True, **settings)
    path = source.path(0)

    def draft(i):
        with Image.open(path) as image:
            image.draft("RGB", (256, 256))     # decodes at half size if both sides stay above
            image.load()
    rng = np.random.default_rng(0)
    return {"ms to decode": process_ms(lambda i: source.load(i % 64, rng), 128),
            "ms to decode with Pillow's draft mode": process_ms(draft, 128),
            "ms per clean sample": process_ms(clean.__getitem__, 4) / 64,
            "ms per sample with 10 crops": process_ms(crops.__getitem__, 2) / 64}


def status(field):
    """-> MB of a line of /proc/self/status"""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1000


def resume(folder):
    from vtp_min.dist import barrier, cleanup, init_distributed, rank
    from vtp_min.run import Run
    init_distributed("cpu")
    folder = Path(os.environ.get("LOADER_FOLDER", folder))
    module = torch.nn.Linear(4000, 4000)       # 64 MB; AdamW has 128 MB
    optimizer = torch.optim.AdamW(module.parameters())
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {"module": module, "optimizer": optimizer}
    settings = {"lr": 1.0}
    Run(folder, settings, fresh=True).save(1, state)
    barrier()
    own = status("RssAnon")
    counted = Path("/proc/self/io").read_text
    before = int(counted().split()[1])
    run = Run(folder, settings)
    held = status("RssAnon") - own
    read = int(counted().split()[1]) - before
    run.restore(state)
    barrier()
    print(json.dumps({f"MB read by process {rank()}": read / 1e6,
                      f"MB of memory held by process {rank()}": held}), flush=True)
    cleanup()


# ---------------------------------------------------------------- the comparison
def run_part(part, version):
    """-> {row: value} of one part with the code in the folder `version`"""
    with tempfile.TemporaryDirectory() as folder:
        launcher = []
        if part == "resume":
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command = [sys.executable, *launcher, __file__, "--part", part, "--version", str(version)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder,
                              env=os.environ | {"LOADER_FOLDER": folder, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    rows = {}
    for line in done.stdout.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            rows |= found if isinstance(found, dict) else {}
    return dict(sorted(rows.items(), key=lambda row: row[0][-1:])) if launcher else rows


def print_row(name, before, after):
    if isinstance(before, str):
        print(f"{name:46s}{before:>14s}{after:>14s}  {'equal' if before == after else 'DIFFERENT'}")
        return
    ratio = f"{before / after:10.2f}" if 1000 * after > before else ""     # else after is 0, almost
    print(f"{name:46s}{before:14.4g}{after:14.4g}{ratio}", flush=True)


def print_count_of_l():
    """Shared memory of --size L on 8 GPUs of one machine, by count"""
    from data import TrainBatches
    from vtp_min.extras.slices import number_of_slices, shared_memory
    L = TrainBatches(None, None, 0, clip=True, ssl=True, rec=True,
                     **SIZES | dict(batch=16384, batch_ssl=4096, batch_rec=2048))
    n = number_of_slices(L)
    print(f"\nBy count, --size L on 8 GPUs of a machine: {n} slices of a process's batch\n"
          f"{'GB of /dev/shm':46s}{'before':>14s}{'after':>14s}{'ratio':>10s}")
    for workers in (4, 15, 23):
        before, after = (8 * shared_memory(L, k, workers) / 1e9 for k in (1, n))
        print_row(f"{workers} workers for each process", before, after)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("before", nargs="?", help="folder of the older version")
    p.add_argument("--part", choices=PARTS, help="run one part, in this process")
    p.add_argument("--version", default=str(HERE), help="folder of the code for --part")
    args = p.parse_args()
    sys.path.insert(0, args.version)
    if args.part:
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[args.part](Path(folder))
        if rows:
            print(json.dumps(rows), flush=True)
        return
    if not args.before:
        p.error("name the folder of an older version: git worktree add /tmp/before 4bf0809")
    print(f"{'':46s}{'before':>14s}{'after':>14s}{'ratio':>10s}")
    for part in PARTS:
        print(f"{part}", flush=True)
        before, after = run_part(part, args.before), run_part(part, HERE)
        for name, value in before.items():
            print_row(f"    {name}", value, after[name])
    print_count_of_l()


PARTS = {"tars": tars, "batches": batches, "samples": samples, "resume": resume}

if __name__ == "__main__":
    main()
