"""Count which batches of S, B and L at 256 px fit on GPUs of 8 to 80 GB.

    python study/memory.py                      -> study/memory.json, study/memory.txt
    python study/memory.py measure S 2 4 8      the count against this process, on a CPU (Linux)
    python study/memory.py measure L 2 4 --w-ssl 0      the same with flags of train.py

Needs no GPU: vtp_min/extras/plan.py executes a step on tensors without values, and adds up their
bytes. Counted is the step of the command

    torchrun --nproc-per-node 8 train.py --size SIZE --micro M [--recompute]

in bfloat16, in the textbook forms that run on GPUs: weights, gradients and the two moments of AdamW
in float32 (16 bytes per parameter), the teacher's weights (4 bytes), and all that the step creates
for M images at a time, with LPIPS. Of 8 images, CLIP uses 8, DINO and iBOT use 2 (2 global crops of
256 px and 8 local crops of 112 px each), and 1 is reconstructed. 1.5 GB are reserved for the
driver, workspaces and fragmentation (a guess).

M = 16, 64 and 512 are counted. The memory of each moment of a step is linear in M, so the peak lies
on or below the lines between the counted points. Takes some minutes.

`measure` compares the count of a step with 2, 4 and 8 images, used by all losses, with the growth
of the resident memory of the process while it computes their gradients in bfloat16, in the fast
forms of CPUs. The weights and their gradients are in memory before, the optimizer is not.
"""
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train                                                               # noqa: E402
from vtp_min.device import autocast                                        # noqa: E402
from vtp_min.extras import fast, plan                                      # noqa: E402
from vtp_min.losses import TeacherTargets                                  # noqa: E402
from vtp_min.model import Student, Teacher                                 # noqa: E402

GPUS = 8, 16, 24, 40, 80                         # memory in GB
COUNTED = 16, 64, 512                            # images at a time
PROCESSES = 8


def measure(size, recompute):
    """-> {"parameters", "weights": bytes, "activations": list of bytes for COUNTED images}"""
    activations = []
    for micro in COUNTED:
        flags = ["--size", size, "--micro", str(micro)]
        if recompute:
            flags.append("--recompute")
        cost = plan.count(train, train.arguments(flags), PROCESSES, "bf16")
        activations.append(cost.activations)
    return {"parameters": cost.parameters, "weights": cost.weights, "activations": activations}


def activations(found, n):
    """-> bytes for n images, on the line through the two nearest counted points"""
    right = 2 if n > COUNTED[1] else 1
    (a, b), (low, high) = COUNTED[right - 1:right + 1], found["activations"][right - 1:right + 1]
    return low + (high - low) * (n - a) / (b - a)


def images_that_fit(found, gigabytes):
    """-> the largest multiple of 8 images at a time that fits; 0 if none does"""
    free = gigabytes * plan.GB - plan.RESERVED - found["weights"]
    return max((n for n in range(8, 4096, 8) if activations(found, n) <= free), default=0)


def report(found):
    """{size: [without, with --recompute]} -> lines of text"""
    yield "GB, without / with --recompute      activations of 16, 64, 512 images at a time"
    yield "size   parameters   weights" + "".join(f"{n:>16d}" for n in COUNTED)
    for size, (plain, recompute) in found.items():
        pairs = zip(plain["activations"], recompute["activations"])
        numbers = "".join(f"{a / plan.GB:8.1f} /{b / plan.GB:6.1f}" for a, b in pairs)
        yield (f"{size:4s}  {plain['parameters'] / 1e6:9.1f}M  {plain['weights'] / plan.GB:8.1f}"
               f"{numbers}")
    yield ""
    yield ("largest micro-batch (--micro) that fits on one GPU; a quarter of the images is for "
           "DINO + iBOT, an eighth is reconstructed; without / with --recompute; 0: does not fit")
    yield "size  " + "".join(f"{gigabytes:>9d} GB" for gigabytes in GPUS)
    for size, (plain, recompute) in found.items():
        line = f"{size:4s}  "
        for gigabytes in GPUS:
            line += f"{images_that_fit(plain, gigabytes):>6d} /"
            line += f"{images_that_fit(recompute, gigabytes):>4d}"
        yield line


# ---------------------------------------------------------------- against a real process
def compare(size, numbers, flags):
    """Yield lines: counted and measured bytes of a step with n images, for each of the numbers"""
    fast.install(free_memory=True)
    student = Student(*train.build_model(arguments(size, 2, flags)))
    teacher = Teacher(student) if student.dino_head else None
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    counted = [plan.count(train, arguments(size, n, flags), 1, "bf16").activations
               for n in numbers]
    before = status("VmRSS")
    for n, count in zip(numbers, counted):
        measured = peak(arguments(size, n, flags), student, teacher) - before
        what = " ".join([size, *flags])
        yield (f"{what}, {n} images: counted {count / plan.GB:.2f} GB, measured "
               f"{measured / plan.GB:.2f} GB, ratio {measured / count:.2f}")


def arguments(size, n, flags):
    return train.arguments(["--size", size, "--batch", str(n), "--batch-ssl", str(n),
                            "--batch-rec", str(n), "--perceptual", "none", *flags])


def peak(args, student, teacher):
    """-> largest resident memory of this process while gradients are computed, in bytes"""
    cpu = torch.device("cpu")
    batch = train.train_batches(args, len(student.model.trunk.blocks))[0]
    targets = TeacherTargets(args.teacher, args.prototypes, cpu)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Path("/proc/self/clear_refs").write_text("5")          # resets the peak, VmHWM
    train.compute_gradients(batch, args.teacher_temp, args, student, teacher, None, targets,
                            autocast(cpu, "bf16"), scaler, cpu)
    return status("VmHWM")


def status(field):
    """-> field of /proc/self/status in bytes"""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def main():
    if sys.argv[1:2] == ["measure"]:
        size, *rest = sys.argv[2:]
        n = next((i for i, text in enumerate(rest) if text.startswith("--")), len(rest))
        for line in compare(size, [int(text) for text in rest[:n]], rest[n:]):
            print(line, flush=True)
        return
    found = {size: [measure(size, False), measure(size, True)] for size in ("S", "B", "L")}
    text = "\n".join(report(found))
    print(text)
    folder = Path(__file__).parent
    (folder / "memory.txt").write_text(text + "\n")
    (folder / "memory.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
