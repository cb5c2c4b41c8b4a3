"""Draw samples of one DiT once, and decode them with several decoders.

    python study/sample_decoders.py RUN/dit --decoder RUN/tokenizer RUN/samples-own \\
        --decoder RUN/more RUN/samples-more --n 500 --points 50

writes what these commands write, but the DiT, which takes most of the time, runs once:

    python dit.py sample RUN/dit --tokenizer RUN/tokenizer --out RUN/samples-own --n 500 --points 50
    python dit.py sample RUN/dit --tokenizer RUN/more --out RUN/samples-more --n 500 --points 50

All further arguments are those of `dit.py sample`. The Euler steps do not depend on the decoder, so
their results, the latents of each batch, are kept from the first pass and used in the others. (So
the images/s that the others print are those of decoding alone.)
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dit                                                                 # noqa: E402


def parser():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="folder that `dit.py train` wrote")
    p.add_argument("--decoder", nargs=2, action="append", required=True, metavar=("DECODER", "OUT"),
                   help="folder of a decoder, and new folder for the images; repeatable")
    return p


def parse(argv=None):
    """-> list of the arguments of `dit.py sample`, one list per decoder"""
    args, others = parser().parse_known_args(argv)
    commands = [["sample", args.run, "--tokenizer", decoder, "--out", out, *others]
                for decoder, out in args.decoder]
    for command in commands:                   # wrong arguments are found before the first
        dit.parse(command)
    return commands


def main(commands):
    """Run these commands; all but the first use the latents of the first.

    ValueError if the decoders belong to different encoders, before anything is computed
    """
    folders = [dit.parse(command).tokenizer for command in commands]
    encoders = [dit.load_tokenizer(folder, "cpu")[1] for folder in folders]
    for folder, encoder in zip(folders, encoders):
        if encoder != encoders[0]:
            raise ValueError(f"the encoder of {folder} is not that of {folders[0]}, so it cannot "
                             f"decode the same latents; give decoders of one tokenizer")
    euler = dit.euler
    latents = []                               # of the batches of the first command, in order

    def first_euler(velocity, x, grid):
        latents.append(euler(velocity, x, grid))
        return latents[-1]

    try:
        dit.euler = first_euler
        dit.main(commands[0])
        for command in commands[1:]:
            batches = iter(latents)
            dit.euler = lambda velocity, x, grid: next(batches)
            dit.main(command)
    finally:
        dit.euler = euler


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, OSError) as problem:
        raise SystemExit(f"sample_decoders.py: {problem}") from None
