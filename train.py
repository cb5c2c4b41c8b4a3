"""Stage 1 of VTP: one ViT learns words, views and pixels at once.   VTP Sec. 3.5, 3.6

    loss = w_clip * clip + w_ssl * (dino + ibot + 0.1 koleo) + w_rec * (L1 + LPIPS)        koleo: of both global crops

    python train.py --perceptual none                  nano on the built-in shapes, on a laptop (none: without LPIPS, whose weights are fetched once)
    torchrun --nproc-per-node 8 train.py --size L --data DIR --out runs/L
AE, CLIP+AE, SSL+AE and all three differ by their weights alone: --w-clip 0, --w-ssl 0.
Leaves a run folder (vtp_min/run.py): weights, checkpoint, log. The same command goes on where it stopped.
"""
import argparse
import math
import os
import resource
import sys
import time
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Steps, batches, mask_indices_and_weights, normalize, open_data
from tokenizer import get_tokenizer
from vtp_min.dist import rank, say, start, stop, total, world
from vtp_min.losses import (Perceptual, centered_softmax, clip_loss, dino_loss, ibot_loss, koleo_loss, moved_center, rec_loss,
                            siglip_loss, sinkhorn)
from vtp_min.model import SIZES, DINOHead, Student, Teacher, VTPConfig, VTPModel
from vtp_min.run import Run, autocast, choose_precision, matmul_peak
from vtp_min.vit import StochasticDepth

DEFAULTS = {   # flag: (nano, S/B/L, where the second comes from). nano's are ours, for a CPU and its built-in pictures
    "image": (48, 256, "paper Sec. 4.2"),
    "patch": (12, 16, "paper: f16"),
    "latent_dim": (64, 64, "paper: d64"),
    "steps": (1_100, 67_000, "paper Sec. 4.5: 1.1 billion samples, in batches of 16k"),
    "batch": (64, 16_384, "paper Sec. 4.1: B_clip = 16k"),
    "batch_ssl": (32, 4_096, "paper Sec. 4.1: B_ssl = 4k"),
    "batch_rec": (64, 2_048, "paper Sec. 4.1: B_rec = 2k"),
    "locals": (2, 8, "borrowed from DINOv2"),
    "prototypes": (256, 65_536, "borrowed from DINOv2's default recipe"),
    "head_hidden": (256, 2_048, "borrowed from DINOv2"),
    "head_bottleneck": (64, 256, "borrowed from DINOv2's default recipe"),
    "drop_ssl": (0.0, 0.3, "borrowed from DINOv2's default recipe"),
    "teacher_temp": (0.04, 0.07, "borrowed from DINOv2; in a short run a soft teacher stays near ln K"),
    "lr": (5e-4, 5e-4, "borrowed from OpenCLIP"),
    "ema": (0.98, 0.994, "borrowed from DINOv2's ViT-L recipe; short runs need a faster teacher"),
}
BETAS, EPS = (0.9, 0.98), 1e-6            # AdamW: OpenCLIP's for ViTs
DECAY = 0.04, 0.2                         # weight decay, first and last step, cosine: DINOv2's ViT-L recipe (0.2 is OpenCLIP's too)
TEMPERATURE = 0.04, 0.3                   # of the teacher at first; share of the run in which it rises to --teacher-temp: DINOv2's default recipe
HEAD_RESTS = 0.01                         # share of the run during which the DINO head's last layer does not move: DINOv2's default recipe
LR_FLOOR = 1e-6                           # where the cosine ends: DINOv2. Its layer-wise rates (0.9 a block, 0.2 for the patch embedding) are left out

# The FLOP counter takes some operators apart, which rounds differently: the first step after resuming would not be the step it is elsewhere
AS_IT_IS = {torch.ops.aten.silu_backward: lambda *shapes, out_shape=None: 0}


def main(args):
    device = start(args.device)
    precision = args.precision or choose_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 is for GPUs; on a CPU take bf16 or fp32")
    clip, ssl, rec = args.w_clip > 0, args.w_ssl > 0, args.w_rec > 0
    settings = vars(args) | {"machine": f"{device}, {precision}"}
    args.warmup = max(args.steps // 10, 1) if args.warmup is None else args.warmup     # not a setting: --steps may change when a run goes on

    # ---- the models
    torch.manual_seed(args.seed)
    config = VTPConfig.of_size(args.size, args.image, args.patch, args.latent_dim, clip, rec, args.light_decoder)
    if args.clip_loss == "siglip":
        config.init_logit_scale, config.init_logit_bias = math.log(10), -10.0          # SigLIP's own start
    model = VTPModel(config)
    head = DINOHead(model.feature_dim, args.prototypes, args.head_hidden, args.head_bottleneck) if ssl else None
    student = Student(model, head).to(device)
    teacher = Teacher(student).to(device) if ssl else None
    perceptual = Perceptual(args.perceptual).to(device) if rec and args.perceptual != "none" else None
    opt = torch.optim.AdamW(param_groups(student), betas=BETAS, eps=EPS, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    center = {"cls": torch.zeros(args.prototypes, device=device), "patch": torch.zeros(args.prototypes, device=device)}

    # ---- the data
    tokenizer = get_tokenizer("ViT-B-32", config.text_context_length)
    source = open_data(args.data, "train", args.seed, side=args.image)
    data = Steps(source, tokenizer, seed=args.seed, batch=args.batch, batch_ssl=args.batch_ssl, batch_rec=args.batch_rec,
                 clip=clip, ssl=ssl, rec=rec, image=args.image, local_image=args.local_image, n_local=args.locals, patch=args.patch,
                 rank=rank(), world=world())

    # ---- the run, new or gone on with
    run = Run(args.out, settings, args.fresh)
    run.finish_on_signals()
    first, bad, named = 0, 0, set()                                                     # bad: unreadable samples so far, on this rank
    if run.state:
        first, bad = run.state["step"], run.state["bad"] if rank() == 0 else 0
        student.load_state_dict(run.state["student"])
        opt.load_state_dict(run.state["opt"])
        scaler.load_state_dict(run.state["scaler"])
        if ssl:
            teacher.load_state_dict(run.state["teacher"])
            center = {k: v.to(device) for k, v in run.state["center"].items()}
        run.state = None                                                                # free its memory
    introduce(args, model, head, source, device, precision, clip, ssl, rec)
    ddp = student
    if world() > 1:
        ddp = DistributedDataParallel(student, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    ddp.train()
    peak, flops = matmul_peak(device, precision), None

    bar = tqdm(total=args.steps, initial=first, desc="train", unit="step", disable=rank() > 0, dynamic_ncols=True)
    clock = asked = time.perf_counter()
    waited, taken = 0.0, 0                                                              # seconds for data, steps: since the last line of the log
    for step, batch in zip(range(first, args.steps), batches(data, first, args.steps, args.workers)):
        waited += time.perf_counter() - asked
        bad += report_bad(batch["bad"], named)
        batch = to_device(batch, device)
        lr, wd = warmup_cosine(step, args.lr, args.warmup, args.steps), cosine(step, *DECAY, args.steps)
        temp = ramp(step, TEMPERATURE[0], args.teacher_temp, TEMPERATURE[1] * args.steps)
        set_lr_and_decay(opt, lr, wd, head_rests=step < HEAD_RESTS * args.steps - 1)
        drop = stochastic_depth(args, step, batch)

        # ================================================================ the method
        with FlopCounterMode(display=False, custom_mapping=AS_IT_IS) if flops is None else nullcontext() as counter:
            with autocast(device, precision):
                out = ddp(batch, drop)                                                  # one forward: DDP syncs gradients once
                seen = teacher(batch["crops"], batch["mask"]) if ssl else None          # what the teacher makes of the whole crops
            targets, center = balanced(args.teacher, seen, temp, center) if ssl else (None, center)
            loss, terms = objective(args, out, batch, targets, perceptual)
            opt.zero_grad()
            scaler.scale(loss).backward()
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
        scaler.step(opt)
        scaler.update()
        with torch.no_grad():
            if clip:
                model.logit_scale.clamp_(0, math.log(100))                              # CLIP, OpenCLIP
            if ssl:
                teacher.follow(student, cosine(step, args.ema, 1.0, args.steps))        # DINO: momentum rises to 1
        # ================================================================

        flops = flops or counter.get_total_flops()                                      # of one step: matrix products, forward and backward
        done, taken, stopping = step + 1, taken + 1, run.stop_requested(device)
        log, save = done % args.log_every == 0 or done in (1, args.steps), done % args.save_every == 0 or done == args.steps or stopping
        if log or save:
            all_bad = int(total(torch.tensor(bad, device=device)))
            gauges = {"teacher_entropy": entropy(targets["cls"]), "spread": spread(out["tokens"][0])} if ssl else {}
            values = {k: mean_over_ranks(v) for k, v in ({"loss": loss} | terms | gauges).items()}
            if not math.isfinite(values["loss"]):
                raise ValueError(f"the loss is {values['loss']} at step {done}; earlier checkpoints are kept: try a smaller --lr, a longer --warmup, or --precision fp32")
        if log:
            seconds = (time.perf_counter() - clock) / taken                             # of a step, on average since the last line
            values |= {"perceptual": args.perceptual} if rec else {}
            values |= {"logit_scale": model.logit_scale.exp().item()} if clip else {}
            run.log(done, **values, lr=lr, weight_decay=wd, grad_norm=norm, bad=all_bad,
                    images_per_s=args.batch / seconds, share_of_peak=flops / seconds / peak, data_wait=waited / taken / seconds)
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in values.items() if k in ("loss", "clip", "dino", "ibot", "rec")))
        bar.update()
        if save:
            run.save(done, {"student": student.state_dict(), "opt": opt.state_dict(), "scaler": scaler.state_dict(),
                            "teacher": teacher.state_dict() if ssl else {}, "center": center, "bad": all_bad})
            if rank() == 0:
                model.save_pretrained(args.out)
        if stopping:
            break
        if log or save:
            clock, waited, taken = time.perf_counter(), 0.0, 0
        asked = time.perf_counter()
    bar.close()
    say(f"{args.out}: {'stopped on a signal, saved; the same command goes on' if run.stopping else 'done'}. "
        f"Peak memory {peak_memory(device):.2f} GB. Next: python eval.py report {args.out}")
    stop()


def objective(args, out, batch, targets, perceptual):
    """The sum of VTP Sec. 3.5, and its terms: what the student answered (`out`, see Student), against captions, teacher and pixels"""
    terms = {}
    if "img" in out:                                                                    # what the words say
        contrast = siglip_loss if args.clip_loss == "siglip" else clip_loss
        terms["clip"] = contrast(out["img"], out["txt"], out["scale"], out["bias"])
    if "cls" in out:                                                                    # what stays when the view changes
        terms["dino"] = dino_loss(out["cls"], targets["cls"])
        terms["ibot"] = ibot_loss(out["patch"], targets["patch"], batch["mask_weight"], n_crops=2 * batch["crops"].shape[1])
        terms["koleo"] = sum(koleo_loss(crop.float()) for crop in out["tokens"])
    if "pixels" in out:                                                                 # what the eye sees
        terms["rec"] = sum(rec_loss(out["pixels"].float(), batch["image"][batch["rec"]], perceptual))
    weights = {"clip": args.w_clip, "dino": args.w_ssl, "ibot": args.w_ssl, "koleo": args.w_ssl * args.w_koleo, "rec": args.w_rec}
    return sum(weights[k] * term for k, term in terms.items()), terms


def balanced(how, seen, temp, center):
    """The teacher's logits -> targets {'cls' (2, Bs, K), 'patch' (M, K)}, and the centers for the next step"""
    if how == "sinkhorn":
        cls, patch = seen
        return {"cls": sinkhorn(cls.flatten(0, 1), temp).view_as(cls), "patch": sinkhorn(patch, temp)}, center
    logits = {"cls": seen[0].float(), "patch": seen[1].float()}
    return ({k: centered_softmax(x, center[k], temp) for k, x in logits.items()},
            {k: moved_center(center[k], x.flatten(0, -2)) for k, x in logits.items()})


# ---------------------------------------------------------------- schedules
def cosine(step, a, b, steps):
    """a at step 0, b at the last, half a cosine between"""
    return b + (a - b) * (1 + math.cos(math.pi * min(step / max(steps - 1, 1), 1))) / 2


def ramp(step, a, b, steps):
    """a at step 0, b from `steps` on, a straight line between"""
    return a + (b - a) * min(step / max(steps, 1), 1)


def warmup_cosine(step, lr, warmup, steps, floor=LR_FLOOR):
    """Linear to lr in `warmup` steps (OpenCLIP: the first step already moves), then half a cosine down to `floor` (DINOv2's)"""
    return lr * (step + 1) / warmup if step < warmup else cosine(step - warmup, lr, min(floor, lr), steps - warmup)


def param_groups(student):
    """No weight decay for vectors (biases, norms, LayerScale, log-scale) and position tables, as OpenCLIP and DINOv2; class and
    mask token and the head's gains do decay, as in DINOv2. The head's last layer stands apart, because it rests at first."""
    groups = {}
    for name, p in student.named_parameters():
        key = (p.ndim > 1 and "positional" not in name, "last_layer" in name)
        groups.setdefault(key, []).append(p)
    return [{"params": ps, "decay": decay, "last": last} for (decay, last), ps in groups.items()]


def set_lr_and_decay(opt, lr, wd, head_rests):
    for g in opt.param_groups:
        g["lr"] = 0.0 if g["last"] and head_rests else lr
        g["weight_decay"] = wd if g["decay"] else 0.0


def stochastic_depth(args, step, batch):
    """One draw an objective over the rows of the global batch that it uses. DINO's global and local crops are drawn apart."""
    def draw(rate, rows, n, objective, crops=1):
        number = rows // (args.batch // n)                                              # a subset is every (batch/n)-th row: its rank, 0..n-1
        number = (number + n * torch.arange(crops)[:, None]).flatten()                  # all first crops, then all second, ...
        return StochasticDepth(rate, number, crops * n, args.seed, step, objective) if rate else None
    drop = dict.fromkeys(("clip", "rec", "ssl", "local"))
    if "image" in batch:
        rate, n = (args.drop_clip, args.batch) if args.w_clip else (args.drop_rec, args.batch_rec)
        drop["clip"] = drop["rec"] = draw(rate, batch["rows_image"], n, 0)
        if "rec" in batch and args.drop_rec != rate:
            drop["rec"] = draw(args.drop_rec, batch["rows_image"][batch["rec"].cpu()], args.batch_rec, 1)
    if "crops" in batch:
        drop["ssl"] = draw(args.drop_ssl, batch["rows_ssl"], args.batch_ssl, 2, crops=2)
        drop["local"] = draw(args.drop_ssl, batch["rows_ssl"], args.batch_ssl, 3, crops=args.locals)
    return drop


# ---------------------------------------------------------------- bookkeeping
def to_device(batch, device):
    """Pixels travel as bytes and become ImageNet-normalised floats on arrival."""
    out = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) and not k.startswith("rows") else v for k, v in batch.items()}
    if "mask" in out:
        out["mask_weight"] = mask_indices_and_weights(out["mask"])[1]
    return out | {k: normalize(out[k]) for k in ("image", "crops", "locals") if k in out}


def report_bad(names, named):
    """Name each unreadable sample once, on the rank that met it -> how many there were"""
    for name in names:
        if name not in named:
            print(f"skipped {name}: another sample takes its place", file=sys.stderr, flush=True)
    named.update(names)
    return len(names)


def mean_over_ranks(x):
    return (total(x.detach().clone()) / world()).item()


def entropy(p):
    """Mean entropy of the teacher's answers, in nats. ln K: it says nothing (collapse). 0: one prototype each."""
    return -(p * p.clamp_min(1e-30).log()).sum(-1).mean()


def spread(x):
    """How far class tokens lie apart: 1 random directions, 0 all in one place (collapse)"""
    x = torch.nn.functional.normalize(x.detach().float(), dim=-1)
    return (1 - x.mean(0).square().sum()).clamp_min(0).sqrt()


def peak_memory(device):
    """GB, of this process"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)      # bytes on macOS, else KiB


def introduce(args, model, head, source, device, precision, clip, ssl, rec):
    def count(m):
        return sum(p.numel() for p in m.parameters()) / 1e6 if m is not None else 0.0
    text = sum(p.numel() for k, p in model.named_parameters() if k.startswith(("text", "token", "pos", "ln_final"))) / 1e6
    grid = args.image // args.patch
    say(f"objectives   {' + '.join(n for n, on in (('CLIP', clip), ('SSL', ssl), ('AE', rec)) if on)}   weights clip {args.w_clip:g}, ssl {args.w_ssl:g}, rec {args.w_rec:g}"
        f"   perceptual {args.perceptual}")
    say(f"model        {args.size}: trunk {count(model.trunk):.2f}M, decoder {count(getattr(model, 'pixel_decoder', None)):.2f}M, "
        f"text {text:.2f}M, DINO head {count(head):.2f}M parameters; latents {args.latent_dim} x {grid} x {grid}")
    say(f"data         {source.spec}   batch {args.batch} (clip), {args.batch_ssl} (ssl), {args.batch_rec} (rec) over {world()} process(es)")
    say(f"machine      {device}, {precision}{'' if args.precision else ' (chosen: bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32)'}, "
        f"{torch.get_num_threads()} threads")
    if ssl and args.batch_ssl < 16:
        say(f"note         {args.batch_ssl} images are few for KoLeo and for the teacher's balance over {args.prototypes} prototypes; their terms are noisy")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def flag(name, type, advice, default=None, **more):
        p.add_argument(name, type=type, default=default, help=advice + ("" if default in (None, "") else f" (default {default})"), **more)
    def sized(name, type, advice):
        nano, paper, source = DEFAULTS[name.strip("-").replace("-", "_")]
        flag(name, type, f"{advice} (default {paper}, {source}; nano {nano}, ours)")
    flag("--out", str, "run folder; one that holds a checkpoint is gone on with", "runs/vtp")
    p.add_argument("--fresh", action="store_true", help="start over in --out")
    flag("--data", str, "shapes, shapes:objects=1,size=0.6-0.9, a folder of class folders, or tar shards 'x-{000..099}.tar'", "shapes")
    flag("--val-data", str, "kept for eval.py, when --data has no val/ of its own")
    flag("--size", str, f"one of {', '.join(SIZES)}: the paper's S, B, L, and nano for a CPU", "nano")
    p.add_argument("--light-decoder", action="store_true", help="the paper's decoder for fast experiments: 4 ViT-L layers (Sec. 4.1)")
    sized("--image", int, "side of pictures and global crops, pixels")
    sized("--patch", int, "side of a patch, pixels; one latent each")
    sized("--latent-dim", int, "d, channels of a latent; the paper also tries 256")
    sized("--steps", int, "length of the run")
    sized("--batch", int, "image-text pairs a step over ALL processes; halve it if memory runs out")
    sized("--batch-ssl", int, "images of the batch that DINO and iBOT see")
    sized("--batch-rec", int, "images of the batch that are reconstructed")
    flag("--w-clip", float, "weight of the contrastive loss; paper 0 or 1", 1.0)
    flag("--w-ssl", float, "weight of DINO + iBOT + KoLeo; paper 0 or 1", 1.0)
    flag("--w-rec", float, "weight of L1 + LPIPS; paper 0.1: smaller helps generation", 0.1)
    flag("--w-koleo", float, "weight of KoLeo within ssl; borrowed from DINOv2, 0 turns it off", 0.1)
    flag("--perceptual", str, "LPIPS net; its trunk must have been fetched. none: L1 alone, which the log repeats", "vgg", choices=["vgg", "alex", "squeeze", "none"])
    flag("--clip-loss", str, "clip: softmax over the batch (paper); siglip: each pair on its own", "clip", choices=["clip", "siglip"])
    flag("--teacher", str, "how the teacher's targets are balanced: sinkhorn (DINOv2 ViT-L/g, DINOv3) or centering (DINO)", "sinkhorn", choices=["sinkhorn", "centering"])
    sized("--teacher-temp", float, "temperature of the teacher's softmax, reached after 0.3 of the run from 0.04; lower is sharper")
    sized("--locals", int, "local crops an image")
    flag("--local-image", int, "side of local crops (default 96/224 of --image as DINOv2, in whole patches)")
    sized("--prototypes", int, "K of the DINO head")
    sized("--head-hidden", int, "width of the DINO head's MLP")
    sized("--head-bottleneck", int, "width of the DINO head's unit sphere")
    sized("--drop-ssl", float, "stochastic depth of DINO and iBOT")
    flag("--drop-clip", float, "stochastic depth of CLIP; OpenCLIP has none", 0.0)
    flag("--drop-rec", float, "stochastic depth of reconstruction; other than CLIP's costs a forward of its own", 0.0)
    sized("--lr", float, "peak learning rate")
    flag("--warmup", int, "steps of linear warm-up (default a tenth of the run, as DINOv2)")
    sized("--ema", float, "teacher momentum at the start; rises to 1 by a cosine")
    flag("--clip-grad", float, "largest gradient norm; borrowed from DINOv2, there per part", 3.0)
    flag("--seed", int, "same seed, same machine: the same run (to the bit on a CPU)", 0)
    flag("--workers", int, "processes that prepare data; changes nothing but speed", 4 if (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 4 else 0)
    flag("--device", str, "cpu, cuda or mps (default the best present)")
    flag("--precision", str, "fp32, bf16 or fp16 autocast (default by device and size, and said)", choices=["fp32", "bf16", "fp16"])
    flag("--log-every", int, "steps between lines of log.jsonl", 10)
    flag("--save-every", int, "steps between checkpoints", 500)
    args = p.parse_args()
    if args.size not in SIZES:
        p.error(f"--size {args.size} is unknown; choose one of {', '.join(SIZES)}")
    for name, (nano, paper, _) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, nano if args.size == "nano" else paper)
    for name in ("image", "patch", "latent_dim", "steps", "batch", "batch_ssl", "batch_rec", "prototypes", "log_every", "save_every"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: wanted 1 or more")
    if args.image % args.patch:
        p.error(f"--image {args.image} is no multiple of --patch {args.patch}; try --image {max(args.image // args.patch, 1) * args.patch}")
    args.local_image = args.local_image or max(round(args.image * 96 / 224 / args.patch), 1) * args.patch
    if args.local_image % args.patch:
        p.error(f"--local-image {args.local_image} is no multiple of --patch {args.patch}")
    if max(args.w_clip, args.w_ssl, args.w_rec) <= 0 or min(args.w_clip, args.w_ssl, args.w_rec) < 0:
        p.error("all of --w-clip, --w-ssl, --w-rec must be 0 or more, and one above 0: nothing would be learned")
    return args


if __name__ == "__main__":
    try:
        main(arguments())
    except (ValueError, FileNotFoundError) as problem:
        raise SystemExit(f"train.py: {problem}") from problem
