"""Stage 1 of VTP: train a ViT with CLIP, self-distillation and reconstruction.   VTP Sec. 3

    loss = w_clip * clip + w_ssl * (dino + ibot + 0.1 koleo) + w_rec * (L1 + LPIPS)

(The paper does not name KoLeo. It is a part of DINOv2, which the paper follows.)

    python train.py --perceptual none                  nano on the built-in shapes, on a laptop
    torchrun --nproc-per-node 8 train.py --size L --data DIR --out runs/L
    python train.py --init WEIGHTS --data DIR          go on from released weights, or from a run

The paper's variants differ in the loss weights: --w-clip 0 --w-ssl 0 for AE, --w-ssl 0 for CLIP+AE,
--w-clip 0 for SSL+AE. Other trainings have flags of their own (--help shows them):
    python train.py --stage 2 --init runs/vtp       the pixel decoder alone, with a GAN (Sec. 3.2)
    python train.py --baseline ldm | vavae | rae    the paper's comparisons (Table 1, Fig. 8, 9)

The run folder holds the model, checkpoints of the whole training state, and the log. The same
command continues a run.

Sources of values: paper; released code (github.com/MiniMax-AI/VTP: the model with its teacher and
heads, and the evaluation, but no losses, data or optimizer); DINO, DINOv2, OpenCLIP (borrowed,
because the paper follows them); ours (our own choice).
"""
import argparse
import math
import sys
from functools import partial
from itertools import chain

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from data import Batch, TrainBatches, clean_batches, open_data, prefetch  # noqa: F401  for plan
from tokenizer import get_tokenizer
from vtp_min import losses
from vtp_min.device import autocast, setup_device, tf32_of
from vtp_min.dist import (average_gradients, broadcast_parameters, cleanup, print0, rank,
                          world_size)
from vtp_min.model import SIZES, SMALL, DINOHead, Student, Teacher, VTPConfig, VTPModel
from vtp_min.optim import cosine, linear, param_groups, set_lr, warmup_cosine
from vtp_min.run import Run, parse_settings
from vtp_min.text import TextBlock
from vtp_min.vit import Block

# ---------------------------------------------------------------- the method
def compute_gradients(batch, teacher_temp, args, student, teacher, lpips, targets, amp, scaler,
                      device):
    """Losses and gradients of one training step.   VTP Sec. 3.2 to 3.6

    batch         this process's images (data.Batch): B images; Bs of them also have crops, and Br
                  of them are reconstructed
        image (B, 3, H, W), text (B, T)    image-caption pairs for CLIP
        rec (Br,)                          indices, among the B images, of those to reconstruct
        crops (2, Bs, 3, H, W)             two global crops of each image
        locals (V, Bs, 3, s, s)            V local crops of s x s pixels
        mask (2, Bs, N)                    True: this patch of a global crop is masked (iBOT)
        mask_index (M,)                    positions of the masked patches in mask.flatten()
        mask_weight (M,), n_crops          their weights, and the number of crops, in ibot_loss
        keep                               stochastic depth: {"image", "rec", "ssl" or "local": for
                                           each block, which images pass through it}
    teacher_temp  temperature of the teacher's probabilities
    student       model.Student, trained by gradients      teacher  its moving average, or None
    lpips         the perceptual loss, or None: LPIPS, or ours (--perceptual efficientnet)
    targets       losses.TeacherTargets: turns the teacher's logits into probabilities
    amp, scaler   autocast context; gradient scaler, active for fp16 only

    Gradients are added to .grad of the student's parameters. Parts 1 and 2 below have one backward
    pass each: the sum of both gradients is the gradient of the total loss, and the memory of part 1
    is free before part 2 needs its own.

    Returns terms and diagnostics, dicts of detached scalar tensors.
    """
    batch = batch.to(device)            # .to also converts bytes to ImageNet-normalised floats
    terms, diagnostics = {}, {}

    # 1. Self-distillation on crops: DINO, iBOT, KoLeo                              Sec. 3.3
    if args.w_ssl:
        with amp:
            # The teacher sees whole crops. At each masked patch, the student has to predict the
            # prototype probabilities that the teacher gives to this patch (iBOT).
            t_cls_logits, t_patch_logits = teacher(batch.crops, batch.mask_index)
            # One forward pass of the masked global crops serves both losses (DINOv2): DINO uses
            # their class tokens, iBOT their masked patches. Sec. 3.3 reads as if DINO used unmasked
            # crops, but that would need another pass.
            s_cls_logits, s_patch_logits, class_tokens = student.views(
                batch.crops, batch.locals, batch.mask, batch.mask_index, batch.keep)
        t_cls_probs, t_patch_probs = targets(t_cls_logits, t_patch_logits, teacher_temp)
        ssl = {"dino": losses.dino_loss(s_cls_logits, t_cls_probs),
               "ibot": losses.ibot_loss(s_patch_logits, t_patch_probs, batch.mask_weight,
                                        batch.n_crops)}
        if args.w_koleo:
            # KoLeo pushes different images apart. The two crops of an image are in separate calls,
            # so they are not pushed apart. Summed, not averaged, as in DINOv2.
            ssl["koleo"] = losses.koleo_loss(class_tokens[0]) + losses.koleo_loss(class_tokens[1])
        scaler.scale(losses.total_loss(ssl, args)).backward()
        terms |= detach(ssl)
        diagnostics["teacher_entropy"] = losses.entropy(t_cls_probs)
        diagnostics["feature_std"] = losses.feature_std(class_tokens[0])
        # delete the last references, so that this memory is free for part 2
        del t_cls_logits, t_patch_logits, t_cls_probs, t_patch_probs
        del s_cls_logits, s_patch_logits, class_tokens, ssl

    # 2. CLIP and reconstruction, on one crop of 90 to 100 % (OpenCLIP)            Sec. 3.2, 3.4
    if args.w_clip or args.w_rec:
        clip_rec = {}
        with amp:
            cls, patches = student.encode(batch.image, batch.keep["image"])  # (B, D), (B, N, D)
            if args.w_clip:
                image_emb = student.embed_image(cls, patches)                # (B, E)
                text_emb = student.embed_text(batch.text)                    # (B, E)
                scale, bias = student.logit_scale_and_bias()
                clip_rec["clip"] = losses.contrastive_loss(args.clip_loss, image_emb, text_emb,
                                                           scale, bias)
                diagnostics["logit_scale"] = scale.detach()
            if args.w_rec:
                rec_patches = student.rec_patches(batch, patches)            # (Br, N, D)
                pixels = student.decode(rec_patches)                         # (Br, 3, H, W)
                clip_rec["rec"] = losses.rec_loss(pixels, batch.image[batch.rec], lpips)
        scaler.scale(losses.total_loss(clip_rec, args)).backward()
        terms |= detach(clip_rec)

    terms = {"loss": losses.total_loss(terms, args)} | terms
    return terms, diagnostics


def train(args, run, batches, step_gradients, student, teacher, targets, optimizer, scaler, state):
    """The training loop, starting from the last checkpoint.

    run             the run folder (run.Run)
    batches         yields one batch per step
    step_gradients  (batch, teacher_temp) -> terms, diagnostics: compute_gradients, or its
                    gradient-caching form (--micro)
    state           all objects whose state a checkpoint holds
    """
    for step in range(run.step, args.steps):
        lr, last_layer_lr, weight_decay, teacher_temp, momentum = schedule(step, args)
        set_lr(optimizer, lr, last_layer_lr, weight_decay)
        optimizer.zero_grad()
        terms, diagnostics = step_gradients(next(batches), teacher_temp)
        average_gradients(student, dtype=args.grad_dtype)      # over all processes
        scaler.unscale_(optimizer)                       # clipping needs the true gradients
        grad_norm = clip_grad_norm_(student.parameters(), args.clip_grad)
        # Are all losses and gradients finite, on all processes? Has any process got a signal to
        # stop? One all_reduce answers both, so that all processes do the same.
        finite, stop = run.agree(terms, grad_norm)
        if finite:
            scaler.step(optimizer)
            student.clamp_logit_scale()
            if teacher is not None:
                teacher.update(student, momentum)        # moving average of the student's weights
                targets.step()                           # moving average of the teacher's logits
        scaler.update()
        diagnostics["weight_decay"] = weight_decay
        run.after_step(step, terms, diagnostics, grad_norm, lr, state)       # log, checkpoint
        if stop:                                         # after_step has saved a checkpoint
            break


def detach(terms):
    return {name: term.detach() for name, term in terms.items()}


def schedule(step, args):
    """-> lr, lr of the DINO head's last layer, weight decay, temperature and EMA momentum of the
    teacher"""
    lr = warmup_cosine(step, args.lr, args.warmup, args.steps)
    # The prototypes stay fixed during the first 1 % of training, which stabilises the start (DINO).
    # One step less (ours): of a run of up to 100 steps, 1 % is not worth a special phase.
    frozen = step < args.freeze_last_layer * args.steps - 1
    last_layer_lr = 0.0 if frozen else lr
    weight_decay = cosine(step, args.weight_decay, args.weight_decay_end, args.steps)
    # A higher temperature at the start would make the targets uniform (DINO).
    teacher_temp = linear(step, args.teacher_temp_start, args.teacher_temp,
                          args.teacher_temp_warmup * args.steps)
    # The momentum rises to 1: the average covers more and more steps, and the targets change less
    # and less (DINO).
    momentum = cosine(step, args.ema, 1.0, args.steps)
    return lr, last_layer_lr, weight_decay, teacher_temp, momentum

# ---------------------------------------------------------------- setup
def main(args):
    """Stage 1, from the flags to the trained model -> exit status"""
    from vtp_min.extras import plan
    device, precision = setup_device(args)
    if args.fast and device.type == "cpu":
        # faster forms of functions of vit.py and losses.py, equal up to rounding
        from vtp_min.extras import fast
        fast.install(free_memory=bool(args.free_memory))
    settings = vars(args) | {"precision": precision, "machine": f"{device}{tf32_of(device)}"}
    if args.init:
        from vtp_min.extras.perceptual import inherited
        settings |= inherited(args)
    if args.warmup is None:
        # This default follows from --steps. It is not part of the settings that must stay equal
        # when a run continues, because a run may continue with more --steps.
        args.warmup = max(args.steps // 10, 1)

    # Data. Stochastic depth is drawn with the batch, for each of `depth` blocks, so that the result
    # does not depend on the number of processes.
    data = train_batches(args, depth=model_config(args).vision_depth)
    # memory, time and what is missing, before anything large is allocated
    plan.check(sys.modules[__name__], args, device, precision)

    # models
    torch.manual_seed(args.seed)
    model, head = build_model(args)
    student = Student(model, head).to(device)
    broadcast_parameters(student)               # before the teacher, which copies the student
    teacher = Teacher(student).to(device) if args.w_ssl else None
    targets = losses.TeacherTargets(args.teacher, args.prototypes, device)
    lpips = None
    if args.w_rec and args.perceptual != "none":
        from vtp_min.extras import perceptual
        lpips = perceptual.build(args.perceptual).to(device)
    groups = param_groups(student, args.layer_decay, args.patch_lr)
    # fused: one kernel updates all weights (not tried on MPS)
    optimizer = torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), eps=args.eps,
                                  fused=device.type != "mps")
    # fp16 gradients underflow unless the loss is scaled up; bf16 and fp32 need no scaling
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step_gradients = compute_gradients
    if args.micro:
        from vtp_min.extras import gradcache
        step_gradients = gradcache.compute_gradients_cached
    step_gradients = partial(step_gradients, args=args, student=student, teacher=teacher,
                             lpips=lpips, targets=targets, amp=autocast(device, precision),
                             scaler=scaler, device=device)

    # run folder
    run = Run(args.out, settings, args.fresh, {"data": data.source, "init": args.init})
    state = {"student": student, "optimizer": optimizer, "scaler": scaler, "targets": targets}
    if teacher is not None:
        state["teacher"] = teacher
    run.restore(state)
    plan.print_summary(args, model, head, data, device, precision)
    batches = prefetch(data, run.step, args.steps, args.workers)
    first, batches = peek(batches)              # FLOPs follow from the shapes of a batch
    run.start(args, data.images_per_step, device, precision,
              export=lambda step: model.save_pretrained(args.out),
              flops=count_flops(args, model, first), check=collapse_check(args))
    del first                                   # its memory is free after the first step
    wrap_blocks(args, student, teacher)
    batches = run.watch(batches)                # measures the wait for data, reports bad samples
    train(args, run, batches, step_gradients, student, teacher, targets, optimizer, scaler, state)
    status = run.finish()
    if status == 0:
        print0(f"Next: python eval.py report {args.out}")
    return status


def model_config(args):
    """-> VTPConfig"""
    if args.init:
        from vtp_min.extras import finetune
        config = finetune.new_config(args)
    else:
        config = VTPConfig.of_size(
            args.size, args.image, args.patch, args.latent_dim, clip=args.w_clip > 0,
            rec=args.w_rec > 0, light_decoder=args.light_decoder, decoder=args.decoder)
    # released code: CLIP and DINO heads read the full width, not the d latent channels
    config.vision_bottleneck_ae_only = not args.heads_after_bottleneck
    if args.clip_loss == "siglip":              # SigLIP starts at scale 10 and bias -10
        config.init_logit_scale, config.init_logit_bias = math.log(10), -10.0
    return config


def build_model(args):
    """-> VTPModel, and a DINOHead or None"""
    model = VTPModel(model_config(args))
    head = None
    if args.w_ssl:
        head = DINOHead(model.feature_dim, args.prototypes, args.head_hidden, args.head_bottleneck)
    if args.init:
        from vtp_min.extras import finetune
        finetune.initialise(model, head, args)
    return model, head


def train_batches(args, depth):
    tokenizer = get_tokenizer("ViT-B-32")
    data = TrainBatches(
        None, tokenizer, seed=args.seed, batch=args.batch, batch_ssl=args.batch_ssl,
        batch_rec=args.batch_rec, clip=args.w_clip > 0, ssl=args.w_ssl > 0, rec=args.w_rec > 0,
        image=args.image, local_image=args.local_image, n_local=args.locals, patch=args.patch,
        rank=rank(), world_size=world_size(), drop_clip=args.drop_clip, drop_rec=args.drop_rec,
        drop_ssl=args.drop_ssl, depth=depth)
    if args.micro:
        from vtp_min.extras.gradcache import check_micro
        check_micro(args)
    # opened last, after all sizes are checked: indexing thousands of tars takes time
    data.source = open_data(args.data, "train", args.seed, side=args.image)
    return data


def wrap_blocks(args, student, teacher):
    """--compile and --recompute, for each transformer block"""
    if args.compile:
        # each size of crop, with and without gradient, needs a recompilation; above the default
        # limit of 8 PyTorch falls back to eager mode
        torch._dynamo.config.cache_size_limit = 64      # newer name: recompile_limit
    for module in [*student.modules(), *(teacher.modules() if teacher else ())]:
        if not isinstance(module, (Block, TextBlock)):
            continue
        if args.compile:
            module.forward = torch.compile(module.forward)
        if args.recompute:          # outside of the compiled code, which cannot contain it
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def peek(iterator):
    """-> its first item, or None if it has none, and an iterator over all items"""
    first = next(iterator, None)
    if first is None:
        return None, iterator
    return first, chain([first], iterator)


def count_flops(args, model, batch):
    """FLOPs of a step on this process, counted once from the shapes of a batch"""
    if batch is None:
        return 0
    from vtp_min.extras.cost import step_flops
    head = (args.prototypes, args.head_hidden, args.head_bottleneck) if args.w_ssl else None
    return step_flops(model.config, batch, args.w_clip, args.w_ssl, args.w_rec, head)


def collapse_check(args):
    from vtp_min.extras.collapse import collapse_warnings
    return collapse_warnings(args)


# ---------------------------------------------------------------- flags
# name: (default of the small sizes pico, nano, micro: ours;
#        default of S, B, L; source of the default of S, B, L)
FLAG_DEFAULTS = {
    "image": (36, 256, "paper Sec. 4.2"),
    "patch": (9, 16, "paper: f16"),
    "latent_dim": (64, 64, "paper: d64"),
    "steps": (480, 67_000, "paper Sec. 4.5: 1.1 billion samples in batches of 16k"),
    "batch": (48, 16_384, "paper Sec. 4.1: B_clip = 16k"),
    "batch_ssl": (16, 4_096, "paper Sec. 4.1: B_ssl = 4k"),
    "batch_rec": (48, 2_048, "paper Sec. 4.1: B_rec = 2k"),
    "lr": (5e-4, 5e-4, "OpenCLIP"),
}
RECIPE = {   # the rest of the recipe: --set name=value
    "clip_loss": ("clip", "clip", "paper; siglip: each pair by itself"),
    "w_koleo": (0.1, 0.1, "DINOv2; weight within ssl"),
    "locals": (2, 8, "DINOv2; local crops per image"),
    "local_image": (None, None, "DINOv2: 96/224 of --image, in whole patches"),
    "prototypes": (256, 65_536, "DINOv2's default recipe; K of the DINO head"),
    "head_hidden": (256, 2_048, "DINOv2; width of the head's MLP"),
    "head_bottleneck": (64, 256, "DINOv2's default recipe; dimension of the head's unit sphere"),
    "teacher": ("sinkhorn", "sinkhorn", "DINOv2 ViT-L/g, DINOv3; centering: DINO"),
    "teacher_temp": (0.04, 0.07, "DINOv2; 0.07 keeps the teacher of a short run uniform"),
    "teacher_temp_start": (0.04, 0.04, "DINOv2's default recipe"),
    "teacher_temp_warmup": (0.3, 0.3, "DINOv2's default recipe; fraction of the run"),
    "ema": (0.98, 0.994, "DINOv2's ViT-L recipe; rises to 1; short runs need a faster teacher"),
    "freeze_last_layer": (0.01, 0.01, "DINOv2's default recipe; fraction of the run, minus a step"),
    "drop_ssl": (0.0, 0.3, "DINOv2's default recipe; stochastic depth of DINO and iBOT"),
    "drop_clip": (0.0, 0.0, "OpenCLIP has none; stochastic depth of CLIP"),
    "drop_rec": (0.0, 0.0, "ours; if it differs from drop_clip, images are encoded twice"),
    "beta1": (0.9, 0.9, "OpenCLIP's AdamW for ViTs"),
    "beta2": (0.98, 0.98, "OpenCLIP's AdamW for ViTs"),
    "eps": (1e-6, 1e-6, "OpenCLIP's AdamW for ViTs"),
    "weight_decay": (0.04, 0.04, "DINOv2's ViT-L recipe, at the first step"),
    "weight_decay_end": (0.2, 0.2, "DINOv2's ViT-L recipe and OpenCLIP, at the last step"),
    "clip_grad": (3.0, 3.0, "DINOv2, which clips each module separately; we clip all together"),
    "layer_decay": (1.0, 1.0, "OpenCLIP, DINOv2's ViT-L recipe: none; DINOv2's default 0.9"),
    "patch_lr": (1.0, 1.0, "OpenCLIP: none; DINOv2 0.2; factor for the patch embedding"),
    "decoder": (None, None, "paper: the size of the trunk; any other --size"),
    "light_decoder": (False, False, "paper Sec. 4.1: 4 ViT-L layers, for fast experiments"),
    "heads_after_bottleneck": (False, False, "released code; true: CLIP and DINO read d channels"),
    "max_bad": (0.1, 0.1, "ours; larger share of unreadable samples stops the run"),
    "grad_dtype": ("fp32", "fp32", "ours; bf16 halves what processes send to each other"),
    "memory_check": (1, 1, "ours; 0: also starts a run that does not seem to fit in memory"),
    "fast": (1, 1, "ours; 0: textbook forms in place of extras/fast.py"),
    "free_memory": (0, 1, "ours; on Linux CPUs: 1 saves a tenth of the memory, 0 is 1.3x as fast"),
}


def parser():
    from vtp_min.extras.perceptual import CHOICES, HELP
    from vtp_min.extras.workers import default_workers
    p = argparse.ArgumentParser(description=__doc__, epilog=recipe_help(), allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, type, text, default=None, **more):
        key = name.strip("-").replace("-", "_")
        if key in FLAG_DEFAULTS:
            small, large, source = FLAG_DEFAULTS[key]
            text += f" (default {small} for nano, ours; {large} for S, B, L: {source})"
        elif default not in (None, []):
            text += f" (default {default})"
        p.add_argument(name, type=type, default=default, help=text, **more)

    flag("--out", str, "run folder; if it holds a checkpoint, training continues", "runs/vtp")
    p.add_argument("--fresh", action="store_true", help="start over in --out")
    flag("--data", str, "shapes, shapes:objects=1,size=0.6-0.9, a folder of class folders, or tars "
         "'x-{000..099}.tar'", "shapes")
    flag("--val-data", str, "validation data for eval.py, if --data has no val/ of its own")
    flag("--size", str, f"one of {', '.join(SIZES)}: S, B, L are the paper's (default nano; with "
         "--init that of the weights)")
    flag("--image", int, "side of images and global crops in pixels")
    flag("--patch", int, "side of a patch in pixels; each patch has one latent")
    flag("--latent-dim", int, "d, channels of a latent; the paper also tries 256")
    flag("--steps", int, "length of training")
    flag("--batch", int, "image-text pairs per step, over all processes together; halve it if "
         "memory is full")
    flag("--batch-ssl", int, "images of the batch for DINO and iBOT")
    flag("--batch-rec", int, "images of the batch that are reconstructed")
    flag("--micro", int, "gradient caching: images at a time on each process. The gradient is that "
         "of the whole batch, and memory does not grow with --batch; one forward pass more. 0: off",
         0)
    flag("--w-clip", float, "weight of the contrastive loss; paper: 0 or 1", 1.0)
    flag("--w-ssl", float, "weight of DINO + iBOT + KoLeo; paper: 0 or 1", 1.0)
    flag("--w-rec", float, "weight of L1 + LPIPS; paper: 0.1", 0.1)
    flag("--perceptual", str, HELP, "vgg", choices=CHOICES)
    flag("--lr", float, "peak learning rate")
    flag("--warmup", int, "steps of linear warm-up (default: a tenth of --steps, as in DINOv2)")
    flag("--seed", int, "on one machine, an equal seed gives an equal run (to the bit on a CPU)", 0)
    flag("--workers", int, "processes that prepare data; they do not change the result; default: "
         "cores per process less one, at most 32 (4 without CUDA), and 0 with up to 4 cores",
         default_workers())
    flag("--device", str, "cpu, cuda or mps (default: the best one present)")
    flag("--precision", str, "default: bf16 where the hardware multiplies it, fp16 on older GPUs, "
         "else fp32; fp64 is for proofs", choices=["fp32", "bf16", "fp16", "fp64"])
    flag("--save-every", int, "steps between checkpoints", 500)
    flag("--log-every", int, "steps between lines of log.jsonl", 10)
    flag("--stage", int, "2: train the pixel decoder alone with a GAN; see --stage 2 --help", 1,
         choices=[1, 2])
    flag("--init", str, "start from the weights of a run, or from released weights: a folder, or a "
         "Hub id; see docs/weights.md")
    flag("--baseline", str, "train ldm, vavae or rae instead; see --baseline ldm --help")
    p.add_argument("--recompute", action="store_true",
                   help="activation checkpointing: a third more work, much less memory")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile of each block: 1.05 to 1.2 times as fast (S, nano; 2 CPU "
                        "cores, bf16) after half a minute; needs a C++ compiler, or Triton")
    flag("--set", str, "any value of the table below, for example --set ema=0.99; repeatable", [],
         action="append", metavar="NAME=VALUE")
    return p


def recipe_help():
    lines = ["The rest of the recipe, changed with --set name=value:", "",
             f"  {'name':<22} {'nano (ours)':<12} {'S, B, L':<10} source of the latter"]
    for name, (small, large, source) in RECIPE.items():
        lines.append(f"  {name:<22} {small!s:<12} {large!s:<10} {source}")
    return "\n".join(lines)


def arguments(argv=None):
    """Flags and recipe in one namespace, checked. argparse exits with a message about a mistake."""
    p = parser()
    args = p.parse_args(argv)
    try:
        if args.init:
            from vtp_min.extras import finetune
            finetune.fill_in(args)             # what the weights decide, such as the size
        else:
            args.size = args.size or "nano"
            if args.size not in SIZES:
                raise ValueError(f"--size {args.size} is unknown; choose one of {', '.join(SIZES)}")
        column = 0 if args.size in SMALL else 1
        for name, row in FLAG_DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, row[column])
        recipe = {name: row[column] for name, row in RECIPE.items()}
        recipe |= parse_settings(args.set, recipe)
        del args.set, args.stage, args.baseline
        for name, value in recipe.items():
            setattr(args, name, value)
        check_arguments(args)
    except ValueError as problem:
        p.error(str(problem))
    return args


def check_arguments(args):
    """ValueError for values that cannot work. TrainBatches checks the batch sizes."""
    from vtp_min.extras.flag_ranges import check_numbers
    check_numbers(args, RECIPE)
    check_choices(args)
    check_sides(args)
    weights = args.w_clip, args.w_ssl, args.w_rec
    if max(weights) <= 0 or min(weights) < 0:
        raise ValueError("all of --w-clip, --w-ssl, --w-rec must be 0 or more, and one above 0: "
                         "nothing would be learned")
    if args.batch_ssl == 1 and args.w_ssl and args.w_koleo:
        raise ValueError("--batch-ssl 1: KoLeo needs at least two images; take 2 or more, or "
                         "--set w_koleo=0")


def check_choices(args):
    choices = {"clip_loss": ("clip", "siglip"), "teacher": ("sinkhorn", "centering"),
               "decoder": (None, *SIZES), "grad_dtype": ("fp32", "bf16")}
    for name, known in choices.items():
        if getattr(args, name) not in known:
            raise ValueError(f"--set {name}={getattr(args, name)}: wanted one of "
                             f"{', '.join(map(str, known))}")


def check_sides(args):
    """Images and local crops consist of whole patches. Sets the default of local_image, which
    follows from --image and --patch."""
    if args.image % args.patch:
        side = max(args.image // args.patch, 1) * args.patch
        raise ValueError(f"--image {args.image} is not a multiple of --patch {args.patch}; "
                         f"try --image {side}")
    if args.local_image is None:
        args.local_image = max(round(args.image * 96 / 224 / args.patch), 1) * args.patch
    side = args.local_image
    if type(side) is not int or side < 1 or side % args.patch:
        raise ValueError(f"--set local_image={side} is not a multiple of --patch {args.patch}")


def command(argv):
    """The command line -> exit status. Stage 2 and the baselines have parsers of their own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", default="1")
    first.add_argument("--baseline")
    chosen, _ = first.parse_known_args(argv)
    if chosen.baseline is not None:
        from vtp_min.extras import baselines
        return baselines.main(argv, clean_batches, prefetch)
    if chosen.stage == "2":
        from vtp_min.extras import gan
        return gan.main(argv, clean_batches, prefetch)
    return main(arguments(argv))


if __name__ == "__main__":
    try:
        status = command(sys.argv[1:])
    except (ValueError, OSError) as problem:
        raise SystemExit(f"train.py: {problem}") from problem
    finally:
        cleanup()
    raise SystemExit(status)
