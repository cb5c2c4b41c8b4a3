"""What processes send to each other: the error of gradients averaged in bfloat16, and the time.

    python study/wire.py          -> study/wire.txt

error   Two processes (gloo, CPU) compute the gradients of one batch of pico, each for its half, and
        average them with --set grad_dtype=fp32 or bf16. The reference is the gradient of one
        process with the whole batch in float64. Errors are relative: the length of the difference,
        over the length of the reference.
time    Counted, not measured. In a ring of n processes, all_reduce sends 2 (n - 1) / n times the
        bytes of the gradients over each link; twice the bytes for many processes. The averaging
        begins when the backward pass has ended, so this time is added to that of a step.
"""
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train                                                               # noqa: E402
from vtp_min.device import autocast                                        # noqa: E402
from vtp_min.dist import average_gradients                                 # noqa: E402
from vtp_min.extras import plan                                            # noqa: E402
from vtp_min.losses import TeacherTargets                                  # noqa: E402
from vtp_min.model import Student, Teacher                                 # noqa: E402

FLAGS = "--size pico --batch 32 --batch-ssl 16 --batch-rec 16 --perceptual none".split()
CPU = torch.device("cpu")
LINKS = 25, 100, 400                             # Gb/s


def new_student():
    torch.manual_seed(0)
    return Student(*train.build_model(train.arguments(FLAGS)))


def gradients(student, precision):
    """Compute the gradients of this process's part of the first batch. -> student"""
    args = train.arguments(FLAGS)
    teacher = Teacher(student)
    batch = train.train_batches(args, len(student.model.trunk.blocks))[0]
    targets = TeacherTargets(args.teacher, args.prototypes, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.compute_gradients(batch, args.teacher_temp, args, student, teacher, None, targets,
                            autocast(CPU, precision), scaler, CPU)
    return student


def flat(student):
    return torch.cat([p.grad.flatten() for p in student.parameters()
                      if p.grad is not None]).double()


def one_of_two(rank, folder):
    """A process of the group: stores the averaged gradient of each combination"""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    found = {}
    for precision in ("fp32", "bf16"):
        for wire in ("fp32", "bf16"):
            student = gradients(new_student(), precision)
            average_gradients(student, dtype=wire)
            found[precision, wire] = flat(student)
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    torch.distributed.destroy_process_group()


def error_lines():
    """Yield a line for each precision of the step and each type of the averaging."""
    student = new_student().double()             # the weights are those of float32
    torch.set_default_dtype(torch.float64)       # of the images
    reference = flat(gradients(student, "fp64"))
    torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
        found = torch.load(Path(folder, "found.pt"))
    yield "step in   averaged in   relative error of the gradient"
    for (precision, wire), gradient in found.items():
        error = (gradient - reference).norm() / reference.norm()
        yield f"{precision:10s}{wire:14s}{error:.1e}"


def time_lines():
    """Yield a line for each size: bytes, and seconds on links of different speed."""
    yield "size   averaged in    bytes" + "".join(f"   {link:4d} Gb/s" for link in LINKS)
    for size in ("S", "B", "L"):
        args = train.arguments(["--size", size])
        student, _ = plan.student_and_teacher(args, train.model_config(args))
        n = sum(p.numel() for p in student.parameters())
        for wire, width in (("fp32", 4), ("bf16", 2)):
            seconds = "".join(f"{2 * width * n * 8 / link / 1e9:9.2f} s" for link in LINKS)
            yield f"{size:7s}{wire:11s}{width * n / 1e9:6.2f} GB{seconds}"


def main():
    text = "\n".join([*error_lines(), "", *time_lines()])
    print(text)
    Path(__file__).with_suffix(".txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
