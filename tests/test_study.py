"""The study: cells differ only in what they compare, and finished work is not repeated."""
import json
import math
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

STUDY = Path(__file__).resolve().parents[1] / "study"
sys.path.insert(0, str(STUDY))
import dit                                                                 # noqa: E402
import figures                                                             # noqa: E402
import new_decoder                                                         # noqa: E402
import sample_decoders                                                     # noqa: E402
import study                                                               # noqa: E402
from study import OBJECTIVES, PARTS, Cell                                  # noqa: E402
from test_readme import PARSERS                                            # noqa: E402
from vtp_min import VTPModel                                               # noqa: E402
from vtp_min.config import VTPConfig                                       # noqa: E402

SCALES = pytest.mark.parametrize("part, gpu", [(part, gpu) for part in PARTS
                                               for gpu in (False, True)])


def arguments(part="race", gpu=False, **changes):
    args = study.parser().parse_args([part])
    args.gpu, args.also = gpu, ""
    args.precision = "fp32"
    args.constants = {name: str(value) for name, value in study.constants_of(args).items()}
    vars(args).update(changes)
    return args


def commands(cell, part="race", gpu=False):
    return study.stages(cell, arguments(part, gpu))


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- the protocol
def test_cells_of_the_race_differ_only_in_losses_captions_and_seed():
    cells = PARTS["race"][1](quick=False)
    first, *others = (commands(cell) for cell in cells if cell.seed == 0)
    for other in others:
        for stage in first.keys() & other.keys() - {"tokenizer"}:
            assert other[stage] == first[stage]
    for cell in cells:
        same_seed = commands(Cell("AE", cell.seed))
        assert commands(cell)["dit-4000"] == same_seed["dit-4000"]


@SCALES
def test_every_command_of_every_cell_is_accepted_by_its_script(part, gpu):
    parsers = PARSERS | {"study/new_decoder.py": new_decoder.parser().parse_args,
                         "study/sample_decoders.py": sample_decoders.parse}
    for cell in PARTS[part][1](quick=False):
        for command in commands(cell, part, gpu).values():
            script, *flags = shlex.split(command)
            parsers[script](flags)


def test_objectives_differ_only_in_their_loss_weights():
    whole = commands(Cell("ALL"))["tokenizer"].split()
    for objective, weights in OBJECTIVES.items():
        one = commands(Cell(objective))["tokenizer"].split()
        k = whole.index("--perceptual")
        assert one == whole[:k] + weights.split() + whole[k:]


def test_the_captions_of_a_cell_are_those_of_its_tokenizer_only():
    both, shuffled = commands(Cell("CLIP+AE")), commands(Cell("CLIP+AE", captions="shuffled"))
    assert {stage for stage in both if both[stage] != shuffled[stage]} == {"tokenizer"}
    assert shuffled["tokenizer"] == both["tokenizer"].replace("captions=both",
                                                              "captions=shuffled")


def test_one_training_of_the_dit_is_continued_from_one_judgement_to_the_next():
    race = commands(Cell("AE"))
    trainings = {stage: c for stage, c in race.items() if stage.startswith("dit-")}
    assert len(trainings) == 5
    assert {c.replace(f"--steps {stage[4:]} ", "") for stage, c in trainings.items()} == {
        trainings["dit-250"].replace("--steps 250 ", "")}


def test_zero_shot_is_measured_only_for_tokenizers_trained_with_text():
    measured = {o for o in OBJECTIVES if "zeroshot" in commands(Cell(o))}
    assert measured == {"CLIP+AE", "ALL"}


@pytest.mark.parametrize("part", PARTS)
def test_names_of_cells_are_unique(part):
    cells = PARTS[part][1](quick=False)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {c.name for c in PARTS[part][1](quick=True)} <= {c.name for c in cells}


def test_with_inception_s_weights_the_gpu_study_also_measures_fid(monkeypatch):
    cell = Cell("ALL")
    monkeypatch.setattr(study.weights, "find", lambda name: f"{name}.pth")
    measured = [c for c in commands(cell, "matched", True).values() if "inception" in c]
    assert len(measured) == 4 and all("eval.py fid" in c for c in measured)
    assert not any("inception" in c for c in commands(cell, "matched", False).values())


@SCALES
def test_every_constant_of_a_part_reaches_a_command(part, gpu, monkeypatch):
    monkeypatch.setattr(study, "has_inception", lambda: True)
    args = arguments(part, gpu)
    cells = PARTS[part][1](quick=False)
    before = [study.stages(cell, args) for cell in cells]
    for name in args.constants:
        if name == "features" and not gpu:
            continue                                       # efficientnet in any case
        changed = arguments(part, gpu, constants=args.constants | {name: "987654"})
        assert [study.stages(cell, changed) for cell in cells] != before, name


# ---------------------------------------------------------------- resuming
# replaces a command: writes the files that the real one would write
FAKE_COMMAND = """import json, pathlib, sys
from PIL import Image
stage, run = sys.argv[1], pathlib.Path(sys.argv[2])
with open(run / "calls", "a") as f:
    f.write(" ".join([stage, *sys.argv[3:]]) + "\\n")
if stage == "dit" and not (run / "repaired").exists():
    sys.exit("a disk is full")
for folder in ("tokenizer", "decoder", "dit", "samples"):
    (run / folder).mkdir(exist_ok=True)
    lines = [json.dumps({"step": k, "loss": 1 / k}) + "\\n" for k in range(1, 100)]
    (run / folder / "log.jsonl").write_text("".join(lines))
Image.new("RGB", (8, 8)).save(run / "samples" / "grid.png")
if "classifier" in sys.argv and not (run / "judge.safetensors").exists():
    (run / "judge.safetensors").write_text("trained in " + run.name)
    with open(run.parent / "trained", "a") as f:
        f.write(run.name + "\\n")
with open(run / "metrics.jsonl", "a") as f:
    protocol = f"of {stage} on /photographs"
    f.write(json.dumps({"name": stage, "value": 1.0, "protocol": protocol}) + "\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replace the commands by three fast ones -> a cell, and args for study.run_cell"""
    (tmp_path / "fake.py").write_text(FAKE_COMMAND)

    def fake_stages(cell, args):
        run = f"{tmp_path}/work/{cell.name}"
        return {s: f"{tmp_path}/fake.py {s} {run}" for s in ("tokenizer", "dit", "fid")}

    monkeypatch.setattr(study, "stages", fake_stages)
    (tmp_path / "work").mkdir()
    args = Namespace(work=tmp_path / "work", out=tmp_path, data="/photographs", part="race",
                     data_name="photographs", quick=False, gpu=False, also="", machine="cpu",
                     constants={}, judge=tmp_path / "judge.safetensors")
    return Cell("AE"), args


def test_a_failed_cell_continues_where_it_failed_and_writes_a_line_and_a_log(fake):
    cell, args = fake
    folder = args.work / cell.name
    with pytest.raises(RuntimeError, match="a disk is full"):
        study.run_cell(cell, args)
    assert not (args.out / "results.jsonl").exists()
    (folder / "repaired").write_text("")
    study.run_cell(cell, args)
    assert (folder / "calls").read_text().split() == ["tokenizer", "dit", "dit", "fid"]
    line, = json_lines(args.out / "results.jsonl")
    assert line["metrics"] == {"tokenizer": 1.0, "dit": 1.0, "fid": 1.0}
    assert line["protocol"]["fid"] == "of fid on DATA"
    log = json_lines(args.out / "logs" / "AE.jsonl")
    assert len(log) == 80 and {x["step"] for x in log} >= {1, 99}
    for name in ("tokenizer", "decoder", "dit", "samples"):
        assert not (folder / name).exists()
    # images generated from photographs stay in the work folder
    assert set(args.out.rglob("*.png")) <= {folder / "samples.png"}


def test_two_processes_do_not_run_the_same_cell(fake):
    cell, args = fake
    (args.work / cell.name).mkdir()
    with open(args.work / cell.name / "lock", "w") as lock:
        study.fcntl.flock(lock, study.fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another study.py"):
            study.run_cell(cell, args)
    assert not (args.work / cell.name / "calls").exists()


def test_times_of_an_interrupted_stage_are_added_up(fake):
    cell, args = fake
    folder = args.work / cell.name
    with pytest.raises(RuntimeError):
        study.run_cell(cell, args)
    done, = json_lines(folder / "done.json")
    # pretend that its first part was long
    done["dit"] = {"exit": 1, "seconds": 1000 + done["dit"]["seconds"],
                   "cpu": 100 + done["dit"]["cpu"]}
    (folder / "done.json").write_text(json.dumps(done))
    (folder / "repaired").write_text("")
    study.run_cell(cell, args)
    line, = json_lines(args.out / "results.jsonl")
    assert 1100 > line["seconds"]["dit"] > 1000 > line["seconds"]["tokenizer"]
    assert line["cpu_seconds"]["dit"] >= 100


def test_names_of_folders_are_replaced_by_their_paths(fake, monkeypatch):
    cell, args = fake
    command = f"{args.out}/fake.py fid RUN DATA/x --data DATA,captions=both DATABASE"
    monkeypatch.setattr(study, "ROOT", args.out)
    (args.work / cell.name).mkdir()
    with open(args.work / "lock", "w") as lock:
        result = study.run_stage(cell, "fid", command, args, args.work / cell.name, lock, {})
    assert result["exit"] == 0 and result["command"] == f"python {command}"
    call = (args.work / cell.name / "calls").read_text()
    assert call == "fid /photographs/x --data /photographs,captions=both DATABASE\n"


# ---------------------------------------------------------------- all cells
@pytest.fixture
def drive(tmp_path, monkeypatch):
    """-> function that runs study.main with fake commands and returns its exit status"""
    (tmp_path / "fake.py").write_text(FAKE_COMMAND)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    fake_stages = {s: f"{tmp_path}/fake.py {s} RUN" for s in ("tokenizer", "fid")}
    monkeypatch.setattr(study, "stages", lambda *rest: fake_stages)
    monkeypatch.setattr(study.signal, "signal", lambda *rest: None)

    def run(**flags):
        args = study.parser().parse_args(["race", "--quick", "--jobs", "2"])
        vars(args).update(dict(out=tmp_path / "my results") | flags)
        with pytest.raises(SystemExit) as end:
            study.main(args)
        return end.value.code
    return run


def test_a_finished_cell_without_one_of_its_stages_is_reported(drive, monkeypatch, capsys):
    drive()
    before = study.stages
    monkeypatch.setattr(study, "stages", lambda *rest: before(*rest) | {"later": "added"})
    assert drive() == 0
    assert "without later; to repeat it, delete its line" in capsys.readouterr().out


def test_the_second_start_finds_everything_finished(drive, tmp_path):
    results = tmp_path / "my results" / "results.jsonl"
    assert drive() == 0
    before = results.read_text()
    assert drive() == 0 and results.read_text() == before and len(before.splitlines()) == 2


def test_all_cells_and_stages_use_the_same_classifier(drive, tmp_path, monkeypatch):
    fake_stages = {s: f"{tmp_path}/fake.py {s} RUN --out RUN --features classifier"
                   for s in ("tokenizer", "recon", "judge")}
    monkeypatch.setattr(study, "stages", lambda *rest: fake_stages)
    assert drive() == 0
    work = tmp_path / "runs" / "study" / "my results" / "shapes"
    name, = (work / "trained").read_text().split()
    assert (work / "judge-DATA.safetensors").read_text() == f"trained in {name}"


def test_a_failed_cell_does_not_stop_the_others(drive, tmp_path):
    folder = tmp_path / "runs" / "study" / "my results" / "shapes" / "CLIP+AE"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{half")
    assert drive() == 1
    done = json_lines(tmp_path / "my results" / "results.jsonl")
    assert [line["cell"] for line in done] == ["AE"]


def test_results_with_different_flags_are_not_mixed(drive):
    drive()
    with pytest.raises(ValueError, match="use another --out"):
        drive(also="--set w_koleo=0")


def test_results_with_different_constants_are_rejected_even_without_the_work_folder(
        drive, tmp_path, monkeypatch):
    drive()
    study.shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ValueError, match="other images, constants, precision.*AE"):
        drive(also="--set w_koleo=0", list=True)
    monkeypatch.setitem(study.CONSTANTS, "samples", (1, 1, "ours"))
    with pytest.raises(ValueError, match="other images, constants"):
        drive()


def test_results_of_two_precisions_are_not_mixed(drive):
    drive(precision="fp32")
    with pytest.raises(ValueError, match="precision"):
        drive(precision="bf16")


def test_photographs_are_wanted_as_class_folders(drive, tmp_path):
    with pytest.raises(ValueError, match="no folders train/ and val/"):
        drive(data=str(tmp_path))


def test_an_incomplete_line_is_reported_with_its_file(drive, tmp_path):
    drive()
    with open(tmp_path / "my results" / "results.jsonl", "a") as f:
        f.write('{"cell": "AE-')
    with pytest.raises(ValueError, match="results.jsonl has an incomplete line"):
        drive()


def test_a_pattern_without_matches_is_rejected_with_the_names_of_all_cells(drive):
    with pytest.raises(ValueError, match="matches no cell; the cells are: AE, CLIP.AE"):
        drive(only="nope*")


# ---------------------------------------------------------------- the figures
STEPS = (250, 500, 1000, 2000, 4000)


def row(objective, shares, seed=0, n=2080, captions="both"):
    """A line of results.jsonl of the race, with these shares of samples recognised"""
    values = {str(s): {"samples recognised": p, "FD-classifier": 30 * (1 - p)}
              for s, p in zip(STEPS, shares)}
    return {"cell": objective, "part": "race", "objective": objective, "seed": seed,
            "captions": captions, "constants": {"samples": str(n)}, "curve": values,
            "metrics": {"linear probe latent": 0.2, "PSNR": 25.0}}


AE = (0.01, 0.05, 0.1, 0.2, 0.3)


def test_a_curve_shifted_by_a_factor_in_steps_is_faster_by_this_factor():
    twice = row("ALL", (*AE[1:], 0.4))                     # what AE has at 2 s, it has at s
    assert figures.speedups(twice, row("AE", AE)) == pytest.approx({1000: 2, 2000: 2, 4000: 2})
    equal = figures.speedups(row("ALL", AE), row("AE", AE))
    assert equal == pytest.approx({1000: 1, 2000: 1, 4000: 1})


def test_a_share_that_is_not_reached_has_no_number_of_steps():
    assert math.isnan(figures.steps_to_share(row("ALL", AE), 0.31))
    assert math.isnan(figures.steps_to_share(row("ALL", AE), 0.001))


def test_the_rule_of_the_race_needs_both_seeds_and_all_lengths():
    better = tuple(p + 0.1 for p in AE)
    reference = [row("AE", AE, seed) for seed in (0, 1)]
    both = [row("ALL", better, seed) for seed in (0, 1)]
    assert figures.verdict(reference + both, "ALL") == "shown"
    assert figures.verdict(reference + both[:1], "ALL") == "open"
    equal = row("ALL", AE, 1)
    assert figures.verdict(reference + [both[0], equal], "ALL") == "not decidable"
    assert figures.verdict(reference + [row("ALL", AE, 0), equal], "ALL") == "not shown"
    worse = [row("ALL", tuple(p / 2 for p in AE), seed) for seed in (0, 1)]
    assert figures.verdict(reference + worse, "ALL") == "not shown"


def test_two_shares_differ_beyond_two_standard_errors_of_their_difference():
    """n = 2500, p = 1/2: a standard error of 1 point, of the difference 1.41 points"""
    assert figures.standard_error(0.5, 2500) == pytest.approx(0.01)
    assert not figures.differs(0.5, 0.528, 2500) and figures.differs(0.5, 0.529, 2500)


def test_the_figure_and_the_table_are_made_from_the_lines_of_a_folder(tmp_path, capsys):
    rows = [row("AE", AE), row("CLIP+AE", (*AE[1:], 0.4)),
            row("CLIP+AE", AE, captions="shuffled")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures.main([tmp_path])
    assert (tmp_path / "race.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "| CLIP+AE | 0 | 20.0 | 25.0 | 5.0, 10.0, 20.0, 30.0, 40.0 |" in out
    assert "2.00, 2.00, 2.00" in out and "CLIP+AE: open" in out


def photograph_row(objective, decoders, seed=0, part="matched", width=0):
    """A line of results.jsonl of the parts with photographs

    decoders  {name: (PSNR, rFD, FD of samples, share recognised)}; equal for both judges and both
              numbers of classes
    """
    curve = {}
    for key, (psnr, rfd, distance, share) in decoders.items():
        found = {name: value for d, s in figures.JUDGES.values()
                 for name, value in ((d, distance), (s, share))}
        curve[f"ten-{key}"] = found
        curve[f"data-{key}"] = found | {figures.PSNR: psnr, figures.RFD: rfd}
    return {"cell": objective, "part": part, "objective": objective, "seed": seed, "width": width,
            "constants": {"samples": "2080"}, "curve": curve,
            "metrics": {"linear probe latent": 0.2}}


AE_DECODERS = {"own": (30, 50, 40, 0.3), "new_600": (28, 80, 44, 0.26),
               "new_150": (24, 120, 60, 0.1)}


def test_ae_is_interpolated_at_the_rfd_and_at_the_psnr_of_all_s_best_decoder():
    ae = photograph_row("AE", AE_DECODERS)
    joint = photograph_row("ALL", {"own": (26, 110, 50, 0.2), "more": (26, 90, 45, 0.25)})
    best, b, equal = figures.matched(ae, joint)
    assert best == "more" and b["ten", figures.JUDGES["classifier"][0]] == 45
    distance, share = figures.JUDGES["classifier"]
    neighbours, a = equal[figures.RFD]                     # a quarter of the way from 80 to 120
    assert neighbours == ("new_600", "new_150") and a["data", figures.RFD] == pytest.approx(90)
    assert a["ten", distance] == pytest.approx(48) and a["data", share] == pytest.approx(0.22)
    neighbours, a = equal[figures.PSNR]                    # half of the way from 24 to 28
    assert neighbours == ("new_150", "new_600") and a["data", figures.PSNR] == pytest.approx(26)
    assert a["ten", distance] == pytest.approx(52) and a["data", share] == pytest.approx(0.18)


@pytest.mark.parametrize("psnr, rfd, matches", [
    (27, 90, True), (30, 50, True), (24, 120, True), (30.1, 90, False), (23.9, 90, False),
    (27, 49, False), (27, 121, False)])
def test_decoders_match_if_ae_s_decoders_reach_both_rfd_and_psnr(psnr, rfd, matches):
    joint = photograph_row("ALL", {"own": (psnr, rfd, 0, 0)})
    assert (figures.matched(photograph_row("AE", AE_DECODERS), joint) is not None) == matches


def matched_rows(seed, distance, share):
    """At the rFD and at the PSNR of ALL, AE has FD 48 and 22 % recognised; ALL has these values."""
    return [photograph_row("AE", AE_DECODERS, seed),
            photograph_row("ALL", {"own": (27, 90, distance, share)}, seed)]


def test_the_rule_of_matched_reconstruction_needs_both_measures_in_both_seeds():
    better, worse, mixed = (45, 0.3), (55, 0.15), (45, 0.22)
    for first, second, expected in ((better, better, "shown"), (worse, worse, "not shown"),
                                    (better, worse, "not decidable"),
                                    (mixed, mixed, "not decidable"), (better, mixed,
                                                                      "not decidable")):
        rows = matched_rows(0, *first) + matched_rows(1, *second)
        assert figures.matched_verdict(rows, "ten") == expected
    for first, expected in ((better, "open"), (worse, "open"), (mixed, "not decidable")):
        assert figures.matched_verdict(matched_rows(0, *first), "ten") == expected
    # at the PSNR of ALL, AE has FD 52 and 18 %: worse than ALL, whose values are those of equal rFD
    rows = [x for seed in (0, 1) for x in (photograph_row("AE", AE_DECODERS, seed), photograph_row(
        "ALL", {"own": (26, 90, 48, 0.22)}, seed))]
    assert figures.matched_verdict(rows, "ten") == "not decidable"
    apart = [photograph_row("ALL", {"own": (30, 10, 40, 0.2)}, seed) for seed in (0, 1)]
    ae = [photograph_row("AE", AE_DECODERS, seed) for seed in (0, 1)]
    assert figures.matched_verdict(ae + apart, "data").startswith("not decidable: no decoders")


def test_a_new_decoder_replaces_the_decoder_alone(tmp_path):
    torch.manual_seed(7)
    model = VTPModel(VTPConfig.of_size("pico", image=16, patch=8))
    model.save_pretrained(tmp_path / "run")
    new_decoder.main(new_decoder.parser().parse_args(
        [str(tmp_path / "run"), "--out", str(tmp_path / "new"), "--seed", "3"]))
    new = VTPModel.from_pretrained(tmp_path / "new").state_dict()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, new[name])}
    assert changed and all(name.startswith("pixel_decoder.") for name in changed)
    assert "pixel_decoder.proj_in.weight" in changed


@pytest.fixture
def two_decoders(tmp_path):
    """-> folder with a tokenizer `own`, `new` with another decoder, and a DiT of 2 steps"""
    torch.manual_seed(7)
    VTPModel(VTPConfig.of_size("pico", image=16, patch=8)).save_pretrained(tmp_path / "own")
    new_decoder.main(new_decoder.parser().parse_args([f"{tmp_path}/own", "--out",
                                                      f"{tmp_path}/new"]))
    dit.main(["latents", f"{tmp_path}/own", "--data", "shapes", "--n", "20", "--out",
              f"{tmp_path}/latents", "--device", "cpu"])
    dit.main(["train", f"{tmp_path}/latents", "--out", f"{tmp_path}/dit", "--size", "pico",
              "--steps", "2", "--batch", "4", "--set", "previews=false", "--device", "cpu"])
    return tmp_path


def test_samples_decoded_by_several_decoders_are_those_of_dit_sample_but_the_dit_runs_once(
        two_decoders, monkeypatch):
    flags = ["--n", "5", "--batch", "2", "--points", "4", "--device", "cpu"]
    for name in ("own", "new"):
        dit.main(["sample", f"{two_decoders}/dit", "--tokenizer", f"{two_decoders}/{name}", "--out",
                  f"{two_decoders}/expected-{name}", *flags])
    calls = []
    euler = dit.euler
    monkeypatch.setattr(dit, "euler", lambda *args: calls.append(args) or euler(*args))
    pairs = [word for name in ("own", "new")
             for word in ("--decoder", f"{two_decoders}/{name}", f"{two_decoders}/found-{name}")]
    sample_decoders.main(sample_decoders.parse([f"{two_decoders}/dit", *pairs, *flags]))
    assert len(calls) == 3                     # batches of 2, 2 and 1, for the first decoder only
    images = {folder: [path.read_bytes() for path in
                       sorted((two_decoders / folder / "png").glob("*.png"))]
              for folder in ("expected-own", "found-own", "expected-new", "found-new")}
    assert len(images["found-own"]) == 5
    assert images["found-own"] == images["expected-own"]
    assert images["found-new"] == images["expected-new"] != images["found-own"]


def test_decoders_of_different_encoders_are_refused_before_the_dit_runs(two_decoders, monkeypatch):
    torch.manual_seed(8)
    VTPModel(VTPConfig.of_size("pico", image=16, patch=8)).save_pretrained(two_decoders / "other")
    monkeypatch.setattr(dit, "main", None)
    pairs = [word for name in ("own", "other")
             for word in ("--decoder", f"{two_decoders}/{name}", f"{two_decoders}/samples-{name}")]
    with pytest.raises(ValueError, match="other is not that of .*own"):
        sample_decoders.main(sample_decoders.parse([f"{two_decoders}/dit", *pairs]))


def wide_rows(seed, width, ae, joint):
    """ae, joint: (FD, share recognised)"""
    return [photograph_row(name, {"own": (25, 100, *values)}, seed, "wide", width)
            for name, values in (("AE", ae), ("ALL", joint))]


def test_the_rule_of_wide_latents_ends_after_one_seed_if_both_conditions_fail():
    assert figures.wide_verdict(wide_rows(0, 48, (50, 0.2), (46, 0.2))) == "not shown"
    assert figures.wide_verdict(wide_rows(0, 48, (50, 0.2), (44, 0.2))) == "open"      # 12 % lower
    assert figures.wide_verdict(wide_rows(0, 48, (50, 0.2), (50, 0.3))) == "open"      # recognised
    assert figures.wide_verdict(wide_rows(0, 16, (50, 0.2), (20, 0.9))) == "open"      # no 48
    rows = [r for seed in (0, 1) for r in (*wide_rows(seed, 48, (50, 0.2), (40, 0.3)),
                                           *wide_rows(seed, 16, (50, 0.2), (50, 0.2)))]
    assert figures.wide_ratios(rows, 1) == pytest.approx({16: 1, 48: 1.25})
    assert figures.wide_verdict(rows) == "shown"
    falling = rows[:6] + wide_rows(1, 16, (50, 0.2), (25, 0.2))      # seed 1: 2.0 at 16, 1.25 at 48
    assert figures.wide_verdict(falling) == "not decidable"


@pytest.mark.parametrize("rows, line", [
    (matched_rows(0, 45, 0.3), "equal PSNR: AE between new_150 and new_600 / ALL's decoder own:"),
    (wide_rows(0, 48, (50, 0.2), (40, 0.3)), "seed 0: FD of AE divided by FD of ALL: 48: 1.25")])
def test_figures_and_tables_of_photographs_are_made_from_the_lines_of_a_folder(rows, line, tmp_path,
                                                                              capsys):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures.main([tmp_path])
    assert (tmp_path / f"{rows[0]['part']}.png").stat().st_size > 1000
    assert line in capsys.readouterr().out


def test_every_script_of_the_study_can_be_imported_from_another_folder(tmp_path):
    # One process for all, because each would import torch anew. Before each import, the process
    # forgets what earlier scripts have imported from the repository and added to sys.path.
    names = sorted(path.stem for path in STUDY.glob("*.py") if "__main__" in path.read_text())
    code = f"""
import sys
path = [{str(STUDY)!r}, *sys.path]
for name in {names}:
    for module, loaded in list(sys.modules.items()):
        if (getattr(loaded, "__file__", None) or "").startswith({str(STUDY.parent)!r}):
            if "/.venv/" not in loaded.__file__:
                del sys.modules[module]
    sys.path[:] = path
    __import__(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
