"""Accuracy of EfficientNet-Lite0, the judge of photographs, on real images.   -> study/judge.txt

    python study/judge.py DIR SIDE      DIR contains val/ with class folders named by WordNet ids

The images are cropped to SIDE pixels as eval.py does. Printed: top-1 accuracy among the classes of
the data and among ImageNet's 1000, and the CPU time of 1000 images on one core.
"""
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import eval_batches, open_data                                   # noqa: E402
from vtp_min.extras.efficientnet import EfficientNetLite0, imagenet_classes  # noqa: E402


@torch.no_grad()
def main(folder, side):
    torch.set_num_threads(1)
    net = EfficientNetLite0()
    source = open_data(folder, "val", whole=True)
    classes = imagenet_classes(source)
    if classes is None:
        raise SystemExit(f"judge.py: the class folders of {folder} are not WordNet ids of ImageNet")
    among_data = among_all = n = 0
    seconds = 0.0
    for images, labels, _ in eval_batches(source, side, 100):
        start = time.process_time()
        logits = net.logits(images)
        seconds += time.process_time() - start
        among_data += (logits[:, classes].argmax(1) == labels).sum().item()
        among_all += (logits.argmax(1) == classes[labels]).sum().item()
        n += len(labels)
    print(f"{Path(folder).name}, {side} px, {n} images: {100 * among_data / n:.1f} % among "
          f"{len(classes)} classes, {100 * among_all / n:.1f} % among 1000; CPU time of 1000 "
          f"images {1000 * seconds / n:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], int(sys.argv[2]))
