"""augment.ssl_views, faster for small crops and equal to it in every bit.

The crops are cut one after the other. The color operations then run on many crops at once, because
numpy needs about as long for one small crop as for ten.
"""
import numpy as np

from .. import augment

VALUES_AT_ONCE = 2 ** 18             # 1 MB of float32: stays in the cache of a core


def ssl_views(jobs):
    """jobs  list of (rng, image, side, an entry of augment.VIEWS) -> list of views"""
    views, operations, by_side = [], [], {}
    for i, (rng, image, side, (area, p_blur, p_solarize)) in enumerate(jobs):
        view = augment.random_crop(rng, image, side, area)
        views.append(view[..., ::-1] if rng.random() < 0.5 else view)
        operations.append(draw_operations(rng, p_blur, p_solarize))
        by_side.setdefault(side, []).append(i)
    for side, indices in by_side.items():
        n = max(1, VALUES_AT_ONCE // (3 * side * side))
        for k in range(0, len(indices), n):
            chunk = indices[k:k + n]
            x = np.stack([views[i] for i in chunk], axis=1).astype(np.float32)    # (3, n, s, s)
            x = apply_operations(x, [operations[i] for i in chunk])
            for i, view in zip(chunk, x.round().astype(np.uint8).swapaxes(0, 1)):
                views[i] = view
    return views


def draw_operations(rng, p_blur, p_solarize):
    """The random numbers of augment.ssl_view in its order -> seven (function, amount) or None"""
    jitter = [None] * 4
    if rng.random() < 0.8:
        jitter = []
        for i in rng.permutation(4):
            operation, low, high = augment.COLOR_JITTER[i]
            jitter.append((operation, rng.uniform(low, high)))
    gray = (grayscale, 0) if rng.random() < 0.2 else None
    blur = (augment.gaussian_blur, rng.uniform(0.1, 2.0)) if rng.random() < p_blur else None
    solar = (solarize, 0) if rng.random() < p_solarize else None
    return [*jitter, gray, blur, solar]


def grayscale(x, _):
    return augment.grayscale(x)


def solarize(x, _):
    return augment.solarize(x)


def apply_operations(x, operations):
    """x (3, n, s, s) float32; operations  n lists of seven -> like x, which may be changed"""
    for position in zip(*operations):          # the first operation of each view, then the second
        for operation in {pair[0] for pair in position if pair}:
            rows = [i for i, pair in enumerate(position) if pair and pair[0] is operation]
            amounts = np.array([position[i][1] for i in rows], np.float32)[:, None, None]
            if len(rows) == len(operations):
                x = operation(x, amounts)                     # spares two copies
            else:
                x[:, rows] = operation(x[:, rows], amounts)
    return x
