"""Kills a training run twenty times (SIGKILL), half of the times in the middle of a save, and compares what comes out with a run left alone.

    python tests/kill.py [FOLDER]        about three minutes on two cores; exit status 1 if a bit of the weights or a line of the log differs
"""
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_many import apart, kill, log, start, train      # noqa: E402

FLAGS = ["--precision", "fp32", "--steps", 80, "--save-every", 1]


def main(folder, kills=20):
    dice, left_alone, killed = random.Random(0), folder / "left alone", folder / "killed"
    train(left_alone, *FLAGS)
    for k in range(kills):
        run, moment = start(killed, *FLAGS), (None, "last.pt.part", "model.safetensors.part", None)[k % 4]
        if not kill(run, killed, moment, dice.uniform(0, 8)):
            raise SystemExit(f"the run ended before kill {k + 1}: no test; take more --steps")
        found = sorted(path.name for path in killed.iterdir()) if killed.exists() else []
        print(f"kill {k + 1:2d} {'while ' + moment + ' is written' if moment else 'at any moment'}: {', '.join(found)}", flush=True)
    train(killed, *FLAGS)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (killed, left_alone)]
    same = log(killed) == log(left_alone), apart(left_alone, killed, "student") == 0, apart(left_alone, killed, "teacher") == 0, weights[0] == weights[1]
    print(f"{kills} kills, {len(log(killed))} logged steps: log equal {same[0]}; to the bit equal: student {same[1]}, teacher {same[2]}, model.safetensors {same[3]}")
    return 0 if all(same) else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch)))
