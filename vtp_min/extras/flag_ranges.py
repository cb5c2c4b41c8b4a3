"""Ranges of the numbers on the command line, for train.py, eval.py, dit.py and data.py.

argparse and parse_settings check the type of a value. check_numbers checks its range, so that a
number which cannot work is refused before anything is computed, by a message that names the flag.
"""
from math import inf, isfinite, nextafter

RANGES = [     # description, smallest and largest value, names of flags and settings
    ("1 or more", 1, inf, "image patch local_image latent_dim steps batch batch_ssl batch_rec "
     "log_every save_every prototypes head_hidden head_bottleneck limit train_limit n per_class "
     "epochs epoch_length train_batch judge_steps"),
    ("2 or more", 2, inf, "rows"),                         # data.py: rows of a training batch
    ("0 or more", 0, inf, "workers warmup micro locals lr w_koleo weight_decay weight_decay_end "
     "clip_grad eps layer_decay patch_lr"),
    ("0 or more, up to 2^63 - 1", 0, 2 ** 63 - 1, "seed"),
    ("more than 0", nextafter(0, 1), inf, "teacher_temp teacher_temp_start"),
    ("a number from 0 to 1", 0, 1, "teacher_temp_warmup freeze_last_layer ema max_bad"),
    ("0 or more, and less than 1", 0, nextafter(1, 0), "drop_ssl drop_clip drop_rec beta1 beta2"),
]


def check_numbers(args, settings=()):
    """ValueError for a number that is out of range or not finite

    args      Namespace of flags and settings; values that are no numbers are not checked
    settings  names of the settings, which are typed as --set name=value
    """
    ranges = {name: limits for *limits, names in RANGES for name in names.split()}
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        wanted, low, high = ranges.get(name, ("a finite number", -inf, inf))
        if low <= value <= high and isfinite(value):
            continue
        if not isfinite(value):
            wanted = "a finite number"
        flag = f"--set {name}=" if name in settings else f"--{name.replace('_', '-')} "
        raise ValueError(f"{flag}{value}: wanted {wanted}")
