"""Kill a training run twenty times (SIGKILL), half of the times in the middle of a save, and
compare the result with an undisturbed run.

    python study/kill.py [FOLDER]       about three minutes on two cores; exit status 1 if a bit of
                                        the weights or a line of the log differs
"""
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_many import apart, kill, log, start, train                       # noqa: E402

FLAGS = ["--precision", "fp32", "--steps", 80, "--save-every", 1]
# a file that is being written when the process is killed; None: after a random time
MOMENTS = None, "last.pt.part", "model.safetensors.part", None


def main(folder, kills=20):
    rng = random.Random(0)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    train(undisturbed, *FLAGS)
    for k in range(kills):
        moment = MOMENTS[k % 4]
        run = start(killed, *FLAGS)
        if not kill(run, killed, moment, rng.uniform(0, 8)):
            raise SystemExit(f"the run ended before kill {k + 1}, so this is no test; take more "
                             f"--steps")
        found = sorted(path.name for path in killed.iterdir()) if killed.exists() else []
        when = f"while {moment} is written" if moment else "at a random moment"
        print(f"kill {k + 1:2d} {when}: {', '.join(found)}", flush=True)
    train(killed, *FLAGS)

    weights = [(run / "model.safetensors").read_bytes() for run in (killed, undisturbed)]
    equal = {"log": log(killed) == log(undisturbed),
             "student": apart(undisturbed, killed, "student") == 0,
             "teacher": apart(undisturbed, killed, "teacher") == 0,
             "model.safetensors": weights[0] == weights[1]}
    text = ", ".join(f"{name} {same}" for name, same in equal.items())
    print(f"{kills} kills, {len(log(killed))} logged steps; equal to the bit: {text}")
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch)))
