"""Ours against the outputs that the reference code left in a folder: row by row, exit status 1 if one is above its limit.

    python tests/compare.py [FOLDER]        default tests/golden: small cuts of the full sets

A row: what | whose code made the numbers | tensors compared | largest difference | limit. "rel" is relative to the largest magnitude
of the reference's tensor, otherwise differences are absolute; a limit of 0 means every bit, id or count. Limits are those that came
with the sets. The tests ask the same questions one by one, and say more; here they are counted.
"""
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
from train import cosine, param_groups, ramp, warmup_cosine
from vtp_min import VTPConfig, VTPModel
from vtp_min.fid import frechet_distance, statistics
from vtp_min.losses import centered_softmax, clip_loss, dino_loss, ibot_loss, koleo_loss, moved_center, siglip_loss, sinkhorn
from vtp_min.model import DINOHead, Student
from vtp_min.probes import zero_shot, zero_shot_classifier
from vtp_min.text import quick_gelu_
from vtp_min.views import adm_crop, mask_indices_and_weights
from vtp_min.vit import FFNS, NORMS, RoPE, rotate

CUT = Path(__file__).parent / "golden"
SHORT = {   # names in the cut sets -> in the full ones
    "dit/weights/": "dit_tiny/", "dit/grid/": "dit_time_grids/", "dit/time/": "dit_lognorm_time/", "dit/": "dit_tiny_vectors/",
    "fid/images": "fid_inception_features/64x64/images_uint8_nhwc", "fid/pool": "fid_inception_features/64x64/pool3_2048_f64",
    "fid/dim8/distance": "fid_frechet/dim8/fid_pytorch_fid", "fid/": "fid_frechet/", "data/crop": "units/crop", "data/masks.": "ibot_masks/ex0/",
    "data/fixed.": "ibot_masks/fixed/", "zero_shot/text": "clip_zero_shot/text_features_class_template", "zero_shot/image": "clip_zero_shot/image_features",
    "zero_shot/classifier": "clip_zero_shot/classifier_DxC", "zero_shot/": "clip_zero_shot/"}
PRECISIONS = ("f64", torch.float64, 1e-8), ("f32", torch.float32, 2e-5)


class Golden(dict):
    """Every npz array and DiT tensor of a folder: {"set/key": tensor}"""
    def __init__(self, folder):
        self.folder = Path(folder)
        for path in sorted(self.folder.glob("*.npz")) + sorted(self.folder.glob("*.safetensors")):
            for k, v in (np.load(path) if path.suffix == ".npz" else safetensors.torch.load_file(path)).items():
                old = next((old for old in SHORT if f"{path.stem}/{k}".startswith(old)), "")
                if getattr(v.dtype, "kind", "f") != "U":                                          # two sets hold a few words as well
                    self[SHORT.get(old, "") + f"{path.stem}/{k}".removeprefix(old)] = torch.as_tensor(v)

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}

    def cases(self, prefix, end):
        """What stands between prefix and end, in any key"""
        return sorted(k.removeprefix(prefix).removesuffix(end) for k in self if k.startswith(prefix) and k.endswith(end))

    def json(self, name):
        return json.loads((self.folder / name).read_text()) if (self.folder / name).exists() else {}


def leaf(x, dtype):
    return x.to(dtype).requires_grad_()


# ---------------------------------------------------------------- each yields (what, reference, limit, ours, theirs)
# ours and theirs are tensors, numbers, lists, or dicts: then the keys that both have are compared
def checkpoints(g):
    for folder in (g.folder / name for name in ("vtp_a", "vtp_b", "vtp_p8") if (g.folder / name).exists()):
        io = np.load(folder / "io.npz")
        for rope, prefix, column in (("bfloat16", "", 0), ("float32", "rope_fp32.", 2)):
            for key, x in outputs(VTPModel.from_pretrained(folder, rope), io, rope == "float32"):
                kind = next(k for k in LIMITS if key.startswith(k))
                if prefix + key in io:
                    yield f"checkpoint, {rope} RoPE: {kind or 'tokens, latents, masked, layers'}", "VTP", f"{LIMITS[kind][column]:g}", x, io[prefix + key]
        with TemporaryDirectory() as saved:
            VTPModel.from_pretrained(folder).save_pretrained(saved)
            ours, theirs = (safetensors.torch.load_file(Path(place, "model.safetensors")) for place in (saved, folder))
        for k in ours.keys() | theirs.keys():
            same = k in ours and k in theirs and ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k])
            yield "checkpoint saved again: name, type, every bit", "VTP", 0, same, True


def training_model(g):
    io = np.load(g.folder / "vtp_ssl" / "io.npz")
    for rope, prefix, limit in (("bfloat16", "", 2e-3), ("float32", "rope_fp32.", 5e-6)):
        student, state = ssl_student(g.folder / "vtp_ssl", rope)
        for key, x in ssl_outputs(student, state, io):
            yield f"student, teacher, stochastic depth, {rope} RoPE", "VTP", limit, x, io[prefix + key]
    yield "DINO head alone", "VTP", 1e-6, student.dino_head(torch.from_numpy(io["head.input"])), io["head.output"]
    teacher, ema = ssl_teacher(student, state), g.json("vtp_ssl/ema.json")
    teacher.follow(student, ema["momentum"])
    for name, p in teacher.named_parameters():
        same = hashlib.sha256(p.numpy().tobytes()).hexdigest() == ema["tensors"]["teacher_" + name]["sha256_f32le"]
        yield "EMA teacher after a step, every bit", "VTP", 0, same, True


def parts(g):
    u = g.under("units/")
    for name in NORMS:
        norm = NORMS[name](40)
        norm.load_state_dict({"weight": u["norm.weight"]} | ({} if name == "rmsnorm" else {"bias": u["norm.bias"]}))
        yield "norms", "VTP", "1e-06 rel", norm(u["norm.x"]), u[f"norm.{name}"]
    for name in {k.split(".")[0] for k in u if k.startswith("swiglu")}:
        ffn = FFNS[name](20, 4.0)
        ffn.load_state_dict({k: u[f"{name}.{k}"] for k in ffn.state_dict()})
        yield "SwiGLU, GELU, QuickGELU", "VTP", 1e-6, ffn(u[f"{name}.x"]), u[f"{name}.y"]
    yield "SwiGLU, GELU, QuickGELU", "VTP", 1e-6, {"quick_gelu": quick_gelu_(u["act.x"]), "gelu": F.gelu(u["act.x"])}, g.under("units/act.")
    for name in g.cases("units/rope", ".sin"):                                                   # .hd64_4x5, _fp32.hd24_1x5, ...
        exact, (c, grid) = name.startswith("_fp32"), name.split(".hd")[1].split("_")
        sin, cos = RoPE(int(c), torch.float32 if exact else torch.bfloat16)(*map(int, grid.split("x")))
        yield f"RoPE in {'float32' if exact else 'bfloat16'}", "VTP", 1e-6 if exact else 0, {"sin": sin, "cos": cos}, g.under(f"units/rope{name}.")
    turned = {f"{x}_out": rotate(u[f"rotate.{x}_in"], *RoPE(64, torch.bfloat16)(4, 5, prefix=1)) for x in "qk"}
    yield "RoPE in bfloat16", "VTP", 0, turned, g.under("units/rotate.")
    for c in g.cases("units/crop", ".in"):
        yield "centre crop, 8-bit", "ADM", 0, np.array(adm_crop(Image.fromarray(u[f"crop{c}.in"].numpy()), int(u[f"crop{c}.size"]))), u[f"crop{c}.out"]


def tokens(g):
    for case in g.json("bpe.json"):
        for length in (77, 32):
            yield "tokenizer: ids", "VTP", 0, get_tokenizer("ViT-B-32", length)([case["text"]])[0], case[f"ids{length}"]
        yield "tokenizer: decoded text", "VTP", 0, get_tokenizer().decode(case["encode"]) == case["decoded"], True


def self_distillation(g):
    for p, dtype, tight in PRECISIONS:
        for name, crops in (("dino_cls_loss", ("student_global", "student_local")), ("ibot_patch_loss", ("student_logits_masked",))):
            title, ibot = {"d": "DINO", "i": "iBOT"}[name[0]], name[0] == "i"
            limit = f"{1e-7 if ibot and p == 'f64' else tight:g} rel"                               # iBOT's weights were float32 in the reference
            for mode in ("centering", "sinkhorn"):
                center = 0
                for step, temp in enumerate(g[f"{name}/teacher_temps"]):
                    x, theirs = g.under(f"{name}/step{step}/"), g.under(f"{name}/{p}/{mode}/step{step}/")
                    if not theirs:
                        continue
                    logits = x["teacher_logits_masked" if ibot else "teacher_logits"].to(dtype)
                    probs = centered_softmax(logits, center, temp) if mode == "centering" else sinkhorn(logits.flatten(0, -2), temp).view_as(logits)
                    center = moved_center(torch.zeros(logits.shape[-1], dtype=dtype) + center, lambda: [logits.flatten(0, -2)])
                    found, students = {"teacher_probs": probs}, [leaf(x[k], dtype) for k in crops if k in x]
                    if students:
                        loss = ibot_loss(*students, probs, x["masks_weight"], len(x["masks"])) if ibot else dino_loss(torch.cat(students), probs)
                        found |= {"loss": loss, "loss_total": loss} | dict(zip(("grad_student",) if ibot else ("grad_student_global", "grad_student_local"),
                                                                               torch.autograd.grad(loss, students)))
                    yield f"{title}: targets, loss, gradients, {p}", "DINOv2", limit, found, theirs
                yield f"{title}: centre after the last batch, {p}", "DINOv2", limit, {"center_after_last_update": center}, g.under(f"{name}/{p}/{mode}/")
        for case in g.cases("koleo/", "/x"):
            x = leaf(g[f"koleo/{case}/x"], dtype)
            loss = 0.1 * sum(map(koleo_loss, x)) if case == "two_crops" else koleo_loss(x)
            found = {"weighted_loss": loss, "loss": loss} | ({} if case == "duplicate" else {"grad": torch.autograd.grad(loss, [x])[0]})
            yield f"KoLeo: loss, gradients, {p}", "DINOv2", f"{tight:g} rel", found, g.under(f"koleo/{case}/{p}/")
    for case in g.cases("ibot_masks/", "/collated_masks"):
        found = dict(zip(("mask_indices_list", "masks_weight"), mask_indices_and_weights(g[f"ibot_masks/{case}/collated_masks"])))
        yield "iBOT: indices and weights of masks", "DINOv2", 0, found, g.under(f"ibot_masks/{case}/")


def words(g):
    for p, dtype, limit in PRECISIONS:
        for name in g.cases(f"clip_single/{p}/", "/loss"):                                        # scale0/clip_bias, ...
            scale, kind = name.split("/")
            x = [leaf(g[f"clip_single/{k}"], dtype) for k in ("raw_image", "raw_text", f"{scale}/logit_scale_log", f"{scale}/logit_bias")]
            ask = siglip_loss if kind == "siglip" else clip_loss
            loss = ask(F.normalize(x[0], dim=-1), F.normalize(x[1], dim=-1), x[2].exp(), None if kind == "clip" else x[3])
            grads = torch.autograd.grad(loss, x[:4 if kind == "siglip" else 3])                   # CLIP's softmax is blind to a bias
            found = {"loss": loss} | dict(zip(("grad_raw_image", "grad_raw_text", "grad_logit_scale_log", "grad_logit_bias"), grads))
            yield f"{'SigLIP' if kind == 'siglip' else 'CLIP'}: loss, gradients, {p}", "OpenCLIP", f"{limit:g} rel", found, g.under(f"clip_single/{p}/{name}/")
    x = g.under("clip_zero_shot/")
    C, T, _ = x["text_features_class_template"].shape
    table = {f"{t} {c}": x["text_features_class_template"][c, t] for c in range(C) for t in range(T)}
    W = zero_shot_classifier(lambda texts: torch.stack([table[t] for t in texts]), [str(c) for c in range(C)], [f"{t} {{}}" for t in range(T)])
    yield "zero-shot: classifier, logits", "OpenCLIP", "2e-05 rel", {"classifier_DxC": W, "logits": 100 * F.normalize(x["image_features"], dim=-1) @ W}, x
    yield "zero-shot: top-1, top-5", "OpenCLIP", 0, zero_shot(x["image_features"], W, x["target"]), x


def rank_of_two(rank, folder, meet):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}/file", rank=rank, world_size=2)
    torch.save((contrast(rank, folder), targets(rank, folder)), f"{meet}/{rank}.pt")
    torch.distributed.destroy_process_group()


def two_processes(g):
    with TemporaryDirectory() as meet:
        torch.multiprocessing.spawn(rank_of_two, (str(g.folder), meet), nprocs=2)
        ranks = [torch.load(f"{meet}/{r}.pt") for r in range(2)]
    mean = torch.cat([g[f"dino_two_process/rank{r}/patch_logits"] for r in range(2)]).mean(0)
    for r, (losses, found) in enumerate(ranks):
        for kind, theirs in (("clip", "clip_local1_grad1"), ("siglip", "siglip_gather")):
            grads = {f"grad_{k}": v for k, v in losses[kind].items() if (kind, k) != ("clip", "logit_bias")}
            yield "CLIP, SigLIP, two processes: loss", "OpenCLIP", "1e-08 rel", losses[kind], g.under(f"clip_two_process/f64/{theirs}/rank{r}/")
            yield "CLIP, SigLIP, two processes: gradients after DDP", "OpenCLIP, two processes", "1e-08 rel", grads, g.under(f"clip_two_process/f64/{theirs}/ddp/")
            yield "CLIP, SigLIP, two processes: gradients after DDP", "OpenCLIP, one process", "1e-08 rel", grads, g.under(f"clip_two_process/f64/global_{kind}/")
        patch = {k: found.pop(k) for k in ("patch_center_1", "patch_center_2")}                   # DINOv2 averages the ranks' own means instead
        yield "DINO, iBOT, two processes: Sinkhorn, DINO centre", "DINOv2", "2e-05 rel", found, g.under(f"dino_two_process/rank{r}/")
        yield "iBOT centre, two processes", "mean of all ranks' rows", "2e-05 rel", patch, {"patch_center_1": 0.1 * mean, "patch_center_2": 0.19 * mean}


def schedules(g):
    x = g.under("clip_schedule/")
    lr, warmup, n = x["base_lr"].item(), int(x["warmup"]), int(x["steps"])
    # OpenCLIP's and DINOv2's cosines stop a step short of their end (n + 1), DINOv3's and ours reach it
    yield "learning rate: warm-up, cosine", "OpenCLIP", "1e-08 rel", [warmup_cosine(s, lr, warmup, n + 1, 0.0) for s in range(n)], x["cosine"][:n]
    for recipe in g.cases("dino_schedules/", "/cfg/epochs"):
        x, c = g.under(f"dino_schedules/{recipe}/"), {k: v.item() for k, v in g.under(f"dino_schedules/{recipe}/cfg/").items()}
        n, warm, hot = (int(c[k] * g["dino_schedules/epoch_length"]) for k in ("epochs", "warmup_epochs", "ttemp_warmup_epochs"))
        ours = {"wd": [cosine(s, c["wd"], c["wd_end"], n + 1) for s in range(n)], "momentum": [cosine(s, c["mom"], c["mom_end"], n + 1) for s in range(n)],
                "teacher_temp": [ramp(s, c["ttemp_start"], c["ttemp"], hot - 1) for s in range(n)]}
        yield "weight decay, momentum, teacher's temperature", "DINOv2", "1e-08 rel", ours, {k: x[k][:n] for k in ours}
        rate = [warmup_cosine(s, c["lr"], warm, n, c["min_lr"]) for s in range(warm, n)]
        yield "learning rate after the warm-up", "DINOv3", "1e-08 rel", rate, x["v3_linear_warmup_cosine_lr"][warm:n]


def parameter_groups(g):
    with torch.device("meta"):                                                                    # the reference's ViT-S/16 under our names
        student = Student(VTPModel(VTPConfig(vision_embed_dim=384, vision_num_heads=6, vision_ffn_layer="mlp", vision_norm_layer="layernorm",
                                             vision_init_values=1.0, train_reconstruction=False)), DINOHead(384, K=64, hidden=32, bottleneck=16))
    names = {id(p): name for name, p in student.named_parameters()}
    ours = {names[id(p)]: group for group in param_groups(student, 0.9, 0.2) for p in group["params"]}
    for prefix, part in (("model.trunk.", "backbone"), ("dino_head.", "dino_head")):
        yield "layer-wise rates, decay, last layer", "DINOv2", 1e-8, {k.removeprefix(prefix): [v["factor"], v["decay"], v["last"]] for k, v in ours.items()}, \
              {k: [v["lr_multiplier"], v["wd_multiplier"], v["is_last_layer"]] for k, v in g.json("dino_param_groups.json")[part].items()}
    alike = {"visual.conv1.weight": "trunk.patch_embed.proj.weight", "visual.proj": "visual_proj.weight"}
    theirs = {"model." + alike.get(k, "text_" * k.startswith("transformer.") + k): not v["no_decay"]
              for k, v in g.json("clip_weight_decay_split.json")["params"].items()}
    yield "weight decay of what words train", "OpenCLIP", 0, {k: v["decay"] for k, v in ours.items()}, theirs


def diffusion(g):
    for name in [n for n in ("dit_tiny", "dit_tiny_qknorm") if f"{n}/pos_embed" in g]:
        x, cases = g.under(f"{name}_vectors/"), lambda prefix, end: [prefix + c for c in g.cases(f"{name}_vectors/{prefix}", end)]
        model = dit.LightningDiT(**TINY | {"use_qknorm": "qknorm" in name}).eval()
        model.load_state_dict(g.under(f"{name}/"))
        yield "DiT: velocity, guidance", "LightningDiT", "1e-05 rel", model(x["fwd/x"], x["fwd/t"], x["fwd/y"]), x["fwd/out"]
        for c in cases("cfg/case", "/out"):
            t, how = x[c + "/t"].float().expand(4), [x[f"{c}/{k}"].item() for k in ("scale", "interval_on", "interval_start")]
            yield "DiT: velocity, guidance", "LightningDiT", "1e-05 rel", model.forward_with_cfg(x["cfg/x"], t, x["cfg/y"], *how), x[c + "/out"]
        trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
        for c in cases("loss/case", "/total"):
            mse, cos = dit.flow_loss(model, x["loss/x1"], x[c + "/x0"], x[c + "/t"], x["loss/y"])
            total = (mse + cos if x[c + "/use_cosine_loss"] else mse).mean()
            grads = dict(zip(trained, torch.autograd.grad(total, list(trained.values()))))
            found = {"mse_per_sample": mse, "cos_per_sample": cos, "total": total, "grad_l2": torch.stack([v.norm() for v in grads.values()])}
            yield "DiT: loss terms, gradients", "LightningDiT", "1e-05 rel", found | {f"grad/{k}": v for k, v in grads.items()}, g.under(f"{name}_vectors/{c}/")
        y, z, pair = x["ode/y"], x["ode/z"], torch.cat([x["ode/y"], torch.full_like(x["ode/y"], 10)])
        for c in cases("ode/euler_shift", "/final"):
            shift, points = c.removeprefix("ode/euler_shift").split("_points")
            grid, guided = dit.time_grid(int(points), float(shift)), lambda x, t: model.forward_with_cfg(x, t, pair, 3.0, True, 0.125)
            found = {"final": dit.euler(lambda x, t: model(x, t, y), z, grid), "cfg3_interval0.125_final": dit.euler(guided, torch.cat([z, z]), grid)}
            yield "DiT: Euler samples, guided or not", "LightningDiT", "5e-05 rel", found, g.under(f"{name}_vectors/{c}/")
    for key, theirs in g.under("dit_time_grids/points").items():
        yield "DiT: time grids, time draws", "LightningDiT", "1e-06 rel", dit.time_grid(int(key.split("_shift")[0]), float(key.split("_shift")[1])), theirs
    for key, theirs in ((k, g[f"dit_lognorm_time/mu{k}/draws"]) for k in g.cases("dit_lognorm_time/mu", "/draws")):
        z = np.random.RandomState(int(g.get("dit_lognorm_time/seed", 600))).standard_normal(4096)[:len(theirs)]
        yield "DiT: time grids, time draws", "LightningDiT", "1e-06 rel", dit.lognorm_time(z, *map(float, key.split("_sigma"))), theirs
    for name, theirs in g.json("dit_param_counts.json").items():
        size, channels = name.split("-")[1].split("/")[0], int(name.split("in_chans=")[1])
        if size in dit.SIZES:
            with torch.device("meta"):
                plain, qknorm = (list(dit.LightningDiT(in_channels=channels, use_qknorm=q, **dit.SIZES[size]).parameters()) for q in (False, True))
            count = {"trainable": [p for p in plain if p.requires_grad], "with_pos_embed": plain, "with_qknorm": [p for p in qknorm if p.requires_grad]}
            yield "DiT: parameters of B, L, XL, 1.0B", "LightningDiT", 0, {k: sum(p.numel() for p in ps) for k, ps in count.items()}, theirs


def distances(g):
    inception = drawn_inception()
    for key, theirs in g.json("fid_inception_keys.json").get("keys", {}).items():
        yield "FID: keys and shapes of Inception", "pytorch-fid", 0, list(inception.state_dict()[key].shape) == theirs["shape"], True
    for size in g.cases("fid_inception_features/", "/images_uint8_nhwc"):
        x = g.under(f"fid_inception_features/{size}/")
        yield "FID: Inception features", "pytorch-fid", 1e-5, inception(chw(x["images_uint8_nhwc"].numpy())), x["pool3_2048_f64"]
    for case in g.cases("fid_frechet/", "/fid_pytorch_fid"):
        x = g.under(f"fid_frechet/{case}/")
        a, b = ((x[f"mu{i}"], x[f"sigma{i}"]) if f"mu{i}" in x else statistics([x[f"x{i}"]]) for i in "12")
        yield "FID: Frechet distance", "pytorch-fid, exact", "1e-06 rel", dict.fromkeys(("fid_pytorch_fid", "fid_exact_low_rank"), frechet_distance(*a, *b)), x


def off(ours, theirs, relative):
    """Largest difference of two tensors, numbers or lists; infinite if their sizes differ or one holds a nan"""
    ours, theirs = (torch.as_tensor(v, dtype=torch.float64).detach().flatten() for v in (ours, theirs))
    largest = (ours - theirs).abs().max().item() / (theirs.abs().max().clamp_min(1e-30).item() if relative else 1) if len(ours) == len(theirs) else np.inf
    return np.inf if np.isnan(largest) else largest


def rows(folder, sections=(checkpoints, training_model, parts, tokens, self_distillation, words, two_processes, schedules, parameter_groups, diffusion, distances)):
    """-> {(what, reference, limit): [tensors compared, largest difference]}"""
    g, table = Golden(folder), {}
    for section in sections:
        for what, reference, limit, ours, theirs in section(g):
            pairs = [(ours[k], theirs[k]) for k in ours.keys() & theirs.keys()] if isinstance(ours, dict) else [(ours, theirs)]
            for pair in pairs:
                n, largest = table.get((what, reference, limit), (0, 0.0))
                table[what, reference, limit] = n + 1, max(largest, off(*pair, "rel" in str(limit)))
    return table


def above(table):
    return [row for row, (_, largest) in table.items() if largest > float(str(row[2]).split()[0])]


def main(folder=CUT):
    table = rows(folder)
    print(f"{'what':68} {'reference':24} tensors  largest   limit")
    for row, (n, largest) in table.items():
        print(f"{row[0]:68} {row[1]:24} {n:7}  {largest:7.1e}   {row[2]}{'   ABOVE' * (row in above(table))}")
    print(f"{sum(n for n, _ in table.values())} tensors in {len(table)} rows, {len(above(table))} above their limit")
    return int(len(above(table)) > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
