"""Kill a training run twenty times with SIGKILL, ten times while it saves a file, and compare the
result with an uninterrupted run.

    python study/kill.py [FOLDER]       about three minutes on two cores

Exit status 1 if the weights are not bitwise equal or a line of the log differs.
"""
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_many import apart, kill, log, start, train                       # noqa: E402

FLAGS = ["--precision", "fp32", "--steps", 80, "--save-every", 1]
# the process is killed when it writes this file; None: after a random time
MOMENTS = None, "last.pt.part", "model.safetensors.part", None


def main(folder, kills=20):
    rng = random.Random(0)
    uninterrupted = folder / "uninterrupted"
    killed = folder / "killed"
    train(uninterrupted, *FLAGS)
    for k in range(kills):
        moment = MOMENTS[k % 4]
        run = start(killed, *FLAGS)
        if not kill(run, killed, moment, rng.uniform(0, 8)):
            raise SystemExit(f"the run ended before kill {k + 1}, so nothing was tested; increase "
                             f"--steps in FLAGS")
        files = sorted(path.name for path in killed.iterdir()) if killed.exists() else []
        when = f"while {moment} was written" if moment else "at a random time"
        print(f"kill {k + 1:2d} {when}; files: {', '.join(files)}", flush=True)
    train(killed, *FLAGS)

    weights = [(run / "model.safetensors").read_bytes() for run in (killed, uninterrupted)]
    equal = {"log": log(killed) == log(uninterrupted),
             "student": apart(uninterrupted, killed, "student") == 0,
             "teacher": apart(uninterrupted, killed, "teacher") == 0,
             "model.safetensors": weights[0] == weights[1]}
    text = ", ".join(f"{name} {same}" for name, same in equal.items())
    print(f"{kills} kills, {len(log(killed))} logged steps; bitwise equal: {text}")
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch)))
