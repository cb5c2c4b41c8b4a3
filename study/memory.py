"""What fits: bytes of S, B and L at 256 px, measured on a CPU tensor by tensor, added up for GPUs of 8 to 80 GB -> study/memory.json, study/memory.txt

    python study/memory.py

fixed    weights, gradients and AdamW's two averages in float32 (16 bytes a parameter), the teacher's weights (4), what autocast keeps in bfloat16 (2)
a row    bytes that autograd keeps for the backward pass, in bfloat16 autocast, counted as the storages it saves: the difference between 2 rows and 1,
         measured with trunks and decoders of 1 and 2 blocks, and drawn out to the true depth: every block keeps the same
Counted with the paper's proportions: of 8 rows 8 are contrasted, 2 seen by DINO and iBOT (2 global crops of 256, 8 local ones of 112), 1 is painted. K 65536, captions
of 32 tokens, half of the crops masked by 30 %. LPIPS is left out (its VGG keeps about 0.1 GB a painted row). 1.5 GB are set aside for the driver, workspaces and fragments (a guess).
--recompute keeps a block's input (float32) and, while its backward pass runs, one block's activations: computed from the same measurement.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).parents[1]))
from vtp_min import text, vit                                              # noqa: E402
from vtp_min.losses import dino_loss, ibot_loss                            # noqa: E402
from vtp_min.model import SIZES, DINOHead, Student, Teacher, VTPConfig, VTPModel       # noqa: E402

text.attend = vit.attend = lambda q, k, v, causal=False: F.scaled_dot_product_attention(q, k, v, is_causal=causal)          # as on a GPU: no N x N matrix is kept
GB, ASIDE, PATCHES, SMALL, K, TEXT = 1e9, 1.5e9, 256, 49, 65536, 32
NO_DROP = dict.fromkeys(("clip", "rec", "ssl", "local"))


def batch_of(n, what):
    """n rows of one objective"""
    if what == "clip":
        return {"image": torch.randn(n, 3, 256, 256), "text": torch.randint(1, 49000, (n, TEXT))}
    if what == "rec":
        return {"image": torch.randn(n, 3, 256, 256), "rec": torch.arange(n)}
    mask = torch.zeros(2, n, PATCHES, dtype=torch.bool)
    mask[0, :, :77] = True                                                  # 30 % of one of the two crops
    return {"crops": torch.randn(2, n, 3, 256, 256), "locals": torch.randn(8, n, 3, 112, 112), "mask": mask}


def kept_bytes(student, batch):
    """Bytes that the forward pass and the losses over rows leave for the backward pass, parameters aside"""
    known = {p.untyped_storage().data_ptr() for p in student.parameters()}
    sizes, held = {}, []

    def pack(x):
        held.append(x)                                                      # an address must not be used twice
        if x.untyped_storage().data_ptr() not in known:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            out = student(batch, NO_DROP)
        loss = sum(x.float().square().mean() for k, x in out.items() if k in ("img", "txt", "pixels"))
        if "cls" in out:
            n = batch["crops"].shape[1]
            loss = loss + dino_loss(out["cls"], torch.rand(2, n, K)) + ibot_loss(out["patch"], torch.rand(len(out["patch"]), K), torch.rand(len(out["patch"])), 2 * n)
    del loss
    return sum(sizes.values())


def student_of(size, **fields):
    model = VTPModel(replace(VTPConfig.of_size(size), **fields))
    return Student(model, DINOHead(model.feature_dim))


def a_row(size, what):
    """-> bytes that a row of this objective keeps, and how many of them in each block"""
    kept = []
    for depth in (1, 2):
        student = student_of(size, vision_depth=depth, decoder_depth=depth)
        kept.append(kept_bytes(student, batch_of(2, what)) - kept_bytes(student, batch_of(1, what)))
    block = kept[1] - kept[0]                                               # for rec: one of the trunk and one of the decoder
    return kept[0] + (SIZES[size]["depth"] - 1) * block, block


def measure(size):
    torch.manual_seed(0)
    with torch.device("meta"):
        student = student_of(size)
        weights, teacher = (sum(p.numel() for p in m.parameters()) for m in (student, Teacher(student)))
    row, block = {}, {}
    for what in ("clip", "ssl", "rec"):
        row[what], block[what] = a_row(size, what)
    D, depth = SIZES[size]["D"], SIZES[size]["depth"]
    tokens = {"clip": PATCHES + 1, "ssl": 2 * (PATCHES + 1) + 8 * (SMALL + 1), "rec": 2 * PATCHES + 1}
    again = {what: row[what] - (depth - 1) * block[what] + depth * tokens[what] * D * 4 for what in row}
    return {"parameters": weights, "fixed": 18 * weights + 4 * teacher, "row": row, "row_recompute": again}


def rows_that_fit(m, memory, key):
    """Groups of 8 contrasted, 2 self-supervised and 1 painted row. Views are done with before the rest begins (`by_objective`): the larger of the two counts.
    The painted row shares the trunk's forward with its contrast: counted once."""
    eight = max(2 * m[key]["ssl"], 7 * m[key]["clip"] + m[key]["rec"] + m[key]["clip"] / 2)
    return max(0, int((memory * GB - ASIDE - m["fixed"]) // eight) * 8)


def main():
    found = {size: measure(size) for size in ("S", "B", "L")}
    lines = ["size   parameters   fixed      a row: clip      ssl      rec    recompute: clip    ssl      rec"]
    for size, m in found.items():
        lines.append(f"{size:4s}  {m['parameters'] / 1e6:9.1f}M  {m['fixed'] / GB:5.1f} GB  " + "".join(f"{m['row'][w] / 1e6:9.0f}" for w in m["row"])
                     + " MB    " + "".join(f"{m['row_recompute'][w] / 1e6:9.0f}" for w in m["row"]) + " MB")
    lines += ["", "rows at a time that fit on one GPU (--micro), of them a quarter for DINO + iBOT and an eighth for pixels; without / with --recompute; 0: does not fit",
              "size  " + "".join(f"{g:>9d} GB" for g in (8, 16, 24, 40, 80))]
    for size, m in found.items():
        lines.append(f"{size:4s}  " + "".join(f"{rows_that_fit(m, g, 'row'):>6d} /{rows_that_fit(m, g, 'row_recompute'):>4d}" for g in (8, 16, 24, 40, 80)))
    text = "\n".join(lines)
    print(text)
    here = Path(__file__).parent
    (here / "memory.txt").write_text(text + "\n")
    (here / "memory.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
