"""Compare our outputs with the stored outputs of the reference code, and print a table.

    python tests/compare.py [--fast] [FOLDER]

FOLDER contains the stored outputs; the default, tests/golden, has parts of the full sets. --fast
compares the forms of extras/fast.py instead of the textbook forms. A row of the table shows:

    outputs      the outputs that are compared
    reference    the project whose code computed the stored outputs
    tensors      number of compared tensors
    largest      largest difference over these tensors
    limit        the limit that came with the stored outputs. "rel": each difference is divided by
                 the largest magnitude of the stored tensor; otherwise it is absolute. A limit of 0
                 means that every bit, id or count must be equal.

The exit status is 1 if a row is above its limit. The test files make the same comparisons one by
one and with more detail; this script counts them.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

import dit
from test_dist import contrast, targets
from test_dit import TINY
from test_fid import chw, drawn_inception
from test_model import LIMITS, outputs, ssl_outputs, ssl_student, ssl_teacher
from tokenizer import get_tokenizer
from vtp_min import VTPConfig, VTPModel, losses, vit
from vtp_min.augment import adm_crop, mask_index_and_weight
from vtp_min.extras import fast
from vtp_min.fid import frechet_distance, statistics
from vtp_min.model import DINOHead, Student
from vtp_min.optim import cosine, linear, param_groups, warmup_cosine
from vtp_min.probes import zero_shot, zero_shot_classifier
from vtp_min.text import quick_gelu

CUT = Path(__file__).parent / "golden"
# Beginning of a name in tests/golden: the corresponding beginning in the full sets. The first that
# matches is used, so a general one ("dit/") comes after its special cases.
FULL_NAMES = {
    "dit/weights/": "dit_tiny/",
    "dit/grid/": "dit_time_grids/",
    "dit/time/": "dit_lognorm_time/",
    "dit/": "dit_tiny_vectors/",
    "fid/images": "fid_inception_features/64x64/images_uint8_nhwc",
    "fid/pool": "fid_inception_features/64x64/pool3_2048_f64",
    "fid/dim8/distance": "fid_frechet/dim8/fid_pytorch_fid",
    "fid/": "fid_frechet/",
    "data/crop": "units/crop",
    "data/masks.": "ibot_masks/ex0/",
    "data/fixed.": "ibot_masks/fixed/",
    "zero_shot/text": "clip_zero_shot/text_features_class_template",
    "zero_shot/image": "clip_zero_shot/image_features",
    "zero_shot/classifier": "clip_zero_shot/classifier_DxC",
    "zero_shot/": "clip_zero_shot/",
}
# name in the stored sets, type, limit
PRECISIONS = ("f64", torch.float64, 1e-8), ("f32", torch.float32, 2e-5)


def full_name(name):
    """Name of an array in tests/golden -> its name in the full sets"""
    for beginning, full_beginning in FULL_NAMES.items():
        if name.startswith(beginning):
            return full_beginning + name.removeprefix(beginning)
    return name


class Golden(dict):
    """All npz arrays and DiT weights of a folder, {"set/key": tensor}, with the names of the full
    sets"""
    def __init__(self, folder):
        self.folder = Path(folder)
        for path in sorted(self.folder.glob("*.npz")):
            self.add(path.stem, np.load(path))
        for path in sorted(self.folder.glob("*.safetensors")):
            self.add(path.stem, safetensors.torch.load_file(path))

    def add(self, stem, arrays):
        for key, value in arrays.items():
            if getattr(value.dtype, "kind", "f") == "U":        # two sets also contain strings
                continue
            self[full_name(f"{stem}/{key}")] = torch.as_tensor(value)

    def under(self, prefix):
        """-> {rest of the key: tensor}, for the keys that start with prefix"""
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}

    def cases(self, prefix, end):
        """-> sorted list of the texts between prefix and end, for the keys that have both"""
        keys = [k for k in self if k.startswith(prefix) and k.endswith(end)]
        return sorted(k.removeprefix(prefix).removesuffix(end) for k in keys)

    def json(self, name):
        """-> contents of a JSON file; {} if this folder does not have it"""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}


def leaf(x, dtype):
    """A leaf of the autograd graph: a tensor for which a gradient is computed"""
    return x.to(dtype).requires_grad_()


def gradients(loss, inputs):
    """Gradients of a loss.   inputs {name: leaf} -> {name: gradient}"""
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()))))


# ---------------------------------------------------------------- sections
# A section takes g, the Golden of a folder, and yields (title, reference, limit, ours, theirs).
# `ours` and `theirs` are tensors, numbers or lists, or dicts of these. Of two dicts, the keys that
# both have are compared.

def checkpoints(g):
    for name in ("vtp_a", "vtp_b", "vtp_p8"):
        folder = g.folder / name
        if not folder.exists():
            continue
        io = np.load(folder / "io.npz")
        for rope, prefix, column in (("bfloat16", "", 0), ("float32", "rope_fp32.", 2)):
            model = VTPModel.from_pretrained(folder, rope)
            for key, x in outputs(model, io, rope == "float32"):
                if prefix + key not in io:
                    continue
                kind = next(kind for kind in LIMITS if key.startswith(kind))
                title = f"checkpoint, {rope} RoPE: {kind or 'tokens, latents, masked, layers'}"
                yield title, "VTP", f"{LIMITS[kind][column]:g}", x, io[prefix + key]
        for same in saved_again(folder):
            yield "checkpoint saved again: name, type, every bit", "VTP", 0, same, True


def saved_again(folder):
    """Load and save a checkpoint; for each tensor, yield whether both files have it, with the same
    type and bits"""
    with TemporaryDirectory() as saved:
        VTPModel.from_pretrained(folder).save_pretrained(saved)
        ours = safetensors.torch.load_file(Path(saved, "model.safetensors"))
    theirs = safetensors.torch.load_file(folder / "model.safetensors")
    for k in ours.keys() | theirs.keys():
        both = k in ours and k in theirs
        yield both and ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k])


def training_model(g):
    folder = g.folder / "vtp_ssl"
    io = np.load(folder / "io.npz")
    for rope, prefix, limit in (("bfloat16", "", 2e-3), ("float32", "rope_fp32.", 5e-6)):
        student, state = ssl_student(folder, rope)
        for key, x in ssl_outputs(student, state, io):
            title = f"student, teacher, stochastic depth, {rope} RoPE"
            yield title, "VTP", limit, x, io[prefix + key]
    logits = student.dino_head(torch.from_numpy(io["head.input"]))
    yield "DINO head alone", "VTP", 1e-6, logits, io["head.output"]
    # the file has hashes of the averaged weights
    ema = g.json("vtp_ssl/ema.json")
    teacher = ssl_teacher(student, state)
    teacher.update(student, ema["momentum"])
    for name, p in teacher.named_parameters():
        found = hashlib.sha256(p.numpy().tobytes()).hexdigest()
        same = found == ema["tensors"]["teacher_" + name]["sha256_f32le"]
        yield "EMA teacher after a step, every bit", "VTP", 0, same, True


def components(g):
    u = g.under("units/")
    for name in vit.NORMS:
        norm = vit.NORMS[name](40)
        state = {"weight": u["norm.weight"]}
        if name != "rmsnorm":
            state["bias"] = u["norm.bias"]
        norm.load_state_dict(state)
        yield "norms", "VTP", "1e-06 rel", norm(u["norm.x"]), u[f"norm.{name}"]
    for name in {k.split(".")[0] for k in u if k.startswith("swiglu")}:
        ffn = vit.FFNS[name](20, 4.0)
        ffn.load_state_dict({k: u[f"{name}.{k}"] for k in ffn.state_dict()})
        yield "SwiGLU, GELU, QuickGELU", "VTP", 1e-6, ffn(u[f"{name}.x"]), u[f"{name}.y"]
    activations = {"quick_gelu": quick_gelu(u["act.x"]), "gelu": F.gelu(u["act.x"])}
    yield "SwiGLU, GELU, QuickGELU", "VTP", 1e-6, activations, g.under("units/act.")
    yield from rope_tables(g)
    tables = vit.RoPE(64, torch.bfloat16)(4, 5, prefix=1)
    rotated = {}
    for x in "qk":
        rotated[f"{x}_out"] = vit.rotate(u[f"rotate.{x}_in"], *tables)
    yield "RoPE in bfloat16", "VTP", 0, rotated, g.under("units/rotate.")
    for c in g.cases("units/crop", ".in"):
        image = Image.fromarray(u[f"crop{c}.in"].numpy())
        cropped = np.array(adm_crop(image, int(u[f"crop{c}.size"])))
        yield "centre crop, 8-bit", "ADM", 0, cropped, u[f"crop{c}.out"]


def rope_tables(g):
    for name in g.cases("units/rope", ".sin"):                 # .hd64_4x5, _fp32.hd24_1x5, ...
        c, grid = name.split(".hd")[1].split("_")              # "64", "4x5"
        h, w = map(int, grid.split("x"))
        dtype = "float32" if name.startswith("_fp32") else "bfloat16"
        limit = 1e-6 if dtype == "float32" else 0
        sin, cos = vit.RoPE(int(c), getattr(torch, dtype))(h, w)
        tables = {"sin": sin, "cos": cos}
        yield f"RoPE in {dtype}", "VTP", limit, tables, g.under(f"units/rope{name}.")


def tokenizer(g):
    for case in g.json("bpe.json"):
        for length in (77, 32):
            ids = get_tokenizer("ViT-B-32", length)([case["text"]])[0]
            yield "tokenizer: ids", "VTP", 0, ids, case[f"ids{length}"]
        decoded = get_tokenizer().decode(case["encode"]) == case["decoded"]
        yield "tokenizer: decoded text", "VTP", 0, decoded, True


def self_distillation(g):
    for p, dtype, tight in PRECISIONS:
        for mode in ("centering", "sinkhorn"):
            yield from dino(g, p, dtype, f"{tight:g} rel", mode)
        for mode in ("centering", "sinkhorn"):
            # the reference stores the weights of masked patches in float32
            limit = 1e-7 if p == "f64" else tight
            yield from ibot(g, p, dtype, f"{limit:g} rel", mode)
        for case in g.cases("koleo/", "/x"):
            x = leaf(g[f"koleo/{case}/x"], dtype)
            loss = sum_of_crops(x) if case == "two_crops" else losses.koleo_loss(x)
            found = {"weighted_loss": loss, "loss": loss}
            if case != "duplicate":                # at distance 0, the gradient is not defined
                found["grad"] = torch.autograd.grad(loss, [x])[0]
            theirs = g.under(f"koleo/{case}/{p}/")
            yield f"KoLeo: loss, gradients, {p}", "DINOv2", f"{tight:g} rel", found, theirs
    for case in g.cases("ibot_masks/", "/collated_masks"):
        index, weight = mask_index_and_weight(g[f"ibot_masks/{case}/collated_masks"])
        found = {"mask_indices_list": index, "masks_weight": weight}
        title = "iBOT: indices and weights of masks"
        yield title, "DINOv2", 0, found, g.under(f"ibot_masks/{case}/")


def sum_of_crops(x):
    """Sum of the KoLeo losses of two crops, with DINOv2's weight 0.1.   x (2, B, D)"""
    return 0.1 * (losses.koleo_loss(x[0]) + losses.koleo_loss(x[1]))


def teacher_probabilities(mode, logits, center, temp):
    if mode == "centering":
        return losses.centered_softmax(logits, center, temp)
    return losses.sinkhorn(logits, temp)


def dino(g, p, dtype, limit, mode):
    """DINO over several batches, because centring depends on earlier ones.

    p  precision, "f64" or "f32"      mode  "centering" or "sinkhorn"
    """
    center = 0
    for step, temp in enumerate(g["dino_cls_loss/teacher_temps"]):
        x = g.under(f"dino_cls_loss/step{step}/")
        theirs = g.under(f"dino_cls_loss/{p}/{mode}/step{step}/")
        if not theirs:
            continue
        logits = x["teacher_logits"].to(dtype)                                 # (2, B, K)
        probs = teacher_probabilities(mode, logits, center, temp)
        center = center + torch.zeros_like(logits[0, 0])                       # (K,)
        center = losses.update_center(center, logits)
        found = {"teacher_probs": probs}
        students = {}
        for name in ("student_global", "student_local"):
            if name in x:
                students["grad_" + name] = leaf(x[name], dtype)
        if students:
            loss = losses.dino_loss(torch.cat(list(students.values())), probs)
            found |= {"loss_total": loss} | gradients(loss, students)
        yield f"DINO: targets, loss, gradients, {p}", "DINOv2", limit, found, theirs
    title = f"DINO: centre after the last batch, {p}"
    found = {"center_after_last_update": center}
    yield title, "DINOv2", limit, found, g.under(f"dino_cls_loss/{p}/{mode}/")


def ibot(g, p, dtype, limit, mode):
    """iBOT over several batches; arguments as for dino"""
    center = 0
    for step, temp in enumerate(g["ibot_patch_loss/teacher_temps"]):
        x = g.under(f"ibot_patch_loss/step{step}/")
        theirs = g.under(f"ibot_patch_loss/{p}/{mode}/step{step}/")
        if not theirs:
            continue
        logits = x["teacher_logits_masked"].to(dtype)                          # (M, K)
        probs = teacher_probabilities(mode, logits, center, temp)
        center = center + torch.zeros_like(logits[0])                          # (K,)
        center = losses.update_center(center, logits)
        found = {"teacher_probs": probs}
        if "student_logits_masked" in x:
            student = leaf(x["student_logits_masked"], dtype)
            loss = losses.ibot_loss(student, probs, x["masks_weight"], len(x["masks"]))
            found |= {"loss": loss} | gradients(loss, {"grad_student": student})
        yield f"iBOT: targets, loss, gradients, {p}", "DINOv2", limit, found, theirs
    title = f"iBOT: centre after the last batch, {p}"
    found = {"center_after_last_update": center}
    yield title, "DINOv2", limit, found, g.under(f"ibot_patch_loss/{p}/{mode}/")


def contrastive(g):
    for p, dtype, limit in PRECISIONS:
        for name in g.cases(f"clip_single/{p}/", "/loss"):                     # scale0/clip_bias
            scale, kind = name.split("/")
            x = {"grad_raw_image": leaf(g["clip_single/raw_image"], dtype),
                 "grad_raw_text": leaf(g["clip_single/raw_text"], dtype),
                 "grad_logit_scale_log": leaf(g[f"clip_single/{scale}/logit_scale_log"], dtype),
                 "grad_logit_bias": leaf(g[f"clip_single/{scale}/logit_bias"], dtype)}
            raw_img, raw_txt, log_scale, bias = x.values()
            img = F.normalize(raw_img, dim=-1)
            txt = F.normalize(raw_txt, dim=-1)
            if kind == "siglip":
                method = "SigLIP"
                loss = losses.siglip_loss(img, txt, log_scale.exp(), bias)
            else:
                method = "CLIP"
                bias = None if kind == "clip" else bias
                loss = losses.clip_loss(img, txt, log_scale.exp(), bias)
                # a bias added to all logits does not change a softmax: no gradient to compare
                del x["grad_logit_bias"]
            found = {"loss": loss} | gradients(loss, x)
            theirs = g.under(f"clip_single/{p}/{name}/")
            yield f"{method}: loss, gradients, {p}", "OpenCLIP", f"{limit:g} rel", found, theirs
    yield from zero_shot_rows(g)


def zero_shot_rows(g):
    x = g.under("clip_zero_shot/")
    # Only text features are stored, not texts. Class c has the name "c" and template t is "t {}",
    # so the text "t c" stands for the stored feature [c, t].
    C, T, _ = x["text_features_class_template"].shape
    features = {}
    for c in range(C):
        for t in range(T):
            features[f"{t} {c}"] = x["text_features_class_template"][c, t]

    def encode(texts):
        return torch.stack([features[text] for text in texts])

    names = [str(c) for c in range(C)]
    templates = [f"{t} {{}}" for t in range(T)]
    W = zero_shot_classifier(encode, names, templates)
    found = {"classifier_DxC": W, "logits": 100 * F.normalize(x["image_features"], dim=-1) @ W}
    yield "zero-shot: classifier, logits", "OpenCLIP", "2e-05 rel", found, x
    accuracy = zero_shot(x["image_features"], W, x["target"])
    yield "zero-shot: top-1, top-5", "OpenCLIP", 0, accuracy, x


def run_rank(rank, folder, results):
    """One of two processes: compute the losses for `folder`, write them to results/RANK.pt"""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{results}/rendezvous",
                                         rank=rank, world_size=2)
    torch.save((contrast(rank, folder), targets(rank, folder)), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def two_processes(g):
    with TemporaryDirectory() as results:
        torch.multiprocessing.spawn(run_rank, (str(g.folder), results), nprocs=2)
        ranks = [torch.load(f"{results}/{r}.pt") for r in range(2)]
    logits = torch.cat([g[f"dino_two_process/rank{r}/patch_logits"] for r in range(2)])
    mean = logits.mean(0)
    for r, (contrasts, found) in enumerate(ranks):
        for kind, variant in (("clip", "clip_local1_grad1"), ("siglip", "siglip_gather")):
            yield from two_process_rows(g, r, kind, variant, contrasts[kind])
        # The center of iBOT differs on purpose: DINOv2 averages the means of the ranks, ours is the
        # mean over the rows of all ranks.
        patch = {k: found.pop(k) for k in ("patch_center_1", "patch_center_2")}
        title = "DINO, iBOT, two processes: Sinkhorn, DINO centre"
        yield title, "DINOv2", "2e-05 rel", found, g.under(f"dino_two_process/rank{r}/")
        # two updates from 0 with momentum 0.9: 0.1 * mean, then 0.9 * 0.1 * mean + 0.1 * mean
        theirs = {"patch_center_1": 0.1 * mean, "patch_center_2": 0.19 * mean}
        title = "iBOT centre, two processes"
        yield title, "mean of all ranks' rows", "2e-05 rel", patch, theirs


def two_process_rows(g, r, kind, variant, found):
    """Rows of a contrastive loss on two processes.

    kind   'clip' or 'siglip'          variant  name of OpenCLIP's way to gather over processes
    found  loss and gradients of rank r
    """
    limit = "1e-08 rel"
    theirs = g.under(f"clip_two_process/f64/{variant}/rank{r}/")
    yield "CLIP, SigLIP, two processes: loss", "OpenCLIP", limit, found, theirs
    grads = {f"grad_{name}": x for name, x in found.items()}
    if kind == "clip":                             # a softmax does not depend on the bias
        del grads["grad_logit_bias"]
    title = "CLIP, SigLIP, two processes: gradients after DDP"
    theirs = g.under(f"clip_two_process/f64/{variant}/ddp/")
    yield title, "OpenCLIP, two processes", limit, grads, theirs
    theirs = g.under(f"clip_two_process/f64/global_{kind}/")
    yield title, "OpenCLIP, one process", limit, grads, theirs


def schedules(g):
    limit = "1e-08 rel"
    x = g.under("clip_schedule/")
    lr = x["base_lr"].item()
    warmup, n = int(x["warmup"]), int(x["steps"])
    # Our cosine reaches its final value at the last of n steps, as in DINOv3. OpenCLIP's and
    # DINOv2's cosines would reach it one step later, so ours is computed for n + 1 steps.
    rate = [warmup_cosine(s, lr, warmup, n + 1, 0.0) for s in range(n)]
    yield "learning rate: warm-up, cosine", "OpenCLIP", limit, rate, x["cosine"][:n]
    for recipe in g.cases("dino_schedules/", "/cfg/epochs"):
        x = g.under(f"dino_schedules/{recipe}/")
        c = {k.removeprefix("cfg/"): v.item() for k, v in x.items() if k.startswith("cfg/")}
        per_epoch = g["dino_schedules/epoch_length"]
        n = int(c["epochs"] * per_epoch)
        warmup = int(c["warmup_epochs"] * per_epoch)
        temp_warmup = int(c["ttemp_warmup_epochs"] * per_epoch)
        ours = {"wd": [], "momentum": [], "teacher_temp": []}
        for s in range(n):
            ours["wd"].append(cosine(s, c["wd"], c["wd_end"], n + 1))
            ours["momentum"].append(cosine(s, c["mom"], c["mom_end"], n + 1))
            ours["teacher_temp"].append(linear(s, c["ttemp_start"], c["ttemp"], temp_warmup - 1))
        theirs = {k: x[k][:n] for k in ours}
        yield "weight decay, momentum, teacher's temperature", "DINOv2", limit, ours, theirs
        rate = [warmup_cosine(s, c["lr"], warmup, n, c["min_lr"]) for s in range(warmup, n)]
        theirs = x["v3_linear_warmup_cosine_lr"][warmup:n]
        yield "learning rate after the warm-up", "DINOv3", limit, rate, theirs


def parameter_groups(g):
    with torch.device("meta"):                     # the ViT-S/16 of the reference; no memory needed
        config = VTPConfig(vision_embed_dim=384, vision_num_heads=6, vision_ffn_layer="mlp",
                           vision_norm_layer="layernorm", vision_init_values=1.0,
                           train_reconstruction=False)
        student = Student(VTPModel(config), DINOHead(384, K=64, hidden=32, bottleneck=16))
    names = {id(p): name for name, p in student.named_parameters()}
    ours = {}
    for group in param_groups(student, 0.9, 0.2):
        for p in group["params"]:
            ours[names[id(p)]] = group
    for prefix, part in (("model.trunk.", "backbone"), ("dino_head.", "dino_head")):
        found = {}
        theirs = {}
        for name, group in ours.items():
            name = name.removeprefix(prefix)
            found[name] = [group["factor"], group["decay"], group["last"]]
        for name, group in g.json("dino_param_groups.json")[part].items():
            theirs[name] = [group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"]]
        yield "layer-wise rates, decay, last layer", "DINOv2", 1e-8, found, theirs
    # OpenCLIP's names of the visual side -> ours; its text transformer gets the prefix text_
    renamed = {"visual.conv1.weight": "trunk.patch_embed.proj.weight",
               "visual.proj": "visual_proj.weight"}
    theirs = {}
    for name, rule in g.json("clip_weight_decay_split.json")["params"].items():
        prefix = "text_" if name.startswith("transformer.") else ""
        theirs["model." + renamed.get(name, prefix + name)] = not rule["no_decay"]
    decay = {name: group["decay"] for name, group in ours.items()}
    yield "weight decay of CLIP's parameters", "OpenCLIP", 0, decay, theirs


# ---------------------------------------------------------------- DiT
def diffusion(g):
    for name in ("dit_tiny", "dit_tiny_qknorm"):
        if f"{name}/pos_embed" in g:
            model = dit.LightningDiT(**TINY | {"use_qknorm": "qknorm" in name}).eval()
            model.load_state_dict(g.under(f"{name}/"))
            yield from velocities(g, f"{name}_vectors/", model)
            yield from flow_losses(g, f"{name}_vectors/", model)
            yield from euler_samples(g, f"{name}_vectors/", model)
    title = "DiT: time grids, time draws"
    limit = "1e-06 rel"
    for key, theirs in g.under("dit_time_grids/points").items():
        points, shift = key.split("_shift")
        grid = dit.time_grid(int(points), float(shift))
        yield title, "LightningDiT", limit, grid, theirs
    seed = int(g.get("dit_lognorm_time/seed", 600))
    for key in g.cases("dit_lognorm_time/mu", "/draws"):
        theirs = g[f"dit_lognorm_time/mu{key}/draws"]
        mu, sigma = map(float, key.split("_sigma"))
        z = np.random.RandomState(seed).standard_normal(4096)[:len(theirs)]
        yield title, "LightningDiT", limit, dit.lognorm_time(z, mu, sigma), theirs
    yield from dit_parameters(g)


def velocities(g, prefix, model):
    x = g.under(prefix)
    title = "DiT: velocity, guidance"
    limit = "1e-05 rel"
    v = model(x["fwd/x"], x["fwd/t"], x["fwd/y"])
    yield title, "LightningDiT", limit, v, x["fwd/out"]
    for case in g.cases(f"{prefix}cfg/case", "/out"):
        case = f"cfg/case{case}"
        t = x[case + "/t"].float().expand(4)
        cfg = [x[f"{case}/{key}"].item() for key in ("scale", "interval_on", "interval_start")]
        v = model.forward_with_cfg(x["cfg/x"], t, x["cfg/y"], *cfg)
        yield title, "LightningDiT", limit, v, x[case + "/out"]


def flow_losses(g, prefix, model):
    x = g.under(prefix)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for case in g.cases(f"{prefix}loss/case", "/total"):
        case = f"loss/case{case}"
        x0, t = x[case + "/x0"], x[case + "/t"]
        mse, cos = dit.flow_loss(model, x["loss/x1"], x0, t, x["loss/y"])
        total = (mse + cos if x[case + "/use_cosine_loss"] else mse).mean()
        grads = gradients(total, trained)
        found = {"mse_per_sample": mse, "cos_per_sample": cos, "total": total,
                 "grad_l2": torch.stack([grad.norm() for grad in grads.values()])}
        found |= {f"grad/{name}": grad for name, grad in grads.items()}
        theirs = g.under(f"{prefix}{case}/")
        yield "DiT: loss terms, gradients", "LightningDiT", "1e-05 rel", found, theirs


def euler_samples(g, prefix, model):
    x = g.under(prefix)
    y, z = x["ode/y"], x["ode/z"]
    # Guidance needs two velocities for each sample, so the batch is doubled: first with its class,
    # then with 10, which means "no class".
    both = torch.cat([y, torch.full_like(y, 10)])

    def plain(x, t):
        return model(x, t, y)

    def guided(x, t):
        return model.forward_with_cfg(x, t, both, 3.0, True, 0.125)

    for case in g.cases(f"{prefix}ode/euler_shift", "/final"):
        shift, points = case.split("_points")
        grid = dit.time_grid(int(points), float(shift))
        found = {"final": dit.euler(plain, z, grid),
                 "cfg3_interval0.125_final": dit.euler(guided, torch.cat([z, z]), grid)}
        theirs = g.under(f"{prefix}ode/euler_shift{case}/")
        yield "DiT: Euler samples, guided or not", "LightningDiT", "5e-05 rel", found, theirs


def dit_parameters(g):
    def count(model, trained_only):
        parameters = [p for p in model.parameters() if p.requires_grad or not trained_only]
        return sum(p.numel() for p in parameters)

    for name, theirs in g.json("dit_param_counts.json").items():
        size = name.split("-")[1].split("/")[0]    # the names contain "-SIZE/" and "in_chans=N"
        channels = int(name.split("in_chans=")[1])
        if size not in dit.SIZES:                  # the reference has more sizes than dit.py
            continue
        with torch.device("meta"):
            fields = dict(in_channels=channels) | dit.SIZES[size]
            model = dit.LightningDiT(use_qknorm=False, **fields)
            with_qknorm = dit.LightningDiT(use_qknorm=True, **fields)
        found = {"trainable": count(model, True), "with_pos_embed": count(model, False),
                 "with_qknorm": count(with_qknorm, True)}
        yield "DiT: parameters of B, L, XL, 1.0B", "LightningDiT", 0, found, theirs


# ---------------------------------------------------------------- FID
def distances(g):
    inception = drawn_inception()
    state = inception.state_dict()
    for key, theirs in g.json("fid_inception_keys.json").get("keys", {}).items():
        same = list(state[key].shape) == theirs["shape"]
        yield "FID: keys and shapes of Inception", "pytorch-fid", 0, same, True
    for size in g.cases("fid_inception_features/", "/images_uint8_nhwc"):
        x = g.under(f"fid_inception_features/{size}/")
        features = inception(chw(x["images_uint8_nhwc"].numpy()))
        yield "FID: Inception features", "pytorch-fid", 1e-5, features, x["pool3_2048_f64"]
    for case in g.cases("fid_frechet/", "/fid_pytorch_fid"):
        x = g.under(f"fid_frechet/{case}/")
        gaussians = []                             # mean and covariance of two sets of features
        for i in "12":
            if f"mu{i}" in x:
                gaussians += [x[f"mu{i}"], x[f"sigma{i}"]]
            else:
                gaussians += statistics([x[f"x{i}"]])
        distance = frechet_distance(*gaussians)
        found = {"fid_pytorch_fid": distance, "fid_exact_low_rank": distance}
        yield "FID: Frechet distance", "pytorch-fid, exact", "1e-06 rel", found, x


# ---------------------------------------------------------------- table
SECTIONS = (checkpoints, training_model, components, tokenizer, self_distillation, contrastive,
            two_processes, schedules, parameter_groups, diffusion, distances)


def difference(ours, theirs, relative):
    """Largest absolute difference between two tensors, numbers or lists. Infinite if their sizes
    differ or one of them contains nan.

    relative  divide by the largest magnitude of `theirs`
    """
    ours = torch.as_tensor(ours, dtype=torch.float64).flatten()
    theirs = torch.as_tensor(theirs, dtype=torch.float64).flatten()
    if len(ours) != len(theirs):
        return np.inf
    largest = (ours.detach() - theirs.detach()).abs().max().item()
    if relative:
        largest /= theirs.abs().max().clamp_min(1e-30).item()
    return np.inf if np.isnan(largest) else largest


def make_table(folder, sections=SECTIONS):
    """-> {(title, reference, limit): (number of compared tensors, largest difference)}"""
    g = Golden(folder)
    table = {}
    for section in sections:
        for title, reference, limit, ours, theirs in section(g):
            row = title, reference, limit
            pairs = [(ours, theirs)]
            if isinstance(ours, dict):
                pairs = [(ours[k], theirs[k]) for k in ours.keys() & theirs.keys()]
            for pair in pairs:
                n, largest = table.get(row, (0, 0.0))
                found = difference(*pair, "rel" in str(limit))
                table[row] = n + 1, max(largest, found)
    return table


def rows_above_limit(table):
    """-> list of the rows (title, reference, limit) whose largest difference is above the limit"""
    found = []
    for row, (_, largest) in table.items():
        limit = float(str(row[2]).split()[0])      # "1e-08 rel" -> 1e-08
        if largest > limit:
            found.append(row)
    return found


def main(folder=CUT, use_fast=False):
    """Print the table -> exit status"""
    undo = fast.install(dit) if use_fast else None
    table = make_table(folder)
    if undo:
        undo()
    too_high = rows_above_limit(table)
    print(f"{'outputs':68} {'reference':24} tensors  largest   limit")
    for row, (n, largest) in table.items():
        title, reference, limit = row
        mark = "   ABOVE" if row in too_high else ""
        print(f"{title:68} {reference:24} {n:7}  {largest:7.1e}   {limit}{mark}")
    tensors = sum(n for n, _ in table.values())
    print(f"{tensors} tensors in {len(table)} rows, {len(too_high)} above their limit")
    return int(len(too_high) > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=CUT, metavar="FOLDER",
                        help="stored outputs of the reference code (default: tests/golden)")
    parser.add_argument("--fast", action="store_true",
                        help="compare the forms of extras/fast.py instead of the textbook forms")
    args = parser.parse_args()
    sys.exit(main(args.folder, args.fast))
