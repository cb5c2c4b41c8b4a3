"""How fast, and against what: ours beside a plain arrangement of the same mathematics (tests/yardstick.py), in turns in one process, medians.

    python tests/bench.py joint                    the training step: nano and S at 64 px, fp32 and bf16
    python tests/bench.py                          everything (about 25 minutes on two quiet cores) -> study/bench.json, study/bench.txt
Ratios compare; images/s belong to the machine that is named with them. Anything else that runs beside a benchmark spoils it.
"""
import copy
import json
import math
import resource
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import train as T                                                          # noqa: E402
import yardstick as plain                                                  # noqa: E402
from data import Steps, open_data                                          # noqa: E402
from tokenizer import get_tokenizer                                        # noqa: E402
from vtp_min.losses import centered_softmax                                # noqa: E402
from vtp_min.model import DINOHead, Student, Teacher, VTPConfig, VTPModel  # noqa: E402
from vtp_min.run import autocast, matmul_peak                              # noqa: E402
from vtp_min.schedules import param_groups                                 # noqa: E402
from vtp_min.views import block_mask                                       # noqa: E402

CPU, TEMP, EMA = torch.device("cpu"), 0.07, 0.994
WEIGHTS = Namespace(w_clip=1.0, w_ssl=1.0, w_rec=0.1, w_koleo=0.1, clip_loss="clip")
NO_DROP = dict.fromkeys(("clip", "rec", "ssl", "local"))
BATCH = {"nano": 64, "S": 32, "B": 16}                                     # pictures a step: words 8 : views 2 : pixels 1, and 8 local crops


# ---------------------------------------------------------------- the joint step
class Joint:
    """A student, its teacher and optimizer, and the step of train.py's loop (`ours`) or of the yardstick (`plain`): the same weights for the same seed"""
    def __init__(self, size, precision, how, side=64, patch=8, batch=None, depth=None):
        torch.manual_seed(0)
        prototypes, hidden, bottleneck = ((256, 256, 64) if size == "nano" else (65536, 2048, 256))      # train.py's defaults
        config = VTPConfig.of_size(size, side, patch, 64, True, True, False)
        config.vision_depth = config.decoder_depth = depth or config.vision_depth
        model = VTPModel(config)
        self.student = Student(model, DINOHead(model.feature_dim, prototypes, hidden, bottleneck))
        self.teacher = Teacher(self.student)
        groups = param_groups(self.student, 1.0, 1.0)
        if how == "plain":
            plain.plainly(self.student), plain.plainly(self.teacher)
            self.opt = plain.optimizer(groups, T.BETAS, T.EPS)
        else:
            self.opt = torch.optim.AdamW(groups, betas=T.BETAS, eps=T.EPS, fused=True)
        for group in self.opt.param_groups:
            group["lr"] = 1e-4
        self.precision, self.step = precision, self.plain if how == "plain" else self.ours

    def ours(self, batch):
        self.opt.zero_grad()
        batch = T.to_device(batch, CPU)
        with autocast(CPU, self.precision):
            seen = self.teacher(batch["crops"], batch["mask"])
        now, _ = T.balance("sinkhorn", {k: lambda x=x: [x.flatten(0, -2)] for k, x in seen.items()}, TEMP, None)
        targets, terms = {k: centered_softmax(x, now[k], TEMP) for k, x in seen.items()}, {}
        for part, _ in T.parts(batch):
            with autocast(CPU, self.precision):
                out = self.student(part, NO_DROP)
                own = T.of_the_batch(WEIGHTS, out) | T.of_each_row(out, part, targets, None)
            T.weighted(WEIGHTS, own).backward()
            terms |= {k: x.item() for k, x in own.items()}
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.opt.step()
        self.teacher.follow(self.student, EMA)
        return terms

    def plain(self, batch):
        self.opt.zero_grad()
        batch = T.to_device(batch, CPU)
        rows = max(int(0.3 * batch["mask"].numel()), int(batch["mask"].sum()))        # DINOv2: of half of the crops, the upper edge of each stratum
        with autocast(CPU, self.precision):
            targets = plain.teach(self.teacher, batch, rows, TEMP)
            terms = plain.losses(plain.forward(self.student, batch, rows), targets, batch)
        T.weighted(WEIGHTS, terms).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.opt.step()
        plain.follow(self.teacher, self.student, EMA)
        return {k: x.item() for k, x in terms.items()}
