"""The commands of eval.py that measure no quality: check, cost, report, fetch."""
import argparse
import json
from pathlib import Path

from ..config import VTPConfig
from ..dist import barrier, cleanup, print0, rank
from ..model import SIZES, SMALL, VTPModel, load_model
from ..run import parse_settings, record_metric


def run(args, device, open_data, eval_batches, get_tokenizer):
    """open_data, eval_batches, get_tokenizer  functions of data.py and tokenizer.py"""
    if args.command == "fetch":
        return fetch(args)
    first = rank() == 0
    cleanup()                                              # rank 0 continues as one process
    if not first:
        return
    if args.command == "check":
        check(args, device, open_data, get_tokenizer)
    elif args.command == "cost":
        cost(args)
    else:
        report(args, device, open_data, eval_batches, get_tokenizer)


def check(args, device, open_data, get_tokenizer):
    """Released weights or a run: parameters beside the official ones; a few images encoded,
    reconstructed and named"""
    from .check import try_out
    from .cost import describe
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model = load_model(args.run).to(device)
    print0("\n".join([args.run, *describe(model)]))
    side = args.image or model.config.image_size
    try_out(model, args.images, args.names, side, args.out, device, open_data, get_tokenizer)


def cost(args):
    """Parameters and GFLOPs of each part, counted without computing: of a run, a size, all sizes"""
    from .cost import COUNTED, costs, head_on_meta, paper_says, table
    print0(COUNTED)
    if args.run:
        args.out = args.out or args.run
        models = {args.run: model_of_run(args.run)}
    else:
        sizes = [args.size] if args.size else [*SIZES, "ldm"]
        models = {size: model_of_size(size, args) for size in sizes}
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, (model, head) in models.items():
        side, patch = args.image or model.config.image_size, model.config.vision_patch_size
        if side % patch:
            raise ValueError(f"--image {side} is no multiple of the patch, {patch}; try --image "
                             f"{max(side // patch, 1) * patch}")
        rows = costs(model, side, head_on_meta(model, head))
        print0(f"\n{name}: {side} px, patch {patch}")
        print0("\n".join([*table(rows), *paper_says(model, side, rows)]))
        if not args.out:
            continue
        for part, n, flops, with_attention in rows:
            record_metric(args.out, f"GFLOPs {part}", flops / 1e9,
                          f"{name}, {side} px, forward, 2 a multiply-add, attention products not "
                          f"counted", parameters=n, with_attention=with_attention / 1e9)


def model_of_run(folder):
    """-> model without values, sizes of its DINO head (prototypes, hidden, bottleneck) or None"""
    path, settings, head = Path(folder, "run.json"), {}, None
    if path.exists():
        settings = json.loads(path.read_text())
    if settings.get("w_ssl"):
        head = [settings[name] for name in ("prototypes", "head_hidden", "head_bottleneck")]
    return load_model(folder).to("meta"), head


def model_of_size(size, args):
    """As model_of_run. Small sizes have train.py's image and DINO head; the others have the
    paper's image and DINOv2's head."""
    from .baselines import LDM, LDMConfig
    from .cost import on_meta
    if size == "ldm":
        return on_meta(LDM, LDMConfig(latent_dim=args.latent_dim)), None
    image, head = {}, (65536, 2048, 256)
    if size in SMALL:
        image, head = dict(image=36, patch=9), (256, 256, 64)
    config = VTPConfig.of_size(size, latent_dim=args.latent_dim,
                               light_decoder=args.light_decoder, **image)
    return on_meta(VTPModel, config), head


def report(args, device, open_data, eval_batches, get_tokenizer):
    """RUN/report.html: curves, reconstructions, features, attention, zero-shot, samples, numbers"""
    from .report import write_report
    path = write_report(args.run, open_data, eval_batches, get_tokenizer, args.data,
                        args.val_data, device, args.dit, args.seed)
    for m in latest_metrics(args.run).values():
        print0(f"{m['name']:28s} {m['value']:10.4g}   {m['protocol']}")
    print0(f"wrote {path}")


def latest_metrics(run):
    """metrics.jsonl -> {name: its newest line}"""
    path = Path(run, "metrics.jsonl")
    if not path.exists():
        return {}
    metrics = [json.loads(line) for line in path.read_text().splitlines()]
    return {m["name"]: m for m in metrics}


def fetch(args):
    """Download external weights and check their hashes; offline, print their address and folder"""
    from . import weights
    for name in args.names or weights.FILES:
        weights.fetch(name)                                # on rank 0
        barrier()
        print0(name, weights.find(name))
        if name in weights.HEADS:
            print0(name, "heads", weights.heads(name))


# --set name=value of cost: default, meaning and source
SETTINGS = {
    "latent_dim": (64, "d, channels of a latent; the paper also has 256"),
    "light_decoder": (False, "the paper's decoder for fast experiments, 4 ViT-L layers, Sec. 4.1"),
}


def arguments(argv):
    """argv  the command and its flags -> namespace; exits with a sentence if they are wrong"""
    top = argparse.ArgumentParser(prog="eval.py")
    parsers = top.add_subparsers(dest="command", required=True)

    def add(function):
        p = parsers.add_parser(function.__name__, description=function.__doc__)
        p.add_argument("--device", help="cpu, cuda or mps; default: the best one present")
        return p

    p = add(check)
    p.add_argument("run", help="official folder (config.json, model.safetensors), Hub id, or a "
                               "folder of train.py")
    p.add_argument("--images", nargs="+", help="your images, or folders of them; without: eight "
                                               "built-in shapes")
    p.add_argument("--names", nargs="+", help="what they may show: a dog, a cat, ...; default: "
                                              "ImageNet's 1000 classes")
    p.add_argument("--image", type=int, help="side of the crop; default: the model's")
    p.add_argument("--out", default="check", help="folder for check.png and metrics.jsonl (default "
                                                   "check)")

    p = add(cost)
    p.add_argument("run", nargs="?", help="count this run; without, --size")
    p.add_argument("--size", choices=[*SIZES, "ldm"], help="a size of train.py, or Table 1's CNN; "
                                                           "default: all")
    p.add_argument("--image", type=int, help="side of the image; default: the model's, 256 for S, "
                                             "B, L")
    p.add_argument("--out", help="folder of metrics.jsonl; default: the run's, none for a size")
    table = [f"{name}={default}: {text}" for name, (default, text) in SETTINGS.items()]
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                   help=f"repeatable; {'; '.join(table)}")

    p = add(report)
    p.add_argument("run", help="folder of train.py")
    p.add_argument("--dit", help="folder of dit.py train; default: RUN/dit, if it exists")
    p.add_argument("--seed", type=int, default=0, help="chooses the images that are shown (default "
                                                   "0)")
    p.add_argument("--data", help="shapes, a folder of class folders, or tars; default: the run's")
    p.add_argument("--val-data", help="validation images, if --data has no val/")

    p = add(fetch)
    p.add_argument("names", nargs="*", help="vgg, alex, squeeze (LPIPS), inception (FID), "
                                            "squeezenet; default: all that can be downloaded")
    args = top.parse_args(argv)
    defaults = {name: default for name, (default, _) in SETTINGS.items()}
    try:
        given = parse_settings(getattr(args, "set", []), defaults)
    except ValueError as problem:
        top.error(str(problem))
    vars(args).update(defaults | given)
    return args
