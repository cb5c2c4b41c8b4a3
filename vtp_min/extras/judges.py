"""Networks that replace Inception in a Frechet distance.

FID is the Frechet distance of Inception's features. It needs Inception's weights, and it is less
informative for images that are unlike the photographs of ImageNet, on which Inception was trained.
The distance of other features is recorded under other names, never as FID.

    SqueezeNet, load_squeezenet    a small ImageNet network: images -> features (B, 512)
    Classifier, classifier_of      trained on the user's data: images -> features (B, 256), logits
    feature_net                    the network that --features and --set halve select
    check_fid_args                 checks the combination of arguments of `eval.py fid`
    check_labels                   leaves out labels of samples that are not the user's classes
    record_recognition             accuracy of the classifier on class-conditional samples

B images    H, W, S sides in pixels    F features
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
from .files import check_writable, reading
from .image_sets import SavedStats, check_sample_count
from .weights import find


def feature_net(kind, halve, side, device, get_classifier):
    """The feature extractor of a Frechet distance

    kind            'inception', 'squeezenet' or 'classifier'
    halve           True: reduce the images to half their side first; not with 'classifier'
    side            side of the images in pixels, for the description
    get_classifier  function () -> Classifier, accuracy; called only if it is needed
    -> function uint8 (B, 3, H, W) -> (B, F), name of the distance, description of the features
    """
    if kind == "classifier":
        if halve:
            raise ValueError("--set halve works only with --features squeezenet or inception: the "
                             "classifier was trained on images of full size; omit --set halve")
        classifier, _ = get_classifier()
        protocol = "256-d features of the classifier trained on the real images"
        return classifier.features, "FD-classifier", protocol
    if kind == "squeezenet":
        net = load_squeezenet(device)
        name = "FD-squeezenet (no FID)"
        protocol = SqueezeNet.PROTOCOL
    else:
        net = inception_network(device)
        name = "FID"
        protocol = "pytorch-fid's Inception"
    if not halve:
        return net, name, protocol
    return (lambda x: net(halved(x)), f"FD-{kind}, halved (no FID)",
            f"{protocol}; images halved to {side // 2} px")


def inception_network(device):
    """load_inception, with an error message that names the alternatives"""
    try:
        return load_inception(device)
    except FileNotFoundError as problem:
        raise FileNotFoundError(f"{problem}; or use --features classifier (or squeezenet, if you "
                                f"have its file), whose distance is not FID") from None


def halved(x):
    """uint8 (B, 3, H, W), even sides -> uint8 (B, 3, H/2, W/2), the means of 2x2 pixels

    At half size, the blur of a decoder has less influence on the distance, and the content of the
    image has more (ours).
    """
    if x.shape[-1] % 2 or x.shape[-2] % 2:
        raise ValueError(f"--set halve: images of {x.shape[-1]}x{x.shape[-2]} cannot be halved, "
                         f"because their sides are not even; omit --set halve")
    return F.avg_pool2d(x.float(), 2).round().byte()


# ---------------------------------------------------------------- arguments of eval.py fid
def check_fid_args(args, samples, reference):
    """Check the arguments of `eval.py fid` before anything is computed.

    samples, reference  ImageSet; reference is None without --reference
    ValueError for too few images, or for arguments that cannot be combined.
    """
    for images in (samples, reference):
        if images and images.n:
            check_sample_count(images.n, args.few)
    from_data = not reference and (args.run or args.data)
    has_images = not isinstance(samples, SavedStats)
    if not (from_data or reference or args.save_stats):
        raise ValueError("there are no real images to compare with; give --run RUN, --data or "
                         "--reference (or only --set save_stats=FILE, to store the statistics of "
                         "the samples)")
    if args.features == "classifier" and not (has_images and from_data):
        raise ValueError("--features classifier is trained on the images of the run: give --run "
                         "and images as SAMPLES, and omit --reference")
    if args.save_real and not from_data:
        raise ValueError("--set save_real stores the statistics of the training images: give "
                         "--run or --data, and omit --reference")
    if from_data and has_images and samples.size[0] != samples.size[1]:
        raise ValueError(f"{samples.name}: the images are {samples.size[0]}x{samples.size[1]}, but "
                         f"samples must be square, because real images are cropped to squares")
    for name in ("save_stats", "save_real"):
        path = getattr(args, name)
        if path is not None:
            check_output(name, path)


def check_output(name, path):
    """Check the file of --set save_stats or save_real before anything is computed. ValueError if
    it exists, or cannot be written."""
    if Path(str(path)).suffix != ".npz":
        raise ValueError(f"--set {name}={path}: wanted the name of a file that ends in .npz")
    path = Path(path)
    if path.exists():
        raise ValueError(f"--set {name}={path}: this file exists and is not overwritten; give "
                         f"another name, or delete it")
    check_writable(path.parent, f"give another file with --set {name}")


def check_labels(args, samples, train):
    """Leave out the labels of the samples, with a message, if they are not classes of the training
    images: samples.labels becomes None. Only --features classifier reads them."""
    if samples.labels is None or args.features != "classifier" or not train.classes:
        return
    C = len(train.classes)
    n_unknown = int(((samples.labels < 0) | (samples.labels >= C)).sum())
    if n_unknown:
        problem = f"{n_unknown} of {samples.n} are not between 0 and {C - 1}"
    elif samples.classes not in (None, train.classes):
        problem = "its labels.json names other classes"
    else:
        return
    print0(f"{samples.name}: the labels are not those of the {C} classes of {train.spec} "
           f"({problem}), so the fraction of recognised samples is not measured")
    samples.labels = None


# ---------------------------------------------------------------- SqueezeNet v1.0
class SqueezeNet(nn.Module):
    """An ImageNet classifier whose weights take 0.8 MB, frozen   Iandola et al. 2016, Table 1

    uint8 (B, 3, H, W), any H and W -> (B, 512) float32, the spatial mean of the output of fire9.
    Layer names are those of the published prototxt, so that its weights can be loaded.
    """
    PROTOCOL = ("512-d average of fire9 of SqueezeNet v1.0, images resized to 227x227 px "
                "(bilinear, antialiased)")
    # {fire module: channels of its squeeze layer}; each of its two expand layers has four times
    # as many, and their outputs are concatenated
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
        # together with in_chunks, this is 2.8 times as fast on a CPU
        self.to(memory_format=torch.channels_last)

    def grid(self, img):
        """uint8 (B, 3, H, W) -> output of fire9, (B, 512, 13, 13)"""
        # as PIL resizes images, except for its rounding
        x = F.interpolate(img.float(), (227, 227), mode="bilinear", antialias=True)
        # Caffe's input format: BGR in the range 0..255, minus the mean colour
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
        """uint8 (B, 3, H, W) -> (B, 1000), the classes of ImageNet sorted by WordNet id"""
        return F.relu(self.conv10(self.grid(img))).mean((2, 3))


def load_squeezenet(device="cpu"):
    """-> SqueezeNet with its ImageNet weights

    The file is not available for download; if it is missing, the FileNotFoundError describes it.
    """
    model = SqueezeNet()
    with np.load(find("squeezenet")) as weights:           # float16; copied to float32
        model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    return model.to(device)


# ---------------------------------------------------------------- classifier of the user's data
class Residual(nn.Sequential):
    """A sequence of layers with a skip connection around it"""

    def forward(self, x):
        return x + super().forward(x)


def conv_layer(channels, width, stride=1):
    conv = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Classifier(nn.Module):
    """A small residual network for images of about 32 to 96 pixels a side

    uint8 (B, 3, S, S) -> features (B, 256), the global average pool;  logits (B, n_classes)
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
        """uint8 (B, 3, S, S) -> predicted labels (B,), on the CPU"""
        return self(img)[1].argmax(1).cpu()


def augment(x, mirror):
    """Random crop, horizontal flip, contrast, brightness, and a grey square (cutout) in each image

    x       float (B, 3, S, S) in the range 0..255 -> same shape; values can exceed this range
    mirror  True: flip half of the images
    """
    B, S = len(x), x.shape[-1]

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape)

    zoom = uniform(0.6, 1).sqrt()                          # the crop has 0.6 to 1 of the area
    # affine maps from output to input coordinates, both in [-1, 1]
    theta = x.new_zeros(B, 2, 3)
    theta[:, 0, 0] = zoom
    if mirror:
        theta[:, 0, 0] *= uniform(-1, 1).sign()
    theta[:, 1, 1] = zoom
    # a crop extends at most 5 % of the side beyond the image, where the image is reflected
    theta[:, :, 2] = uniform(-1, 1, 2) * (1.1 - zoom)[:, None]
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    contrast = uniform(0.8, 1.2, 1, 1, 1)
    brightness = 127.5 * uniform(-0.2, 0.2, 1, 1, 1)
    x = 127.5 + (x - 127.5) * contrast + brightness
    # (B, 2, S): which rows and which columns belong to the square, whose side is 0.3 S
    inside = (torch.arange(S) / S - uniform(0, 1, 2, 1)).abs() < 0.15
    square = inside[:, 0, :, None] & inside[:, 1, None, :]
    return x.masked_fill(square[:, None], 127.5)


@torch.enable_grad()
def train_classifier(images, labels, n_classes, val_images, val_labels, steps=2400, batch=64,
                     lr=3e-3, mirror=True, seed=0, device="cpu", precision="fp32", progress=True):
    """Train a classifier on images that are held in memory.

    images, labels          uint8 (n, 3, S, S), (n,)
    val_images, val_labels  the same for validation
    mirror                  False if left and right must be distinguished in the data
    precision               'fp32' or 'bf16'
    progress                show a progress bar on rank 0
    -> Classifier in eval mode, its accuracy on the validation images

    AdamW with a one-cycle learning rate, weight decay 0.05, label smoothing 0.1; all
    hyperparameters are ours. The same seed and precision give the same classifier, and the global
    random state of PyTorch on the CPU is left unchanged.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(n_classes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
        warmup = 0.2 if steps != 5 else 0.3                # 0.2 of 5 steps: division by zero
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=warmup)
        epochs = steps * batch // len(images) + 1
        order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
        silent = not progress or rank() > 0
        for step in ProgressBar(range(steps), desc="classifier", unit="step", disable=silent):
            rows = order[step * batch:][:batch]
            # augmented on the CPU, so that all devices use the same random numbers
            x = augment(images[rows].float(), mirror).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                _, logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    n_correct = 0
    for x, y in zip(val_images.split(256), val_labels.split(256)):
        n_correct += (model.predict(x.to(device)) == y).sum().item()
    return model, n_correct / len(val_images)


def load_or_train_classifier(path, metadata, n_classes, load_images, steps, device):
    """Load the classifier from the file `path`, or train it and write the file.

    Rank 0 trains if the file is missing or damaged, or if its metadata or its number of steps is
    different.

    metadata     {str: str} that identifies the training data; stored in the file
    load_images  function () -> images, labels, val_images, val_labels; called by every rank
    -> Classifier, its accuracy on the validation images
    """
    metadata = metadata | {"steps": str(steps)}
    model, accuracy = load_classifier(path, metadata, n_classes)
    if model is None:
        check_writable(path.parent, "the classifier is stored there; give another --out")
        print0(f"training the classifier on the real images; it will be stored in {path}")
        # before the branch below, because all ranks must take part in gathering the images
        images, labels, val_images, val_labels = load_images()
        if rank() == 0:
            model, accuracy = train_classifier(images, labels, n_classes, val_images, val_labels,
                                               steps=steps, device=device)
            tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
            metadata["accuracy"] = str(accuracy)
            atomic_write(path, lambda part: safetensors.torch.save_file(tensors, part, metadata))
        barrier()
        model, accuracy = load_classifier(path, metadata, n_classes)
    return model.to(device), accuracy


def load_classifier(path, metadata, n_classes):
    """-> Classifier from a file, its accuracy; None, None if the file is missing, damaged or that
    of other data"""
    if not path.exists():
        return None, None
    model = Classifier(n_classes)
    try:
        with reading(path, "the classifier is trained again"):
            with safetensors.safe_open(path, "pt") as f:
                found = f.metadata() or {}
            if not metadata.items() <= found.items():
                return None, None
            model.load_state_dict(safetensors.torch.load_file(path))
            return model.eval().requires_grad_(False), float(found["accuracy"])
    except ValueError as problem:
        print0(problem)
        return None, None


def classifier_of(args, train, val, side, device, loader):
    """Load or train the classifier of a run's images, stored in OUT/judge.safetensors.

    args        needs out, train_limit, limit and judge_steps
    train, val  data sources with labels
    side        side of the images in pixels
    loader      function (source, limit) -> batches (images, labels, captions) of this rank
    -> Classifier, its accuracy on the validation images
    """
    metadata = {"data": train.spec, "val": val.spec, "classes": str(len(train.classes)),
                "side": str(side), "train": str(args.train_limit)}

    def read_all(source, limit):
        """-> images uint8 (n, 3, S, S), labels (n,), gathered from all ranks, on the CPU"""
        images, labels, _ = zip(*loader(source, limit))
        return [all_gather_ragged(torch.cat(x).to(device)).cpu() for x in (images, labels)]

    def load_images():
        return *read_all(train, args.train_limit), *read_all(val, args.limit)

    return load_or_train_classifier(Path(args.out, "judge.safetensors"), metadata,
                                    len(train.classes), load_images, args.judge_steps, device)


def record_recognition(args, samples, train, val, side, device, loader):
    """Record the accuracy of the classifier on validation images and on the samples.

    samples  ImageSet; its labels are the classes that were requested from the DiT. Without labels,
             only the accuracy on validation images is recorded.
    The other arguments are those of `classifier_of`.
    """
    classifier, accuracy = classifier_of(args, train, val, side, device, loader)
    C, n = len(train.classes), samples.n
    record_metric(args.out, "classifier accuracy", accuracy,
                  f"the classifier, on real images of {val.spec} val, {C} classes, {side} px, "
                  f"{args.judge_steps} training steps")
    if samples.labels is None:
        return
    rows = rank_slice(n)
    labels = samples.labels[rows.start:rows.stop].split(args.batch)
    n_correct = torch.zeros((), device=device)
    for x, y in zip(samples.batches(args.batch), labels):
        n_correct += (classifier.predict(x.to(device)) == y).sum()
    record_metric(args.out, "samples recognised", all_reduce_sum(n_correct).item() / n,
                  f"fraction of {n} class-conditional samples of {args.samples} that the "
                  f"classifier assigns to the requested class; chance {1 / C:.3f}, real images "
                  f"{accuracy:.3f}; {samples.origin()}")
