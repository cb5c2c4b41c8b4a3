"""Estimate which batches of S, B and L at 256 px fit on GPUs of 8 to 80 GB.

    python study/memory.py        -> study/memory.json, study/memory.txt

The estimate needs no GPU. It is computed from the sizes of tensors on a CPU:

fixed      weights, gradients and the two moments of AdamW in float32 (16 bytes per parameter), the
           teacher's weights (4 bytes), and the bfloat16 copies that autocast makes (2 bytes)
per image  activations that autograd stores for the backward pass in bfloat16 autocast. They are
           measured as the difference between 2 images and 1 image, for trunks and decoders of 1 and
           2 blocks, and extrapolated to the true depth, because every block stores the same amount.
           The model uses the textbook forms, which also run on GPUs.

The proportions are the paper's: of 8 images, CLIP uses 8, DINO and iBOT use 2 (2 global crops of
256 px and 8 local crops of 112 px each), and 1 is reconstructed. K = 65536 prototypes, captions of
32 tokens, 30 % of the patches masked in half of the global crops. LPIPS is not included (its VGG
stores about 0.1 GB per reconstructed image). 1.5 GB are reserved for the driver, workspaces and
fragmentation (a guess). With --recompute, autograd stores the input of each block in float32 and,
during the backward pass, the activations of one block; this is computed from the same measurement.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vtp_min.losses import dino_loss, ibot_loss                            # noqa: E402
from vtp_min.model import (SIZES, DINOHead, Student, Teacher, VTPConfig,   # noqa: E402
                           VTPModel)

GB = 1e9
RESERVED = 1.5e9                                 # bytes for the driver, workspaces, fragmentation
PATCHES, LOCAL_PATCHES = 256, 49                 # of a global crop, of a local crop
K, TOKENS = 65536, 32                            # prototypes; tokens of a caption
GPUS = 8, 16, 24, 40, 80                         # memory in GB
OBJECTIVES = "clip", "ssl", "rec"


def loss_of(student, objective, n):
    """Forward pass of one objective on n images -> scalar that depends on all outputs"""
    if objective == "ssl":
        return ssl_loss(student, n)
    image = torch.randn(n, 3, 256, 256)
    with torch.autocast("cpu", torch.bfloat16):
        cls, patches = student.encode(image)
        if objective == "rec":
            outputs = [student.decode(patches)]
        else:
            text = torch.randint(1, 49000, (n, TOKENS))
            outputs = [student.embed_image(cls, patches), student.embed_text(text)]
    return sum(x.float().square().mean() for x in outputs)


def ssl_loss(student, n):
    """Forward pass of DINO and iBOT on n images with random targets -> scalar loss"""
    crops = torch.randn(2, n, 3, 256, 256)
    locals = torch.randn(8, n, 3, 112, 112)
    mask = torch.zeros(2, n, PATCHES, dtype=torch.bool)
    mask[0, :, :77] = True                       # 30 % of the patches of one of the two crops
    index = mask.flatten().nonzero()[:, 0]
    keep = {"ssl": None, "local": None}
    with torch.autocast("cpu", torch.bfloat16):
        cls, patch, _ = student.views(crops, locals, mask, index, keep)
    M = len(index)                               # masked patches
    return (dino_loss(cls, torch.rand(2, n, K))
            + ibot_loss(patch, torch.rand(M, K), torch.rand(M), 2 * n))


def kept_bytes(student, objective, n):
    """-> bytes of the tensors that autograd stores for the backward pass, without parameters"""
    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    sizes = {}                                   # {address of a storage: its bytes}
    tensors = []

    def pack(x):
        tensors.append(x)                        # keeps it alive, so that no address is reused
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(student, objective, n)
    del loss
    return sum(sizes.values())


def student_of(size, **fields):
    model = VTPModel(replace(VTPConfig.of_size(size), **fields))
    return Student(model, DINOHead(model.feature_dim))


def bytes_per_image(size, objective):
    """-> bytes stored for each additional image, and the part of them in one block"""
    kept = []
    for depth in (1, 2):
        student = student_of(size, vision_depth=depth, decoder_depth=depth)
        two, one = (kept_bytes(student, objective, n) for n in (2, 1))
        kept.append(two - one)
    block = kept[1] - kept[0]                    # rec: one block of the trunk and of the decoder
    return kept[0] + (SIZES[size]["depth"] - 1) * block, block


def measure(size):
    """-> {"parameters", "fixed": bytes, "row" and "row_recompute": {objective: bytes per image}}"""
    torch.manual_seed(0)
    with torch.device("meta"):
        student = student_of(size)
        teacher = Teacher(student)
    weights = sum(p.numel() for p in student.parameters())
    teacher_weights = sum(p.numel() for p in teacher.parameters())
    row, block = {}, {}
    for objective in OBJECTIVES:
        row[objective], block[objective] = bytes_per_image(size, objective)
    D, depth = SIZES[size]["D"], SIZES[size]["depth"]
    tokens = {"clip": PATCHES + 1, "ssl": 2 * (PATCHES + 1) + 8 * (LOCAL_PATCHES + 1),
              "rec": 2 * PATCHES + 1}
    recompute = {}
    for objective in OBJECTIVES:
        all_but_one = (depth - 1) * block[objective]
        inputs = depth * tokens[objective] * D * 4
        recompute[objective] = row[objective] - all_but_one + inputs
    return {"parameters": weights, "fixed": 18 * weights + 4 * teacher_weights, "row": row,
            "row_recompute": recompute}


def images_that_fit(found, gigabytes, key):
    """-> the largest multiple of 8 images that fits; 0 if none does

    found  result of `measure`      key  'row' or 'row_recompute'
    Of 8 images, CLIP uses 8, self-distillation uses 2, and 1 is reconstructed. The two backward
    passes of a step run one after the other, so only the larger graph counts. CLIP and
    reconstruction share the forward pass of the trunk: the image that is reconstructed costs `rec`
    and the text tower for its caption, which is taken as half of `clip`.
    """
    clip, ssl, rec = (found[key][objective] for objective in OBJECTIVES)
    bytes_of_eight = max(2 * ssl, 7 * clip + rec + clip / 2)
    available = gigabytes * GB - RESERVED - found["fixed"]
    return max(0, int(available // bytes_of_eight) * 8)


def report(found):
    """{size: result of `measure`} -> lines of text"""
    yield ("size   parameters   fixed     per image: clip     ssl      rec    recompute: clip    "
           "ssl      rec")
    for size, m in found.items():
        plain = "".join(f"{m['row'][name] / 1e6:9.0f}" for name in OBJECTIVES)
        recompute = "".join(f"{m['row_recompute'][name] / 1e6:9.0f}" for name in OBJECTIVES)
        yield (f"{size:4s}  {m['parameters'] / 1e6:9.1f}M  {m['fixed'] / GB:5.1f} GB  {plain} MB"
               f"    {recompute} MB")
    yield ""
    yield ("largest micro-batch (--micro) that fits on one GPU; a quarter of the images is for "
           "DINO + iBOT, an eighth is reconstructed; without / with --recompute; 0: does not fit")
    yield "size  " + "".join(f"{gigabytes:>9d} GB" for gigabytes in GPUS)
    for size, m in found.items():
        line = f"{size:4s}  "
        for gigabytes in GPUS:
            line += f"{images_that_fit(m, gigabytes, 'row'):>6d} /"
            line += f"{images_that_fit(m, gigabytes, 'row_recompute'):>4d}"
        yield line


def main():
    found = {size: measure(size) for size in ("S", "B", "L")}
    text = "\n".join(report(found))
    print(text)
    folder = Path(__file__).parent
    (folder / "memory.txt").write_text(text + "\n")
    (folder / "memory.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
