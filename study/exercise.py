"""Check your solutions of the exercises in study/exercises.

    python study/exercise.py                                list all exercises and their state
    python study/exercise.py clip_loss                      check study/exercises/clip_loss.py
    python study/exercise.py clip_loss --file mine.py       check the same function in another file

1. Choose an exercise of the list. The easiest ones are guidance, euler_sampler and clip_loss.
2. Open its file. The docstring says what the function computes, with shapes and the equation.
   Replace `raise NotImplementedError` by your code, or do so in a copy and name it with --file.
3. Check it. Each line is a property of a correct solution, yes or no, and what was measured:

        1. rows sum to 1: no, 0.306 to 0.348

   A typical mistake is recognised and named. Correct it and check again. When all properties hold,
   the result is compared with stored outputs of the reference code: VTP, DINOv2, OpenCLIP,
   LightningDiT, pytorch-fid.
4. Answer the question at the end of the docstring. It needs thought, but no code.

The exit status is 0 if the exercise is done (without a name: if all are done), else 1.
"""
import argparse
import contextlib
import importlib
import inspect
import io
import json
import math
import re
import signal
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vtp_min import vit                                                    # noqa: E402

FOLDER = ROOT / "study/exercises"
GOLDEN = ROOT / "tests/golden"                   # stored outputs of the reference code
TOL = 1e-4                                       # relative to the largest wanted value
SECONDS = 20                                     # time limit of one call of the student's function


class Problem(Exception):
    """A sentence about the student's function that ends the check"""


class NotBegun(Exception):
    """The student's function is still the stub."""


@dataclass
class Property:
    """A property of a correct solution, such as "each row sums to 1"."""
    statement: str
    holds: bool
    measured: str = ""                           # what was found, and what was wanted
    hint: str = ""                               # a rule that helps to find the mistake
    cause: str = ""                              # the mistake, if it is recognised by its result


# ---------------------------------------------------------------- calls of the student's function
def as_tensor(shape_of, result, args, allow_nan):
    """-> result, if it is a tensor of the wanted shape. shape_of: arguments -> shape"""
    shape = shape_of(args)
    wanted = f"a torch tensor of shape {shape} is wanted"
    if shape == ():
        wanted = "a torch tensor of shape (), a single number, is wanted"
    if isinstance(result, (float, int)):
        wanted += "; .item() or float() would cut off the gradient"
    if not torch.is_tensor(result):
        raise Problem(f"the function returns {kind_of(result)}, but {wanted}")
    if result.shape != shape:
        raise Problem(f"the function returns a tensor of shape {tuple(result.shape)}, but {wanted}")
    if not allow_nan and not result.isfinite().all():
        raise Problem("the result contains nan or inf")
    return result


def as_number(result, args, allow_nan):
    """float, numpy scalar or tensor of shape () -> tensor (), float64"""
    is_tensor = torch.is_tensor(result) and result.shape == ()
    if not is_tensor and not isinstance(result, (float, int, complex)):
        raise Problem(f"the function returns {kind_of(result)}, but a number is wanted")
    result = torch.as_tensor(result)
    if result.is_complex():
        raise Problem(f"the function returns the complex number {result.item():.4g}, but a real "
                      f"number is wanted; the eigenvalues of S1 S2 are real up to rounding, so "
                      f"take their real part")
    if not allow_nan and not result.isfinite():
        raise Problem(f"the function returns {result.item()}")
    return result.double()


def as_tokens(result, args, allow_nan):
    """-> result, if it is a list of strings"""
    if not isinstance(result, list):
        raise Problem(f"the function returns {kind_of(result)}, but a list of strings is wanted")
    for token in result:
        if not isinstance(token, str):
            raise Problem(f"the returned list contains {kind_of(token)}, {token!r}, but all its "
                          f"elements must be strings")
    return result


def kind_of(result):
    if result is None:
        return "None (is the return statement missing?)"
    if torch.is_tensor(result):
        return f"a tensor of shape {tuple(result.shape)}"
    return f"an object of type {type(result).__name__}"


def number(args):
    return ()


def like_first(args):
    return tuple(args[0].shape)


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError after some seconds, such as in an endless loop"""
    def stop(*_):
        raise TimeoutError(f"no result after {seconds} s; is there an endless loop?")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def copy_of(x):
    """A copy of an argument, through which gradients flow back to x"""
    if torch.is_tensor(x):
        return x.clone()
    return list(x) if isinstance(x, list) else x


class Student:
    """The student's function. A call checks its result and raises Problem if it is not usable."""

    def __init__(self, function, convert, file=None):
        self.function, self.convert = function, convert
        code = getattr(inspect.unwrap(function), "__code__", None)
        self.file = str(file or getattr(code, "co_filename", ""))
        try:
            self.signature = inspect.signature(function)
        except ValueError:                       # some functions that are written in C
            raise Problem("the function must be written in Python, with def") from None

    def __call__(self, *args, allow_nan=False):
        copies = [copy_of(x) for x in args]
        try:
            self.signature.bind(*copies)
        except TypeError as error:
            raise Problem(f"the function cannot be called with the {len(args)} arguments of the "
                          f"stub: {error}") from None
        try:
            with time_limit(SECONDS):
                result = self.function(*copies)
        except Problem:                          # raised by a model that the student's code calls
            raise
        except (Exception, SystemExit) as error:
            raise self.translate(error) from None
        for name, x, copy in zip(self.signature.parameters, args, copies):
            same = torch.equal(x, copy) if torch.is_tensor(x) else x == copy
            if not same:
                raise Problem(f"the function changes its argument {name} in place; make a new "
                              f"tensor or list instead: x = x + 1, not x += 1 or x[0] = 1")
        return self.convert(result, args, allow_nan)

    def translate(self, error):
        """-> Problem with the line of the student's file, or NotBegun"""
        frames = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in frames if frame.filename == self.file]
        place = ""
        if frames:
            last = frames[-1]
            place = f" in line {last.lineno} of {Path(self.file).name}, `{last.line}`"
            stub = isinstance(error, NotImplementedError)
            if stub and last.line.startswith("raise NotImplementedError"):
                return NotBegun()
        return Problem(f"{type(error).__name__}{place}: {first_line(error)}")


def first_line(error):
    return (str(error).splitlines() or ["(no message)"])[0]


def load(name, file):
    """-> the student's function. Problem if the file has none."""
    namespace = {"__name__": name, "__file__": str(file)}
    try:
        code = compile(file.read_text(encoding="utf-8"), str(file), "exec")
        with time_limit(SECONDS):
            exec(code, namespace)
    except OSError as error:
        raise Problem(f"{file} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        raise Problem(f"{type(error).__name__} in line {error.lineno} of {file.name}: "
                      f"{error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == str(file)]
        place = f" in line {lines[-1]}" if lines else ""
        raise Problem(f"{file.name} cannot be imported: {type(error).__name__}{place}: "
                      f"{first_line(error)}") from None
    if not callable(namespace.get(name)):
        raise Problem(f"{file.name} has no function with the name {name}")
    return namespace[name]


# ---------------------------------------------------------------- comparing
def short(x):
    """-> a tensor with at most six numbers as text, a longer one as ''"""
    numbers = [f"{value:.4g}" for value in x.flatten().tolist()]
    if x.dim() == 0:
        return numbers[0]
    return f"({', '.join(numbers)})" if len(numbers) <= 6 else ""


def close(found, wanted, tol=TOL):
    """Whether the largest difference is at most tol times the largest magnitude of wanted (at most
    tol, where wanted is 0). Tensors of different sizes are not close."""
    if found.shape != wanted.shape:
        return False
    scale = wanted.abs().max().item() or 1.0
    return bool((found - wanted).abs().max() <= tol * scale)


def equal(statement, found, wanted, mistakes=(), otherwise=""):
    """The property that found equals wanted, tensors or numbers.

    mistakes   pairs (wrong result, cause): the results of typical mistakes
    otherwise  the hint if none of them matches
    """
    found, wanted = [torch.as_tensor(x).detach().double() for x in (found, wanted)]
    if close(found, wanted):
        return Property(statement, True, short(found))
    if short(wanted):
        numbers = short(found) or f"{len(found)} numbers"
        text = f"{numbers} instead of {short(wanted)}"
    elif found.isnan().any():
        text = "it contains nan"
    else:
        difference = (found - wanted).abs().max()
        largest = wanted.abs().max()
        text = f"it differs by up to {difference:.2g}, where values are up to {largest:.2g}"
    for wrong, cause in mistakes:
        wrong = torch.as_tensor(wrong).detach().double()
        if close(found, wrong):
            return Property(statement, False, text, cause=cause)
    return Property(statement, False, text, otherwise)


def all_are(statement, wanted, x, hint="", cause=""):
    """The property that each element of x is the number `wanted`"""
    low, high = x.min().item(), x.max().item()
    text = f"{low:.3g} to {high:.3g}"
    if f"{low:.3g}" == f"{high:.3g}":
        text = f"{low:.3g}"
    return Property(statement, close(x, torch.full_like(x, wanted)), text, hint, cause)


def gradients(loss, inputs):
    """-> gradients of the sum of loss with respect to {name: leaf}, {name: tensor}"""
    try:
        grads = torch.autograd.grad(loss.sum(), list(inputs.values()), allow_unused=True,
                                    materialize_grads=True)
    except RuntimeError as error:                # such as after a change in place
        raise Problem(f"the gradient cannot be computed: {first_line(error)}") from None
    return dict(zip(inputs, grads))


def gradient_arrives(loss, inputs):
    """The property that a loss has a gradient with respect to each of {name: leaf}"""
    statement = f"a gradient arrives at {', '.join(inputs)}"
    hint = ("use no .detach(), .item(), .data or torch.no_grad() between the arguments and the "
            "result")
    if not loss.requires_grad:
        return Property(statement, False, "the result has no gradient at all", hint)
    without = [name for name, grad in gradients(loss, inputs).items() if not grad.any()]
    measured = f"none at {', '.join(without)}" if without else ""
    return Property(statement, not without, measured, hint)


def as_ours(name, found, *args, otherwise=""):
    """The property that found equals the result of the project's own function"""
    wanted = solution(name)(*args)
    return equal("with random inputs, the result is that of the project's own function", found,
                 wanted, otherwise=otherwise)


def draws(*shapes):
    """-> a list of normally distributed tensors, the same in each run"""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def leaf(x):
    """A copy of x with respect to which gradients can be computed"""
    return x.detach().clone().requires_grad_()


def stored(stem, *keys):
    """-> arrays of tests/golden/STEM.npz, in float32 unless they are integers"""
    arrays = np.load(GOLDEN / f"{stem}.npz")
    tensors = [torch.from_numpy(arrays[key]) for key in keys]
    return [x.float() if x.is_floating_point() else x for x in tensors]


def gradients_as_stored(reference, loss, inputs, stem, prefix):
    """Yield a property per gradient.   inputs {end of the stored name: leaf}"""
    for name, grad in gradients(loss, inputs).items():
        wanted, = stored(stem, prefix + name)
        yield equal(f"the gradient {name} equals the stored output of {reference}", grad, wanted)


def cross_entropy(teacher, student, dim=-1):
    """Mean cross-entropy of rows of probabilities and of logits, to recognise mistakes"""
    return -(teacher * F.log_softmax(student, dim)).sum(-1).mean()


# ---------------------------------------------------------------- the exercises
# NAME_properties(f) yields the properties of a correct function f, the simplest first.
# NAME_reference(f) yields comparisons with stored outputs of the reference code.

def rope_rotation_properties(f):
    x, k, angle, other = draws((2, 3, 5, 8), (2, 3, 5, 8), (5, 4), (5, 4))

    def rotate(x, angle):
        angle = torch.cat([angle, angle], -1)
        return f(x, angle.sin(), angle.cos())

    half_turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    yield equal("with all angles 0, nothing changes", rotate(x, 0 * angle), x,
                [(half_turned, "sin and cos are exchanged"),
                 (0 * x, "the terms with cos are missing")])
    small = torch.arange(1., 5).view(1, 1, 1, 4)
    found = rotate(small, torch.tensor([[torch.pi / 2, 0]])).flatten()
    neighbours = "the pairs are neighbouring channels 2i, 2i + 1; here they are i, i + c/2"
    yield equal("a quarter turn of the first pair, (1, 3), turns (1, 2, 3, 4) into (-3, 2, 1, 4)",
                found, torch.tensor([-3., 2, 1, 4]),
                [(torch.tensor([3., 2, -1, 4]), "the rotation has the opposite direction: the "
                  "minus sign belongs to the first channel of a pair"),
                 (torch.tensor([3., 2, 1, 4]), "the minus sign of -b sin theta is missing"),
                 (torch.tensor([-2., 2, -4, 4]), neighbours),
                 (torch.tensor([-2., 1, -4, 3]), neighbours),
                 (torch.tensor([-2., 1, 3, 4]), neighbours)])
    yield all_are("the length of each vector stays the same (length after / before)", 1,
                  rotate(x, angle).norm(dim=-1) / x.norm(dim=-1),
                  "the two halves of a pair need the same angle, and the new a must not be used "
                  "to compute b")
    yield equal("rotating by one angle, then by another, is rotating by their sum",
                rotate(rotate(x, angle), other), rotate(x, angle + other))
    position = torch.arange(5.)[:, None]
    angle = position * torch.tensor([1, 0.5, 0.2, 0.1])
    q, k = [rotate(y[:, :, :1].expand(-1, -1, 5, -1), angle) for y in (x, k)]
    products = q @ k.transpose(-1, -2)                                     # (B, H, L, L)
    yield equal("if all tokens have the same query and the same key, q . k depends only on the "
                "difference of their positions", products[..., 1:, 1:], products[..., :-1, :-1])
    yield as_ours("rope_rotation", f(x, angle.tile(2).sin(), angle.tile(2).cos()), x,
                  angle.tile(2).sin(), angle.tile(2).cos())


def tokenizer_features():
    """Run the small stored VTP model -> its output, the stored output of the official code"""
    from vtp_min import VTPModel
    model = VTPModel.from_pretrained(GOLDEN / "vtp_p8", "float32")
    wanted, image = stored("vtp_p8/io", "rope_fp32.last.patch_tokens", "image")
    with torch.no_grad():
        return model.get_last_layer_feature(image)["patch_tokens"], wanted


def rope_rotation_reference(f):
    with mock.patch("vtp_min.vit.rotate", f):
        found, wanted = tokenizer_features()
    yield equal("a VTP trunk with your rotation computes the stored features of the official code",
                found, wanted)


# functions for the argument rotate of qknorm_attention
def same(x):
    return x


def zero(x):
    return 0 * x


def roll(x):
    return x.roll(1, dims=-1)


def qknorm_attention_properties(f):
    L = c = 4
    q, k, v, w = draws((2, 3, L, c), (2, 3, L, c), (2, 3, L, c), c)
    one = torch.ones(c)
    eye = torch.eye(L).expand(2, 3, L, L)        # with these values, the result is the weights
    weights = f(q, k, eye, one, one, same)                                 # (B, H, L, L)
    cause = ""
    if close(weights.sum(-2), torch.ones(2, 3, L)):
        cause = "the softmax is over the queries; it must be over the keys, the last dimension"
    yield all_are("the attention weights of each query sum to 1", 1, weights.sum(-1), cause=cause)
    order = torch.tensor([2, 0, 3, 1])
    yield equal("the order of the keys, with their values, does not matter",
                f(q, k[:, :, order], v[:, :, order], one, one, same), f(q, k, v, one, one, same),
                otherwise="attention here has no causal mask, and all keys are treated alike")
    yield equal("queries and keys that are 10 times as long give the same result",
                f(10 * q, 10 * k, v, one, one, same), f(q, k, v, one, one, same),
                [(f(q, 10 * k, v, one, one, same), "the keys are not normalised"),
                 (f(10 * q, k, v, one, one, same), "the queries are not normalised")],
                "normalise queries and keys over their channels (RMSNorm)")
    # the weights are softmax(factor * products), and a softmax ignores a constant
    products = vit.rms_norm(q, one, 1e-5) @ vit.rms_norm(k, one, 1e-5).transpose(-1, -2)
    centred = products - products.mean(-1, keepdim=True)
    logits = weights.clamp_min(1e-30).log()

    def factor_of(logits):
        return (logits * centred).sum() / centred.square().sum()

    with_layer_norm = F.layer_norm(q, (c,)) @ F.layer_norm(k, (c,)).transpose(-1, -2) / 2
    yield equal("the logits are the products of normalised q and k times 1 / sqrt(4) = 0.5",
                factor_of(logits), 0.5,
                [(1.0, "the division by sqrt(c) is missing"),
                 (2.0, "the logits are multiplied by sqrt(c) instead of divided"),
                 (0.25, "the logits are divided by c instead of sqrt(c)"),
                 (0.125, "q and k are divided by their length; RMSNorm divides by the root of the "
                  "mean square, which is smaller by the factor sqrt(c)"),
                 (factor_of(with_layer_norm), "this is LayerNorm, which subtracts the mean first; "
                  "RMSNorm does not")])
    yield equal("the result is proportional to v", f(q, k, 3 * v, one, one, same),
                3 * f(q, k, v, one, one, same),
                [(f(q, k, v, one, one, same), "v is normalised, too; only q and k should be")])
    yield equal("a weight has the same effect on q as on k", f(q, k, v, w, one, same),
                f(q, k, v, one, w, same),
                [(f(q, k, v, w, w, same), "k_weight is not used, or q_weight is used for both"),
                 (f(q, k, v, one, one, same), "q_weight is not used")],
                "q_weight belongs to q and k_weight to k, both after the division")
    mean = v.mean(-2, keepdim=True).expand_as(v)
    yield equal("with q_weight 0, each query gets the mean of the values",
                f(q, k, v, 0 * one, one, same), mean,
                [(f(q, k, v, one, one, same), "q_weight is not used")])
    yield equal("a query that is 0 gets the mean of the values",
                f(0 * q, k, v, one, one, same, allow_nan=True), mean,
                otherwise="0 is divided by 0; add 0.00001 to the mean square")
    yield from position_properties(f, q, k, v, w, one, mean)
    yield as_ours("qknorm_attention", f(q, k, v, w, w, roll), q, k, v, w, w, roll)


def position_properties(f, q, k, v, w, one, mean):
    """qknorm_attention: where rotate is called"""
    yield equal("if rotate returns 0, each query gets the mean of the values",
                f(q, k, v, one, one, zero), mean,
                [(0 * v, "rotate is applied to v, too; only q and k have a position"),
                 (f(q, k, v, one, one, same), "rotate is not called")])
    yield equal("if rotate shifts the channels of q and k alike, nothing changes",
                f(q, k, v, w, one, roll), f(q, k, v, w, one, same),
                otherwise="call rotate for q and for k, after the norms with their weights")


def qknorm_attention_reference(f):
    def forward(self, x, rope):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = f(q, k, v, self.q_norm.weight, self.k_norm.weight, lambda x: vit.rotate(x, *rope))
        return self.proj(x.transpose(1, 2).reshape(B, L, D))

    with mock.patch("vtp_min.vit.Attention.forward", forward):
        found, wanted = tokenizer_features()
    yield equal("a VTP trunk with your attention computes the stored features of the official code",
                found, wanted)


def clip_loss_properties(f):
    img, txt = [F.normalize(x, dim=-1) for x in draws((6, 4), (6, 4))]
    scale = torch.tensor(5.0)
    eye = torch.eye(4)
    wanted = math.log(1 + 3 * math.exp(-5))
    yield equal("if each image equals its caption and is orthogonal to the others, the loss is "
                f"ln(1 + (B - 1) exp(-scale)) = {wanted:.4g} for B = 4, scale = 5",
                f(eye, eye, scale), wanted,
                [(math.log(1 + 3 * math.exp(-1 / 5)), "the logits are divided by scale; scale is "
                  "1 / temperature, so they are multiplied by it"),
                 (math.log(1 + 3 * math.exp(-1)), "scale is not used"),
                 (0.0, "scale is used as it is, without exp(scale)")])
    ln6 = math.log(6)
    yield equal("with scale 0 all captions are equally likely, and the loss is ln B = 1.792",
                f(img, txt, 0 * scale), ln6,
                [(2 * ln6, "the losses of the two directions are added; the loss is their mean"),
                 (6 * ln6, "the loss is summed over the batch; it is the mean"),
                 (12 * ln6, "the loss is summed over the batch and the directions; both are means"),
                 (ln6 / 6, "the loss is divided by B once more than needed"),
                 (-ln6, "the sign is wrong: the loss is minus the log of a probability")])
    # the losses of the two directions, to recognise a mistake
    logits = scale * img @ txt.T
    labels = torch.arange(6)
    of_images, of_texts = F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)
    yield equal("exchanging images and captions does not change the loss", f(txt, img, scale),
                f(img, txt, scale),
                [(of_texts, "only the caption of each image is looked for; the loss is the mean of "
                  "both directions"),
                 (of_images, "only the image of each caption is looked for; the loss is the mean "
                  "of both directions")],
                "the loss treats images and captions alike")
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    yield equal("the order of the pairs does not matter", f(img[order], txt[order], scale),
                f(img, txt, scale))
    yield equal("embeddings that are twice as long have the loss of a scale that is 4 times as "
                "large", f(2 * img, 2 * txt, scale), f(img, txt, 4 * scale),
                [(f(img, txt, scale), "the embeddings are normalised again; they have unit length "
                  "already, and the gradient would change")])
    inputs = {"img": leaf(img), "txt": leaf(txt), "scale": leaf(scale)}
    loss = f(*inputs.values())
    yield gradient_arrives(loss, inputs)
    yield as_ours("clip_loss", loss, img, txt, scale)


def clip_loss_reference(f):
    img, txt, log_scale, wanted = stored("clip_single", "f64/norm_image", "f64/norm_text",
                                         "scale0/logit_scale_log", "f64/scale0/clip/loss")
    inputs = {"grad_norm_image": leaf(img), "grad_norm_text": leaf(txt)}
    loss = f(*inputs.values(), log_scale.exp())
    yield equal("the loss equals the stored output of OpenCLIP", loss, wanted)
    yield from gradients_as_stored("OpenCLIP", loss, inputs, "clip_single", "f64/scale0/clip/")


def dino_loss_properties(f):
    V, B, K, tau = 4, 3, 7, 0.1
    student, teacher = draws((2 + V, B, K), (2, B, K))
    teacher = teacher.softmax(-1)
    yield equal("a student that outputs 0 everywhere has loss ln K = 1.946",
                f(0 * student, teacher, tau), math.log(K),
                [(math.log(B), "the softmax is over the images; it must be over the prototypes"),
                 (math.log(2 + V), "the softmax is over the crops; it must be over the prototypes"),
                 (-math.log(K), "the sign is wrong: cross-entropy is minus the sum"),
                 (math.log(K) / K, "the sum over the prototypes is replaced by a mean"),
                 (math.log(K) * B, "the loss is summed over the images; it is the mean")])
    p = teacher[:1]                                                        # (1, B, K)
    found = f((tau * p.log()).expand(2 + V, B, K), p.expand(2, B, K), tau)
    entropy = cross_entropy(p, p.log())
    yield equal("if student and teacher agree, the loss is the entropy of the teacher", found,
                entropy,
                [(cross_entropy(p, tau * tau * p.log()), "the logits are multiplied by tau instead "
                  "of divided"),
                 (cross_entropy(p, tau * p.log()), "tau is not used"),
                 (cross_entropy(p.softmax(-1), p.log()), "a softmax is applied to the teacher, "
                  "which already contains probabilities"),
                 (cross_entropy(p, p.log(), -2), "the softmax is over the images"),
                 (0.0, "this is the Kullback-Leibler divergence; cross-entropy does not subtract "
                  "the entropy of the teacher")])
    # crop s has cross-entropy s + 1 with class 0, the teacher's class for every crop and image
    values = torch.arange(1., 7)
    logits = torch.stack([-values.expm1().log(), 0 * values], -1) * tau    # (6, 2)
    found = f(logits[:, None].expand(6, B, 2), torch.tensor([1., 0]).expand(2, B, 2), tau)
    yield equal("if the crops have cross-entropies 1, 2 (global), 3, 4, 5, 6 (local), the mean "
                "over the 10 pairs is 3.9", found, 3.9,
                [(3.5, "the pairs of a crop with itself are included; they must be left out"),
                 (39.0, "the pairs are added; the loss is their mean"),
                 (3.25, "the sum over 10 pairs is divided by 12"),
                 (1.5, "only the global crops of the student are used"),
                 (4.5, "the student's local crops only are used; each global crop is also compared "
                  "with the other global crop"),
                 (11.7, "the loss is summed over the images; it is the mean"),
                 (117.0, "the loss is summed over pairs and images; it is the mean of both"),
                 (1.95, "the sum over the prototypes is replaced by a mean")])
    only_first = teacher * torch.tensor([1.0, 0])[:, None, None]
    changed = torch.cat([student[:1] + draws((1, B, K))[0], student[1:]])
    yield equal("crop 0 of the student is compared with crop 1 of the teacher only",
                f(changed, only_first, tau), f(student, only_first, tau),
                otherwise="a crop must not be compared with itself: leave out the pairs s == t")
    inputs = {"student": leaf(student)}
    loss = f(*inputs.values(), teacher, tau)
    yield gradient_arrives(loss, inputs)
    args = student[:4], teacher, 0.3             # 2 local crops, another temperature
    yield as_ours("dino_loss", f(*args), *args, otherwise="this student has 4 crops, and tau is "
                  "0.3: the code must not assume other values")


def dino_loss_reference(f):
    prefix = "f64/sinkhorn/step0/"
    teacher, wanted, *crops = stored("dino_cls_loss", f"{prefix}teacher_probs",
                                     f"{prefix}loss_total", "step0/student_global",
                                     "step0/student_local")
    inputs = {f"grad_student_{kind}": leaf(x) for kind, x in zip(("global", "local"), crops)}
    loss = f(torch.cat(list(inputs.values())), teacher, 0.1)
    yield equal("the loss equals the stored output of DINOv2", loss, wanted)
    yield from gradients_as_stored("DINOv2", loss, inputs, "dino_cls_loss", prefix)


def sinkhorn_properties(f):
    n, K, temp = 12, 4, 0.25
    x, prototype = draws((n, K), K)
    x, prototype = (8 * x).round() / 8, prototype.round()     # sums with these are exact
    q = f(x, temp, 3)
    yield all_are("rows sum to 1", 1, q.sum(-1),
                  "in each iteration the columns are normalised first, then the rows")
    small = torch.tensor([[1., 2], [3, 4]])
    found = f(temp * small.log(), temp, 1).flatten()
    columns_last = small / small.sum(-1, keepdim=True)
    columns_last = columns_last / columns_last.sum(0)
    ours = solution("sinkhorn")                  # to recognise mistakes
    one_max_per_row = ours(small.div(torch.tensor([[2.], [4]])).log(), 1.0, 1)
    yield equal("one iteration with exp(logits / temp) = (1, 2), (3, 4) gives (3/7, 4/7), "
                "(9/17, 8/17)", found, torch.tensor([3 / 7, 4 / 7, 9 / 17, 8 / 17]),
                [(torch.tensor([1 / 3, 2 / 3, 3 / 7, 4 / 7]), "this is a softmax: the columns are "
                  "not normalised"),
                 (columns_last.flatten(), "the rows are normalised before the columns"),
                 (one_max_per_row.flatten(), "the largest logit of each row is subtracted; it must "
                  "be the same number for all rows"),
                 (ours(temp * small.log(), 1 / temp, 1).flatten(), "the logits are multiplied by "
                  "the temperature instead of divided"),
                 (ours(temp * small.log(), 1.0, 1).flatten(), "the temperature is not used"),
                 (ours(temp * small.log(), temp, 3).flatten(), "the argument `iterations` is not "
                  "used")])
    yield equal("logits and temperature that are both doubled give the same result",
                f(2 * x, 2 * temp, 3), q,
                otherwise="the logits are divided by the temperature, before exp")
    yield equal("adding a number to all logits of a prototype changes nothing",
                f(x + prototype, temp, 3), q,
                otherwise="the first normalisation must be that of the columns, which removes it")
    shifted = f(x + 1000, temp, 3, allow_nan=True)
    yield equal("adding 1000 to all logits changes nothing, since exp does not overflow",
                shifted, q, otherwise="exp overflows: subtract the largest logit first")
    many = f(x, temp, 200)
    yield all_are("after 200 iterations each column sums to n / K = 3: all prototypes are used "
                  "equally", n / K, many.sum(0))
    yield equal("a batch of shape (3, 4, K) is treated as 12 rows", f(x.view(3, 4, K), temp, 3),
                q.view(3, 4, K), otherwise="flatten the leading dimensions first: the columns are "
                "sums over all of them")
    result = f(leaf(x), temp, 3)
    yield Property("the result carries no gradient", not result.requires_grad,
                   "requires_grad is True" if result.requires_grad else "",
                   "the targets are constants of the student's loss: use torch.no_grad() or "
                   ".detach()")
    yield as_ours("sinkhorn", f(x, 0.1, 2), x, 0.1, 2)


def sinkhorn_reference(f):
    prefix = "f64/sinkhorn/step0/"
    for stem, what, logits in (("dino_cls_loss", "class tokens", "step0/teacher_logits"),
                               ("ibot_patch_loss", "patches", "step0/teacher_logits_masked")):
        logits, temps, wanted = stored(stem, logits, "teacher_temps", f"{prefix}teacher_probs")
        yield equal(f"the targets of the {what} equal the stored output of DINOv2",
                    f(logits, temps[0].item(), 3), wanted)


def ibot_loss_properties(f):
    M, K, tau = 6, 7, 0.1
    student, teacher = draws((M, K), (M, K))
    teacher = teacher.softmax(-1)
    # the first crop has one masked patch, the second five; two more crops have none
    weight = torch.tensor([1.0] + 5 * [0.2])
    lnK = math.log(K)
    yield equal("if 2 of 4 crops have masked patches and the student outputs 0, the loss is "
                "(1/2) ln K = 0.973", f(0 * student, teacher, weight, 4, tau), lnK / 2,
                [(lnK, "this is a plain mean over the masked patches; each patch has a weight, and "
                  "the sum is divided by n_crops"),
                 (2 * lnK, "the sum is not divided by n_crops"),
                 (1.5 * lnK, "weight is not used"),
                 (lnK / 3, "the weighted terms are averaged over the patches; they are added and "
                  "divided by n_crops"),
                 (-lnK / 2, "the sign is wrong: cross-entropy is minus the sum"),
                 (math.log(M) / 2, "the softmax is over the patches; it must be over the "
                  "prototypes"),
                 (lnK / 2 / K, "the sum over the prototypes is replaced by a mean")])
    same = torch.full((M,), 1 / M)               # one crop: the loss is a mean over its patches
    found = f(tau * teacher.log(), teacher, same, 1, tau)
    yield equal("if student and teacher agree, the loss is the entropy of the teacher", found,
                cross_entropy(teacher, teacher.log()),
                [(cross_entropy(teacher, tau * tau * teacher.log()), "the logits are multiplied by "
                  "tau instead of divided"),
                 (cross_entropy(teacher, tau * teacher.log()), "tau is not used"),
                 (cross_entropy(teacher.softmax(-1), teacher.log()), "a softmax is applied to the "
                  "teacher, which already contains probabilities"),
                 (0.0, "this is the Kullback-Leibler divergence; cross-entropy does not subtract "
                  "the entropy of the teacher")])
    values = torch.tensor([1.0] + 5 * [3.0])     # cross-entropy of each patch with class 0
    logits = torch.stack([-values.expm1().log(), 0 * values], -1) * tau
    yield equal("a crop with one masked patch (cross-entropy 1) counts as much as one with five "
                "(cross-entropy 3): the loss of these two is 2",
                f(logits, torch.tensor([1., 0]).expand(M, 2), weight, 2, tau), 2.0,
                [(8 / 3, "all patches count equally; multiply each by its weight"),
                 (8.0, "all patches count equally; multiply each by its weight")])
    found = f(student[:0], teacher[:0], weight[:0], 4, tau, allow_nan=True)
    yield equal("without masked patches the loss is 0", found, 0.0,
                otherwise="the mean of nothing is nan; add the terms, then divide by n_crops")
    inputs = {"student": leaf(student)}
    loss = f(*inputs.values(), teacher, weight, 4, tau)
    yield gradient_arrives(loss, inputs)
    args = student, teacher, weight, 5, 0.3
    yield as_ours("ibot_loss", f(*args), *args, otherwise="here n_crops is 5, and tau is 0.3: the "
                  "code must not assume other values")


def ibot_loss_reference(f):
    prefix = "f64/sinkhorn/step0/"
    student, teacher, weight, masks, wanted = stored(
        "ibot_patch_loss", "step0/student_logits_masked", f"{prefix}teacher_probs",
        "step0/masks_weight", "step0/masks", f"{prefix}loss")
    inputs = {"grad_student": leaf(student)}
    loss = f(*inputs.values(), teacher, weight, len(masks), 0.1)
    yield equal("the loss equals the stored output of DINOv2", loss, wanted)
    yield from gradients_as_stored("DINOv2", loss, inputs, "ibot_patch_loss", prefix)


class Recorder:
    """A model that keeps the arguments of its calls and returns answer(x)"""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, x, t, y=None):
        if not torch.is_tensor(t) or t.shape != x.shape[:1]:
            shape = tuple(t.shape) if torch.is_tensor(t) else type(t).__name__
            raise Problem(f"the model is called with a time of shape {shape}, but it needs one "
                          f"time per sample, {tuple(x.shape[:1])}")
        self.calls.append((x.detach().clone(), t.detach().clone(), y))
        return self.answer(x)


def flow_matching_loss_properties(f):
    x1, x0 = draws((4, 3, 2, 2), (4, 3, 2, 2))
    t, y = torch.tensor([0, 0.25, 0.5, 1]), torch.tensor([1, 7, 3, 5])
    model = Recorder(torch.zeros_like)
    of_zero = f(model, x1, x0, t, y)
    yield Property("the model is called once", len(model.calls) == 1, str(len(model.calls)))
    if not model.calls:
        return
    xt, found_t, found_y = model.calls[0]
    yield equal("the model gets the times as they are", found_t, t)
    yield Property("the model gets the classes as they are", found_y is not None
                   and torch.equal(found_y, y), hint="call model(xt, t, y)")
    s = t[:, None, None, None]
    yield equal("at t = 0 the model sees the noise x0, at t = 1 the data x1, between them a point "
                "on the line", xt, s * x1 + (1 - s) * x0,
                [(s * x0 + (1 - s) * x1, "t is reversed: xt = t x1 + (1 - t) x0")])
    v = x1 - x0

    def mse(x):
        return x.square().mean((1, 2, 3))

    yield equal("a perfect model has loss 0", f(Recorder(lambda x: v), x1, x0, t, y),
                torch.zeros(4),
                [(mse(2 * v), "the target is reversed; the velocity from noise to data is x1 - x0"),
                 (mse(v - x1), "the target is the data x1; it must be the velocity x1 - x0"),
                 (mse(v - x0), "the target is the noise x0; it must be the velocity x1 - x0")],
                "the target is the velocity x1 - x0")
    yield equal("a model that outputs 0 has the mean of (x1 - x0)^2 of each sample as its loss",
                of_zero, mse(v),
                [(12 * mse(v), "the error is summed over C, H, W; it is the mean"),
                 (v.abs().mean((1, 2, 3)), "the error must be squared"),
                 (mse(v).mean().expand(4), "all samples are averaged; there must be one value per "
                  "sample")])
    w = torch.ones(1, requires_grad=True)
    yield gradient_arrives(f(Recorder(lambda x: w * x), x1, x0, t, y), {"the model": w})
    model = Recorder(torch.sin)
    yield as_ours("flow_matching_loss", f(model, x1, x0, t, y), model, x1, x0, t, y)


def stored_dit():
    """-> the small LightningDiT of tests/golden/dit.npz, with its weights"""
    import dit
    model = dit.LightningDiT(input_size=8, patch_size=1, in_channels=16, hidden_size=64, depth=3,
                             num_heads=2, num_classes=10)
    arrays = np.load(GOLDEN / "dit.npz")
    weights = {key.removeprefix("weights/"): torch.from_numpy(arrays[key])
               for key in arrays if key.startswith("weights/")}
    model.load_state_dict(weights)
    return model.eval()


def flow_matching_loss_reference(f):
    case = "loss/case1/"
    x1, x0, t, y, wanted = stored("dit", "loss/x1", f"{case}x0", f"{case}t", "loss/y",
                                  f"{case}mse_per_sample")
    yield equal("the loss of a small LightningDiT equals its stored output",
                f(stored_dit(), x1, x0, t, y), wanted)


def euler_sampler_properties(f):
    x, x1 = draws((2, 3, 2, 2), (2, 3, 2, 2))
    model = Recorder(torch.zeros_like)
    f(model, x, torch.tensor([0, 0.1, 0.5, 1]))
    times = torch.tensor([call[1][0] for call in model.calls])
    yield equal("for the grid 0, 0.1, 0.5, 1 the velocity is computed at 0, 0.1, 0.5", times,
                torch.tensor([0, 0.1, 0.5]),
                [(torch.tensor([0.1, 0.5, 1]), "the velocity is computed at the end of each step; "
                  "Euler's method uses its beginning"),
                 (torch.tensor([0, 0.1, 0.5, 1]), "there is one step too many: a grid of P times "
                  "has P - 1 steps"),
                 (torch.tensor([1, 0.5, 0.1]), "the steps go from data to noise; t = 0 is noise"),
                 (torch.arange(3) / 3, "the steps are equally long; use the given grid")])
    shift = (f(Recorder(torch.ones_like), x, torch.tensor([0.2, 0.3, 0.8])) - x).mean()
    yield equal("with velocity 1, x grows by grid[-1] - grid[0] = 0.6 on the grid 0.2, 0.3, 0.8",
                shift, 0.6,
                [(-0.6, "the step is subtracted; the velocity points from noise to data"),
                 (2.0, "the velocity is not multiplied by the step size"),
                 (1.0, "the step size is 1 / (number of steps); it is the difference of two times "
                  "of the grid"),
                 (2 / 3, "the step size is 1 / (number of times); it is the difference of two "
                  "times of the grid"),
                 (0.5, "the step size is the time; it is the difference of two times of the grid"),
                 (0.1, "the last step is missing"), (0.0, "x does not change")])
    factor = (f(Recorder(lambda x: x), x, torch.tensor([0, 0.5, 1])) / x).mean()
    yield equal("with velocity x and two steps of 0.5, x grows by the factor 1.5^2 = 2.25",
                factor, 2.25,
                [(2.0, "the velocity is computed for the initial x; use the x of the previous "
                  "step"),
                 (1.625 ** 2, "this is a Heun or midpoint step, not an Euler step")])

    def straight(x, t):
        return (x1 - x) / (1 - t[:, None, None, None])

    yield equal("on straight lines to x1, velocity (x1 - x) / (1 - t), it ends exactly at x1",
                f(straight, x, torch.tensor([0, 0.1, 0.5, 1])), x1)
    w = torch.ones(1, requires_grad=True)
    recorded = []                                # one entry per step

    def velocity(x, t):
        recorded.append((w * x).requires_grad)
        return w * x

    f(velocity, x, torch.tensor([0, 0.5, 1]))
    yield Property("no gradient is recorded", not any(recorded),
                   "the velocity has requires_grad=True" if any(recorded) else "",
                   "without torch.no_grad() the memory grows with each step; write "
                   "@torch.no_grad() above the function")
    model, grid = Recorder(torch.sin), torch.tensor([0, 0.2, 0.3, 0.9])
    yield as_ours("euler_sampler", f(model, x, grid), model, x, grid)


def euler_sampler_reference(f):
    model = stored_dit()
    grid, x, y, wanted = stored("dit", "grid/points11_shift0.3", "ode/z", "ode/y",
                                "ode/euler_shift0.3_points11/final")
    yield equal("10 steps with a small LightningDiT end at its stored samples",
                f(lambda x, t: model(x, t, y), x, grid), wanted)


def guidance_properties(f):
    c, u = draws((3, 5, 2, 2), (3, 5, 2, 2))
    late = torch.full((3,), 0.9)

    def guide(scale, channels=None):
        return f(c, u, scale, late, 0.0, channels)

    off_by_one = "this is Ho & Salimans' formula with w = scale; here scale = 1 + w"
    yield equal("scale 1 gives the conditional velocity", guide(1.0), c,
                [(2 * c - u, off_by_one), (u, "cond and uncond are exchanged"),
                 (2 * u - c, "cond and uncond are exchanged"),
                 (c + u, "the velocity for \"no class\" is added, not subtracted: uncond + scale * "
                  "(cond - uncond)"),
                 (c - u, "uncond is missing: uncond + scale * (cond - uncond)")])
    yield equal("scale 0 gives the velocity for \"no class\"", guide(0.0), u,
                [(c, "samples with t >= start get cond; only those with t < start should")])
    yield equal("scale 3 lies in the middle between scale 1 and scale 5", guide(3.0),
                (guide(1.0) + guide(5.0)) / 2, otherwise="the result must be linear in scale")
    t = torch.tensor([0.1, 0.25, 0.5])           # start = 0.25: the first sample is not guided
    guided = u + 4 * (c - u)
    yield equal("of samples with t = 0.1, 0.25, 0.5 and start = 0.25, the first one gets cond, the "
                "others are guided", f(c, u, 4.0, t, 0.25, None), torch.cat([c[:1], guided[1:]]),
                [(guided, "start is not used"),
                 (torch.cat([guided[:1], c[1:]]), "the condition is reversed: t < start gets cond"),
                 (torch.cat([c[:2], guided[2:]]), "t equal to start is guided: the condition is "
                  "t < start, not <="),
                 (torch.cat([u[:1], guided[1:]]), "samples with t < start get cond, not uncond")])
    yield equal("with channels = 3, the other two channels of five get cond", guide(4.0, 3),
                torch.cat([guided[:, :3], c[:, 3:]], 1),
                [(guided, "channels is not used"),
                 (torch.cat([guided[:, :3], u[:, 3:]], 1), "the other channels get cond, not "
                  "uncond"),
                 (torch.cat([c[:, :3], guided[:, 3:]], 1), "the first `channels` channels are "
                  "guided, not the others")])
    yield as_ours("guidance", f(c, u, 2.5, t, 0.3, 2), c, u, 2.5, t, 0.3, 2)


def guidance_reference(f):
    model = stored_dit()
    for case in range(3):
        t, scale, on, start, wanted = stored("dit", *(f"cfg/case{case}/{key}" for key in (
            "t", "scale", "interval_on", "interval_start", "out")))
        x, y = stored("dit", "cfg/x", "cfg/y")
        half = x.chunk(2)[0]
        with torch.no_grad():
            cond, uncond = model(torch.cat([half, half]), t.expand(4), y).chunk(2)
        found = f(cond, uncond, scale.item(), t.expand(2), start.item() if on else 0.0, 3)
        yield equal(f"case {case + 1} of 3 equals the stored output of LightningDiT", found,
                    wanted.chunk(2)[0])


def roots(matrices):
    """Symmetric square roots of covariances, to recognise a mistake"""
    for matrix in matrices:
        values, vectors = torch.linalg.eigh(matrix)
        yield vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_distance_properties(f):
    mu, a, b = [x.double() for x in draws(4, (9, 4), (9, 4))]
    cov = a.T @ a / 8
    zero = torch.zeros(2, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    yield equal("a distribution has distance 0 to itself", f(mu, cov, mu, cov), 0.0,
                [(2 * cov.trace(), "the term with the square root is missing"),
                 (cov.trace(), "the factor 2 of the square root is missing")])
    yield equal("means that are (3, 4) apart, with equal covariances, have distance 25",
                f(zero, eye, torch.tensor([3., 4]).double(), eye), 25.0,
                [(5.0, "the length of the difference of the means is not squared"),
                 (12.5, "the squared difference of the means is averaged; it is the sum"),
                 (7.0, "the difference of the means is not squared")])
    yield equal("variances 1 and 9 in one dimension have distance (1 - 3)^2 = 4",
                f(zero[:1], eye[:1, :1], zero[:1], 9 * eye[:1, :1]), 4.0,
                [(7.0, "the factor 2 of the square root is missing"),
                 (-8.0, "the square root is missing"), (64.0, "the square root is missing")])
    s1, s2 = torch.tensor([[2., 1], [1, 2]]).double(), torch.tensor([1., 4]).double().diag()
    r1, r2 = roots([s1, s2])
    yield equal("covariances ((2, 1), (1, 2)) and ((1, 0), (0, 4)) have distance 0.7712",
                f(zero, s1, zero, s2), 9 - 2 * (10 + 2 * 12 ** 0.5) ** 0.5,
                [(9 - 2 * (s1 @ s2).sqrt().trace(), "the root of each entry is taken; a matrix "
                  "root (or the eigenvalues) is needed"),
                 (9 - 2 * (r1 @ r2).trace(), "the roots of S1 and S2 are multiplied; the root of "
                  "the product S1 S2 differs, unless S1 S2 = S2 S1")])
    cov2 = b.T @ b / 8
    yield equal("exchanging the two distributions does not change the distance",
                f(0 * mu, cov2, mu, cov), f(mu, cov, 0 * mu, cov2))
    a, b = a[0], b[0]
    found = f(mu, a.outer(a), mu, b.outer(b), allow_nan=True)
    yield equal("covariances a a^T and b b^T, which have rank 1, have distance |a|^2 + |b|^2 - "
                "2 |a . b|", found, a @ a + b @ b - 2 * (a @ b).abs(),
                otherwise="rounding makes eigenvalues slightly negative, and their root is nan; "
                "replace negative ones by 0")
    yield as_ours("frechet_distance", f(0 * mu, cov2, mu, cov), 0 * mu, cov2, mu, cov)


def frechet_distance_reference(f):
    arrays = np.load(GOLDEN / "fid.npz")         # float64 stays, unlike in stored()
    names = [f"dim8/{name}" for name in ("mu1", "sigma1", "mu2", "sigma2", "distance")]
    *gaussians, wanted = [torch.from_numpy(arrays[name]) for name in names]
    yield equal("the distance of two sets of features equals the stored output of pytorch-fid",
                f(*gaussians), wanted)


def tokens_equal(statement, f, parts, pair, wanted, mistakes=(), otherwise=""):
    """The property that f(parts, pair) is `wanted`. All three are texts with a space between
    tokens."""
    found = f(parts.split(), tuple(pair.split()))
    text = " ".join(found) if found else "an empty list"
    if found == wanted.split():
        return Property(statement, True, text)
    cause = dict(mistakes).get(" ".join(found), "")
    return Property(statement, False, f"{text} instead of {wanted}", otherwise, cause)


def bpe_merge_properties(f):
    yield tokens_equal("l o w e r with the pair (l, o) becomes lo w e r", f, "l o w e r", "l o",
                       "lo w e r",
                       [("l o w e r", "the pair is not joined"), ("w e r", "the joined token is "
                         "missing"), ("lo o w e r", "the second token of the pair stays in the "
                                      "list")])
    yield tokens_equal("a word without the pair stays as it is: a c b with (a, b)", f, "a c b",
                       "a b", "a c b", [("a c", "the last token is lost"),
                                        ("ab c", "the two tokens must be neighbours")])
    yield tokens_equal("every occurrence is joined: a b c a b with (a, b) becomes ab c ab", f,
                       "a b c a b", "a b", "ab c ab",
                       [("ab c a b", "only the first occurrence is joined"),
                        ("ab c a", "the last token is lost")])
    yield tokens_equal("the order of the pair matters: b a with (a, b) stays b a", f, "b a", "a b",
                       "b a")
    yield tokens_equal("a token takes part in one merge at most: a a a with (a, a) becomes aa a",
                       f, "a a a", "a a", "aa a",
                       [("aa aa", "after a merge, go on behind both tokens"),
                        ("a aa", "read from left to right"),
                        ("aaa", "a token that was just joined does not match again"),
                        ("aa", "the last token is lost")])
    yield tokens_equal("only whole tokens match: ab c with (b, c) stays ab c", f, "ab c", "b c",
                       "ab c", otherwise="compare tokens, not parts of the text")
    found = f([], ("a", "b"))
    yield Property("an empty word stays empty", found == [], f"{found}")
    yield tokens_equal("with other inputs, the result is that of the project's own function", f,
                       "a b b a a b c a b", "a b", " ".join(
                           solution("bpe_merge")("a b b a a b c a b".split(), ("a", "b"))))


def bpe_merge_reference(f):
    import tokenizer
    cases = json.loads((GOLDEN / "bpe.json").read_text())

    def join(parts, pair):
        joined = f(parts, pair)
        # otherwise the tokenizer would not end, or would not know a token
        if len(joined) >= len(parts) or set(joined) - {*parts, "".join(pair)}:
            raise Problem(f"joining {pair} in {parts} gives {joined}")
        return joined

    right = 0
    with mock.patch("tokenizer.join", join):
        for case in cases:
            ids = []
            for word in tokenizer.WORD.findall(tokenizer.clean(case["text"])):
                ids += tokenizer.merge.__wrapped__(word)   # without the cache
            right += ids == case["encode"]
    yield Property("a tokenizer with your merge gives the stored ids of VTP's tokenizer",
                   right == len(cases), f"{right} of {len(cases)} texts")


# ---------------------------------------------------------------- table
def qknorm_adapter(forward, q, k, v, q_weight, k_weight, rotate):
    """What vit.Attention.forward computes between its two linear layers"""
    q = rotate(vit.rms_norm(q, q_weight, 1e-5))
    k = rotate(vit.rms_norm(k, k_weight, 1e-5))
    return vit.attention(q, k, v)


def flow_adapter(flow_loss, *args):
    return flow_loss(*args)[0]                   # without the cosine term


def guidance_adapter(forward_with_cfg, cond, uncond, scale, t, start, channels):
    """The method calls its model once, for both halves of a doubled batch; cond is the first."""
    both = torch.cat([cond, uncond])
    guided = forward_with_cfg(lambda *_: both, both, torch.cat([t, t]), None, scale, True, start,
                              channels)
    return guided.chunk(2)[0]


@dataclass
class Exercise:
    properties: Callable                         # student's function -> properties
    reference: Callable                          # student's function -> comparisons
    convert: Callable                            # check of a result, see Student
    solution: str                                # the project's own function, "module:name"
    adapter: Callable | None = None              # (own function, *arguments of the stub) -> result


LIKE_FIRST = partial(as_tensor, like_first)
NUMBER = partial(as_tensor, number)
EXERCISES = {
    "rope_rotation": Exercise(rope_rotation_properties, rope_rotation_reference, LIKE_FIRST,
                              "vtp_min.vit:rotate"),
    "qknorm_attention": Exercise(qknorm_attention_properties, qknorm_attention_reference,
                                 LIKE_FIRST, "vtp_min.vit:Attention.forward", qknorm_adapter),
    "clip_loss": Exercise(clip_loss_properties, clip_loss_reference, NUMBER,
                          "vtp_min.losses:clip_loss"),
    "dino_loss": Exercise(dino_loss_properties, dino_loss_reference, NUMBER,
                          "vtp_min.losses:dino_loss"),
    "sinkhorn": Exercise(sinkhorn_properties, sinkhorn_reference, LIKE_FIRST,
                         "vtp_min.losses:sinkhorn"),
    "ibot_loss": Exercise(ibot_loss_properties, ibot_loss_reference, NUMBER,
                          "vtp_min.losses:ibot_loss"),
    "flow_matching_loss": Exercise(flow_matching_loss_properties, flow_matching_loss_reference,
                                   partial(as_tensor, lambda args: (len(args[1]),)),
                                   "dit:flow_loss", flow_adapter),
    "euler_sampler": Exercise(euler_sampler_properties, euler_sampler_reference,
                              partial(as_tensor, lambda args: tuple(args[1].shape)), "dit:euler"),
    "guidance": Exercise(guidance_properties, guidance_reference, LIKE_FIRST,
                         "dit:LightningDiT.forward_with_cfg", guidance_adapter),
    "frechet_distance": Exercise(frechet_distance_properties, frechet_distance_reference,
                                 as_number, "vtp_min.fid:frechet_distance"),
    "bpe_merge": Exercise(bpe_merge_properties, bpe_merge_reference, as_tokens, "tokenizer:join"),
}


def solution(name):
    """-> the project's own function, with the arguments of the stub"""
    module, function = EXERCISES[name].solution.split(":")
    found = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    adapter = EXERCISES[name].adapter
    return partial(adapter, found) if adapter else found


def time_and_question(name):
    """-> minutes, question. Both are at the end of the stub's docstring, which a student may have
    deleted."""
    path = FOLDER / f"{name}.py"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    minutes = re.search(r"^ *Time: (\d+) minutes$", text, re.M)
    question = re.search(r'^ *Question: (.*?)\s*"""', text, re.M | re.S)
    return (minutes[1] if minutes else "?",
            " ".join(question[1].split()) if question else "")


# ---------------------------------------------------------------- report
def check(name, student):
    """Check a function -> lines of the report, state: "done", "not begun" or "fails at ..."

    The comparison with the reference follows only if all properties hold.
    """
    exercise = EXERCISES[name]
    lines, failed, k = [], [], 0
    explained = None                             # "Hint" or "Likely cause", once it was printed
    try:
        for section in (exercise.properties, exercise.reference):
            for k, found in enumerate(section(student), k + 1):
                answer = "yes" if found.holds else "no"
                measured = f", {found.measured}" if found.measured else ""
                lines.append(f"{k:2d}. {found.statement}: {answer}{measured}")
                if found.holds:
                    continue
                failed.append(k)
                # One cause and one hint at most: a mistake makes several properties fail.
                if found.cause and explained != "Likely cause":
                    explained = "Likely cause"
                    lines.append(f"    Likely cause: {found.cause}.")
                elif found.hint and not explained:
                    explained = "Hint"
                    lines.append(f"    Hint: {found.hint}.")
            if failed:
                if section is exercise.properties:
                    lines.append("The reference tensors are compared when all properties hold.")
                break
    except NotBegun:
        return lines, "not begun"
    except Problem as problem:
        lines.append(f"{k + 1:2d}. cannot be checked, nor what follows: {problem}")
        failed.append(k + 1)
    state = f"fails at property {failed[0]}" if failed else "done"
    return lines, state


def check_file(name, file):
    """-> lines of the report, state"""
    try:
        function = load(name, file)
        student = Student(function, EXERCISES[name].convert, file)
    except Problem as problem:
        return [str(problem)], "cannot be loaded"
    return check(name, student)


def report(name, file):
    """Check one file and print the report -> exit status"""
    lines, state = check_file(name, file)
    print(f"{name} in {shown(file)}", *lines, f"{name}: {state}", sep="\n")
    if state == "not begun":
        print(f"Replace `raise NotImplementedError` in {shown(file)} by your code.")
    if state != "done":
        return 1
    module, function = EXERCISES[name].solution.split(":")
    print(f"The project's own version: {function} in {module.replace('.', '/')}.py")
    print(f"Question: {time_and_question(name)[1]}")
    return 0


def shown(file):
    """A path as text, relative to the current folder if it is below it"""
    file = file.resolve()
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def list_all():
    """Print one line per exercise -> exit status"""
    states = []
    print(f"{'exercise':20}minutes  {'state':22}file")
    for name in EXERCISES:
        file = FOLDER / f"{name}.py"
        with contextlib.redirect_stdout(io.StringIO()):    # what the student's code prints
            states.append(check_file(name, file)[1])
        print(f"{name:20}{time_and_question(name)[0]:>7}  {states[-1]:22}{shown(file)}", flush=True)
    done = states.count("done")
    print(f"{done} of {len(states)} done. Next: python study/exercise.py NAME")
    return int(done < len(states))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="python study/exercise.py",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=EXERCISES, metavar="NAME",
                        help=f"one of {', '.join(EXERCISES)}")
    parser.add_argument("--file", type=Path, help="file with the function, if it is not "
                        "study/exercises/NAME.py")
    args = parser.parse_args(words)
    if args.name is None:
        if args.file:
            parser.error("--file needs the name of an exercise: python study/exercise.py NAME "
                         "--file FILE")
        return list_all()
    return report(args.name, args.file or FOLDER / f"{args.name}.py")


if __name__ == "__main__":
    sys.exit(main())
