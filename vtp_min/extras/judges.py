"""Networks that replace Inception in a Frechet distance.

FID is the Frechet distance of Inception's features. It needs Inception's weights, and it is less
informative for images that are unlike the photographs of ImageNet, on which Inception was trained.
The distance of other features is recorded under other names, never as FID.

    feature_net                    the network that --features selects
    independence_note              was the decoder trained with the network that judges its images?
    check_fid_args                 checks the combination of arguments of `eval.py fid`
    check_labels                   leaves out labels of samples that are not the user's classes
    Classifier, classifier_of      trained on the user's data: images -> features (B, 256), logits
    record_recognition             accuracy of the classifier on class-conditional samples
    record_imagenet_recognition    the same for EfficientNet (efficientnet.py), where the classes
                                   of the data are ImageNet's

B images    H, W, S sides in pixels    F features
"""
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from ..config import atomic_write
from ..dist import all_gather_ragged, all_reduce_sum, barrier, print0, rank, rank_slice
from ..fid import load_inception
from ..run import ProgressBar, record_metric
from .efficientnet import EfficientNetLite0, imagenet_classes
from .files import check_writable, read_settings, reading, wait_until
from .image_sets import SavedStats, check_sample_count
from .perceptual import uses_efficientnet


def feature_net(kind, device, get_classifier):
    """The feature extractor of a Frechet distance

    kind            'inception', 'efficientnet' or 'classifier'
    get_classifier  function () -> Classifier, accuracy; called only if it is needed
    -> function uint8 (B, 3, H, W) -> (B, F), name of the distance, description of the features
    """
    if kind == "classifier":
        classifier, _ = get_classifier()
        protocol = "256-d features of the classifier trained on the real images"
        return classifier.features, "FD-classifier", protocol
    if kind == "efficientnet":
        net = EfficientNetLite0().to(device)
        return net, "FD-EfficientNet (no FID)", EfficientNetLite0.PROTOCOL
    return inception_network(device), "FID", "pytorch-fid's Inception"


def inception_network(device):
    """load_inception, with an error message that names the alternatives"""
    try:
        return load_inception(device)
    except FileNotFoundError as problem:
        raise FileNotFoundError(f"{problem}; or use --features efficientnet (after pip install -r "
                                f"requirements-study.txt) or --features classifier, whose distance "
                                f"is not FID") from None


def independence_note(kind, run, samples=None):
    """-> what the protocol has to say if the decoder was trained with EfficientNet's features and
    EfficientNet judges its images, else ''

    kind     a choice of --features or --perceptual
    run      folder of the tokenizer, or None
    samples  ImageSet; dit.py writes into its protocol which folder decoded the images
    """
    if kind != "efficientnet":
        return ""
    decoder = re.search("decoded by (.+?) in fp32", (samples and samples.protocol) or "")
    folders = [run, decoder and decoder[1]]
    if not any(folders):
        return "; without --run it is unknown whether the decoder was trained with this network"
    if not any(uses_efficientnet(read_settings(folder)) for folder in folders):
        return ""
    return ("; NOT INDEPENDENT: the decoder was trained with this network's features. For another "
            "judge, type the same command with --features classifier")


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
    images: samples.labels becomes None. FID does not read them."""
    if samples.labels is None or args.features == "inception" or not train.classes:
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
        wait_until(path.exists)                # another machine may see the file later
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
    C = len(train.classes)
    record_metric(args.out, "classifier accuracy", accuracy,
                  f"the classifier, on real images of {val.spec} val, {C} classes, {side} px, "
                  f"{args.judge_steps} training steps")
    record_share(args, samples, classifier.predict, device, "samples recognised", "the classifier",
                 C, accuracy)


def record_share(args, samples, predict, device, name, judge, C, accuracy, note=""):
    """Record, under a name, the fraction of the samples that a judge recognises. Nothing is
    recorded if the samples have no labels.

    predict   function uint8 (B, 3, S, S) -> labels (B,), on the CPU
    judge     description      C  number of its classes      accuracy  on real images
    """
    if samples.labels is None:
        return
    rows = rank_slice(samples.n)
    labels = samples.labels[rows.start:rows.stop].split(args.batch)
    n_correct = torch.zeros((), device=device)
    for x, y in zip(samples.batches(args.batch), labels):
        n_correct += (predict(x.to(device)) == y).sum()
    record_metric(args.out, name, all_reduce_sum(n_correct).item() / samples.n,
                  f"fraction of {samples.n} class-conditional samples of {args.samples} that "
                  f"{judge} assigns to the requested class; chance {1 / C:.3f}, real images "
                  f"{accuracy:.3f}; {samples.origin()}{note}")


def record_imagenet_recognition(args, net, samples, train, val, device, loader, note):
    """As record_recognition, for EfficientNet: no training is needed, but the classes of the data
    must be ImageNet's, which the names of the class folders show.

    net     EfficientNetLite0
    loader  function (source, limit) -> batches (images, labels, captions) of this rank
    note    of independence_note
    """
    classes = imagenet_classes(train)          # (C,) positions among ImageNet's 1000
    if classes is None or val.classes != train.classes:
        print0(f"EfficientNet's accuracy and the fraction of recognised samples are not measured: "
               f"the classes of {train.spec} are not folders named by WordNet ids of ImageNet, or "
               f"those of {val.spec} val differ from them")
        return

    def predict(images):
        """The most probable of the C classes, whatever the logits of the other classes are"""
        return net.logits(images).cpu()[:, classes].argmax(1)

    counts = torch.zeros(3, device=device)     # images, right among C classes, right among 1000
    for images, labels, _ in loader(val, args.limit):
        logits = net.logits(images.to(device)).cpu()
        right = logits[:, classes].argmax(1) == labels
        right_of_1000 = logits.argmax(1) == classes[labels]
        counts += torch.tensor([len(labels), right.sum(), right_of_1000.sum()]).to(device)
    n, *n_right = all_reduce_sum(counts).tolist()
    accuracy, accuracy_of_1000 = [count / n for count in n_right]
    C = len(classes)
    judge = f"EfficientNet-Lite0 (most probable of the {C} classes of the data, not of all 1000)"
    protocol = f"on {n:.0f} real images of {val.spec} val, {images.shape[-1]} px"
    record_metric(args.out, "EfficientNet accuracy", accuracy, f"{judge}, {protocol}; chance "
                  f"{1 / C:.3f}")
    record_metric(args.out, "EfficientNet accuracy, 1000 classes", accuracy_of_1000,
                  f"EfficientNet-Lite0, {protocol}; chance 0.001")
    record_share(args, samples, predict, device, "samples recognised (EfficientNet)", judge, C,
                 accuracy, note)
