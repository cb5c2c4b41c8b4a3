"""Check this code on an accelerator: correct, as fast as planned, as large as counted?

    python study/gpu.py               every line, at most 30 minutes -> study/gpu/NAME.json, .txt
    python study/gpu.py golden mfu    some of the lines
    python study/gpu.py --device cpu  the same lines at small size, to test this script

NAME is the name of the device. A line is stored as soon as it is finished, and the same command
skips the lines that are stored; --fresh measures them again. Ctrl-C loses the current line only.
The table (NAME.txt) is Markdown: please paste it into an issue, whatever it says. The lines are:

{lines}

    pass      the value is within the limit
    slow      the device does less than planned, or did not finish the line in its time
    fail      do not trust results of this device; the table says what to do
    not run   the machine lacks what the line needs

On a CPU the models are pico at 32 px. There the lines show that this script works; speeds have no
limit. No limit was measured on a GPU: each is our choice, and the docstring of its function says
what it follows from.
"""
import argparse
import gc
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "study")]
from gpu_lines import LINES, Found, NotRun                                 # noqa: E402
from gpu_tools import Machine                                              # noqa: E402
from vtp_min.config import atomic_write                                    # noqa: E402
from vtp_min.device import set_tf32                                        # noqa: E402
from vtp_min.dist import choose_device                                     # noqa: E402


def machine_text(device):
    name = "CPU"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    elif device.type == "mps":
        name = "MPS"
    return f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def version():
    """-> the commit of this repository, with -dirty if files were changed"""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                              capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):                 # no git, or not a clone
        return "unknown commit"
    return f"commit {done.stdout.strip()}"


class TimeIsOver(Exception):
    """A line was not finished within its time"""


def measure(m, name):
    """Run one line within its time -> its row; an exception is a row with the state fail"""
    function = LINES[name]
    over = f"not finished within {function.seconds} s"

    def time_is_over(number, frame):
        raise TimeIsOver(over)

    previous = signal.signal(signal.SIGALRM, time_is_over)
    # a CPU may be busy with other work
    signal.alarm(0 if m.small else function.seconds)
    start = time.perf_counter()
    try:
        set_tf32(m.device, True)                                 # as train.py
        found = function(m)
    except NotRun as reason:
        found = Found(str(reason), "", "not run", {})
    except TimeIsOver as error:
        found = Found(str(error), "", "slow", {})
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        found = Found(f"{type(error).__name__}: {text[:300]}", "", "fail", {})
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    todo = function.advice.get(found.state, "")
    if found.value == over:
        todo = f"Try again on an idle machine: python study/gpu.py {name} --fresh."
    return found._asdict() | {"do": todo, "seconds": round(time.perf_counter() - start, 1),
                              "version": version()}


def clean_up(device):
    """Free the memory of a line -> False if the device cannot be used by this process any more

    After some errors of a CUDA kernel, each further call in the same process fails.
    """
    gc.collect()
    try:
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def table(results):
    """-> the table in Markdown"""
    rows = {name: results["rows"][name] for name in LINES if name in results["rows"]}
    total = sum(row["seconds"] for row in rows.values())
    states = Counter(row["state"] for row in rows.values())
    versions = ", ".join(sorted({row["version"] for row in rows.values()}))
    yield (f"`{results['command']}` ({versions}) on {results['machine']}: "
           f"{total / 60:.1f} minutes; " + ", ".join(f"{n} {s}" for s, n in states.items()))
    yield ""
    yield "| line | value | limit | result | what to do |"
    yield "|---|---|---|---|---|"
    for name, row in rows.items():
        cells = [name, row["value"], row["limit"], row["state"], row["do"]]
        yield "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def save(out, results):
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    atomic_write(out, lambda path: path.write_text(text))
    out.with_suffix(".txt").write_text("\n".join(table(results)) + "\n")


def parse(argv):
    lines = "\n".join(f"    {name:17s} {f.__doc__.splitlines()[0]}" for name, f in LINES.items())
    p = argparse.ArgumentParser(description=__doc__.replace("{lines}", lines),
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="line", help="some of the lines (default: all)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the best one present)")
    p.add_argument("--out", type=Path,
                   help="JSON file (default: study/gpu/NAME.json); the table is written next to it "
                        "with the suffix .txt")
    p.add_argument("--fresh", action="store_true", help="measure stored lines again")
    args = p.parse_args(argv)
    unknown = set(args.names) - set(LINES)
    if unknown:
        p.error(f"unknown line {', '.join(sorted(unknown))}; wanted some of {', '.join(LINES)}")
    return args


def main(argv=None):
    args = parse(argv)
    command = "python study/gpu.py" + (f" --device {args.device}" if args.device else "")
    device = choose_device(args.device)
    text = machine_text(device)
    name = re.sub(r"\W+", "-", text.split(",")[0]).lower()
    out = args.out or ROOT / f"study/gpu/{name}.json"
    m = Machine(device, out.with_suffix("") if args.out else ROOT / f"runs/gpu/{name}")
    results = json.loads(out.read_text()) if out.exists() else {"machine": text, "rows": {}}
    names = args.names or [*LINES]
    if args.fresh:
        results["rows"] = {k: row for k, row in results["rows"].items() if k not in names}
    if results["rows"] and results["machine"] != text:
        raise SystemExit(f"{out} holds lines of another machine ({results['machine']}; this is "
                         f"{text}): give another --out, or measure all again with --fresh")
    results |= {"machine": text, "command": command}
    for name in names:
        if name in results["rows"]:
            print(f"{name}: stored", flush=True)
            continue
        # If the process dies in this line, this row stays and the next start skips the line.
        ended = "the process ended in this line, for example because the memory was full"
        results["rows"][name] = {"value": ended, "limit": "", "state": "fail", "numbers": {},
                                 "do": LINES[name].advice["fail"], "seconds": 0,
                                 "version": version()}
        save(out, results)
        try:
            row = measure(m, name)
        except KeyboardInterrupt:
            del results["rows"][name]
            save(out, results)
            print(f"stopped in {name}; the same command continues")
            return 130
        results["rows"][name] = row
        save(out, results)
        print(f"{name}: {row['state']}: {row['value']}", flush=True)
        if not clean_up(device):
            print("the device cannot be used any more by this process; the same command continues")
            return 1
    print("\n".join(table(results)), f"\n-> {out}, {out.with_suffix('.txt')}", sep="\n")
    return int(any(results["rows"][name]["state"] == "fail" for name in names))


if __name__ == "__main__":
    sys.exit(main())
