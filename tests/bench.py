"""How fast, and against what: ours beside a plain arrangement of the same mathematics (tests/yardstick.py), in turns in one process, medians.

    python tests/bench.py joint                    the training step: nano, S and B at 64 px
    python tests/bench.py                          everything (half an hour on two quiet cores) -> study/bench.json
Ratios compare; images/s belong to the machine that is named with them. Anything else that runs beside a benchmark spoils it. Linux (memory is read from /proc).
"""
import copy
import ctypes
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import dit                                                                 # noqa: E402
import train as T                                                          # noqa: E402
import yardstick as plain                                                  # noqa: E402
from data import Steps, eval_batches, in_workers, open_data                # noqa: E402
from tokenizer import get_tokenizer                                        # noqa: E402
from vtp_min import latents, shapes                                        # noqa: E402
from vtp_min.cost import costs, head_on_meta, on_meta                      # noqa: E402
from vtp_min.fid import Inception                                          # noqa: E402
from vtp_min.lightning import SIZES, LightningDiT                          # noqa: E402
from vtp_min.losses import centered_softmax                                # noqa: E402
from vtp_min.model import SMALL, DINOHead, Student, Teacher, VTPConfig, VTPModel  # noqa: E402
from vtp_min.run import autocast, choose_precision, give_back_memory, matmul_peak   # noqa: E402
from vtp_min.schedules import param_groups                                 # noqa: E402
from vtp_min.views import normalize                                        # noqa: E402

CPU, TEMP, EMA = torch.device("cpu"), 0.07, 0.994
WEIGHTS = Namespace(w_clip=1.0, w_ssl=1.0, w_rec=0.1, w_koleo=0.1, clip_loss="clip")
NO_DROP = dict.fromkeys(("clip", "rec", "ssl", "local"))
ITS_OWN = 2 ** 25                                                          # bytes: where glibc's own threshold ends up in a program that frees large pieces
BATCH = {"nano": 64, "S": 32, "B": 32}                                     # pictures a step: words 8 : views 2 : pixels 1, and 8 local crops


# ---------------------------------------------------------------- the joint step
class Joint:
    """A student, its teacher and optimizer, and a step: the method as train.py has it (`ours`: change both), or the yardstick's (`plain`). Equal weights"""
    def __init__(self, size, precision, how, side=64, patch=8, batch=None, depth=None):
        torch.manual_seed(0)
        prototypes, hidden, bottleneck = ((256, 256, 64) if size in SMALL else (65536, 2048, 256))      # train.py's defaults
        config = VTPConfig.of_size(size, side, patch, 64, True, True, False)
        config.vision_depth = config.decoder_depth = depth or config.vision_depth
        model = VTPModel(config)
        self.student = Student(model, DINOHead(model.feature_dim, prototypes, hidden, bottleneck))
        self.teacher = Teacher(self.student)
        groups = param_groups(self.student, 1.0, 1.0)
        if how == "plain":
            plain.plainly(self.student), plain.plainly(self.teacher)
            self.opt = plain.optimizer(groups, T.BETAS, T.EPS)
        else:
            self.opt = torch.optim.AdamW(groups, betas=T.BETAS, eps=T.EPS, fused=True)
        for group in self.opt.param_groups:
            group["lr"] = 1e-4
        self.size, self.precision, self.step = size, precision, self.plain if how == "plain" else self.ours

    def ours(self, batch):
        give_back_memory(ITS_OWN if self.size in SMALL else 2 ** 20)                  # as train.py does
        self.opt.zero_grad()
        batch = T.to_device(batch, CPU)
        with autocast(CPU, self.precision):
            seen = self.teacher(batch["crops"], batch["mask"])
        now, _ = T.balance("sinkhorn", {k: lambda x=x: [x.flatten(0, -2)] for k, x in seen.items()}, TEMP, None)
        targets, terms = {k: centered_softmax(seen.pop(k), now[k], TEMP) for k in [*seen]}, {}
        for part, _ in T.by_objective(batch):
            with autocast(CPU, self.precision):
                out = self.student(part, NO_DROP)
                own = T.of_the_batch(WEIGHTS, out) | T.of_each_row(out, part, targets, None)
            T.weighted(WEIGHTS, own).backward()
            terms |= {k: x.item() for k, x in own.items()}
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.opt.step()
        self.teacher.follow(self.student, EMA)
        return terms

    def plain(self, batch):
        give_back_memory(ITS_OWN)
        self.opt.zero_grad()
        batch = T.to_device(batch, CPU)
        crops, patches = batch["mask"].shape[0] * batch["mask"].shape[1], batch["mask"].shape[-1]
        rows = sum(int(patches * edge) for edge in torch.linspace(0.1, 0.5, crops // 2 + 1)[1:].tolist())      # DINOv2: of half of the crops, the upper edge of each stratum
        with autocast(CPU, self.precision):
            targets = plain.teach(self.teacher, batch, rows, TEMP)
            terms = plain.losses(plain.forward(self.student, batch, rows), targets, batch)
        T.weighted(WEIGHTS, terms).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.opt.step()
        plain.follow(self.teacher, self.student, EMA)
        return {k: x.item() for k, x in terms.items()}


def batches_of(n, size, batch, side=64, patch=8, source="shapes"):
    local = max(round(side * 96 / 224 / patch), 1) * patch                            # train.py's default
    steps = Steps(None, get_tokenizer("ViT-B-32", 77), seed=0, batch=batch, batch_ssl=max(batch // 4, 1), batch_rec=max(batch // 8, 1), clip=True, ssl=True, rec=True,
                  image=side, local_image=local, n_local=8, patch=patch)
    steps.source = open_data(source, "train", 0, side=side)
    return [steps[i] for i in range(n)] if n else steps


def in_turns(calls, rounds):
    """{name: step -> anything} -> {name: seconds of each round}, the first round left out"""
    seconds = {name: [] for name in calls}
    for r in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(r)
            seconds[name].append(time.perf_counter() - start)
    return {name: s[1:] for name, s in seconds.items()}


def ratio(seconds, slow, fast):
    """-> the median over rounds; the lowest and the highest, which say how quiet the machine was"""
    each = sorted(a / b for a, b in zip(seconds[slow], seconds[fast]))
    return {"ratio": median(each), "ratio_lowest": each[0], "ratio_highest": each[-1]}


def flops_of(joint, batch):
    """Of the matrix products of ours, as run.counting counts them: 3 x the student's forward pass, and the teacher's"""
    batch = T.to_device(batch, CPU)
    with FlopCounterMode(display=False) as student, autocast(CPU, joint.precision):
        joint.student(batch, NO_DROP)
    with FlopCounterMode(display=False) as teacher, autocast(CPU, joint.precision):
        joint.teacher(batch["crops"], batch["mask"])
    return 3 * student.get_total_flops() + teacher.get_total_flops()


def joint(rounds, cases=(("nano", "fp32"), ("nano", "bf16"), ("S", "fp32"), ("S", "bf16"), ("B", "bf16"))):
    """The training step at 64 px, patch 8, of three objectives, 8 : 2 : 1 pictures for words, views, pixels; batches made beforehand"""
    for size, precision in cases:
        hows = ["ours"] if size == "B" else ["plain", "ours"] if precision == "fp32" else ["plain", "ours", "compiled"]      # two of B want more than 20 GB
        n, many, made = BATCH[size], rounds if size == "nano" else max(rounds // 3, 3), batches_of(4, size, BATCH[size])
        steps, losses = {how: Joint(size, precision, how) for how in hows}, {how: [] for how in hows}
        flops = flops_of(steps["ours"], made[0])                                      # counting takes no step: the weights are still equal
        if "compiled" in steps:
            T.compile_blocks(steps["compiled"].student, steps["compiled"].teacher)
            for batch in made:
                steps["compiled"].step(batch)
        seconds = in_turns({how: lambda r, how=how: losses[how].append(steps[how].step(made[r % 4])) for how in hows}, many)
        steps.clear()
        ctypes.CDLL(None).malloc_trim(0)                                              # S leaves gigabytes in glibc's heap, and B needs them
        peak = matmul_peak(CPU, precision, 1)
        row = dict(what=f"joint step, {size}, {precision}", ours=n / median(seconds["ours"]), unit="images/s", share_of_peak=flops / median(seconds["ours"]) / peak,
                   gflops=flops / 1e9, peak_gflops=peak / 1e9, **of_process("ours", size, precision),
                   protocol=f"batch {n}, 8 local crops, cached batches, {many} rounds")
        if "plain" in hows:
            row |= dict(plain=n / median(seconds["plain"]), **ratio(seconds, "plain", "ours"), **of_process("plain", size, precision))
            row |= dict(memory_ratio=row["ours_gb"] / row["plain_gb"], memory_ratio_with_all_else=(row["ours_gb"] + row["ours_before_gb"]) / (row["plain_gb"] + row["plain_before_gb"]),
                        first_step_losses_apart=max(abs(losses["plain"][0][k] / x - 1) for k, x in losses["ours"][0].items()))
        if "compiled" in hows:
            row |= dict(ratio_compiled=ratio(seconds, "plain", "compiled")["ratio"])
        yield row


def memory(how, size, precision):
    """In a process of its own: GB that three steps need at most beyond what lies there before them: activations, gradients, AdamW's averages, copies"""
    made, step = batches_of(2, size, BATCH[size]), Joint(size, precision, how).step
    before = status("VmRSS")
    for r in range(3):
        step(made[r % 2])
    print(json.dumps({f"{how}_gb": status("VmHWM") - before, f"{how}_before_gb": before}))


def status(field):
    """GB, of this process. (resource's ru_maxrss would start with the parent's.)"""
    return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def of_process(*words):
    return json.loads(subprocess.run([sys.executable, __file__, "memory", *words], stdout=subprocess.PIPE, text=True, check=True).stdout)


# ---------------------------------------------------------------- the data
def data(rounds):
    """One thread: DINOv2's ten views of 288 px JPEGs, globals of 224 and locals of 96, uint8 (ours) and normalised floats (torchvision's own transforms)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "shapes").mkdir()
        for i in range(64):
            Image.fromarray(shapes.draw(i, 288)[0]).save(Path(folder) / "shapes" / f"{i}.jpg", quality=90)
        n, paths = 8, sorted(Path(folder, "shapes").iterdir())
        steps = Steps(open_data(folder, "val", whole=True), None, seed=0, batch=n, batch_ssl=n, batch_rec=n, clip=False, ssl=True, rec=False,
                      image=224, local_image=96, n_local=8, patch=16)

        def plainly(floats):
            return lambda r: [plain.views(paths[(r * n + i) % 64], 224, 96, 8, floats) for i in range(n)]
        seconds = in_turns({"plain": plainly(True), "uint8": plainly(False), "ours": steps.__getitem__}, rounds)
    torch.set_num_threads(threads)
    yield dict(what="views, 1 thread", plain=n / median(seconds["plain"]), ours=n / median(seconds["ours"]), unit="images/s", **ratio(seconds, "plain", "ours"),
               ratio_without_floats=ratio(seconds, "uint8", "ours")["ratio"], protocol=f"10 views of 288 px JPEGs of built-in pictures, {rounds} rounds of {n}")


def fed(rounds):
    """The joint step of nano with its data made beforehand, made in between, and made by one worker meanwhile, in turns: drawn pictures, and JPEGs of 64 px"""
    n, precision = BATCH["nano"], choose_precision(CPU)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(512):
            (Path(folder) / f"train/{i % 8}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(shapes.draw(i, 64)[0]).save(Path(folder) / f"train/{i % 8}/{i}.jpg", quality=90)
        for source, name in (("shapes", "drawn"), (folder, "JPEGs")):
            joint, steps = Joint("nano", precision, "ours"), batches_of(0, "nano", n, source=source)
            made, worker = [steps[i] for i in range(4)], in_workers(steps.__getitem__, range(rounds + 1), 1)
            seconds = in_turns({"made before": lambda r: joint.step(made[r % 4]), "by a worker": lambda r: joint.step(next(worker)),
                                "in between": lambda r: joint.step(steps[r])}, rounds)
            for way in ("in between", "by a worker"):
                yield dict(what=f"step with data {name} {way}", plain=n / median(seconds["made before"]), ours=n / median(seconds[way]), unit="images/s",
                           **ratio(seconds, "made before", way), protocol=f"nano, 64 px, patch 8, 8 local crops, {precision}; plain: batches made before; {rounds} rounds")


# ---------------------------------------------------------------- diffusion
CLASSES, CHANNELS = 10, 64


class Diffusion:
    """A DiT with weights as after some training, latents on disk to train it on, and the step of dit.py or of the yardstick"""
    def __init__(self, size, side, batch, precision, how, folder):
        torch.manual_seed(0)
        self.model = LightningDiT(input_size=side, patch_size=1, in_channels=CHANNELS, num_classes=CLASSES, **SIZES[size])
        for p in self.model.parameters():
            if p.requires_grad and p.ndim > 1 and not p.any():
                torch.nn.init.normal_(p, std=0.02)                                    # what starts at zero
        self.average, self.precision = copy.deepcopy(self.model).requires_grad_(False), precision
        weights = [p for p in self.model.parameters() if p.requires_grad]
        how_adam = dict(foreach=False) if how == "plain" else dict(fused=True)
        self.opt = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0, **how_adam)
        if not latents.shards(folder):
            latents.write_shard(folder / "latents_rank00_shard000.safetensors", torch.randn(512, CHANNELS, side, side), torch.randn(512, CHANNELS, side, side),
                                torch.randint(CLASSES, (512,)), "cpu")
        self.data, self.stats = latents.Latents(folder), {"mean": torch.zeros(1, CHANNELS, 1, 1), "std": torch.ones(1, CHANNELS, 1, 1)}
        self.steps = latents.Steps(self.data, self.stats, 0, batch, 0.1, CLASSES)
        self.step = self.plain if how == "plain" else self.ours

    def ours(self, r):
        batch = self.steps[r]
        self.opt.zero_grad()
        with autocast(CPU, self.precision):
            mse, cos = (term.mean() for term in dit.flow_loss(self.model, batch["x1"], batch["x0"], dit.lognorm_time(batch["z"], -0.5, 1.25), batch["y"]))
        (mse + cos).backward()
        self.opt.step()
        dit.ema_(self.average, self.model, 0.99)
        return (mse + cos).item()

    def plain(self, r):
        batch = self.steps[r]                                                         # the same draws; what reading plainly costs comes on top, its result unused
        for i in range(len(batch["y"])):
            plain.latent(self.data.paths[0], i, False, self.stats)
        self.opt.zero_grad()
        with autocast(CPU, self.precision):
            loss = plain.flow_loss(self.model, batch["x1"], batch["x0"], dit.lognorm_time(batch["z"], -0.5, 1.25), batch["y"])
        loss.backward()
        self.opt.step()
        plain.ema(self.average, self.model, 0.99)
        return loss.item()

    def flops(self):
        """Of one picture, forward"""
        x = torch.randn(1, CHANNELS, self.model.input_size, self.model.input_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
        return counter.get_total_flops()


def diffusion(rounds):
    """The DiT's step, and Euler's walk with guidance off (decoding and files aside), both in bf16 where the machine has it"""
    precision = choose_precision(CPU)
    for size, side, batch, shots in (("nano", 4, 64, 50), ("nano", 8, 64, 50), ("B", 4, 32, 50), ("B", 16, 4, 4)):
        n = rounds if size == "nano" else max(rounds // 3, 3)
        with tempfile.TemporaryDirectory() as folder:
            pair, losses = {how: Diffusion(size, side, batch, precision, how, Path(folder)) for how in ("plain", "ours")}, []
            x, y, args = torch.randn(shots, CHANNELS, side, side), torch.arange(shots) % CLASSES, Namespace(cfg=1.0, cfg_start=0.0, cfg_channels="3")

            def walk(r):
                with torch.no_grad(), autocast(CPU, precision):
                    dit.euler(dit.field(pair["ours"].model, y, CLASSES, args), x, dit.time_grid(6, 0.075))
            seconds = in_turns({how: lambda r, how=how: losses.append(pair[how].step(r)) for how in pair} | {"sample": walk}, n)
        peak, each = matmul_peak(CPU, precision, 1), pair["ours"].flops()
        training = 3 * batch * each / median(seconds["ours"]) / peak
        yield dict(what=f"DiT step, {size}, {side * side} tokens, {precision}", plain=batch / median(seconds["plain"]), ours=batch / median(seconds["ours"]), unit="images/s",
                   **ratio(seconds, "plain", "ours"), share_of_peak=training, first_step_losses_apart=abs(losses[1] / losses[0] - 1), protocol=f"batch {batch}, {n} rounds")
        yield dict(what=f"sampling, {size}, {side * side} tokens, {precision}", ours=shots / (median(seconds["sample"]) / 5 * 249), unit="images/s of 249 steps",
                   share_of_peak=5 * shots * each / median(seconds["sample"]) / peak, share_of_training=training, protocol=f"{shots} at once, guidance off, 5 steps timed, x 249/5, without decoding; {n} rounds")


@torch.no_grad()
def encoding(rounds):
    """Pictures and their mirror images -> latents, as dit.py latents does (fp32), drawing the pictures included"""
    tokenizer, source = VTPModel(VTPConfig.of_size("nano", 64, 8, CHANNELS, clip=False)).eval(), open_data("shapes", seed=0, side=64)
    n, img = 200, torch.zeros(1, 3, 64, 64)

    def call(r):
        for images, labels, _ in eval_batches(source, 64, 50, limit=n, crop="adm"):
            dit.encode(tokenizer, normalize(images), labels)
    seconds = in_turns({"ours": call}, rounds)["ours"]
    with FlopCounterMode(display=False) as counter:
        tokenizer.get_reconstruction_latents(img)
    yield dict(what="latents, nano, 64 px, fp32", ours=n / median(seconds), unit="images/s", share_of_peak=2 * n * counter.get_total_flops() / median(seconds) / matmul_peak(CPU, "fp32", 1),
               protocol=f"patch 8, batch 50, built-in pictures drawn meanwhile, each and its mirror image; {rounds} rounds of {n}")


# ---------------------------------------------------------------- FID
def fid(rounds, n=32):
    """Inception's features of 64 px pictures, enlarged to 299"""
    torch.manual_seed(0)
    ours = Inception()
    for name, x in ours.state_dict().items():                                         # weights through which a signal survives
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(x, nonlinearity="relu")
    both, img = {"plain": plain.inception(ours), "ours": ours}, torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8)
    seconds, (a, b) = in_turns({name: lambda r, net=net: net(img) for name, net in both.items()}, max(rounds // 2, 3)), (net(img) for net in both.values())
    yield dict(what="Inception features, fp32", plain=n / median(seconds["plain"]), ours=n / median(seconds["ours"]), unit="images/s", **ratio(seconds, "plain", "ours"),
               features_apart=((a - b).abs().max() / a.abs().max()).item(), protocol=f"batch {n}, random weights, {max(rounds // 2, 3)} rounds")


# ---------------------------------------------------------------- how cost grows
def growth(rounds):
    """Seconds of a joint step of ours in bf16 against batch, side, depth and width, and over processes; the exponent between neighbours"""
    rounds, precision = max(rounds // 3, 3), choose_precision(CPU)

    def cost(size="nano", batch=32, side=64, depth=None):
        joint, made = Joint(size, precision, "ours", side, 8, depth=depth), batches_of(2, size, batch, side)
        seconds = in_turns({"": lambda r: joint.step(made[r % 2])}, rounds)[""]
        return median(seconds), flops_of(joint, made[0]) / 1e9
    curves = {"batch": [(b, dict(batch=b)) for b in (8, 16, 32, 64, 128)], "side in pixels": [(s, dict(batch=16, side=s)) for s in (32, 64, 128, 192)],
              "depth": [(d, dict(depth=d)) for d in (2, 4, 8, 16)], "width": [(w, dict(size=z)) for w, z in ((96, "pico"), (192, "nano"), (384, "micro"))]}
    for axis, points in curves.items():
        before = None
        for value, settings in points:
            seconds, gflops = cost(**settings)
            row = dict(what=f"{axis} {value}", seconds=seconds, gflops=gflops, unit="seconds a step", protocol=f"{settings}, else nano, 64 px, batch 32; {precision}, {rounds} rounds")
            yield row | ({"exponent": math.log(seconds / before[1]) / math.log(value / before[0]), "exponent_of_flops": math.log(gflops / before[2]) / math.log(value / before[0])} if before else {})
            before = value, seconds, gflops
    for processes in (1, 2):                                                          # of one thread each
        out = Path(tempfile.mkdtemp()) / "run"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        subprocess.run([sys.executable, *launch, str(ROOT / "train.py"), "--out", str(out), "--perceptual", "none", "--steps", "40", "--device", "cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"},
                       capture_output=True, check=True)
        rate = median(json.loads(line)["images_per_s"] for line in (out / "log.jsonl").read_text().splitlines()[2:])
        yield dict(what=f"{processes} processes of one thread", ours=rate, unit="images/s", protocol="train.py, nano's defaults, 40 steps, the last three lines of the log")


def plan(rounds):
    """Counted, not timed: the paper's runs of S, B, L at 256 px, patch 16, in FLOPs, and in GPU-hours where a GPU reaches 40 % (a guess) of its bfloat16 peak"""
    for size in ("S", "B", "L"):
        model = on_meta(VTPModel, VTPConfig.of_size(size))
        rows = {side: {part: work for part, _, _, work in costs(model, side, head_on_meta(model, (65536, 2048, 256)))} for side in (256, 112)}
        trunk, small, part = rows[256]["encoder"], rows[112]["encoder"], rows[256]
        words, longer = 3 * trunk + 3 * part["text tower"] * 32 / 77, 3 * part["text tower"] * 45 / 77      # captions of 32 tokens, forward and backward: 3 x forward; of 77
        tokens = 10 + 0.15 * 512, 2 + 0.15 * 512                                      # a picture's rows of the head: class tokens, hidden patches; of student, of teacher
        views = 3 * (2 * trunk + 8 * small) + 2 * trunk + (3 * tokens[0] + tokens[1]) * part["DINO head"]
        pixels = 3 * part["decoder"]
        each = words + views / 4 + pixels / 8                                         # 16k : 4k : 2k
        hours = {gpu: 1.1e9 * each / (0.4 * peak) / 3600 for gpu, peak in (("A100", 312e12), ("H100", 989e12))}
        yield dict(what=f"plan {size}", gflops_a_sample=each / 1e9, gflops_with_77_tokens=(each + longer) / 1e9, flops_of_1_1_billion=1.1e9 * each, a100_hours=hours["A100"], h100_hours=hours["H100"], unit="",
                   protocol="256 px, patch 16, 8 local crops of 112, captions of 32 tokens; 40 % of 312 and 989 TFLOP/s; Table 2 takes three times as long; LPIPS not counted")


BENCHES = {f.__name__: f for f in (joint, data, fed, diffusion, encoding, fid, growth, plan)}

if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(*sys.argv[2:])
        raise SystemExit
    p = ArgumentParser(description=__doc__ + "\n" + "\n".join(f"{name:10s} {f.__doc__.strip().splitlines()[0]}" for name, f in BENCHES.items()), formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="*", help="some of the above; default: all")
    p.add_argument("--rounds", type=int, default=15, help="of which the median counts; slow ones take a third of them. default %(default)s")
    p.add_argument("--out", default=str(ROOT / "study" / "bench.json"), help="rows of the same name are replaced, the others stay")
    args = p.parse_args()
    if unknown := set(args.what) - BENCHES.keys():
        p.error(f"{', '.join(unknown)} is not measured here; choose some of {', '.join(BENCHES)}")
    if not Path("/proc/self/status").exists():
        p.error("memory is read from /proc, as Linux has it; this system has none")
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{torch.get_num_threads()} threads of {model[1] if model else platform.machine()}, torch {torch.__version__.split('+')[0]}"
    kept = {row["what"]: row for row in (json.loads(Path(args.out).read_text()) if Path(args.out).exists() else [])}
    for name in args.what or BENCHES:
        for row in BENCHES[name](args.rounds):
            kept[row["what"]] = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} | {"bench": name, "machine": machine}
            print(json.dumps(kept[row["what"]]), flush=True)
            Path(args.out).write_text(json.dumps(list(kept.values()), indent=1) + "\n")
