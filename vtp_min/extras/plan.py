"""What a run of train.py needs, counted before it starts: memory, FLOPs, time.

    python train.py ...              prints the plan, or refuses a run that does not fit in memory
    --set memory_check=0             prints the plan, but does not refuse
    count(script, args, world_size, precision) -> Cost of one process

One training step is executed on fake tensors, which have shapes but no values. A dispatch mode sees
every operator, forward and backward. It adds the bytes of each new tensor, subtracts them when the
tensor is freed, and adds the FLOPs of matrix products and convolutions. So --micro, --recompute,
stochastic depth, LPIPS and the fast forms are counted as they are executed.

Not in the count: what a single operator allocates inside (workspaces), and fragmentation. RESERVED
is a guess for both.
"""
import math
import os
import re
import shlex
import sys
import warnings
import weakref
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import dist, losses
from ..device import autocast, peak_flops, tf32_of
from ..dist import all_reduce_max, barrier, print0, under_torchrun, world_size
from ..model import SMALL, DINOHead, Student, Teacher, VTPModel
from . import gradcache, perceptual
from .weights import find

GB = 1e9
RESERVED = 1.5e9         # bytes for the driver, workspaces and fragmentation (a guess)
SHARE = 0.4              # of the measured peak that a step reaches (a guess; see docs/scale.md)
MASKED = 0.15            # share of patches that are masked: half of the crops, 10 to 50 % of each
TOKENS = 32              # of the longest caption of a batch (ours; a caption has at most 77)
# FLOPs of a run and bytes of a step, both roughly, below which pico, nano and micro need no plan
# (ours)
SMALL_RUN, SMALL_STEP = 1e15, 2e9
PARTS = "self-distillation", "CLIP and reconstruction"      # of a step
LPIPS = "vgg", "alex", "squeeze"                    # its networks, whose weights are downloaded
CPU = torch.device("cpu")


# ---------------------------------------------------------------- counting
class Meter(TorchDispatchMode):
    """Inside this context tensors are counted: bytes (`live` now, `peak` at most) and `flops`.

    existing  tensors that were made before, such as weights; their views are not counted either
    """

    def __init__(self, existing=()):
        super().__init__()
        self.live = self.peak = self.flops = 0
        # {address: weak reference} of each storage; a tensor and its views share one
        self.storages = {x.untyped_storage()._cdata: None for x in existing}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if operator is torch.ops.prim.device.default:      # the question where a tensor lies
            return out
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                self.add(x.untyped_storage())
        formula = flop_registry.get(operator.overloadpacket)
        if formula:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def add(self, storage):
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages:
            return

        def remove(_):
            self.live -= size
            del self.storages[address]

        self.storages[address] = weakref.ref(storage, remove)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass
class Cost:
    """What one process needs for one step. Memory in bytes."""
    parameters: int          # number of parameters of the student
    weights: int             # weights, gradients and AdamW's moments; the weights of the teacher
    parts: dict              # {part of the step: peak of its tensors}
    kept: int = 0            # features and embeddings that --micro keeps during the step
    flops: int = 0           # of matrix products and convolutions

    @property
    def activations(self):
        """The parts run one after the other, so only the largest of them counts."""
        return self.kept + max(self.parts.values())

    @property
    def memory(self):
        return self.weights + self.activations + RESERVED


def count(script, args, n_processes, precision):
    """-> Cost of one process

    script  the module train.py, whose functions are executed
    args    its arguments    precision  'bf16', 'fp16', 'fp32' or 'fp64'
    """
    config = script.model_config(args)
    student, teacher = student_and_teacher(args, config)
    n = sum(p.numel() for p in student.parameters())
    cost = Cost(n, 4 * bytes_of(student) + bytes_of(teacher), {})
    micro_batches = args.batch // n_processes // args.micro if args.micro else 1
    for name in PARTS:
        used = part_of_step(args, name)
        if not used:
            continue
        meter = run_part(script, used, n_processes * micro_batches, precision, config)
        cost.parts[name] = meter.peak
        cost.flops += micro_batches * meter.flops
    if teacher:
        cost.parts["update of the teacher"] = bytes_of(teacher.trunk)
    if args.micro:
        count_pairs(cost, args, student, n_processes)
    return cost


def part_of_step(args, name):
    """-> a copy of args with the weights of the other part set to 0, or None if nothing is left"""
    off = ("w_clip", "w_rec") if name == "self-distillation" else ("w_ssl",)
    used = Namespace(**vars(args) | dict.fromkeys(off, 0.0) | {"compile": False})
    return used if used.w_clip or used.w_ssl or used.w_rec else None


def run_part(script, args, divisor, precision, config):
    """Execute one part of a step on fake tensors -> Meter

    divisor  the batch is divided by it: number of processes times micro-batches of each
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    args.batch, args.batch_ssl, args.batch_rec = (
        max(n // divisor, 1) for n in (args.batch, args.batch_ssl, args.batch_rec))
    gathered, gradients = divisor, script.compute_gradients
    if args.micro:
        args.micro = args.batch
        gathered = 1                             # count_pairs counts the losses that gather rows
        gradients = gradcache.compute_gradients_cached
    student, teacher = student_and_teacher(args, config)
    lpips = perceptual_loss(args)
    targets = losses.TeacherTargets(args.teacher, args.prototypes, CPU)
    amp = autocast(CPU, "bf16" if precision == "fp16" else precision)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    # real tensors, such as the weights of LPIPS, become fake ones
    with FakeTensorMode(allow_non_fake_inputs=True), as_one_process(gathered):
        materialize(student, teacher)
        script.wrap_blocks(args, student, teacher)
        with Meter(tensors_of(student, teacher)) as meter:
            batch = fake_batch(script.Batch, args, config)
            gradients(batch, args.teacher_temp, args, student, teacher, lpips, targets, amp,
                      scaler, CPU)
    return meter


def materialize(student, teacher):
    """Move the modules from the meta device to the (fake) CPU, and allocate the gradients"""
    student.to_empty(device="cpu")
    for p in student.parameters():
        p.grad = torch.empty_like(p)
    if teacher:
        teacher.to_empty(device="cpu")


def count_pairs(cost, args, student, n_processes):
    """--micro: add the losses that compare images, which are computed for the whole batch of a
    process, and what is kept for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    b, bs = args.batch // n_processes, args.batch_ssl // n_processes
    E, D = student.model.config.text_embed_dim, student.model.config.vision_embed_dim
    shapes = {}
    if args.w_clip:
        shapes |= {"img": (b, E), "txt": (b, E)}
    if args.w_ssl and args.w_koleo:
        shapes["koleo"] = (2, bs, D)
    with FakeTensorMode(allow_non_fake_inputs=True), as_one_process(n_processes):
        student.to_empty(device="cpu")
        leaves = {name: torch.empty(shape, requires_grad=True) for name, shape in shapes.items()}
        with Meter(tensors_of(student)) as meter:
            terms = gradcache.pairwise_losses(leaves, args, student)
            if terms:
                losses.total_loss(terms, args).backward()
    cost.parts["losses that compare images"] = meter.peak
    cost.flops += meter.flops
    # each feature in its micro-batch and in the batch, and its gradient
    numbers = 3 * sum(math.prod(shape) for shape in shapes.values())
    if args.w_ssl:
        patches = (args.image // args.patch) ** 2
        tokens = 2 * bs * (1 + MASKED * patches)
        numbers += tokens * args.head_bottleneck          # embeddings of the teacher
    cost.kept = round(4 * numbers)


def perceptual_loss(args):
    """-> the loss of --perceptual, with random weights where LPIPS has none, or None"""
    if not args.w_rec or args.perceptual == "none":
        return None
    if args.perceptual == "efficientnet":
        return perceptual.build(args.perceptual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # of torchvision, about the arguments of lpips
        return perceptual.Perceptual(args.perceptual, random_trunk=True)


def student_and_teacher(args, config):
    """-> Student, Teacher or None, on the meta device"""
    with torch.device("meta"):
        model = VTPModel(config)
        head = None
        if args.w_ssl:
            head = DINOHead(model.feature_dim, args.prototypes, args.head_hidden,
                            args.head_bottleneck)
        student = Student(model, head)
        return student, Teacher(student) if args.w_ssl else None


def tensors_of(*modules):
    """-> list of their parameters, gradients and buffers. A module may be None."""
    found = []
    for module in modules:
        if module:
            found += [*module.parameters(), *module.buffers()]
            found += [p.grad for p in module.parameters() if p.grad is not None]
    return found


def bytes_of(module):
    """-> bytes of the parameters of a module, or 0 for None"""
    parameters = module.parameters() if module else ()
    return sum(p.numel() * p.element_size() for p in parameters)


@contextmanager
def as_one_process(n_processes):
    """Inside it, no communication takes place. Losses gather n_processes times their own rows."""
    originals = dist.is_distributed, losses.gather, gradcache.split_batch
    dist.is_distributed = lambda: False
    losses.gather = lambda x: x.repeat(n_processes, *[1] * (x.dim() - 1))
    # the batch is already one micro-batch; to split it, the values of its masks would be needed
    gradcache.split_batch = lambda batch, n, device: [batch]
    try:
        yield
    finally:
        dist.is_distributed, losses.gather, gradcache.split_batch = originals


def fake_batch(Batch, args, config):
    """-> data.Batch of the sizes in args, without values"""
    def images(*shape, side=args.image):
        return torch.empty(*shape, 3, side, side, dtype=torch.uint8)

    def indices(n):
        return torch.empty(max(round(n), 1), dtype=torch.long)

    def keep(rate, n):
        """Stochastic depth: a share of n images passes through each of two branches of a block"""
        if rate == 0:
            return None
        return [((indices(n * (1 - rate)), 1.0),) * 2] * config.vision_depth

    b, bs, br = args.batch, args.batch_ssl, args.batch_rec
    fields, kept = {}, {"image": None, "ssl": None, "local": None}
    if args.w_clip or args.w_rec:
        n = b if args.w_clip else br
        fields["image"] = images(n)
        kept["image"] = keep(args.drop_clip if args.w_clip else args.drop_rec, n)
    if args.w_clip:
        fields["text"] = torch.empty(b, TOKENS, dtype=torch.long)
    if args.w_rec:
        fields["rec"] = indices(br)
        if args.w_clip and args.drop_rec != args.drop_clip:
            kept["rec"] = keep(args.drop_rec, br)
    if args.w_ssl:
        patches = (args.image // args.patch) ** 2
        masked = indices(MASKED * 2 * bs * patches)
        fields |= {"crops": images(2, bs), "n_crops": 2 * bs,
                   "locals": images(args.locals, bs, side=args.local_image),
                   "mask": torch.empty(2, bs, patches, dtype=torch.bool),
                   "mask_index": masked, "mask_weight": torch.empty(len(masked))}
        kept |= {"ssl": keep(args.drop_ssl, 2 * bs), "local": keep(args.drop_ssl, args.locals * bs)}
    return Batch(captions=[], bad=[], keep=kept, **fields)


# ---------------------------------------------------------------- the machine
def available_memory(device):
    """-> bytes that this process may still use: free memory of its GPU, or its part of the free
    memory of this computer"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return free_ram() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_ram():
    """-> bytes. On Linux free memory, or less if the control group of a container or job has a
    lower limit; elsewhere all memory of the computer."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024
    return min([free, *free_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def free_in_groups(root, own):
    """Yield the free bytes of each control group (version 2) of this process that has a limit.

    root  the folder of all groups      own  file with the name of this process's group
    """
    group = re.search(r"^0::/(.*)$", own.read_text(), re.MULTILINE) if own.exists() else None
    folder = root / (group[1] if group else "")
    for path in (folder, *folder.parents):
        limit = path / "memory.max"
        if not limit.exists() or limit.read_text().strip() == "max":
            continue
        used = int((path / "memory.current").read_text())
        # cached files give their memory back
        cached = re.findall(r"^(?:in)?active_file (\d+)$", (path / "memory.stat").read_text(),
                            re.MULTILINE)
        yield int(limit.read_text()) - used + sum(map(int, cached))


def rough_cost(args, config, n_processes):
    """-> FLOPs of the whole run, bytes of activations of a step; for one process, within a factor
    of about three

    12 D^2 weights per block, 6 FLOPs per weight and token, 64 bytes per channel of a token.
    """
    grid, local_grid = args.image // args.patch, args.local_image // args.patch
    tokens = args.batch * grid ** 2
    if args.w_ssl:
        tokens += args.batch_ssl * (2 * grid ** 2 + args.locals * local_grid ** 2)
    if args.w_rec:
        tokens += args.batch_rec * grid ** 2
    tokens /= n_processes
    D, depth = config.vision_embed_dim, config.vision_depth
    at_once = tokens * args.micro * n_processes / args.batch if args.micro else tokens
    return args.steps * 72 * D ** 2 * depth * tokens, 64 * D * depth * at_once


# ---------------------------------------------------------------- before the first step
def check(script, args, device, precision):
    """Print what the run needs and what is missing. ValueError if it does not fit in memory.

    A small run needs no plan: it prints one line. All processes call this function.
    script, args, precision: as in `count`
    """
    n = world_size()
    run_flops, step_bytes = rough_cost(args, script.model_config(args), n)
    if args.size in SMALL and run_flops < SMALL_RUN and step_bytes < SMALL_STEP:
        print0("memory       not counted: a small run; its time is measured after the first steps")
        return
    try:
        cost = count(script, args, n, precision)
    except Exception as problem:                 # fake tensors are young, so no run depends on them
        print0(f"memory       not checked: a step cannot be counted with torch {torch.__version__} "
               f"({type(problem).__name__}: {str(problem)[:200]})")
        return
    # the smallest value of all processes, so that all decide the same
    free = -all_reduce_max(torch.tensor(-float(available_memory(device)), device=device)).item()
    peak = peak_flops(device, precision)
    seconds = cost.flops / (SHARE * peak)
    print0(f"memory       {in_gb(cost.memory)} in each process, {in_gb(free)} are free: weights, "
           f"gradients, optimizer\n             {in_gb(cost.weights)}; activations "
           f"{in_gb(cost.activations)}; reserve {in_gb(RESERVED)} (a guess)")
    print0(f"time         {duration(seconds)} a step, {duration(args.steps * seconds)} for "
           f"{args.steps} steps: {cost.flops:.1e} FLOPs a step in\n             each process, at "
           f"{SHARE:.0%} (a guess) of the {peak / 1e12:.2g} TFLOP/s of a matrix product here")
    for text in missing(args, device):
        print0(f"missing      {text}")
    if cost.memory > free and args.memory_check:
        refuse(script, args, n, precision, cost, free)
    if args.w_rec and args.perceptual in LPIPS:
        find(args.perceptual)                    # FileNotFoundError before the models are made


def missing(args, device):
    """Yield what the run, or its evaluation, will lack."""
    if device.type == "cpu":
        yield "a GPU: this run uses the CPU"
    if args.w_rec and args.perceptual in LPIPS:
        try:
            find(args.perceptual)
        except FileNotFoundError as problem:
            yield f"weights of LPIPS: {problem}; or --perceptual none"
    if not args.val_data and not args.data.startswith("shapes") and not Path(args.data,
                                                                            "val").is_dir():
        yield "validation data: eval.py will need --val-data"


def refuse(script, args, n, precision, cost, free):
    """ValueError with the command that fits"""
    flags, least = settings_that_fit(script, args, n, precision, free)
    command = "python train.py"
    if under_torchrun():
        command = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} train.py"
    typed = f"{command} {shlex.join(sys.argv[1:])}"
    if flags:
        advice = f"This fits:\n    {typed} {flags}"
    else:
        advice = (f"Nothing makes it fit: with the smallest --micro and --recompute it needs "
                  f"{in_gb(least)}. Take a smaller --size or --image, fewer processes on a CPU, or "
                  f"a machine with more memory.")
    print0(f"{advice}\nTo start it all the same:\n    {typed} --set memory_check=0")
    barrier()                                    # rank 0 has printed before any process ends
    raise ValueError(f"the run needs about {in_gb(cost.memory)} of memory in each process, but "
                     f"{in_gb(free)} are free; see above what to type")


def settings_that_fit(script, args, n, precision, free):
    """-> flags to add to the command, such as '--micro 32 --recompute', or None if nothing fits;
    bytes of the last settings that were tried

    First --micro alone. If that leaves fewer than 32 images at a time (ours), which uses the
    hardware badly, --recompute too. The memory of each moment of a step grows linearly with
    --micro. The peak is the largest of them, so it lies on or below the line between two counts.
    """
    sizes = gradcache.micro_sizes(args)
    smallest, largest = sizes[0], sizes[-1]

    def memory(micro, recompute):
        changed = Namespace(**vars(args) | {"micro": micro, "recompute": recompute})
        return count(script, changed, n, precision).memory

    for recompute in ([True] if args.recompute else [False, True]):
        least = memory(smallest, recompute)
        if least > free:
            continue
        image = (memory(largest, recompute) - least) / max(largest - smallest, 1)
        micro = max(m for m in sizes if least + image * (m - smallest) <= free)
        if micro >= 32 or recompute:
            # the whole batch at a time is the same as no --micro
            flags = f"--micro {0 if micro == largest else micro}"
            return flags + (" --recompute" if recompute and not args.recompute else ""), least
    return None, least


def print_summary(args, model, head, data, device, precision):
    """Print the model, the data and the machine of a run. data: data.TrainBatches"""
    def millions(module):
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M" if module else "none"
    grid = args.image // args.patch
    print0(f"weights      clip {args.w_clip:g}, ssl {args.w_ssl:g}, rec {args.w_rec:g}; "
           f"{perceptual.describe(args.perceptual)}")
    print0(f"model        {args.size}: trunk {millions(model.trunk)}, decoder "
           f"{millions(getattr(model, 'pixel_decoder', None))}, all {millions(model)}, DINO head "
           f"{millions(head)} parameters; latents {args.latent_dim} x {grid} x {grid}")
    micro = f", {args.micro} at a time in each" if args.micro else ""
    print0(f"data         {data.source.spec}   batch {args.batch} (clip), {args.batch_ssl} (ssl), "
           f"{args.batch_rec} (rec) over {world_size()} process(es){micro}")
    print0(f"machine      {device}, {precision}{tf32_of(device)}, "
           f"{torch.get_num_threads()} threads")
    if args.w_ssl and args.batch_ssl < 16:
        print0(f"note         --batch-ssl {args.batch_ssl} is small: below 16 (ours) Sinkhorn and "
               f"KoLeo are noisy")
    if args.w_clip and args.batch < 32:
        print0(f"note         --batch {args.batch} is small: below 32 (ours) CLIP learns little; "
               f"--micro allows a larger --batch in the memory of a small one")


def in_gb(n):
    return f"{n / GB:.1f} GB"


def duration(seconds):
    """-> text such as '5.2 hours'"""
    units = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, length in units.items() if seconds >= 2 * length), "seconds")
    n = seconds / units[unit]
    return f"{n:,.0f} {unit}" if n >= 10 else f"{n:.1f} {unit}"
