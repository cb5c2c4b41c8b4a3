"""The exercises: the project's own functions pass their checks, the stubs are not begun, and wrong
solutions are explained in words."""
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "study"))
import exercise                                                            # noqa: E402
from exercise import EXERCISES, FOLDER                                     # noqa: E402
from vtp_min.vit import rms_norm                                           # noqa: E402

ALL = pytest.mark.parametrize("name", EXERCISES)


def check(name, function):
    """-> report as text, state"""
    lines, state = exercise.check(name, exercise.Student(function, EXERCISES[name].convert))
    return "\n".join(lines), state


def stub_file(name):
    """-> text of a stub. In a class, the files in study/exercises contain solutions."""
    text = (FOLDER / f"{name}.py").read_text()
    docstring_end = text.rindex('"""') + 3
    return text[:docstring_end] + "\n    raise NotImplementedError\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """-> function that checks code, the content of a file -> exit status, printed text"""
    monkeypatch.chdir(tmp_path)

    def check_code(name, code):
        Path("mine.py").write_text(code)
        status = exercise.main([name, "--file", "mine.py"])
        return status, capsys.readouterr().out
    return check_code


# ---------------------------------------------------------------- right solutions and stubs
@ALL
def test_the_projects_own_function_passes(name):
    text, state = check(name, exercise.solution(name))
    assert state == "done", text
    assert ": no" not in text


@ALL
def test_a_stub_is_not_begun_and_its_docstring_is_complete(name, run):
    status, text = run(name, stub_file(name))
    assert status == 1
    assert text.splitlines()[1] == f"{name}: not begun"
    minutes, question = exercise.time_and_question(name)
    assert minutes.isdigit() and "?" in question
    assert "Source:" in stub_file(name) and "    returns  " in stub_file(name)


@ALL
def test_a_file_with_a_solution_passes_and_shows_the_question(name, run):
    status, text = run(name, f"import exercise\n{name} = exercise.solution('{name}')\n")
    assert status == 0
    assert f"\n{name}: done\n" in text
    assert text.endswith(f"Question: {exercise.time_and_question(name)[1]}\n")


def test_the_readme_lists_every_exercise_with_its_minutes():
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.py\) \|.*?\| (\d+) \|", text, re.M)
    assert [row[0] for row in rows] == list(EXERCISES)
    for name, file, minutes in rows:
        assert file == name and minutes == exercise.time_and_question(name)[0]
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(EXERCISES)


def test_the_list_shows_the_state_of_every_exercise(tmp_path, monkeypatch, capsys):
    for name in EXERCISES:
        (tmp_path / f"{name}.py").write_text(stub_file(name))
    (tmp_path / "guidance.py").write_text("def guidance(c, u, scale, t, start, channels):\n"
                                          "    print('called')\n"
                                          "    return u + scale * (c - u)\n")
    (tmp_path / "clip_loss.py").write_text("def clip_loss(:\n")
    (tmp_path / "sinkhorn.py").write_text("import exercise\n"
                                          "sinkhorn = exercise.solution('sinkhorn')\n")
    monkeypatch.setattr(exercise, "FOLDER", tmp_path)
    assert exercise.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    state = {line.split()[0]: line[29:51].strip() for line in lines[1:-1]}
    assert list(state) == list(EXERCISES)
    assert state["guidance"] == "fails at property 4"
    assert state["clip_loss"] == "cannot be loaded"
    assert state["sinkhorn"] == "done"
    assert "called" not in "".join(lines)
    assert lines[-1] == "1 of 11 done. Next: python study/exercise.py NAME"


# ---------------------------------------------------------------- three reports, word by word
def test_clip_loss_with_one_direction(run):
    status, text = run("clip_loss", """
import torch
import torch.nn.functional as F

def clip_loss(img, txt, scale):
    logits = scale * img @ txt.T
    return F.cross_entropy(logits, torch.arange(len(img)))
""")
    assert status == 1
    assert text == """\
clip_loss in mine.py
 1. if each image equals its caption and is orthogonal to the others, the loss is \
ln(1 + (B - 1) exp(-scale)) = 0.02001 for B = 4, scale = 5: yes, 0.02001
 2. with scale 0 all captions are equally likely, and the loss is ln B = 1.792: yes, 1.792
 3. exchanging images and captions does not change the loss: no, 3.804 instead of 3.15
    Likely cause: only the caption of each image is looked for; the loss is the mean of both \
directions.
 4. the order of the pairs does not matter: yes, 3.15
 5. embeddings that are twice as long have the loss of a scale that is 4 times as large: yes, 11.19
 6. a gradient arrives at img, txt, scale: yes
 7. with random inputs, the result is that of the project's own function: no, 3.15 instead of 3.477
The reference tensors are compared when all properties hold.
clip_loss: fails at property 3
"""


def test_sinkhorn_with_rows_before_columns(run):
    status, text = run("sinkhorn", """
import torch

@torch.no_grad()
def sinkhorn(logits, temp, iterations):
    q = torch.exp((logits - logits.max()) / temp).flatten(0, -2)
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(0)
    return q.view_as(logits)
""")
    assert status == 1
    assert text == """\
sinkhorn in mine.py
 1. rows sum to 1: no, 0.306 to 0.348
    Hint: in each iteration the columns are normalised first, then the rows.
 2. one iteration with exp(logits / temp) = (1, 2), (3, 4) gives (3/7, 4/7), (9/17, 8/17): no, \
(0.4375, 0.5385, 0.5625, 0.4615) instead of (0.4286, 0.5714, 0.5294, 0.4706)
    Likely cause: the rows are normalised before the columns.
 3. logits and temperature that are both doubled give the same result: yes
 4. adding a number to all logits of a prototype changes nothing: no, it differs by up to 0.33, \
where values are up to 0.33
 5. adding 1000 to all logits changes nothing, since exp does not overflow: yes
 6. after 200 iterations each column sums to n / K = 3: all prototypes are used equally: no, 1
 7. a batch of shape (3, 4, K) is treated as 12 rows: yes
 8. the result carries no gradient: yes
 9. with random inputs, the result is that of the project's own function: no, it differs by up \
to 0.88, where values are up to 1
The reference tensors are compared when all properties hold.
sinkhorn: fails at property 1
"""


def test_guidance_with_the_formula_of_ho_and_salimans(run):
    status, text = run("guidance", """
import torch

def guidance(cond, uncond, scale, t, start, channels):
    guided = (1 + scale) * cond - scale * uncond
    guided = torch.where((t < start)[:, None, None, None], cond, guided)
    n = cond.shape[1] if channels is None else channels
    return torch.cat([guided[:, :n], cond[:, n:]], dim=1)
""")
    assert status == 1
    assert text == """\
guidance in mine.py
 1. scale 1 gives the conditional velocity: no, it differs by up to 4.3, where values are up to 2.1
    Likely cause: this is Ho & Salimans' formula with w = scale; here scale = 1 + w.
 2. scale 0 gives the velocity for "no class": no, it differs by up to 4.3, where values are up \
to 2.7
 3. scale 3 lies in the middle between scale 1 and scale 5: yes
 4. of samples with t = 0.1, 0.25, 0.5 and start = 0.25, the first one gets cond, the others are \
guided: no, it differs by up to 4.3, where values are up to 15
 5. with channels = 3, the other two channels of five get cond: no, it differs by up to 2.1, \
where values are up to 8.5
 6. with random inputs, the result is that of the project's own function: no, it differs by up \
to 1.6, where values are up to 4
The reference tensors are compared when all properties hold.
guidance: fails at property 1
"""


# ---------------------------------------------------------------- other wrong solutions
def rope_of_neighbours(x, sin, cos):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return x * cos + turned * sin


def rope_backwards(x, sin, cos):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, -a], dim=-1) * sin


def qknorm(q, k, v, q_weight, k_weight, rotate, dim=-1, factor=0.5, l2=False):
    """Right for c = 4 by default. dim: of the softmax; l2: divide by the length instead"""
    if l2:
        q, k = F.normalize(q, dim=-1) * q_weight, F.normalize(k, dim=-1) * k_weight
    else:
        q, k = rms_norm(q, q_weight, 1e-5), rms_norm(k, k_weight, 1e-5)
    return (factor * rotate(q) @ rotate(k).transpose(-1, -2)).softmax(dim) @ v


def softmax_over_queries(*args):
    return qknorm(*args, dim=-2)


def no_division_by_root_c(*args):
    return qknorm(*args, factor=1)


def length_instead_of_rms(*args):
    return qknorm(*args, l2=True)


def layer_norm(q, k, v, q_weight, k_weight, rotate):
    q, k = F.layer_norm(q, (4,), q_weight), F.layer_norm(k, (4,), k_weight)
    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


def norm_without_epsilon(q, k, v, q_weight, k_weight, rotate):
    q, k = rms_norm(q, q_weight, 0), rms_norm(k, k_weight, 0)
    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


def no_norm(q, k, v, q_weight, k_weight, rotate):
    return F.scaled_dot_product_attention(rotate(q * q_weight), rotate(k * k_weight), v)


def rotated_before_the_norm(q, k, v, q_weight, k_weight, rotate):
    return qknorm(rotate(q), rotate(k), v, q_weight, k_weight, lambda x: x)


def values_rotated_too(q, k, v, q_weight, k_weight, rotate):
    return qknorm(q, k, rotate(v), q_weight, k_weight, rotate)


def clip(img, txt, scale, reduction="mean"):
    logits = scale * img @ txt.T
    labels = torch.arange(len(img))
    return (F.cross_entropy(logits, labels, reduction=reduction)
            + F.cross_entropy(logits.T, labels, reduction=reduction)) / 2


def clip_divided_by_scale(img, txt, scale):
    return clip(img, txt, 1 / scale)


def clip_sum_over_the_batch(img, txt, scale):
    return clip(img, txt, scale, reduction="sum")


def clip_without_gradient_of_texts(img, txt, scale):
    return clip(img, txt.detach(), scale)


def clip_that_normalises(img, txt, scale):
    return clip(F.normalize(img, dim=-1), F.normalize(txt, dim=-1), scale)


def dino_with_a_fixed_temperature(student, teacher, tau):
    return exercise.solution("dino_loss")(student, teacher, 0.1)


def dino_with_ten_pairs(student, teacher, tau):
    pairs = [-(teacher[t] * (student[s] / tau).log_softmax(-1)).sum(-1).mean()
             for t in range(2) for s in range(len(student)) if s != t]
    return sum(pairs) / 10


def dino_with_equal_crops(student, teacher, tau):
    log_p = (student / tau).log_softmax(-1)
    return -(teacher[:, None] * log_p).sum(-1).mean()


def dino_times_tau(student, teacher, tau):
    return exercise.solution("dino_loss")(student * tau, teacher, 1.0)


def dino_sum_of_pairs(student, teacher, tau):
    return 10 * exercise.solution("dino_loss")(student, teacher, tau)


def sinkhorn_with_gradient(logits, temp, iterations):
    q = torch.exp((logits - logits.max()) / temp).flatten(0, -2)
    for _ in range(iterations):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q.view_as(logits)


def sinkhorn_that_overflows(logits, temp, iterations):
    return sinkhorn_with_gradient(logits + 0 * (logits.exp() / temp), temp, iterations)


def softmax_instead_of_sinkhorn(logits, temp, iterations):
    return (logits / temp).softmax(-1).detach()


def ibot_plain_mean(student, teacher, weight, n_crops, tau):
    return F.cross_entropy(student / tau, teacher)


def ibot_with_a_fixed_temperature(student, teacher, weight, n_crops, tau):
    return exercise.solution("ibot_loss")(student, teacher, weight, n_crops, 0.1)


def ibot_mean_instead_of_sum(student, teacher, weight, n_crops, tau):
    entropies = F.cross_entropy(student / tau, teacher, reduction="none")
    return (entropies * weight).mean() * max(len(weight), 1) / n_crops


def flow(model, x1, x0, t, y, target=None):
    s = t[:, None, None, None]
    target = x1 - x0 if target is None else target
    return (model(s * x1 + (1 - s) * x0, t, y) - target).square().mean((1, 2, 3))


def flow_with_reversed_time(model, x1, x0, t, y):
    return flow(model, x0, x1, t, y, target=x1 - x0)


def flow_with_reversed_target(model, x1, x0, t, y):
    return flow(model, x1, x0, t, y, target=x0 - x1)


def flow_of_the_whole_batch(model, x1, x0, t, y):
    return flow(model, x1, x0, t, y).mean()


def flow_without_gradient(model, x1, x0, t, y):
    with torch.no_grad():
        return flow(model, x1, x0, t, y)


def flow_with_one_time(model, x1, x0, t, y):
    return flow(lambda xt, t, y: model(xt, t[0], y), x1, x0, t, y)


def euler(velocity, x, grid, at=0, step=None):
    """Right by default. at: 0 or 1, the beginning or end of a step; step: None or its size"""
    with torch.no_grad():
        for i in range(len(grid) - 1):
            dt = grid[i + 1] - grid[i] if step is None else step
            x = x + dt * velocity(x, grid[i + at].expand(len(x)))
    return x


def euler_at_the_end(velocity, x, grid):
    return euler(velocity, x, grid, at=1)


def euler_with_equal_steps(velocity, x, grid):
    return euler(velocity, x, grid, step=1 / (len(grid) - 1))


def euler_that_detaches_at_the_end(velocity, x, grid):
    for t, dt in zip(grid[:-1], grid.diff()):
        x = x + dt * velocity(x, t.expand(len(x)))
    return x.detach()


def sinkhorn_in_float64(logits, temp, iterations):
    q = (logits.double() / temp).exp().flatten(0, -2)
    for _ in range(iterations):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q.view_as(logits).float().detach()


def heun(velocity, x, grid):
    with torch.no_grad():
        for t, dt in zip(grid[:-1], grid.diff()):
            v = velocity(x, t.expand(len(x)))
            x = x + dt * (v + velocity(x + dt * v, (t + dt).expand(len(x)))) / 2
    return x


def guidance_with_reversed_interval(cond, uncond, scale, t, start, channels):
    guided = uncond + scale * (cond - uncond)
    return torch.where((t < start)[:, None, None, None], guided, cond)


def frechet(mu1, cov1, mu2, cov2, trace_of_root):
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace()
    return distance - 2 * trace_of_root(cov1, cov2)


def frechet_with_root_of_each_entry(*args):
    return frechet(*args, lambda a, b: (a @ b).sqrt().trace().nan_to_num())


def frechet_with_product_of_roots(*args):
    def root(cov):
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T
    return frechet(*args, lambda a, b: (root(a) @ root(b)).trace())


def frechet_without_clamping(*args):
    return frechet(*args, lambda a, b: torch.linalg.eigvals(a @ b).real.sub(1e-15).sqrt().sum())


def frechet_complex(*args):
    return frechet(*args, lambda a, b: torch.linalg.eigvals(a @ b).sqrt().sum())


def merge_the_text(parts, pair):
    return " ".join(parts).replace(" ".join(pair), "".join(pair)).split()


def merge_once(parts, pair):
    for i in range(len(parts) - 1):
        if (parts[i], parts[i + 1]) == pair:
            return parts[:i] + ["".join(pair)] + parts[i + 2:]
    return parts


def merge_in_place(parts, pair):
    for i in range(len(parts) - 1):
        if tuple(parts[i:i + 2]) == pair:
            parts[i:i + 2] = ["".join(pair)]
    return parts


WRONG = [
    ("rope_rotation", rope_of_neighbours, "the pairs are neighbouring channels 2i, 2i + 1"),
    ("rope_rotation", rope_backwards, "no, (3, 2, -1, 4) instead of (-3, 2, 1, 4)"),
    ("qknorm_attention", softmax_over_queries, "the softmax is over the queries"),
    ("qknorm_attention", no_division_by_root_c, "no, 1 instead of 0.5"),
    ("qknorm_attention", length_instead_of_rms, "q and k are divided by their length"),
    ("qknorm_attention", layer_norm, "this is LayerNorm, which subtracts the mean first"),
    ("qknorm_attention", norm_without_epsilon, "0 is divided by 0; add 0.00001"),
    ("qknorm_attention", no_norm, "normalise queries and keys over their channels"),
    ("qknorm_attention", rotated_before_the_norm, "call rotate for q and for k, after"),
    ("qknorm_attention", values_rotated_too, "rotate is applied to v, too"),
    ("clip_loss", clip_divided_by_scale, "the logits are divided by scale"),
    ("clip_loss", clip_sum_over_the_batch, "the loss is summed over the batch; it is the mean"),
    ("clip_loss", clip_without_gradient_of_texts, "arrives at img, txt, scale: no, none at txt"),
    ("clip_loss", clip_that_normalises, "the embeddings are normalised again"),
    ("dino_loss", dino_with_a_fixed_temperature, "the code must not assume other values"),
    ("dino_loss", dino_with_ten_pairs, "the code must not assume other values"),
    ("dino_loss", dino_with_equal_crops, "the pairs of a crop with itself are included"),
    ("dino_loss", dino_times_tau, "the logits are multiplied by tau instead of divided"),
    ("dino_loss", dino_sum_of_pairs, "no, 39 instead of 3.9"),
    ("sinkhorn", sinkhorn_with_gradient, "the targets are constants of the student's loss"),
    ("sinkhorn", sinkhorn_that_overflows, "exp overflows: subtract the largest"),
    ("sinkhorn", softmax_instead_of_sinkhorn, "this is a softmax: the columns are not normalised"),
    ("ibot_loss", ibot_plain_mean, "this is a plain mean over the masked patches"),
    ("ibot_loss", ibot_with_a_fixed_temperature, "the code must not assume other values"),
    ("ibot_loss", ibot_mean_instead_of_sum, "no, nan instead of 0"),
    ("flow_matching_loss", flow_with_reversed_time, "t is reversed: xt = t x1 + (1 - t) x0"),
    ("flow_matching_loss", flow_with_reversed_target, "the target is reversed"),
    ("flow_matching_loss", flow_of_the_whole_batch, "a tensor of shape (), but a torch tensor of "
     "shape (4,) is wanted"),
    ("flow_matching_loss", flow_without_gradient, "no, the result has no gradient at all"),
    ("flow_matching_loss", flow_with_one_time, "called with a time of shape (), but it needs one"),
    ("euler_sampler", euler_at_the_end, "no, (0.1, 0.5, 1) instead of (0, 0.1, 0.5)"),
    ("euler_sampler", euler_with_equal_steps, "the step size is 1 / (number of steps)"),
    ("euler_sampler", euler_that_detaches_at_the_end, "the velocity has requires_grad=True"),
    ("sinkhorn", sinkhorn_in_float64, "exp overflows: subtract the largest"),
    ("euler_sampler", heun, "no, (0, 0.1, 0.1, 0.5, 0.5, 1) instead of (0, 0.1, 0.5)"),
    ("guidance", guidance_with_reversed_interval, "samples with t >= start get cond; only"),
    ("frechet_distance", frechet_with_root_of_each_entry, "the root of each entry is taken"),
    ("frechet_distance", frechet_with_product_of_roots, "the roots of S1 and S2 are multiplied"),
    ("frechet_distance", frechet_without_clamping, "rounding makes eigenvalues slightly negative"),
    ("frechet_distance", frechet_complex, "returns the complex number"),
    ("bpe_merge", merge_the_text, "no, abc instead of ab c"),
    ("bpe_merge", merge_once, "only the first occurrence is joined"),
    ("bpe_merge", merge_in_place, "changes its argument parts in place"),
]


@pytest.mark.parametrize("name, function, expected", WRONG,
                         ids=[function.__name__ for _, function, _ in WRONG])
def test_a_wrong_solution_is_explained(name, function, expected):
    text, state = check(name, function)
    assert state.startswith("fails at property")
    assert expected in text


def test_every_exercise_has_a_wrong_solution():
    assert {name for name, _, _ in WRONG} == set(EXERCISES)


# ---------------------------------------------------------------- unusable functions and files
HEAD = "import torch\n\ndef clip_loss(img, txt, scale):\n    "


@pytest.mark.parametrize("body, sentence", [
    ("return", "the function returns None (is the return statement missing?), but a torch tensor "
     "of shape (), a single number, is wanted"),
    ("return 1.5", "the function returns an object of type float, but a torch tensor of shape (), "
     "a single number, is wanted; .item() or float() would cut off the gradient"),
    ("return (img @ txt.T).numpy()", "the function returns an object of type ndarray, but"),
    ("return img @ txt.T", "the function returns a tensor of shape (4, 4), but a torch tensor of "
     "shape (), a single number, is wanted"),
    ("return scale / 0 - scale / 0", "the result contains nan or inf"),
    ("return img @ scale", "RuntimeError in line 4 of mine.py, `return img @ scale`: both "
     "arguments to matmul need to be at least 1D, but they are 2D and 0D"),
    ("return F.normalize(img)", "NameError in line 4 of mine.py, `return F.normalize(img)`: "
     "name 'F' is not defined"),
    ("exit()", "SystemExit in line 4 of mine.py, `exit()`: None"),
    ("img *= scale; return img.sum()", "the function changes its argument img in place; make a "
     "new tensor or list instead: x = x + 1, not x += 1 or x[0] = 1"),
    ("while True: pass", "TimeoutError in line 4 of mine.py, `while True: pass`: no result after "
     "1 s; is there an endless loop?"),
])
def test_an_unusable_function_gives_a_sentence(run, monkeypatch, body, sentence):
    monkeypatch.setattr(exercise, "SECONDS", 1)
    status, text = run("clip_loss", HEAD + body + "\n")
    assert status == 1
    assert sentence in text.splitlines()[1]
    assert text.endswith("clip_loss: fails at property 1\n")


@pytest.mark.parametrize("code, sentence", [
    ("def clip_loss(img, txt:\n", "SyntaxError in line 1 of mine.py: "),
    ("x = 1\ny = x / 0\n", "mine.py cannot be imported: ZeroDivisionError in line 2: division by "
     "zero"),
    ("import nothing_of_this_name\n", "mine.py cannot be imported: ModuleNotFoundError in line 1: "
     "No module named 'nothing_of_this_name'"),
    ("def loss():\n    pass\n", "mine.py has no function with the name clip_loss"),
])
def test_a_file_that_cannot_be_loaded_gives_a_sentence(run, code, sentence):
    status, text = run("clip_loss", code)
    assert status == 1
    assert text.splitlines()[1].startswith(sentence)
    assert text.endswith("clip_loss: cannot be loaded\n")


def test_a_function_with_other_arguments_gives_a_sentence(run):
    status, text = run("clip_loss", "def clip_loss(img, txt):\n    return img\n")
    assert status == 1
    assert ("the function cannot be called with the 3 arguments of the stub: too many positional "
            "arguments") in text


def test_a_missing_file_gives_a_sentence(tmp_path, capsys):
    assert exercise.main(["clip_loss", "--file", str(tmp_path / "none.py")]) == 1
    assert "none.py cannot be read: No such file or directory" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    (["clip"], "invalid choice: 'clip'"),
    (["--file", "mine.py"], "--file needs the name of an exercise"),
])
def test_wrong_arguments_are_an_error(words, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        exercise.main(words)
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err
