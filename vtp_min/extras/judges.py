"""Networks whose features replace Inception's in a Frechet distance, where FID cannot be computed
or says too little. The distance on their features is never called FID.

    SqueezeNet, load_squeezenet    images -> features (B, 512): a small ImageNet network
    Classifier, classifier_of      images -> features (B, 256), logits: trained on the data at hand
    feature_net                    --features, --set halve -> one of them, or Inception
    check_fid_args                 arguments of `eval.py fid` that do not go together
    record_recognition             share of class-conditional samples with the right class
"""
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from ..config import atomic_write
from ..dist import all_gather_ragged, all_reduce_sum, barrier, print0, rank, rank_slice
from ..fid import in_chunks, load_inception
from ..run import ProgressBar, record_metric
from .image_sets import SavedStats, check_sample_count
from .weights import find


def feature_net(kind, halve, side, device, get_classifier):
    """The features that a Frechet distance compares.

    kind  'inception', 'squeezenet' or 'classifier'      halve  see the images at half their side
    get_classifier  () -> Classifier, accuracy
    -> function uint8 (B, 3, H, W) -> (B, F), name of the distance, features in words
    """
    if kind == "classifier":
        if halve:
            raise ValueError("--set halve goes with --features squeezenet or inception: the "
                             "classifier has learned images of full size")
        classifier, _ = get_classifier()
        protocol = "256-d features of the classifier trained on the real pictures"
        return classifier.features, "FD-classifier", protocol
    if kind == "squeezenet":
        net, name, protocol = load_squeezenet(device), "FD-squeezenet (no FID)", SqueezeNet.PROTOCOL
    else:
        net, name, protocol = inception_or_advice(device), "FID", "pytorch-fid's Inception"
    if not halve:
        return net, name, protocol
    return (lambda x: net(halved(x)), f"FD-{kind}, halved (no FID)",
            f"{protocol}; of pictures halved to {side // 2} px")


def inception_or_advice(device):
    try:
        return load_inception(device)
    except FileNotFoundError as problem:
        raise FileNotFoundError(f"{problem}; or take --features classifier (or squeezenet, with "
                                f"its file), whose distance is no FID") from None


def halved(x):
    """uint8 (B, 3, H, W), even sides -> (B, 3, H/2, W/2), means of 2x2 pixels.

    At half size the blur of a decoder weighs less, and the content of the image more (ours).
    """
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"--set halve: images of {x.shape[-1]}x{x.shape[-2]} cannot be halved; "
                         f"leave it out")
    return F.avg_pool2d(x.float(), 2).round().byte()


# ---------------------------------------------------------------- arguments of eval.py fid
def check_fid_args(args, samples, reference):
    """ValueError for too few images, or arguments that do not go together

    samples, reference  ImageSet; reference is None without --reference
    """
    for images in (samples, reference):
        if images and images.n:
            check_sample_count(images.n, args.few)
    from_data = not reference and (args.run or args.data)
    has_images = not isinstance(samples, SavedStats)
    if not (from_data or reference or args.save_stats):
        raise ValueError("against which real images? Give --run RUN or --data, or --reference; "
                         "--set save_stats=FILE alone stores the statistics of the samples")
    if args.features == "classifier" and not (has_images and from_data):
        raise ValueError("--features classifier learns from the run's own images: give images as "
                         "SAMPLES, --run, and no --reference")
    if args.save_real and not from_data:
        raise ValueError("--set save_real stores the statistics of the training images: give "
                         "--run or --data, and no --reference")
    if from_data and has_images and samples.size[0] != samples.size[1]:
        raise ValueError(f"{samples.name}: {samples.size[0]}x{samples.size[1]}; real images are "
                         f"cropped to squares, so samples must be square")


# ---------------------------------------------------------------- SqueezeNet v1.0
class SqueezeNet(nn.Module):
    """A network of ImageNet's 1000 classes in 0.8 MB, frozen.   Iandola et al. 2016, Table 1

    uint8 (B, 3, H, W), any side -> (B, 512) float32, the global average of fire9's output.
    Layer names are those of the published prototxt.
    """
    PROTOCOL = ("512-d average of fire9 of SqueezeNet v1.0, pictures squashed to 227 px "
                "(bilinear, antialiased)")
    # fire module: channels of its squeeze layer; each expand layer has four times as many
    SQUEEZE = {2: 16, 3: 16, 4: 32, 5: 32, 6: 48, 7: 48, 8: 64, 9: 64}

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, 2)
        width = 96
        for n, squeeze in self.SQUEEZE.items():
            self.add_module(f"fire{n}/conv1x1_1", nn.Conv2d(width, squeeze, 1))
            self.add_module(f"fire{n}/conv1x1_2", nn.Conv2d(squeeze, 4 * squeeze, 1))
            self.add_module(f"fire{n}/conv3x3_2", nn.Conv2d(squeeze, 4 * squeeze, 3, padding=1))
            width = 8 * squeeze
        self.conv10 = nn.Conv2d(width, 1000, 1, padding=1)
        self.eval().requires_grad_(False)
        # with in_chunks 2.8 times as fast on a CPU
        self.to(memory_format=torch.channels_last)

    def grid(self, img):
        """uint8 (B, 3, H, W) -> (B, 512, 13, 13)"""
        # as PIL resizes, but for its rounding
        x = F.interpolate(img.float(), (227, 227), mode="bilinear", antialias=True)
        # Caffe's input: BGR in 0..255 minus the mean
        x = x.flip(1) - x.new_tensor([104, 117, 123])[:, None, None]
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for n in self.SQUEEZE:
            x = F.relu(self.get_submodule(f"fire{n}/conv1x1_1")(x))
            one = self.get_submodule(f"fire{n}/conv1x1_2")(x)
            three = self.get_submodule(f"fire{n}/conv3x3_2")(x)
            x = F.relu(torch.cat([one, three], 1))
            if n in (4, 8):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return x

    def forward(self, img):
        return in_chunks(lambda x: self.grid(x).mean((2, 3)), img)

    def logits(self, img):
        """uint8 (B, 3, H, W) -> (B, 1000), classes in the order of their WordNet ids"""
        return F.relu(self.conv10(self.grid(img))).mean((2, 3))


def load_squeezenet(device="cpu"):
    """SqueezeNet() with its ImageNet weights. FileNotFoundError says where to find the file, which
    cannot be downloaded ready made."""
    model = SqueezeNet()
    with np.load(find("squeezenet")) as found:             # float16
        model.load_state_dict({k: torch.from_numpy(x) for k, x in found.items()})
    return model.to(device)


# ---------------------------------------------------------------- a classifier of the data
class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def conv_layer(channels, width, stride=1):
    conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Classifier(nn.Module):
    """A small residual network.   uint8 (B, 3, S, S), S from about 32 to 96

    -> features (B, 256), the global average pool, for FD-classifier;  logits (B, n_classes)
    """

    def __init__(self, n_classes):
        super().__init__()
        self.body = nn.Sequential(
            conv_layer(3, 32, 2),                                       # (B, 32, S/2, S/2)
            conv_layer(32, 64, 2),                                      # (B, 64, S/4, S/4)
            conv_layer(64, 128, 2),                                     # (B, 128, S/8, S/8)
            Residual(conv_layer(128, 128), conv_layer(128, 128)),
            conv_layer(128, 256, 2))                                    # (B, 256, S/16, S/16)
        self.head = nn.Linear(256, n_classes)

    def features(self, img):
        return self.body(img.float() / 127.5 - 1).mean((2, 3))

    def forward(self, img):
        features = self.features(img)
        return features, self.head(features)

    def predict(self, img):
        """-> class numbers (B,) on the CPU"""
        return self(img)[1].argmax(1).cpu()


def augment(x, mirror):
    """Random zoom, shift, mirror, contrast, brightness, and a grey square (cutout) of each image.

    x  (B, 3, S, S) in 0..255 -> the same shape
    """
    B, S = len(x), x.shape[-1]

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape)

    zoom = uniform(0.6, 1).sqrt()                          # 0.6 to 1 of the area
    theta = x.new_zeros(B, 2, 3)
    theta[:, 0, 0] = zoom
    if mirror:
        theta[:, 0, 0] *= uniform(-1, 1).sign()
    theta[:, 1, 1] = zoom
    # shifts reach at most 5 % of the side beyond the border, which is reflected
    theta[:, :, 2] = uniform(-1, 1, 2) * (1.1 - zoom)[:, None]
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    contrast = uniform(0.8, 1.2, 1, 1, 1)
    brightness = 127.5 * uniform(-0.2, 0.2, 1, 1, 1)
    x = 127.5 + (x - 127.5) * contrast + brightness
    # (B, 2, S): rows, columns of the square, whose side is 0.3 S
    inside = (torch.arange(S) / S - uniform(0, 1, 2, 1)).abs() < 0.15
    square = inside[:, 0, :, None] & inside[:, 1, None, :]
    return x.masked_fill(square[:, None], 127.5)


@torch.enable_grad()
def train_classifier(images, labels, n_classes, val_images, val_labels, steps=2400, batch=64,
                     lr=3e-3, mirror=True, seed=0, device="cpu", precision="fp32", progress=True):
    """-> Classifier in eval mode, its accuracy on the validation images

    images   uint8 (n, 3, S, S), labels (n,), in memory      precision  'fp32' or 'bf16'
    mirror   False if left and right have a meaning in the data
    All numbers are ours: AdamW with a one-cycle learning rate, weight decay 0.05, label smoothing
    0.1. The same seed and precision give the same classifier.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(n_classes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
        epochs = steps * batch // len(images) + 1
        order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
        silent = not progress or rank() > 0
        for step in ProgressBar(range(steps), desc="classifier", unit="step", disable=silent):
            rows = order[step * batch:][:batch]
            # augmented on the CPU: the same random numbers on every device
            x = augment(images[rows].float(), mirror).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                _, logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    n_right = 0
    for x, y in zip(val_images.split(256), val_labels.split(256)):
        n_right += (model.predict(x.to(device)) == y).sum().item()
    return model, n_right / len(val_images)


def load_or_train_classifier(path, about, n_classes, images, steps, device):
    """The classifier in the file `path`. If there is none, or one of other data, rank 0 trains it.

    about   {str: str} what it depends on
    images  () -> images, labels, val_images, val_labels; called by every process
    -> Classifier, its accuracy on the validation images
    """
    def read_metadata():
        with safetensors.safe_open(path, "pt") as f:
            return dict(f.metadata())

    about = about | {"steps": str(steps)}
    if not path.exists() or not about.items() <= read_metadata().items():
        print0(f"training the classifier of the real images, to be kept in {path}")
        found = images()
        if rank() == 0:
            train, labels, val, val_labels = found
            model, accuracy = train_classifier(train, labels, n_classes, val, val_labels,
                                               steps=steps, device=device)
            tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
            metadata = about | {"accuracy": str(accuracy)}
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda part: safetensors.torch.save_file(tensors, part, metadata))
        barrier()
    model = Classifier(n_classes)
    model.load_state_dict(safetensors.torch.load_file(path))
    model = model.to(device).eval().requires_grad_(False)
    return model, float(read_metadata()["accuracy"])


def classifier_of(args, train, val, side, device, loader):
    """The classifier of a run's images, kept in RUN/judge.safetensors -> Classifier, its accuracy

    train, val  sources with labels      loader  (source, limit) -> batches (images, labels, _)
    """
    about = {"data": train.spec, "val": val.spec, "classes": str(len(train.classes)),
             "side": str(side), "train": str(args.train_limit)}

    def read_all(source, limit):
        """-> uint8 (n, 3, S, S), labels (n,), of all processes, in memory"""
        images, labels, _ = zip(*loader(source, limit))
        return [all_gather_ragged(torch.cat(x).to(device)).cpu() for x in (images, labels)]

    def images():
        return *read_all(train, args.train_limit), *read_all(val, args.limit)

    return load_or_train_classifier(Path(args.out, "judge.safetensors"), about,
                                    len(train.classes), images, args.judge_steps, device)


def record_recognition(args, samples, train, val, side, device, loader):
    """The classifier's accuracy on real images, and its agreement with the labels of the samples"""
    classifier, accuracy = classifier_of(args, train, val, side, device, loader)
    C, n = len(train.classes), samples.n
    record_metric(args.out, "classifier accuracy", accuracy,
                  f"the classifier, on real pictures of {val.spec} val, {C} classes, {side} px, "
                  f"{args.judge_steps} steps")
    if samples.labels is None:
        return
    rows = rank_slice(n)
    labels = samples.labels[rows.start:rows.stop].split(args.batch)
    n_right = torch.zeros((), device=device)
    for x, y in zip(samples.batches(args.batch), labels):
        n_right += (classifier.predict(x.to(device)) == y).sum()
    record_metric(args.out, "samples recognised", all_reduce_sum(n_right).item() / n,
                  f"share of {n} class-conditional samples of {args.samples} that the classifier "
                  f"takes for the requested class; chance {1 / C:.3f}, real pictures "
                  f"{accuracy:.3f}; {samples.origin()}")
