"""Measure the speed-up of each fast form in extras/fast.py.

    python study/forms.py                 nano and S, in the default precision of this machine
    python study/forms.py --rounds 15     more measurements

A training step is timed with all fast forms, and with one of them replaced by its textbook form.
The gain of a form is the time without it divided by the time with all of them. In every round, each
variant is timed once, so that slow changes of the machine's speed affect all variants equally.
A form is kept if it gains 3 % on nano or on S, in time or in the memory of the tensors that
autograd stores for the backward pass. Prints a table and writes study/forms.json.

    python study/forms.py --rounds 0      the memory only, which does not depend on the machine
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from vtp_min import losses, vit
from vtp_min.device import autocast, choose_precision
from vtp_min.extras import fast
from vtp_min.model import Student, Teacher
from vtp_min.optim import param_groups

# {name: (module or class, attribute)}; study/speed.py measures the views
FORMS = {"rms_norm": (vit, "rms_norm"), "rotate": (vit, "rotate"),
         "attention": (vit, "attention"), "SwiGLU": (vit.SwiGLU, "forward"),
         "cross_entropy": (losses, "cross_entropy")}
SIZES = {"nano": [], "S": "--size S --batch 4 --batch-ssl 4 --batch-rec 4".split()}


class Step:
    """A training step of train.py on one fixed batch of the built-in shapes"""

    def __init__(self, flags, precision):
        args = self.args = train.arguments(["--perceptual", "none", *flags])
        args.warmup = 1
        self.device = torch.device("cpu")
        self.amp = autocast(self.device, precision)
        torch.manual_seed(0)
        model, head = train.build_model(args)
        self.student = Student(model, head)
        self.teacher = Teacher(self.student)
        self.targets = losses.TeacherTargets(args.teacher, args.prototypes, self.device)
        self.optimizer = torch.optim.AdamW(param_groups(self.student), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.batch = train.train_batches(args, depth=len(model.trunk.blocks))[0]

    def __call__(self):
        self.optimizer.zero_grad()
        train.compute_gradients(self.batch, 0.05, self.args, self.student, self.teacher, None,
                                self.targets, self.amp, self.scaler, self.device)
        self.optimizer.step()
        self.teacher.update(self.student, 0.99)


def stored_gigabytes(step):
    """Memory of all tensors that autograd stores for the backward passes of one step"""
    stored = {}

    def record(tensor):
        # Tensors may share a storage. Keeping the tensor keeps its storage from being freed and
        # used again for another one.
        stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.values()) / 1e9


def measure(step, rounds):
    """-> {variant: list of seconds, one for each round}, {variant: GB stored for the backward pass}

    The variants are "all" (all fast forms), "plain" (none), and the name of each form (all fast
    forms except this one).
    """
    textbook_forms = {name: getattr(*location) for name, location in FORMS.items()}
    undo = fast.install()
    fast_forms = {name: getattr(*location) for name, location in FORMS.items()}
    # {variant: names of the forms that are textbook forms in it}
    variants = {"all": set(), "plain": set(FORMS)} | {name: {name} for name in FORMS}
    seconds = {variant: [] for variant in variants}
    gigabytes = {}
    for k in range(rounds + 1):                              # the first round measures the memory
        for variant, textbook in variants.items():
            for name, (owner, attribute) in FORMS.items():
                forms = textbook_forms if name in textbook else fast_forms
                setattr(owner, attribute, forms[name])
            if k == 0:
                gigabytes[variant] = stored_gigabytes(step)
                continue
            start = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - start)
    undo()
    return seconds, gigabytes


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9,
                        help="measurements of each variant (default: %(default)s)")
    parser.add_argument("--out", default=str(ROOT / "study" / "forms.json"),
                        help="JSON file for the results (default: study/forms.json)")
    args = parser.parse_args()
    precision = choose_precision(torch.device("cpu"))
    found = {"precision": precision, "threads": torch.get_num_threads(),
             "torch": torch.__version__, "rounds": args.rounds}
    for size, flags in SIZES.items():
        seconds, gigabytes = measure(Step(flags, precision), args.rounds)
        print(f"{size}, {precision}, {torch.get_num_threads()} threads")
        found[size] = {"stored_gb": gigabytes}
        if args.rounds:
            median = {variant: statistics.median(times) for variant, times in seconds.items()}
            found[size]["seconds"] = {k: [round(t, 4) for t in v] for k, v in seconds.items()}
            found[size]["gain"] = {k: round(v / median["all"], 3) for k, v in median.items()}
            print(f"    a step takes {median['all']:.3f} s with all fast forms "
                  f"(median of {args.rounds})")
        for variant in ("plain", *FORMS):
            label = "all in textbook form" if variant == "plain" else f"{variant} in textbook form"
            memory = gigabytes[variant] / gigabytes["all"]
            line = f"    {label:32} stored {gigabytes[variant]:.3f} GB, {memory:.3f} x"
            if args.rounds:
                low, high = min(seconds[variant]), max(seconds[variant])
                line += (f"     time {found[size]['gain'][variant]:.3f} x "
                         f"({low:.3f} to {high:.3f} s)")
            print(line, flush=True)
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
