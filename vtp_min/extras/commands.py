"""The five commands of eval.py that do not evaluate a model on a data set.

    check     run released weights, or a training run, on a few images
    cost      count parameters and FLOPs of a run or of a model size
    report    write one HTML page about a run
    compare   compare the log of a run with reference logs
    fetch     download external weights

eval.py calls `arguments` to parse the command line, then `run`. Each command is a function of the
same name; its docstring is the description that `--help` prints.
"""
import argparse
import sys
from pathlib import Path

from ..config import VTPConfig
from ..dist import barrier, cleanup, print0, rank
from ..model import SIZES, SMALL, VTPModel, load_model
from ..run import parse_settings, record_metric
from .files import check_writable, read_settings
from .flag_ranges import check_numbers


def run(args, device, open_data, eval_batches, get_tokenizer):
    """Execute the command in args.command.

    args    namespace returned by `arguments`
    device  torch.device of the model
    open_data, eval_batches, get_tokenizer
            functions of data.py and tokenizer.py; passed in because vtp_min imports no script
    """
    if args.command == "fetch":
        return fetch(args)
    # The other commands take little time, so only rank 0 executes them; the other ranks return.
    is_rank_0 = rank() == 0
    cleanup()
    if not is_rank_0:
        return
    if args.command == "check":
        check(args, device, open_data, get_tokenizer)
    elif args.command == "cost":
        cost(args)
    elif args.command == "compare":
        compare(args)
    else:
        report(args, device, open_data, eval_batches, get_tokenizer)


def check(args, device, open_data, get_tokenizer):
    """Check released weights or a run: compare its parameter counts with those of the released
    code, then encode, reconstruct and classify a few images. Writes OUT/check.png and
    OUT/metrics.jsonl."""
    from .check import check_model
    from .cost import describe
    check_writable(args.out, "give another folder with --out")
    model = load_model(args.run).to(device)
    print0("\n".join([args.run, *describe(model)]))
    side = args.image or model.config.image_size
    check_model(model, args.images, args.names, side, args.out, device, open_data, get_tokenizer)


def cost(args):
    """Count parameters and GFLOPs of each part of a run, of one size, or of all sizes. Only tensor
    shapes are needed: the model is on the meta device and computes nothing."""
    from .cost import COUNTING_RULES, compare_with_table_1, costs, head_on_meta, table
    print0(COUNTING_RULES)
    if args.run:
        args.out = args.out or args.run
        models = {args.run: model_of_run(args.run)}
    else:
        sizes = [args.size] if args.size else [*SIZES, "ldm"]
        models = {size: model_of_size(size, args) for size in sizes}
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, (model, head) in models.items():
        side = args.image or model.config.image_size
        patch = model.config.vision_patch_size
        if side % patch:
            raise ValueError(f"--image {side} is not a multiple of the patch size, {patch}; try "
                             f"--image {max(side // patch, 1) * patch}")
        rows = costs(model, side, head_on_meta(model, head))
        print0(f"\n{name}: {side} px, patch {patch}")
        print0("\n".join([*table(rows), *compare_with_table_1(model, side, rows)]))
        if not args.out:
            continue
        for part, n, flops, with_attention in rows:
            record_metric(args.out, f"GFLOPs {part}", flops / 1e9,
                          f"{name}, {side} px, forward pass, 2 FLOPs per multiply-add, attention "
                          f"products not counted", parameters=n,
                          with_attention=with_attention / 1e9)


def model_of_run(folder):
    """-> the model on the meta device, and the sizes of its DINO head

    The sizes are (prototypes, hidden, bottleneck), or None for a run without self-distillation and
    for released weights, which have no run.json.
    """
    settings = read_settings(folder)
    head = None
    if settings.get("w_ssl"):
        head = [settings[name] for name in ("prototypes", "head_hidden", "head_bottleneck")]
    return load_model(folder).to("meta"), head


def model_of_size(size, args):
    """-> as model_of_run, for a size of train.py or for 'ldm', the CNN of Table 1

    Small sizes get train.py's image size and DINO head; S, B and L get the paper's image size and
    DINOv2's head.
    """
    from .baselines import LDM, LDMConfig
    from .cost import on_meta
    if size == "ldm":
        return on_meta(LDM, LDMConfig(latent_dim=args.latent_dim)), None
    image = {}                                             # the defaults of VTPConfig.of_size
    head = (65536, 2048, 256)                              # prototypes, hidden, bottleneck
    if size in SMALL:
        image = {"image": 36, "patch": 9}
        head = (256, 256, 64)
    config = VTPConfig.of_size(size, latent_dim=args.latent_dim,
                               light_decoder=args.light_decoder, **image)
    return on_meta(VTPModel, config), head


def report(args, device, open_data, eval_batches, get_tokenizer):
    """Write RUN/report.html: training curves, reconstructions, patch features, attention maps,
    zero-shot classification, generated samples, and all metrics."""
    from .report import latest_metrics, write_report
    path = write_report(args.run, open_data, eval_batches, get_tokenizer, args.data,
                        args.val_data, device, args.dit, args.seed)
    for metric in latest_metrics([args.run]).values():
        print0(f"{metric['name']:28s} {float(metric['value']):10.4g}   {metric['protocol']}")
    print0(f"wrote {path}")


def compare(args):
    """Is a run on the reference curve? Compare each loss term and diagnostic in its log with
    reference logs, which are runs of the same settings: several seeds give a range. Name the
    settings that differ, and write OUT/compare.png. Exit status: 0 if all are on the curve, 1 if
    not, 2 if the logs cannot be compared. study/logs contains reference logs."""
    from .compare import compare as compare_logs
    try:
        on_curve = compare_logs(args.run, args.references, args.out)
    except (ValueError, OSError) as problem:
        print(f"eval.py compare: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    if not on_curve:
        raise SystemExit(1)


def fetch(args):
    """Download external weights and check their hashes. Without a network, print the addresses of
    the files and the folder where they belong."""
    from . import weights
    for name in args.names or weights.FILES:
        weights.fetch(name)                                # only rank 0 downloads
        barrier()
        print0(name, weights.find(name))
        if name in weights.HEADS:
            print0(name, "heads", weights.heads(name))


# settings of the command cost for --set name=value: default, and meaning with its source
SETTINGS = {
    "latent_dim": (64, "latent channels d; the paper also uses 256"),
    "light_decoder": (False, "the paper's decoder for fast experiments, 4 ViT-L layers, Sec. 4.1"),
}


def arguments(argv):
    """Parse the command line.

    argv  the command, then its flags -> Namespace
    Exits with a usage message if a flag or a setting is unknown.
    """
    top = argparse.ArgumentParser(prog="eval.py")
    parsers = top.add_subparsers(dest="command", required=True)

    def add(function):
        p = parsers.add_parser(function.__name__, description=function.__doc__)
        p.add_argument("--device", help="cpu, cuda or mps; default: the best one available")
        return p

    p = add(check)
    p.add_argument("run", help="folder with the official config.json and model.safetensors, Hub "
                               "id, or run folder of train.py")
    p.add_argument("--images", nargs="+", help="image files, or folders of them; default: eight "
                                               "images of the built-in shapes")
    p.add_argument("--names", nargs="+", help="class names to choose from, such as: dog cat; "
                                              "default: ImageNet's 1000 classes")
    p.add_argument("--image", type=int, help="side of the square crop in pixels; default: the "
                                             "model's image size")
    p.add_argument("--out", default="check", help="output folder for check.png and metrics.jsonl "
                                                  "(default: check)")

    p = add(cost)
    p.add_argument("run", nargs="?", help="run to count; if it is omitted, --size is counted")
    p.add_argument("--size", choices=[*SIZES, "ldm"], help="a size of train.py, or ldm, the CNN of "
                                                           "Table 1; default: all sizes")
    p.add_argument("--image", type=int, help="side of the image in pixels; default: the model's "
                                             "image size, 256 for S, B and L")
    p.add_argument("--out", help="folder of metrics.jsonl; default: the run; the numbers of a size "
                                 "are only printed")
    table = [f"{name}={default}: {text}" for name, (default, text) in SETTINGS.items()]
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                   help=f"change a setting; repeatable. {'; '.join(table)}")

    p = add(report)
    p.add_argument("run", help="run folder of train.py")
    p.add_argument("--dit", help="output folder of dit.py train; default: RUN/dit, if it exists")
    p.add_argument("--seed", type=int, default=0, help="random seed for the choice of the images "
                                                       "that are shown (default: 0)")
    p.add_argument("--data", help="shapes, a folder of class folders, or tar files; default: the "
                                  "run's data")
    p.add_argument("--val-data", help="validation images, needed if --data has no folder val/")

    p = add(compare)
    p.add_argument("run", help="run folder of train.py or dit.py, or a log.jsonl")
    p.add_argument("references", nargs="+", metavar="reference", help="log.jsonl of a reference, "
                                                                       "or its run folder")
    p.add_argument("--out", help="folder of compare.png; default: that of the run's log")

    p = add(fetch)
    p.add_argument("names", nargs="*", help="some of: vgg, alex, squeeze (for LPIPS), inception "
                                            "(for FID); default: all")
    args = top.parse_args(argv)
    defaults = {name: default for name, (default, _) in SETTINGS.items()}
    try:
        given = parse_settings(getattr(args, "set", []), defaults)
        check_numbers(argparse.Namespace(**vars(args) | given), given)
        if getattr(args, "names", None) and args.command == "check" and len(set(args.names)) < 2:
            raise ValueError(f"--names {args.names[0]}: wanted two or more names to choose from")
    except ValueError as problem:
        top.error(str(problem))
    vars(args).update(defaults | given)
    return args
