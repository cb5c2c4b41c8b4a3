"""Random generators that depend only on their purpose: (stream, seed, step, row, ...) -> generator.

With one global generator, each random number would depend on all earlier draws. A batch would then
change with the number of processes, with the number of data workers and after a resumed run. Here,
each use makes its own generator from a key of integers. Equal keys give equal numbers in every
process.
"""
from enum import IntEnum
from functools import lru_cache

import numpy as np


class Stream(IntEnum):
    """The first integer of a key: one number per purpose, so no two purposes share a generator.

    Do not renumber: the number determines the random values, and a resumed run must draw the same.
    """
    ORDER = 0          # order of the samples in an epoch
    SAMPLE = 1         # caption template of a sample, such as "a photo of a {}"
    REPLACEMENT = 2    # choice of the sample that replaces an unreadable one
    CLIP_VIEW = 3      # crop for CLIP and reconstruction
    CROPS = 4          # global and local crops for self-distillation
    MASK_RATIO = 5     # number of masked patches of each crop
    MASK_BLOCKS = 6    # positions of the masked patches
    EVAL = 7           # evaluation: caption templates; order and crops of the linear probe
    STATS = 8          # choice of the latents whose mean and std are measured
    DIT = 9            # noise, time, flip and label dropout of a DiT training step
    SAMPLING = 10      # initial noise of a generated image
    DECODER = 11       # noise added to latents when a pixel decoder is trained
    POSTERIOR = 12     # samples of the posterior of a KL autoencoder
    DROP = 13          # rows that stochastic depth keeps


def make_rng(stream, *key):
    """stream: a Stream; key: any non-negative integers -> numpy.random.Generator"""
    # NumPy hashes the whole list, so keys that differ in one integer give independent sequences.
    return np.random.default_rng([stream, *key])


# The cache holds two permutations, because a batch can contain the end of one epoch and the start
# of the next. All callers share the cached array and must not write to it.
@lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """Order of the n samples of an epoch -> (n,) array of the integers 0 to n - 1"""
    return make_rng(Stream.ORDER, seed, epoch).permutation(n)
