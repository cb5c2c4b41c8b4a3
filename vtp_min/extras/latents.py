"""Write latents to disk, in the layout that LightningDiT reads, and load them in batches.

    latents_rank00_shard000.safetensors ...   latents, latents_flip (n, C, h, w): latents of the
                                              images and of their mirror images; labels (n,)
    latents_stats.pt                          mean, std (1, C, 1, 1) for each channel; the DiT is
                                              trained on (z - mean) / std
    classes.json                              class names in the order of the labels (ours)
    latents.json                              how the latents were made, and their number (ours)

latents_stats.pt marks a complete encoding, so it is deleted first and written last. A folder may
have been copied, and a tokenizer trained on: `dit.py train` checks both before it starts.

C channels of the latents    h, w latent grid    b images or latents of a batch on this rank
"""
import bisect
import json
import math
import os
import re
from contextlib import suppress
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..augment import normalize
from ..config import atomic_write
from ..device import autocast, tf32_of
from ..dist import all_reduce_sum, barrier, print0, rank, rank_slice, world_size
from ..rng import Stream, make_rng, permutation
from ..run import ProgressBar
from .files import (check_writable, read_json, read_names, read_settings, reading,
                    wait_until)

SHARD_SIZE = 10000           # latents per shard: VTP
STATS_SAMPLES = 10000        # latents from which mean and std are computed: LightningDiT
# keys of latents.json that dit.py reads
ABOUT = ("tokenizer", "encoder", "data", "split")


# ---------------------------------------------------------------- encoding
@torch.no_grad()
def encode_folder(args, device, load_tokenizer, open_data, eval_batches):
    """The command `dit.py latents`

    args  run, data, split, n, image, batch, out, seed, workers, precision, fresh
    load_tokenizer, open_data, eval_batches  the functions of dit.py and data.py
    """
    out = Path(args.out or Path(args.run) / "latents")
    if args.batch < 1 or (args.n is not None and args.n < 1):
        raise ValueError(f"--batch {args.batch} --n {args.n}: both must be at least 1")
    tokenizer, encoder = load_tokenizer(args.run, device)
    check_folder(out, args.fresh, encoder)
    source, side = open_images(args, tokenizer, open_data)
    n = min(args.n or len(source), len(source))
    prepare_folder(out)
    images = eval_batches(source, side, args.batch, limit=n, crop="adm", workers=args.workers)
    batches = encode_images(tokenizer, images, n, args, device)
    n_written = write_shards(out, batches, max(1, SHARD_SIZE // args.batch), device)
    if rank() > 0:                                  # one rank computes the statistics of all shards
        return
    if not wait_until(lambda: is_written(out, n_written)):
        raise ValueError(f"{out} holds {len(Latents(out))} of the {n_written} latents that the "
                         f"processes wrote; give an --out on a disk that all machines share")
    posterior = f"sampled with seed {args.seed}" if is_kl(tokenizer) else "deterministic"
    about = dict(tokenizer=os.path.relpath(args.run, out), encoder=encoder, data=source.spec,
                 split=args.split, image=side, precision=args.precision, posterior=posterior)
    done, stats = write_stats(out, source.classes, about, args.seed)
    mean, std = stats["mean"], stats["std"]
    print0(f"{len(done)} images, {len(source.classes)} classes, {side} px, ADM centre crop, "
           f"{args.precision}{tf32_of(device)} -> {out}: latents {done.shape} of images and mirror "
           f"images, {posterior}\nmean {mean.min():.3f} .. {mean.max():.3f}, "
           f"std {std.min():.3f} .. {std.max():.3f} over channels")


def open_images(args, tokenizer, open_data):
    """Open --data, or else the training data of the tokenizer -> the source, image side in pixels

    ValueError or FileNotFoundError if no data are named, or if they have no classes.
    """
    settings = read_settings(args.run)
    if not settings and args.data is None:
        raise FileNotFoundError(f"{args.run} has no run.json that names its training data; give "
                                f"--data")
    spec = args.data or settings.get("data")
    side = args.image or settings.get("image") or tokenizer.config.image_size
    config = getattr(tokenizer, "config", None)
    patch = getattr(config, "vision_patch_size", 1)         # the baselines have no patches
    if side % patch:
        raise ValueError(f"--image {side} is not a multiple of the patch size, {patch}; try "
                         f"--image {max(side // patch, 1) * patch}")
    source = open_data(spec, split=args.split, seed=settings.get("seed", 0), side=side)
    if source.classes is None:
        raise ValueError(f"{spec} has no classes, but LightningDiT is class-conditional; use a "
                         f"folder of class folders, or the built-in shapes")
    return source, side


def encode_images(tokenizer, batches, n, args, device):
    """Yield latents, latents of the mirror images (b, C, h, w), labels (b,)

    batches  data.eval_batches: this rank's part of the n images
    """
    total = math.ceil(n / (args.batch * world_size()))
    bar = ProgressBar(batches, total=total, desc="latents", unit="batch", disable=rank() > 0)
    index = rank_slice(n).start
    for images, labels, _ in bar:
        rngs = [make_rng(Stream.POSTERIOR, args.seed, index + k) for k in range(len(images))]
        index += len(images)
        z, z_flip = encode(tokenizer, normalize(images.to(device)), args.precision, rngs)
        yield z, z_flip, labels


def is_kl(tokenizer):
    """True for a KL autoencoder (LDM, VA-VAE), whose encoder returns a Gaussian for each image. A
    DiT is trained on samples of it, as in LightningDiT's extract_features.py."""
    return hasattr(tokenizer, "sample_latents")


def encode(tokenizer, images, precision, rngs):
    """images (b, 3, H, W) -> latents and latents of the mirror images, each (b, C, h, w) float32

    rngs  one generator per image. A KL autoencoder draws the noise of the image from it, then the
          noise of the mirror image. Other tokenizers do not use it.
    """
    encoder = tokenizer.get_reconstruction_latents
    if is_kl(tokenizer):
        encoder = partial(tokenizer.sample_latents, rngs=rngs)
    with autocast(images.device, precision):
        z = encoder(images)
        z_flip = encoder(images.flip(-1))
    return z.float().cpu(), z_flip.float().cpu()


# ---------------------------------------------------------------- writing
def shards(folder):
    """-> paths of the shards in a folder, sorted by rank, then by number

    Each rank encodes a contiguous part of the images. So this order is the order of the images, for
    any number of ranks.
    """
    paths = Path(folder).glob("latents_rank[0-9]*_shard[0-9]*.safetensors")
    # by length first: rank 100 follows rank 99
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def is_complete(folder):
    """True if all latents have been written; latents_stats.pt is written last"""
    return (folder / "latents_stats.pt").exists()


def is_written(folder, n):
    """True if this process sees n latents in the shards, which several machines may have written"""
    with suppress(OSError, ValueError):             # a shard that is not yet visible as a whole
        return len(Latents(folder)) == n
    return False


def check_folder(folder, fresh, encoder):
    """ValueError if the folder holds a complete encoding, unless --fresh is given

    encoder  fingerprint of the encoder
    """
    if fresh or not shards(folder) or not is_complete(folder):
        return
    old = Latents(folder)
    if old.about["encoder"] != encoder:
        raise ValueError(old.outdated(encoder))
    raise ValueError(f"{folder} already holds latents ({len(old.paths)} files); train on them "
                     f"(python dit.py train {folder}), or encode again with --fresh")


def prepare_folder(folder):
    """Create the folder and delete old shards"""
    old = shards(folder)
    if old and not is_complete(folder):
        print0(f"{folder} holds {len(old)} files of an incomplete encoding (no latents_stats.pt): "
               f"all images are encoded again")
    barrier()                                       # all ranks have listed the old shards by now
    if rank() == 0:
        check_writable(folder, "give another folder with --out")
        for path in [folder / "latents_stats.pt", *folder.glob("latents_rank*")]:
            path.unlink(missing_ok=True)
    barrier()


def write_shards(folder, batches, batches_per_shard, device):
    """Write the latents of this rank -> number of latents that all ranks wrote

    batches  iterator of latents, latents of mirror images (b, C, h, w), labels (b,)
    """
    n_written = 0
    for number in count():
        part = list(islice(batches, batches_per_shard))
        if not part:
            break
        z, z_flip, labels = [torch.cat(tensors).contiguous() for tensors in zip(*part)]
        path = folder / f"latents_rank{rank():02d}_shard{number:03d}.safetensors"
        write_shard(path, z, z_flip, labels, device)
        n_written += len(z)
    # waits for all ranks, so that all shards are complete
    return int(all_reduce_sum(torch.tensor(n_written, device=device)))


def write_shard(path, z, z_flip, labels, device):
    """Write one shard in the layout of VTP's extraction script

    z, z_flip  (n, C, h, w)      labels  (n,)      device  that computed them, for the metadata
    """
    tensors = {"latents": z, "latents_flip": z_flip, "labels": labels.long()}
    # safetensors allows only strings as metadata
    metadata = {"total_size": str(len(z)), "dtype": str(z.dtype), "device": str(device)}
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))


def write_stats(folder, classes, about, seed):
    """Write all files except the shards -> the folder as Latents, {"mean", "std"}

    Called on rank 0 after all shards are written.

    classes  names in the order of the labels      about  dict for latents.json
    seed     selects the latents of latent_stats
    """
    latents = Latents(folder)
    stats = latent_stats(latents, seed)
    about = about | {"shape": latents.shape, "n": len(latents)}
    names = json.dumps(list(classes)) + "\n"
    text = json.dumps(about, indent=2) + "\n"
    atomic_write(folder / "classes.json", lambda path: path.write_text(names))
    atomic_write(folder / "latents.json", lambda path: path.write_text(text))
    atomic_write(folder / "latents_stats.pt", lambda path: torch.save(stats, path))
    return latents, stats


def latent_stats(latents, seed):
    """Mean and standard deviation (unbiased) of each channel -> {"mean", "std": (1, C, 1, 1)}

    They are taken over all positions of up to STATS_SAMPLES random latents, without mirror images,
    as in LightningDiT. ValueError if a channel is constant or not finite.
    """
    chosen = make_rng(Stream.STATS, seed).permutation(len(latents))[:STATS_SAMPLES]
    C, height, width = latents.shape
    total = torch.zeros(C, dtype=torch.float64)
    total_of_squares = torch.zeros(C, dtype=torch.float64)
    for i in np.sort(chosen):                       # in the order of the files
        z = latents.read(i).double()
        total += z.sum((1, 2))
        total_of_squares += z.square().sum((1, 2))
    n = len(chosen) * height * width
    mean = total / n
    variance = (total_of_squares - n * mean ** 2).clamp(min=0) / (n - 1)
    std = variance.sqrt()
    bad = (~(std > 0)).nonzero().flatten()          # nan is not > 0
    if len(bad):
        raise ValueError(f"channels {bad.tolist()} of the latents are constant or not finite; use "
                         f"a tokenizer that has been trained")
    return {"mean": mean.float()[None, :, None, None], "std": std.float()[None, :, None, None]}


# ---------------------------------------------------------------- reading
@lru_cache(None)
def memory_mapped(path, name):
    """A tensor of a shard, opened once per process. Rows are read from disk when they are used."""
    with safe_open(path, "pt") as f:
        return f.get_tensor(name)


def read_stats(path, remedy):
    """Path of latents_stats.pt -> {"mean", "std": (1, C, 1, 1)}. ValueError if it is damaged"""
    with reading(path, remedy):
        stats = torch.load(path, weights_only=True)
        if not isinstance(stats, dict):
            raise ValueError(f"it holds a {type(stats).__name__}, not a dict")
        mean, std = stats["mean"], stats["std"]
        if mean.shape != std.shape or mean.shape != (1, mean.numel(), 1, 1):
            raise ValueError(f"mean is {tuple(mean.shape)} and std {tuple(std.shape)}; wanted "
                             f"(1, C, 1, 1)")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("a mean is not finite, or a standard deviation is not above 0")
    return stats


class Latents:
    """The shards of a folder as one list of latents (C, h, w) with labels

    labels    LongTensor (n,)      shape  (C, h, w)
    stats     {"mean", "std": (1, C, 1, 1)}
    classes   class names          about  the contents of latents.json

    The last three raise FileNotFoundError until the encoding is complete. ValueError if a file is
    damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.paths = shards(folder)
        if not self.paths:
            raise FileNotFoundError(f"{folder} holds no latents_rank*_shard*.safetensors; write "
                                    f"them with: python dit.py latents RUN --out {folder}")
        self.remedy = (f"copy it again, or encode again: python dit.py latents RUN --out {folder} "
                       f"--fresh")
        memory_mapped.cache_clear()                # the shards may have been replaced by new ones
        self.shape = None
        labels = [self._check_shard(path) for path in self.paths]
        self.labels = torch.cat(labels)
        # number of latents in the shards up to and including this one
        self.ends = np.cumsum([len(part) for part in labels]).tolist()

    def _check_shard(self, path):
        """-> labels (n,) of a shard. ValueError if it is damaged or unlike the shards before it"""
        names = ("labels", "latents", "latents_flip")
        with reading(path, self.remedy):
            labels, z, z_flip = [memory_mapped(path, name) for name in names]
            shape = tuple(z.shape[1:])
            self.shape = self.shape or shape
            matches = len(z) > 0 and labels.shape == z.shape[:1] and z.shape == z_flip.shape
            if not matches or labels.is_floating_point():
                raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}, latents "
                                 f"{tuple(z.shape)}, latents_flip {tuple(z_flip.shape)}")
            if shape != self.shape or len(shape) != 3:
                raise ValueError(f"its latents are {shape}, those of {self.paths[0].name} "
                                 f"{self.shape}")
        return labels

    def __len__(self):
        return len(self.labels)

    def read(self, i, flip=False):
        """-> latent i, or that of its mirror image (C, h, w). Only its bytes are read from disk."""
        shard = bisect.bisect(self.ends, i)
        first = self.ends[shard - 1] if shard else 0
        tensor = memory_mapped(self.paths[shard], "latents_flip" if flip else "latents")
        return tensor[int(i) - first]              # 5 times as fast as safe_open's get_slice

    def file(self, name):
        """-> path of a file next to the shards. FileNotFoundError if it is missing"""
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, so the encoding is incomplete; encode "
                                    f"again: python dit.py latents RUN --out {self.folder}")
        return path

    @property
    def stats(self):
        return read_stats(self.file("latents_stats.pt"), self.remedy)

    @property
    def classes(self):
        return read_names(self.file("classes.json"), self.remedy)

    @property
    def about(self):
        return read_json(self.file("latents.json"), self.remedy, keys=ABOUT)

    def check(self, load_tokenizer):
        """ValueError if LightningDiT cannot be trained on these latents, or if they do not fit
        their tokenizer any more

        load_tokenizer  the function of dit.py
        """
        C, height, width = self.shape
        if height != width:
            raise ValueError(f"latents are {height}x{width}, but LightningDiT needs square ones; "
                             f"encode square images")
        mean, classes = self.stats["mean"], self.classes
        if mean.shape != (1, C, 1, 1):
            raise ValueError(f"latents have {C} channels, but latents_stats.pt has shape "
                             f"{tuple(mean.shape)}; encode again with --fresh")
        lowest, highest = self.labels.min(), self.labels.max()
        if lowest < 0 or highest >= len(classes):
            raise ValueError(f"labels are between {lowest} and {highest}, but classes.json names "
                             f"{len(classes)} classes; encode again with --fresh")
        unused = sorted(set(range(len(classes))) - set(self.labels.tolist()))
        if unused:
            print0(f"{self.folder}: {len(unused)} of {len(classes)} classes have no latents "
                   f"({classes[unused[0]]}, ...); samples of them will look like no class")
        self._check_shard_names()
        self._check_encoder(load_tokenizer)

    def _check_shard_names(self):
        """ValueError if a shard is missing. Each rank numbers its shards from 0."""
        found = {}                                 # {(rank, number): path}
        last = {}                                  # {rank: number of its last shard}
        problems = []
        for path in self.paths:
            r, k = map(int, re.findall("[0-9]+", path.name)[:2])
            if (r, k) in found:
                problems.append(f"{found[r, k].name} is there twice, also as {path.name}")
            found[r, k] = path
            last[r] = max(k, last.get(r, 0))
        wanted = {(r, k) for r in range(max(last) + 1) for k in range(last.get(r, 0) + 1)}
        missing = [f"shard {k} of rank {r}" for r, k in sorted(wanted - set(found))]
        if missing:
            problems.append(f"{len(missing)} did not arrive ({', '.join(missing[:5])})")
        expected = self.about.get("n", len(self))  # older folders do not state the number
        if expected != len(self):
            problems.append(f"latents.json counts {expected} latents")
        if problems:
            raise ValueError(f"{self.folder} holds {len(self)} latents in {len(self.paths)} "
                             f"shards, but {'; '.join(problems)}; {self.remedy}")

    def _check_encoder(self, load_tokenizer):
        """ValueError if the tokenizer has been trained on since it made these latents"""
        tokenizer = os.path.normpath(self.folder / self.about["tokenizer"])
        if not Path(tokenizer, "config.json").exists():
            print0(f"note: {tokenizer}, the tokenizer of these latents, is not there; so it is not "
                   f"checked whether it was trained on since, there are no previews, and dit.py "
                   f"sample needs --tokenizer")
            return
        _, encoder = load_tokenizer(tokenizer, "cpu")
        if encoder != self.about["encoder"]:
            raise ValueError(self.outdated(encoder))

    def outdated(self, encoder):
        """-> error message: the tokenizer has now this fingerprint"""
        return (f"{self.folder} holds latents of an older encoder (fingerprint "
                f"{self.about['encoder']}; the tokenizer has {encoder} now, because it was trained "
                f"on). Its decoder does not fit them: encode again with python dit.py latents RUN "
                f"--out {self.folder} --fresh, or restore the tokenizer of that time")


def read_export(folder):
    """Read the files that `dit.py train` writes beside its weights -> the contents of config.json,
    latents_stats.pt and classes.json

    FileNotFoundError if one is missing; ValueError if one is damaged or does not fit the others.
    """
    files = ("config.json", "model.safetensors", "latents_stats.pt", "classes.json")
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; give a folder that was "
                                f"written by: python dit.py train LATENTS --out {folder}")
    remedy = (f"copy it again, or repeat the command python dit.py train LATENTS --out {folder}: "
              f"it writes the file again from its checkpoint")
    config = read_json(folder / "config.json", remedy, keys=("model", "tokenizer", "encoder"))
    stats = read_stats(folder / "latents_stats.pt", remedy)
    classes = read_names(folder / "classes.json", remedy)
    with reading(folder / "config.json", remedy):
        wanted = config["model"]["in_channels"], config["model"]["num_classes"]
        found = stats["mean"].numel(), len(classes)
        if found != wanted:
            raise ValueError(f"it is a model of {wanted[0]} channels and {wanted[1]} classes; "
                             f"latents_stats.pt has {found[0]} channels and classes.json names "
                             f"{found[1]} classes")
    return config, stats, classes


class LatentBatches:
    """batches[step] -> this rank's rows of the batch, a dict of tensors

    x1  latents (b, C, h, w), normalised      z  standard normal numbers (b,); they give the time t
    x0  noise (b, C, h, w)                    y  classes (b,)

    Each latent is used once per epoch, mirrored with probability 1/2 (LightningDiT). With
    probability `label_drop` its class is replaced by `null`, the last row of the label table: the
    model needs it for classifier-free guidance. Row i of step s depends only on (seed, s, i), not
    on ranks, workers or earlier steps.
    """

    def __init__(self, latents, stats, seed, batch, label_drop, null):
        self.latents, self.stats = latents, stats
        self.seed, self.batch = seed, batch
        self.label_drop, self.null = label_drop, null
        self.rows = rank_slice(batch)

    def __getitem__(self, step):
        samples = [self.sample(step, row) for row in self.rows]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        batch["x1"] = (batch["x1"] - self.stats["mean"]) / self.stats["std"]
        return batch

    def sample(self, step, row):
        epoch, position = divmod(step * self.batch + row, len(self.latents))
        index = permutation(self.seed, epoch, len(self.latents))[position]
        rng = make_rng(Stream.DIT, self.seed, step, row)
        flip = rng.random() < 0.5
        drop = rng.random() < self.label_drop
        z = rng.standard_normal(dtype=np.float32)
        x0 = rng.standard_normal(self.latents.shape, dtype=np.float32)
        label = self.latents.labels[index]
        if drop:
            label = torch.tensor(self.null)
        return {"x1": self.latents.read(index, flip), "x0": torch.from_numpy(x0),
                "z": torch.tensor(z), "y": label}
