"""Which batches of S, B and L at 256 px fit on GPUs of 8 to 80 GB, computed from tensor sizes that
are measured on a CPU -> study/memory.json, study/memory.txt

    python study/memory.py

fixed     weights, gradients and AdamW's two averages in float32 (16 bytes per parameter), the
          teacher's weights (4), the bfloat16 copies of autocast (2)
an image  bytes that autograd keeps for the backward pass in bfloat16 autocast, counted as the
          storages that it saves: the difference between 2 images and 1, measured on trunks and
          decoders of 1 and 2 blocks and extrapolated to the true depth, because every block keeps
          the same. These are the textbook forms, which run on GPUs.

The proportions are the paper's: of 8 images all are used by CLIP, 2 by DINO and iBOT (2 global
crops of 256 px, 8 local ones of 112), 1 is reconstructed. K 65536, captions of 32 tokens, half of
the crops masked by 30 %. Not included: LPIPS (its VGG keeps about 0.1 GB per reconstructed image).
1.5 GB are set aside for the driver, workspaces and fragmentation (a guess). --recompute keeps the
input of each block (float32) and, during its backward pass, the activations of one block: computed
from the same measurement.
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
SET_ASIDE = 1.5e9
PATCHES, LOCAL_PATCHES = 256, 49                 # of a global and a local crop
K, TOKENS = 65536, 32
GPUS = 8, 16, 24, 40, 80                         # GB
OBJECTIVES = "clip", "ssl", "rec"


def loss_of(student, objective, n):
    """A forward pass of one objective on n images -> a scalar that depends on all outputs"""
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
    crops, locals = torch.randn(2, n, 3, 256, 256), torch.randn(8, n, 3, 112, 112)
    mask = torch.zeros(2, n, PATCHES, dtype=torch.bool)
    mask[0, :, :77] = True                       # 30 % of one of the two crops
    index = mask.flatten().nonzero()[:, 0]
    keep = {"ssl": None, "local": None}
    with torch.autocast("cpu", torch.bfloat16):
        cls, patch, _ = student.views(crops, locals, mask, index, keep)
    M = len(index)
    return (dino_loss(cls, torch.rand(2, n, K))
            + ibot_loss(patch, torch.rand(M, K), torch.rand(M), 2 * n))


def kept_bytes(student, objective, n):
    """Bytes that the forward pass and the losses keep for the backward pass, without parameters"""
    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    sizes, held = {}, []

    def pack(x):
        held.append(x)                           # so that no address is used twice
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
    """-> bytes that one more image keeps, and how many of them in each block"""
    kept = []
    for depth in (1, 2):
        student = student_of(size, vision_depth=depth, decoder_depth=depth)
        two, one = (kept_bytes(student, objective, n) for n in (2, 1))
        kept.append(two - one)
    block = kept[1] - kept[0]                    # for rec: one of the trunk, one of the decoder
    return kept[0] + (SIZES[size]["depth"] - 1) * block, block


def measure(size):
    torch.manual_seed(0)
    with torch.device("meta"):
        student = student_of(size)
        teacher = Teacher(student)
    weights, teacher_weights = (sum(p.numel() for p in m.parameters())
                                for m in (student, teacher))
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
    """A multiple of 8: 8 for CLIP, 2 for self-supervision, 1 to be reconstructed

    The two backward passes of a step follow each other, so the larger graph counts. CLIP and
    reconstruction share a forward pass of the trunk.
    """
    clip, ssl, rec = (found[key][objective] for objective in OBJECTIVES)
    eight = max(2 * ssl, 7 * clip + rec + clip / 2)
    return max(0, int((gigabytes * GB - SET_ASIDE - found["fixed"]) // eight) * 8)


def report(found):
    """{size: measurements} -> lines"""
    yield ("size   parameters   fixed      an image: clip     ssl      rec    recompute: clip    "
           "ssl      rec")
    for size, m in found.items():
        plain = "".join(f"{m['row'][name] / 1e6:9.0f}" for name in OBJECTIVES)
        recompute = "".join(f"{m['row_recompute'][name] / 1e6:9.0f}" for name in OBJECTIVES)
        yield (f"{size:4s}  {m['parameters'] / 1e6:9.1f}M  {m['fixed'] / GB:5.1f} GB  {plain} MB"
               f"    {recompute} MB")
    yield ""
    yield ("images at a time that fit on one GPU (--micro), of them a quarter for DINO + iBOT and "
           "an eighth to be reconstructed; without / with --recompute; 0: does not fit")
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
