"""Latents on disk: a folder that LightningDiT reads too, and what a training step draws of it.

    latents_rank00_shard000.safetensors ...   latents, latents_flip (n, C, H, W), labels (n,): pictures, their mirror images, their classes
    latents_stats.pt                          mean, std (1, C, 1, 1): the DiT sees (z - mean) / std. Written last: without it encoding has not ended
    classes.json, latents.json                names of the classes; which encoder saw which pictures (ours)
"""
import bisect
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .run import write_aside
from .views import DRAW, ORDER, STATS, lots


def shards(folder):
    """Its files in order: rank, then number. Each rank encodes a run of neighbours, so this is the order of the pictures for any number of ranks."""
    return sorted(Path(folder).glob("latents_rank*_shard*.safetensors"), key=lambda path: (len(path.name), path.name))


def write_shard(path, z, z_flip, labels, device):
    """One file in the reference's layout, metadata as strings (VTP's extraction script)"""
    write_aside(path, lambda aside: save_file({"latents": z, "latents_flip": z_flip, "labels": labels.long()}, aside,
                                              metadata={"total_size": str(len(z)), "dtype": str(z.dtype), "device": str(device)}))


@lru_cache(None)
def mapped(path, name):
    """A tensor of a shard. It stays on disk until its rows are looked at; opened once in each process."""
    with safe_open(path, "pt") as f:
        return f.get_tensor(name)


class Latents:
    """The shards of a folder as one list of (C, H, W) latents with labels."""

    def __init__(self, folder):
        self.folder, self.paths = Path(folder), shards(folder)
        if not self.paths:
            raise FileNotFoundError(f"{folder} holds no latents_rank*_shard*.safetensors; make them with: python dit.py latents RUN --out {folder}")
        mapped.cache_clear()                               # the folder may have been written anew
        labels = [mapped(path, "labels") for path in self.paths]
        self.labels = torch.cat(labels)
        self.ends = np.cumsum([len(part) for part in labels]).tolist()
        self.shape = tuple(mapped(self.paths[0], "latents").shape[1:])

    def __len__(self):
        return len(self.labels)

    def read(self, i, flip=False):
        """Latent i, or that of the mirrored picture -> (C, H, W); only these bytes are read"""
        shard = bisect.bisect(self.ends, i)
        row = int(i) - (self.ends[shard - 1] if shard else 0)
        return mapped(self.paths[shard], "latents_flip" if flip else "latents")[row]         # 5 times as fast as a slice from the file

    def beside(self, name):
        """Path of a file that stands beside the shards, or a sentence"""
        if not (self.folder / name).exists():
            raise FileNotFoundError(f"{self.folder / name} is missing, so encoding has not ended; python dit.py latents RUN writes it beside the shards")
        return self.folder / name


def latent_stats(latents, seed):
    """Mean and unbiased std of each channel over batch and space of up to 10000 random latents, not mirrored (LightningDiT) -> dict of (1, C, 1, 1)"""
    chosen = np.sort(lots(STATS, seed).permutation(len(latents))[:10000])
    s = torch.zeros(2, latents.shape[0], dtype=torch.float64)
    for i in chosen:
        z = latents.read(i).double()
        s += torch.stack([z.sum((1, 2)), z.square().sum((1, 2))])
    n = len(chosen) * latents.shape[1] * latents.shape[2]
    mean = s[0] / n
    std = ((s[1] - n * mean ** 2).clamp(min=0) / (n - 1)).sqrt()
    if not (std > 0).all():
        raise ValueError(f"channels {(~(std > 0)).nonzero().flatten().tolist()} of the latents are constant or not finite; has this tokenizer been trained?")
    return {"mean": mean.float()[None, :, None, None], "std": std.float()[None, :, None, None]}


class Steps:
    """steps[s] -> this rank's share of step s: data x1, noise x0 (b, C, H, W), z (b,) for the draw of time, classes y (b,).

    Each latent once an epoch, mirrored half of the time (LightningDiT); its class is hidden with probability `label_drop`, which the last row of
    the label table, `null`, stands for. Row i of step s follows from (seed, s, i): not from ranks, workers, or what was trained before.
    """

    def __init__(self, latents, stats, seed, batch, label_drop, null, rank=0, world=1):
        self.latents, self.stats, self.seed, self.batch, self.label_drop, self.null = latents, stats, seed, batch, label_drop, null
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)

    def __getitem__(self, step):
        x1, x0, z, y = (torch.stack(column) for column in zip(*(self.draw(step, row) for row in self.rows)))
        return {"x1": (x1 - self.stats["mean"]) / self.stats["std"], "x0": x0, "z": z, "y": y}

    def draw(self, step, row):
        epoch, place = divmod(step * self.batch + row, len(self.latents))
        index = shuffled(self.seed, epoch, len(self.latents))[place]
        lot = lots(DRAW, self.seed, step, row)
        flip, drop, z = lot.random() < 0.5, lot.random() < self.label_drop, torch.tensor(lot.standard_normal(dtype=np.float32))
        x0 = torch.from_numpy(lot.standard_normal(self.latents.shape, dtype=np.float32))
        return self.latents.read(index, flip), x0, z, torch.tensor(self.null) if drop else self.latents.labels[index]


@lru_cache(2)
def shuffled(seed, epoch, n):
    return lots(ORDER, seed, epoch).permutation(n)
