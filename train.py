"""Stage 1 of VTP: one ViT learns words, views and pixels at once.   VTP Sec. 3.5, 3.6

    loss = w_clip * clip + w_ssl * (dino + ibot + 0.1 koleo) + w_rec * (L1 + LPIPS)        koleo: of both global crops

    python train.py --perceptual none                  nano on the built-in shapes, on a laptop (none: without LPIPS, whose weights are fetched once)
    torchrun --nproc-per-node 8 train.py --size L --data DIR --out runs/L
AE, CLIP+AE, SSL+AE and all three differ by their weights alone: --w-clip 0, --w-ssl 0.
Stage 2 fine-tunes the pixel decoder alone with a GAN (Sec. 3.2, vtp_min/gan.py); what is not typed it takes from the run it starts from:
    python train.py --stage 2 --init runs/vtp          leaves runs/vtp-gan
--baseline ldm, vavae, rae trains what the paper compares with (Table 1, Fig. 8, 9; vtp_min/baselines.py), some of them with --encoder RUN.
Leaves a run folder (vtp_min/run.py): weights, checkpoint, log. The same command goes on where it stopped.
"""
import argparse
import math
import os
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from data import Steps, batches, clean_steps, open_data
from tokenizer import get_tokenizer
from vtp_min import baselines, gan
from vtp_min.dist import rank, say, stop, world
from vtp_min.gauges import advice, entropy, spread
from vtp_min.losses import (Perceptual, centered_softmax, clip_loss, dino_loss, ibot_loss, koleo_loss, moved_center, rec_loss,
                            siglip_loss, sinkhorn_center, to_fp32)
from vtp_min.model import SIZES, SMALL, DINOHead, Student, Teacher, VTPConfig, VTPModel
from vtp_min.run import STOPPED, Run, autocast, give_back_memory, machine, move_to, tf32_of
from vtp_min.schedules import cosine, param_groups, ramp, set_lr_and_decay, warmup_cosine
from vtp_min.text import TextBlock
from vtp_min.vit import Block, StochasticDepth
from vtp_min.views import mask_indices_and_weights, normalize

DEFAULTS = {   # flag: (nano, S/B/L, where the second comes from). nano's are ours, for a CPU and its built-in pictures
    "image": (36, 256, "paper Sec. 4.2"),
    "patch": (9, 16, "paper: f16"),
    "latent_dim": (64, 64, "paper: d64"),
    "steps": (480, 67_000, "paper Sec. 4.5: 1.1 billion samples, in batches of 16k"),
    "batch": (48, 16_384, "paper Sec. 4.1: B_clip = 16k"),
    "batch_ssl": (16, 4_096, "paper Sec. 4.1: B_ssl = 4k"),
    "batch_rec": (48, 2_048, "paper Sec. 4.1: B_rec = 2k"),
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
HEAD_RESTS = 0.01                         # share of the run during which the DINO head's last layer does not move, less one step: DINOv2's default recipe; short runs need no rest


def main(args):
    """Stage 1 -> the exit status: 0, or STOPPED when a signal ended it early"""
    device, precision = machine(args)
    if device.type == "cpu" and args.size not in SMALL:
        give_back_memory()
    clip, ssl, rec = args.w_clip > 0, args.w_ssl > 0, args.w_rec > 0
    settings = vars(args) | {"precision": precision, "machine": f"{device}{tf32_of(device)}"}
    args.warmup = max(args.steps // 10, 1) if args.warmup is None else args.warmup     # not a setting: --steps may change when a run goes on

    # ---- the models
    torch.manual_seed(args.seed)
    config = VTPConfig.of_size(args.size, args.image, args.patch, args.latent_dim, clip, rec, args.light_decoder, args.decoder)
    config.vision_bottleneck_ae_only = not args.heads_after_bottleneck
    if args.clip_loss == "siglip":
        config.init_logit_scale, config.init_logit_bias = math.log(10), -10.0          # SigLIP's own start
    model = VTPModel(config)
    head = DINOHead(model.feature_dim, args.prototypes, args.head_hidden, args.head_bottleneck) if ssl else None
    student = Student(model, head).to(device)
    teacher = Teacher(student).to(device) if ssl else None
    perceptual = Perceptual(args.perceptual).to(device) if rec and args.perceptual != "none" else None
    opt = torch.optim.AdamW(param_groups(student, args.layer_decay, args.patch_lr), betas=BETAS, eps=EPS, fused=device.type != "mps")        # fused: a third of the time
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    center = {"cls": torch.zeros(args.prototypes, device=device), "patch": torch.zeros(args.prototypes, device=device)}

    # ---- the data
    tokenizer = get_tokenizer("ViT-B-32", config.text_context_length)
    refuse_unequal_pieces(args)
    data = Steps(None, tokenizer, seed=args.seed, batch=args.batch, batch_ssl=args.batch_ssl, batch_rec=args.batch_rec,
                 clip=clip, ssl=ssl, rec=rec, image=args.image, local_image=args.local_image, n_local=args.locals, patch=args.patch,
                 rank=rank(), world=world())
    data.source = open_data(args.data, "train", args.seed, side=args.image)             # last: thousands of tars take their time

    # ---- the run, new or gone on with
    run = Run(args.out, settings, args.fresh)
    if run.state:
        student.load_state_dict(run.state["student"])
        opt.load_state_dict(run.state["opt"])
        scaler.load_state_dict(run.state["scaler"])
        if ssl:
            teacher.load_state_dict(run.state["teacher"])
            center = {k: v.to(device) for k, v in run.state["center"].items()}
        run.state = None                                                                # free its memory
    introduce(args, model, head, data.source, device, precision)
    if args.recompute:
        forget_activations(student)
    ddp = student
    if world() > 1:
        ddp = DistributedDataParallel(student, [device] if device.type == "cuda" else None, broadcast_buffers=False,
                                      find_unused_parameters=True)                      # neither part of a step reads all of them
    ddp.train()

    def keep():
        return {"student": student.state_dict(), "opt": opt.state_dict(), "scaler": scaler.state_dict(),
                "teacher": teacher.state_dict() if ssl else {}, "center": center}

    warned = set()
    for step, batch in run.walk(args, data.rows, batches(data, run.first, args.steps, args.workers), device, precision, keep,
                                lambda step: model.save_pretrained(args.out)):
        lr, wd = warmup_cosine(step, args.lr, args.warmup, args.steps), cosine(step, *DECAY, args.steps)
        temp = ramp(step, TEMPERATURE[0], args.teacher_temp, TEMPERATURE[1] * args.steps)
        set_lr_and_decay(opt, lr, wd, head_rests=step < HEAD_RESTS * args.steps - 1)
        opt.zero_grad()

        # ================================================================ the method
        if args.micro:                                                                  # the same gradient, with less memory: see there
            terms, gauges, after = in_pieces(args, ddp, teacher, perceptual, batch, step, temp, center, scaler, run, device, precision)
        else:
            drop = stochastic_depth(args, step, batch)
            batch = to_device(batch, device)
            with autocast(device, precision), run.counting():
                seen = teacher(batch["crops"], batch["mask"]) if ssl else {}            # what the teacher makes of crops with nothing hidden: logits
            logits = {k: lambda x=x: [x.flatten(0, -2)] for k, x in seen.items()}       # here in one piece; --micro makes many, anew whenever they are asked for
            now, after = balance(args.teacher, logits, temp, center)                    # centers: for these targets; to go on with
            del logits
            targets = {k: centered_softmax(seen.pop(k), now[k], temp) for k in [*seen]}      # logits go as their targets come
            terms, gauges = {}, {"teacher_entropy": entropy(targets["cls"])} if ssl and run.due else {}
            for part, last in by_objective(batch):                                      # views; words and pixels
                with nullcontext() if last or world() == 1 else ddp.no_sync():
                    with autocast(device, precision):
                        with run.counting(times=3):
                            out = ddp(part, drop)
                    own = of_the_batch(args, out) | of_each_row(out, part, targets, perceptual)
                    scaler.scale(weighted(args, own)).backward()
                terms |= {k: term.detach() for k, term in own.items()}
                gauges |= {"spread": spread(out["tokens"][0])} if "tokens" in out and run.due else {}
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip_grad)
        loss = weighted(args, terms)
        if run.sound(loss, norm):
            scaler.step(opt)
            center = after
            with torch.no_grad():
                if clip:
                    model.logit_scale.clamp_(0, math.log(100))                          # CLIP, OpenCLIP
                if ssl:
                    teacher.follow(student, cosine(step, args.ema, 1.0, args.steps))    # DINO: momentum rises to 1
        scaler.update()
        # ================================================================

        if run.due:
            values = run.means(loss=loss, **terms, **gauges)
            values |= {"perceptual": args.perceptual} if rec else {}
            values |= {"logit_scale": model.logit_scale.exp().item()} if clip else {}
            values |= {"warning": warning} if (warning := advice(args, values, step, warned)) else {}
            run.note(**values, lr=lr, weight_decay=wd, grad_norm=norm.item())
        if args.compile and step == run.first:                                          # its operations have been counted: compiled code hides them
            compile_blocks(student, teacher)
    say(f"Next: python eval.py report {args.out}")
    stop()
    return STOPPED if run.leaving else 0


# ---------------------------------------------------------------- the sum of VTP Sec. 3.5: what the student answered (`out`, see Student) against captions, teacher, pixels
def of_the_batch(args, out):
    """The terms that compare rows with each other, over all ranks"""
    terms = {}
    if "img" in out:                                                                    # what the words say
        contrast = siglip_loss if args.clip_loss == "siglip" else clip_loss
        terms["clip"] = contrast(out["img"], out["txt"], out["scale"], out["bias"])
    if "tokens" in out and args.w_koleo:                                                # no two pictures in one place
        terms["koleo"] = sum(koleo_loss(crop) for crop in out["tokens"])
    return terms


def of_each_row(out, batch, targets, perceptual):
    """The terms that are means over rows"""
    terms = {}
    if "cls" in out:                                                                    # what stays when the view changes
        terms["dino"] = dino_loss(out["cls"], targets["cls"])
        terms["ibot"] = ibot_loss(out["patch"], targets["patch"], batch["mask_weight"], n_crops=2 * batch["crops"].shape[1])
    if "pixels" in out:                                                                 # what the eye sees
        terms["rec"] = sum(rec_loss(out["pixels"], batch["image"][batch["rec"]], perceptual))
    return terms


def weighted(args, terms):
    weights = {"clip": args.w_clip, "dino": args.w_ssl, "ibot": args.w_ssl, "koleo": args.w_ssl * args.w_koleo, "rec": args.w_rec}
    return sum(weights[k] * term for k, term in terms.items())


def balance(how, logits, temp, center):
    """logits {name: () -> the teacher's logits, (n, K) at a time} -> {name: center (K,)} for this batch's targets, and to go on with"""
    if how == "sinkhorn":
        return {k: sinkhorn_center(pieces, temp) for k, pieces in logits.items()}, center
    return center, {k: moved_center(center[k], pieces) for k, pieces in logits.items()}


def by_objective(batch):
    """-> (part, is it the last): the views, then the rest. Their graphs share nothing but weights, so each has its backward pass before the next
    one grows: the same gradient in less memory (S at 256 px, of 8 pictures: 0.56 GB in place of 0.99, as study/memory.py counts)."""
    found = [part for part in split(batch) if "crops" in part or "image" in part]
    return [(part, part is found[-1]) for part in found]


def split(batch):
    """-> the part that self-supervision reads, the part that CLIP and reconstruction read"""
    views = {k: x for k, x in batch.items() if k in ("crops", "locals", "mask", "mask_weight")}
    return views, {k: x for k, x in batch.items() if k not in views}


def compared(args, batch):
    """The part of a batch whose features `of_the_batch` needs: crops for KoLeo, the rest for CLIP"""
    views, rest = split(batch)
    return (views if args.w_ssl and args.w_koleo else {}) | (rest if args.w_clip else {})


def in_pieces(args, ddp, teacher, perceptual, batch, step, temp, center, scaler, run, device, precision):
    """The gradient of the whole batch with the memory of --micro pictures -> terms, gauges, center, as above.   Gradient caching, Gao et al. 2021

    1  All pieces, without a graph: a vector a row for the losses that compare rows; the teacher's points, and from them its center.
    2  These losses, and their slope at each of those vectors.
    3  Each piece once more, with a graph: its own losses, and the slopes, which bring it its share of the gradient of the others.
    """
    student, n = getattr(ddp, "module", ddp), args.batch // world() // args.micro
    pieces = cut(batch, n)
    drops = [stochastic_depth(args, step, piece) for piece in pieces]                   # draws the same rows each time
    vectors, points = [], []
    with autocast(device, precision), torch.no_grad():
        for piece, drop in zip(pieces, drops):
            piece = to_device(piece, device)
            if part := compared(args, piece):
                vectors.append(student(part, drop, heads=False))                        # img, txt, scale, bias, tokens
            if teacher:
                with run.counting():
                    points.append(teacher.points(piece["crops"], piece["mask"]))

    def compare(point):
        with autocast(device, precision), torch.no_grad():
            return teacher.dino_head.compare(point)
    logits = {k: lambda k=k: (compare(p[k].flatten(0, -2)) for p in points) for k in (points[0] if points else ())}
    now, after = balance(args.teacher, logits, temp, center)

    at = {k: torch.cat([v[k] for v in vectors], 1) if k == "tokens" else torch.cat([v[k] for v in vectors]) if k in ("img", "txt") else x
          for k, x in (vectors[0].items() if vectors else ())}
    at = {k: x if x is None else x.detach().requires_grad_() for k, x in at.items()}
    terms = of_the_batch(args, at)
    moved = {k: x for k, x in at.items() if x is not None}
    slopes = dict(zip(moved, torch.autograd.grad(weighted(args, terms), moved.values(), allow_unused=True))) if terms else {}
    slopes = {k: s.chunk(n, 1 if k == "tokens" else 0) if s.ndim else [s / n] * n for k, s in slopes.items() if s is not None}

    rows, gauges, tokens = {}, {}, []                                                   # tokens: of the first global crop
    for k, (piece, drop) in enumerate(zip(pieces, drops)):
        targets = {key: centered_softmax(compare(p), now[key], temp) for key, p in points[k].items()} if teacher else {}
        for part, last in by_objective(to_device(piece, device)):
            with nullcontext() if world() == 1 or last and k + 1 == n else ddp.no_sync():
                with autocast(device, precision):
                    with run.counting(times=3):
                        out = ddp(part, drop)
                own = of_each_row(out, part, targets, perceptual)
                carried = sum((to_fp32(out[key]) * slope[k]).sum() for key, slope in slopes.items() if key in out)
                scaler.scale(weighted(args, own) / n + carried).backward()
            rows |= {key: rows.get(key, 0) + term.detach() / n for key, term in own.items()}
            tokens += [out["tokens"][0].detach()] if "tokens" in out else []
        gauges = {"teacher_entropy": gauges.get("teacher_entropy", 0) + entropy(targets["cls"]) / n} if teacher else {}
    if tokens:
        gauges["spread"] = spread(torch.cat(tokens))
    return {k: t.detach() for k, t in terms.items()} | rows, gauges, after


def cut(batch, n):
    """This rank's batch -> n batches with an equal share of every subset: they lie evenly spread, so neighbours stay together"""
    pieces = [{} for _ in range(n)]
    for name, x in batch.items():
        for k, piece in enumerate(pieces):
            if torch.is_tensor(x):
                piece[name] = x.chunk(n, 1 if name in ("crops", "locals", "mask") else 0)[k]
    for k, piece in enumerate(pieces):
        if "rec" in piece:
            piece["rec"] = piece["rec"] - k * len(piece["image"])
    return pieces


def refuse_unequal_pieces(args):
    shares = [n // world() for n, w in ((args.batch, 1), (args.batch_ssl, args.w_ssl), (args.batch_rec, args.w_rec)) if w]
    fitting = [shares[0] // n for n in range(1, shares[0] + 1) if all(share % n == 0 for share in shares)]
    if args.micro and args.micro not in fitting:
        raise ValueError(f"--micro {args.micro} does not cut a process's share of the batch ({' / '.join(map(str, shares))}) into equal pieces; "
                         f"try --micro {min(fitting, key=lambda m: abs(m - args.micro))}")


def forget_activations(student):
    """Each block keeps its input alone and computes itself again for the backward pass: less memory, a third more work.   Chen et al. 2016"""
    for block in blocks_of(student):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(*models):
    """One kernel in place of many small ones: norms, rotations, residuals. It is compiled for each size of crop, with and without gradients

    The checkpoint of forget_activations stays outside: torch.compile skips a block that calls it, silently.
    """
    torch._dynamo.config.recompile_limit = 64                                           # each of these counts; beyond its limit of 8 torch would go back to the slow way
    for block in blocks_of(*models):
        if recomputed := vars(block).pop("forward", None):                              # partial(checkpoint, the plain forward)
            block.forward = partial(checkpoint, torch.compile(recomputed.args[0]), use_reentrant=False)
        else:
            block.compile()


def blocks_of(*models):
    modules = [m for model in models if model is not None for m in model.modules()]
    return [m for m in modules if isinstance(m, (Block, TextBlock))]


# ---------------------------------------------------------------- a step's draws, and its pixels
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


def to_device(batch, device):
    """Pixels travel as bytes and become ImageNet-normalised floats on arrival."""
    out = {k: move_to(v, device) if torch.is_tensor(v) and not k.startswith("rows") else v for k, v in batch.items()}
    if "mask" in out:
        out["mask_weight"] = mask_indices_and_weights(out["mask"])[1]
    return out | {k: normalize(out[k]).to(torch.get_default_dtype()) for k in ("image", "crops", "locals") if k in out}


def introduce(args, model, head, source, device, precision):
    def count(m):
        return sum(p.numel() for p in m.parameters()) / 1e6 if m is not None else 0.0
    text = sum(p.numel() for k, p in model.named_parameters() if k.startswith(("text", "token", "pos", "ln_final"))) / 1e6
    grid = args.image // args.patch
    say(f"objectives   {' + '.join(n for n, on in (('CLIP', args.w_clip), ('SSL', args.w_ssl), ('AE', args.w_rec)) if on)}   weights clip {args.w_clip:g}, ssl {args.w_ssl:g}, rec {args.w_rec:g}"
        f"   perceptual {args.perceptual}")
    say(f"model        {args.size}: trunk {count(model.trunk):.2f}M, decoder {count(getattr(model, 'pixel_decoder', None)):.2f}M, "
        f"text {text:.2f}M, DINO head {count(head):.2f}M parameters; latents {args.latent_dim} x {grid} x {grid}")
    say(f"data         {source.spec}   batch {args.batch} (clip), {args.batch_ssl} (ssl), {args.batch_rec} (rec) over {world()} process(es)"
        + (f", {args.micro} at a time in each" if args.micro else ""))
    say(f"machine      {device}, {precision}{tf32_of(device)}{'' if args.precision else ' (chosen: bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32)'}, "
        f"{torch.get_num_threads()} threads")
    if args.w_ssl and args.batch_ssl < 16:
        say(f"note         {args.batch_ssl} images are few: Sinkhorn shares {args.prototypes} prototypes among 2 x {args.batch_ssl} rows, KoLeo has {args.batch_ssl - 1} neighbours; "
            f"their terms are noisy below 16 (ours)" + ("; --w-koleo 0 would be wiser" if args.batch_ssl < 4 and args.w_koleo else ""))
    if args.w_clip and args.batch < 32:
        say(f"note         a picture has {args.batch - 1} wrong captions to be told from: below 32 (ours) CLIP learns little; --micro gives a larger --batch the memory of a small one")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def flag(name, type, advice, default=None, **more):
        p.add_argument(name, type=type, default=default, help=advice + ("" if default in (None, "") else f" (default {default})"), **more)
    def sized(name, type, advice):
        key = name.strip("-").replace("-", "_")
        (nano, paper, source), two = DEFAULTS[key], gan.DEFAULTS.get(key)
        flag(name, type, f"{advice} (default {paper}, {source}; nano {nano}, ours{f'. Stage 2: {two[1]}, {two[2]}; nano {two[0]}, ours' if two else ''})")
    flag("--out", str, "run folder; one that holds a checkpoint is gone on with", "runs/vtp")
    p.add_argument("--fresh", action="store_true", help="start over in --out")
    flag("--data", str, "shapes, shapes:objects=1,size=0.6-0.9, a folder of class folders, or tar shards 'x-{000..099}.tar'", "shapes")
    flag("--val-data", str, "kept for eval.py, when --data has no val/ of its own")
    flag("--size", str, f"one of {', '.join(SIZES)}: the paper's S, B, L; pico, nano, micro for a CPU", "nano")
    p.add_argument("--light-decoder", action="store_true", help="the paper's decoder for fast experiments: 4 ViT-L layers (Sec. 4.1)")
    flag("--decoder", str, "size of the pixel decoder, if it shall not be the trunk's", choices=[*SIZES])
    sized("--image", int, "side of pictures and global crops, pixels")
    sized("--patch", int, "side of a patch, pixels; one latent each")
    sized("--latent-dim", int, "d, channels of a latent; the paper also tries 256")
    p.add_argument("--heads-after-bottleneck", action="store_true", help="CLIP and DINO read the d latent channels instead of the full width (released code: full width)")
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
    flag("--warmup", int, "steps of linear warm-up (default a tenth of the run, as DINOv2; stage 2 a sixteenth, RAE)")
    sized("--ema", float, "teacher momentum at the start; rises to 1 by a cosine")
    flag("--layer-decay", float, "factor on the learning rate for each block that stands above; 1: none (OpenCLIP); DINOv2's ViT-L recipe 0.9", 1.0)
    flag("--patch-lr", float, "factor on the learning rate of the patch embedding; 1: none (OpenCLIP); DINOv2 0.2", 1.0)
    flag("--clip-grad", float, "largest gradient norm; borrowed from DINOv2, there per part. Stage 2 and baselines do not clip unless it is typed (RAE)", 3.0)
    flag("--stage", int, "1: words, views, pixels together; 2: the decoder alone, with a GAN, the tokenizer frozen (paper Sec. 3.2)", 1, choices=[1, 2])
    flag("--init", str, "stage 2: the run, or the released weights, whose decoder is fine-tuned; data, seed and picture side are its own unless typed, --out is INIT-gan")
    flag("--w-gan", float, f"stage 2: weight of the GAN, times VQGAN's adaptive weight; 0 turns it off (default {gan.DEFAULTS['w_gan'][1]}, {gan.DEFAULTS['w_gan'][2]})")
    flag("--gan-start", int, "stage 2: step from which the decoder listens to the discriminator (default half of the run; the discriminator learns from three eighths of it: RAE)")
    flag("--ema-decoder", float, f"stage 2: momentum of the average of the decoder that is saved (default {gan.DEFAULTS['ema_decoder'][1]}, {gan.DEFAULTS['ema_decoder'][2]}; "
                                 f"nano {gan.DEFAULTS['ema_decoder'][0]}, ours)")
    flag("--baseline", str, "train another tokenizer of the paper in place of VTP: ldm, a convolutional autoencoder (Table 1); vavae, one aligned to --encoder (Fig. 9); "
                            "rae, a decoder on --encoder (Fig. 8)", choices=["ldm", "vavae", "rae"])
    flag("--encoder", str, "--baseline vavae, rae: the frozen encoder, a run or released weights")
    flag("--seed", int, "same seed, same machine: the same run (to the bit on a CPU)", 0)
    flag("--workers", int, "processes that prepare data; changes nothing but speed", 4 if (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 4 else 0)
    flag("--device", str, "cpu, cuda or mps (default the best present)")
    flag("--precision", str, "fp32, bf16 or fp16 autocast (default by device, and said); fp64: for proofs, slow", choices=["fp32", "bf16", "fp16", "fp64"])
    flag("--micro", int, "pictures at a time on each process: the gradient stays that of the whole batch, memory does not grow with it; costs one forward pass more, of nano here 45 % (default 0: all at once)", 0)
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: blocks compute themselves again for the backward pass, a third more work for much less memory")
    p.add_argument("--compile", action="store_true", help="torch.compile for every block: 1.05 to 1.2 times as fast (S, nano; 2 CPU cores, bf16) after half a minute or more; wants a C++ compiler, on "
                                                          "GPUs Triton. Its rounding differs, and the first step's is not compiled: going on is no longer equal to the bit")
    flag("--max-bad", float, "share of unreadable samples above which the run stops (and more than 10); ours", 0.1)
    flag("--log-every", int, "steps between lines of log.jsonl", 10)
    flag("--save-every", int, "steps between checkpoints", 500)
    args = p.parse_args()
    typed = typed_flags(p)
    if args.baseline:
        return baselines.flags(args, typed)
    if args.stage == 2:
        return gan.flags(args, typed)
    if idle := typed.keys() & {*gan.OWN}:
        p.error(f"--{', --'.join(sorted(idle)).replace('_', '-')}: for stage 2; add --stage 2 (all but --init: or --baseline)")
    if args.encoder:
        p.error("--encoder: for --baseline vavae or rae; add one of them")
    if args.size not in SIZES:
        p.error(f"--size {args.size} is unknown; choose one of {', '.join(SIZES)}")
    for name, (nano, paper, _) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, nano if args.size in SMALL else paper)
    for name in ("image", "patch", "latent_dim", "steps", "batch", "batch_ssl", "batch_rec", "prototypes", "log_every", "save_every"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: wanted 1 or more")
    if args.image % args.patch:
        p.error(f"--image {args.image} is no multiple of --patch {args.patch}; try --image {max(args.image // args.patch, 1) * args.patch}")
    args.local_image = args.local_image or max(round(args.image * 96 / 224 / args.patch), 1) * args.patch
    if args.local_image % args.patch:
        p.error(f"--local-image {args.local_image} is no multiple of --patch {args.patch}")
    if args.batch_ssl == 1 and args.w_ssl and args.w_koleo:
        p.error("--batch-ssl 1: KoLeo wants a neighbour to flee from; take 2 or more, or --w-koleo 0")
    if args.micro < 0 or not 0 <= args.max_bad <= 1:
        p.error(f"--micro {args.micro}, --max-bad {args.max_bad}: wanted 0 or more, and a share from 0 to 1")
    if max(args.w_clip, args.w_ssl, args.w_rec) <= 0 or min(args.w_clip, args.w_ssl, args.w_rec) < 0:
        p.error("all of --w-clip, --w-ssl, --w-rec must be 0 or more, and one above 0: nothing would be learned")
    return args


def typed_flags(p):
    """-> {name: value} of what the user typed, without the defaults"""
    unset = argparse.Namespace(**dict.fromkeys(vars(p.parse_args([]))))
    return {k: v for k, v in vars(p.parse_args(namespace=unset)).items() if v is not None}


if __name__ == "__main__":
    try:
        args = arguments()
        if args.stage == 2:
            status = gan.train(args, clean_steps, batches)
        elif args.baseline:
            status = baselines.train(args, clean_steps, batches)
        else:
            status = main(args)
        raise SystemExit(status)
    except (ValueError, OSError) as problem:
        raise SystemExit(f"train.py: {problem}") from problem
