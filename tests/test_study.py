"""The study: cells differ only in their tokenizer, and finished work is not repeated."""
import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).resolve().parents[1] / "study"
sys.path.insert(0, str(STUDY))
import figures                                                             # noqa: E402
import study                                                               # noqa: E402
from study import OBJECTIVES, Cell, cells, link_images, stages             # noqa: E402
from test_readme import PARSERS                                            # noqa: E402

SHAPES = "shapes:objects=1,size=0.6-0.9"
DATA = pytest.mark.parametrize("data, quick", [("/photographs", False), (SHAPES, True)])


def commands(cell, data="/photographs", quick=False):
    return stages(cell, data, quick)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- the protocol
@DATA
def test_all_cells_have_the_same_decoder_training_dit_sampler_and_measures(data, quick):
    first, *others = (commands(cell, data, quick) for cell in cells(quick) if not cell.dit)
    for other in others:
        for stage in first.keys() & other.keys() - {"tokenizer"}:
            assert other[stage] == first[stage]


@DATA
def test_every_command_of_every_cell_is_accepted_by_its_script(data, quick):
    for cell in cells(quick):
        for existing in ((), ("REAL", "HALF")):
            for command in stages(cell, data, quick, existing).values():
                script, *flags = shlex.split(command)
                PARSERS[script](flags)


def test_objectives_differ_only_in_their_loss_weights():
    whole = commands(Cell("", "ALL", 100))["tokenizer"].split()
    for objective, weights in OBJECTIVES.items():
        one = commands(Cell("", objective, 100))["tokenizer"].split()
        k = whole.index("--perceptual")
        assert one == whole[:k] + weights.split() + whole[k:]


def test_a_longer_dit_changes_only_the_command_of_the_dit():
    short, long = commands(Cell("", "ALL", 9)), commands(Cell("", "ALL", 9, dit=12_000))
    assert {stage for stage in short if short[stage] != long[stage]} == {"dit"}
    assert long["dit"] == short["dit"].replace("--steps 4000", "--steps 12000")
    assert Cell("", "ALL", 9, dit=12_000).name == "ALL-9-dit12000"


def test_zero_shot_is_measured_only_for_tokenizers_trained_with_text():
    measured = {o for o in OBJECTIVES if "zeroshot" in commands(Cell("", o, 1))}
    assert measured == {"CLIP+AE", "ALL"}


def test_fewer_images_are_used_for_the_tokenizer_only():
    few = commands(Cell("", "AE", 1, pictures=100))
    used = [stage for stage, command in few.items() if "RUN/pictures" in command]
    assert used == ["tokenizer"]
    assert all("DATA" in few[stage] for stage in ("decoder", "latents", "probe", "recon", "fid"))


@pytest.mark.parametrize("quick", [False, True])
def test_names_of_cells_are_unique_and_contain_the_fields_that_differ(quick):
    assert len({cell.name for cell in cells(quick)}) == len(cells(quick))
    cell = Cell("", "ALL", 9, size="micro", decoder="pico", pictures=100, seed=2)
    assert cell.name == "ALL-9-micro-decoder_pico-n100-seed2"


def test_every_constant_of_the_protocol_reaches_a_command(monkeypatch):
    def both():
        return commands(Cell("", "ALL", 1)), commands(Cell("", "ALL", 1), SHAPES)

    for name in study.CONSTANTS:
        if name == "base":                               # used by `cells` instead
            continue
        before = both()
        with monkeypatch.context() as patch:
            patch.setitem(study.CONSTANTS, name, ("987654",) * 3)
            assert both() != before


# ---------------------------------------------------------------- the data
def test_linked_images_are_evenly_spread_over_classes_and_validation_is_complete(tmp_path):
    data, few = tmp_path / "data", tmp_path / "few"
    for k in range(4):
        for split, n in (("train", 10), ("val", 3)):
            (data / split / f"class{k}").mkdir(parents=True)
            for j in range(n):
                (data / split / f"class{k}" / f"{j}.png").write_text("")
    (data / "classnames.txt").write_text("class0\ta\n")
    for _ in range(2):                                   # the second call changes nothing
        link_images(data, few, 8)
    assert [len(list((few / "train" / f"class{k}").iterdir())) for k in range(4)] == [2] * 4
    assert len(list((few / "val").glob("*/*"))) == 12 and (few / "classnames.txt").exists()


# ---------------------------------------------------------------- resuming
# replaces a command: writes the files that the real one would write
FAKE_COMMAND = """import json, pathlib, sys
stage, run = sys.argv[1], pathlib.Path(sys.argv[2])
with open(run / "calls", "a") as f:
    f.write(" ".join([stage, *sys.argv[3:]]) + "\\n")
if stage == "dit" and not (run / "repaired").exists():
    sys.exit("a disk is full")
for folder in ("tokenizer", "decoder", "dit", "samples"):
    (run / folder).mkdir(exist_ok=True)
    lines = [json.dumps({"step": k, "loss": 1 / k}) + "\\n" for k in range(1, 100)]
    (run / folder / "log.jsonl").write_text("".join(lines))
(run / "samples" / "grid.png").write_text("an image")
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

    def fake_stages(cell, *rest):
        run = f"{tmp_path}/work/{cell.name}"
        return {s: f"{tmp_path}/fake.py {s} {run}" for s in ("tokenizer", "dit", "fid")}

    monkeypatch.setattr(study, "stages", fake_stages)
    (tmp_path / "work").mkdir()
    args = Namespace(work=tmp_path / "work", out=tmp_path, data="/photographs",
                     data_name="photographs", prefix="photographs", quick=False, also="",
                     constants={}, judge=tmp_path / "judge.safetensors")
    return Cell("1", "AE", 10), args


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
    log = json_lines(args.out / "logs" / "photographs-AE-10.jsonl")
    assert len(log) <= 40 and {x["step"] for x in log} >= {1, 99}
    for name in ("tokenizer", "decoder", "dit", "samples"):
        assert not (folder / name).exists()
    # images generated from photographs stay in the work folder
    assert set(args.out.rglob("*.png")) <= {folder / "grid.png"}


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


def test_names_of_folders_and_files_are_replaced_by_their_paths(fake, monkeypatch):
    """Also within --set save_real=REAL"""
    cell, args = fake
    command = f"{args.out}/fake.py fid RUN DATA/x save_real=REAL --data DATA DATABASE"
    monkeypatch.setattr(study, "stages", lambda *rest: {"fid": command})
    monkeypatch.setattr(study, "ROOT", args.out)
    (args.work / cell.name).mkdir()
    with open(args.work / "lock", "w") as lock:
        result = study.run_stage(cell, "fid", args, args.work / cell.name, lock, {})
    assert result["exit"] == 0 and result["command"] == f"python {command}"
    call = (args.work / cell.name / "calls").read_text()
    assert call == "fid /photographs/x save_real=work/real.npz --data /photographs DATABASE\n"


@pytest.mark.parametrize("stage, file", [("fid", "real.npz"), ("halved", "half.npz"),
                                         ("judge", "judge.safetensors"), ("probe", None)])
def test_the_file_that_a_stage_shares_with_all_cells_is_found(stage, file):
    args = Namespace(work=Path("work"), judge=Path("work/judge.safetensors"))
    for existing in ((), ("REAL", "HALF")):
        command = stages(Cell("", "ALL", 1), "/photographs", False, existing)[stage]
        assert study.shared_output(command, args) == (Path("work", file) if file else None)


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
        args = dict(quick=True, data=SHAPES, only="AE-*", jobs=2, list=False, also="",
                    out=tmp_path / "my results")
        with pytest.raises(SystemExit) as end:
            study.main(Namespace(**args | flags))
        return end.value.code
    return run


def test_a_finished_cell_without_one_of_its_stages_is_reported(drive, monkeypatch, capsys):
    drive()
    before = study.stages
    monkeypatch.setattr(study, "stages", lambda *rest: before(*rest) | {"halved": "added later"})
    assert drive() == 0
    assert "finished without halved; to repeat it, delete its line" in capsys.readouterr().out


def test_the_second_start_finds_everything_finished(drive, tmp_path):
    results = tmp_path / "my results" / "results.jsonl"
    assert drive() == 0
    before = results.read_text()
    assert drive() == 0 and results.read_text() == before and len(before.splitlines()) == 2


def test_all_cells_and_stages_use_the_same_classifier(drive, tmp_path, monkeypatch):
    fake_stages = {s: f"{tmp_path}/fake.py {s} RUN classifier"
                   for s in ("tokenizer", "recon", "judge")}
    monkeypatch.setattr(study, "stages", lambda *rest: fake_stages)
    assert drive() == 0
    work = tmp_path / "runs" / "my results" / "shapes-quick"
    name, = (work / "trained").read_text().split()
    assert (work / "judge.safetensors").read_text() == f"trained in {name}"


def test_a_failed_cell_does_not_stop_the_others(drive, tmp_path):
    folder = tmp_path / "runs" / "my results" / "shapes-quick" / "AE-750"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{half")
    assert drive() == 1
    done = json_lines(tmp_path / "my results" / "results.jsonl")
    assert [line["cell"] for line in done] == ["AE-250"]


def test_results_with_different_flags_are_not_mixed(drive):
    drive()
    with pytest.raises(ValueError, match="use another --out"):
        drive(also="--set w_koleo=0")


def test_results_with_different_constants_are_rejected_even_without_the_work_folder(
        drive, tmp_path, monkeypatch):
    drive()
    study.shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ValueError, match="other images, constants or --also.*AE-250"):
        drive(also="--set w_koleo=0", list=True)
    monkeypatch.setitem(study.CONSTANTS, "dit", (4000, 1, "ours"))
    with pytest.raises(ValueError, match="other images, constants"):
        drive()


def test_results_with_the_older_spelling_of_flags_are_continued():
    """The published results have --head-hidden 256, now spelled --set head_hidden=256"""
    results = json_lines(Path(study.__file__).parent / "results.jsonl")
    constants = {"training_pictures": 50_000, "also": ""}
    constants |= {name: str(value[0]) for name, value in study.CONSTANTS.items()}
    wanted = study.normalize_flags(constants)
    assert all(study.normalize_flags(r["constants"]) == wanted for r in results if not r["quick"])
    assert study.normalize_flags({"recipe": "--ema 0.9"}) != study.normalize_flags(
        {"recipe": "--set ema=0.98"})


def test_an_incomplete_line_is_reported_with_its_file(drive, tmp_path):
    drive()
    with open(tmp_path / "my results" / "results.jsonl", "a") as f:
        f.write('{"cell": "AE-')
    with pytest.raises(ValueError, match="results.jsonl has an incomplete line"):
        drive()


def test_a_pattern_without_matches_is_rejected_with_the_names_of_all_cells(drive):
    with pytest.raises(ValueError, match="matches no cell; the cells are: AE-750, ALL-250"):
        drive(only="nope*")


# ---------------------------------------------------------------- the figures
def row(objective, steps, probe, fd, **more):
    metrics = {"linear probe latent": probe, "PSNR": 20.0 + steps, "rFD-classifier": 1.0,
               "FD-classifier": fd, "samples recognised": 0.5}
    constants = {"training_pictures": 50_000, "samples": "2500", "dit": "4000"}
    return {"cell": f"{objective}-{steps}", "questions": "1", "objective": objective,
            "steps": steps, "size": "nano", "decoder": "", "pictures": 0, "dit": 0, "seed": 0,
            "data": "shapes", "quick": True, "constants": constants, "metrics": metrics,
            "gflops_a_step": {"tokenizer": 25.0},
            "cpu_seconds": {"tokenizer": float(steps)}} | more


def metric(rows, name):
    return np.array([r["metrics"][name] for r in rows])


def test_spearman_is_1_for_increasing_functions_and_pearson_only_for_linear_ones():
    x = np.arange(1.0, 9)
    assert figures.correlation(x, 3 * x + 1) == pytest.approx((1, 1))
    pearson, spearman = figures.correlation(x, np.exp(x))
    assert spearman == pytest.approx(1) and pearson < 0.9
    assert figures.correlation(x, -np.exp(x))[1] == pytest.approx(-1)
    assert figures.ranks([5, 1, 5]).tolist() == [1.5, 0, 1.5]


def test_missing_values_are_not_part_of_a_correlation():
    x, y = [1, 2, np.nan, 3, 4], [2, 4, 100, 6, np.nan]
    assert figures.correlation(x, y) == pytest.approx((1, 1))


def test_the_correlation_within_objectives_needs_two_objectives_with_two_rows():
    rows = [row("AE", 1, 0.1, 9.0), row("AE", 3, 0.2, 8.0), row("ALL", 1, 0.3, 5.0)]
    x, y = metric(rows, "linear probe latent"), metric(rows, "FD-classifier")
    assert np.isnan(figures.correlation_within_objectives(rows, x, y))
    rows.append(row("ALL", 3, 0.4, 4.0))
    x, y = metric(rows, "linear probe latent"), metric(rows, "FD-classifier")
    assert figures.correlation_within_objectives(rows, x, y) == pytest.approx(-1)
    assert figures.correlation_within_objectives(rows, x + [0, 0, 5, 5], y) == pytest.approx(-1)


def test_seeds_are_averaged_before_correlations_are_computed():
    one, other = row("AE", 3, 0.1, 8.0), row("AE", 3, 0.3, 6.0, seed=1)
    mean, = figures.over_seeds([one, other])
    assert mean["metrics"]["linear probe latent"] == pytest.approx(0.2)
    assert mean["metrics"]["FD-classifier"] == 7 and mean["steps"] == 3
    others = [row("AE", 3, 0.9, 99.0, pictures=100), row("ALL", 3, 0.9, 99.0)]
    lines = [line.split() for line in figures.spread([one, other, *others])]
    found, = [words for words in lines if "FD-classifier" in words]
    assert found == "AE 3 steps, 2 seeds FD-classifier 7 from 6 to 8".split()


def test_figures_without_enough_cells_are_not_drawn_but_reported(tmp_path, capsys):
    rows = [row("AE", 1, 0.1, 9.0), row("ALL", 1, 0.3, 5.0), row("AE", 3, 0.1, 9.5),
            row("ALL", 1, 0.2, 6.0, pictures=100)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures.main(tmp_path)
    drawn = ("scaling", "objectives", "prediction", "by_pictures")
    assert {p.name for p in tmp_path.glob("*.png")} == {f"shapes-quick-{name}.png"
                                                        for name in drawn}
    assert "shapes-quick-by_size.png is not drawn" in capsys.readouterr().out


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
