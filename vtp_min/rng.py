"""Random numbers that depend only on their use: (stream, seed, step, row, ...) -> generator.

Equal keys give equal numbers in any process, so a batch does not depend on the number of processes,
on data workers or on what was drawn before.
"""
from enum import IntEnum
from functools import lru_cache

import numpy as np


class Stream(IntEnum):
    """One number for each purpose. Two purposes never share a generator."""
    ORDER = 0          # order of the samples in an epoch
    SAMPLE = 1         # caption template of a sample
    REPLACEMENT = 2    # sample that replaces an unreadable one
    CLIP_VIEW = 3      # crop for CLIP and reconstruction
    CROPS = 4          # global and local crops
    MASK_RATIO = 5     # number of masked patches of each crop
    MASK_BLOCKS = 6    # position of the masked patches
    EVAL = 7           # caption template in evaluation
    STATS = 8          # latents on which mean and std are measured
    DIT = 9            # noise, time, flip and label dropout of a DiT training step
    SAMPLING = 10      # initial noise of a generated image
    DECODER = 11       # noise of the baselines' decoders
    POSTERIOR = 12     # samples of a KL autoencoder's posterior
    DROP = 13          # stochastic depth


def make_rng(stream, *key):
    """stream, then any non-negative integers -> numpy Generator"""
    return np.random.default_rng([stream, *key])


@lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order of n samples in an epoch -> (n,) array"""
    return make_rng(Stream.ORDER, seed, epoch).permutation(n)
