"""The study compares tokenizers and nothing else: what cells have in common is the same in every
letter, and finished work is not repeated."""
import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import figures                                                             # noqa: E402
import study                                                               # noqa: E402
from study import OBJECTIVES, Cell, cells, link_pictures, stages           # noqa: E402
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
def test_every_command_of_every_cell_is_one_that_its_script_knows(data, quick):
    for cell in cells(quick):
        for known in ((), ("REAL", "HALF")):
            for command in stages(cell, data, quick, known).values():
                script, *flags = shlex.split(command)
                PARSERS[script](flags)


def test_objectives_differ_by_their_weights_alone():
    whole = commands(Cell("", "ALL", 100))["tokenizer"].split()
    for objective, weights in OBJECTIVES.items():
        one = commands(Cell("", objective, 100))["tokenizer"].split()
        at = whole.index("--perceptual")
        assert one == whole[:at] + weights.split() + whole[at:]


def test_a_longer_dit_is_the_same_cell_up_to_that_command():
    short, long = commands(Cell("", "ALL", 9)), commands(Cell("", "ALL", 9, dit=12_000))
    assert {stage for stage in short if short[stage] != long[stage]} == {"dit"}
    assert long["dit"] == short["dit"].replace("--steps 4000", "--steps 12000")
    assert Cell("", "ALL", 9, dit=12_000).name == "ALL-9-dit12000"


def test_zero_shot_is_measured_only_for_tokenizers_trained_with_text():
    measured = {o for o in OBJECTIVES if "zeroshot" in commands(Cell("", o, 1))}
    assert measured == {"CLIP+AE", "ALL"}


def test_fewer_pictures_are_for_the_tokenizer_alone():
    few = commands(Cell("", "AE", 1, pictures=100))
    used = [stage for stage, command in few.items() if "RUN/pictures" in command]
    assert used == ["tokenizer"]
    assert all("DATA" in few[stage] for stage in ("decoder", "latents", "probe", "recon", "fid"))


@pytest.mark.parametrize("quick", [False, True])
def test_no_two_cells_share_a_name_and_a_name_shows_what_differs(quick):
    assert len({cell.name for cell in cells(quick)}) == len(cells(quick))
    cell = Cell("", "ALL", 9, size="micro", decoder="pico", pictures=100, seed=2)
    assert cell.name == "ALL-9-micro-decoder_pico-n100-seed2"


def test_every_constant_of_the_protocol_reaches_a_command(monkeypatch):
    def both():
        return commands(Cell("", "ALL", 1)), commands(Cell("", "ALL", 1), SHAPES)

    for name in study.TABLE:
        if name == "base":                               # that of the cells
            continue
        before = both()
        with monkeypatch.context() as patch:
            patch.setitem(study.TABLE, name, ("987654",) * 3)
            assert both() != before


# ---------------------------------------------------------------- the data
def test_linked_pictures_are_evenly_spread_over_classes_and_validation_is_complete(tmp_path):
    data, few = tmp_path / "data", tmp_path / "few"
    for k in range(4):
        for split, n in (("train", 10), ("val", 3)):
            (data / split / f"class{k}").mkdir(parents=True)
            for j in range(n):
                (data / split / f"class{k}" / f"{j}.png").write_text("")
    (data / "classnames.txt").write_text("class0\ta\n")
    for _ in range(2):                                   # a second time changes nothing
        link_pictures(data, few, 8)
    assert [len(list((few / "train" / f"class{k}").iterdir())) for k in range(4)] == [2] * 4
    assert len(list((few / "val").glob("*/*"))) == 12 and (few / "classnames.txt").exists()


# ---------------------------------------------------------------- resuming
# stands for a command: leaves the files that the real one would leave
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
    """The driver with three fake commands in place of hours -> a cell, arguments of study.work"""
    (tmp_path / "fake.py").write_text(FAKE_COMMAND)

    def fake_stages(cell, *rest):
        run = f"{tmp_path}/work/{cell.name}"
        return {s: f"{tmp_path}/fake.py {s} {run}" for s in ("tokenizer", "dit", "fid")}

    monkeypatch.setattr(study, "stages", fake_stages)
    (tmp_path / "work").mkdir()
    args = Namespace(work=tmp_path / "work", out=tmp_path, data="/photographs",
                     shown="photographs", prefix="photographs", quick=False, also="", constants={},
                     judge=tmp_path / "judge.safetensors")
    return Cell("1", "AE", 10), args


def test_a_failed_cell_continues_where_it_failed_and_leaves_a_line_and_a_log(fake):
    cell, args = fake
    folder = args.work / cell.name
    with pytest.raises(RuntimeError, match="a disk is full"):
        study.work(cell, args)
    assert not (args.out / "results.jsonl").exists()
    (folder / "repaired").write_text("")
    study.work(cell, args)
    assert (folder / "calls").read_text().split() == ["tokenizer", "dit", "dit", "fid"]
    line, = json_lines(args.out / "results.jsonl")
    assert line["metrics"] == {"tokenizer": 1.0, "dit": 1.0, "fid": 1.0}
    assert line["protocol"]["fid"] == "of fid on DATA"
    log = json_lines(args.out / "logs" / "photographs-AE-10.jsonl")
    assert len(log) <= 40 and {x["step"] for x in log} >= {1, 99}
    for name in ("tokenizer", "decoder", "dit", "samples"):
        assert not (folder / name).exists()
    # images made from photographs stay in the work folder
    assert set(args.out.rglob("*.png")) <= {folder / "grid.png"}


def test_two_drivers_do_not_work_on_the_same_cell(fake):
    cell, args = fake
    (args.work / cell.name).mkdir()
    with open(args.work / cell.name / "lock", "w") as lock:
        study.fcntl.flock(lock, study.fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another driver"):
            study.work(cell, args)
    assert not (args.work / cell.name / "calls").exists()


def test_times_of_an_interrupted_stage_are_those_of_all_its_parts(fake):
    cell, args = fake
    folder = args.work / cell.name
    with pytest.raises(RuntimeError):
        study.work(cell, args)
    done, = json_lines(folder / "done.json")
    # as if its first part had been long
    done["dit"] = {"exit": 1, "seconds": 1000 + done["dit"]["seconds"],
                   "cpu": 100 + done["dit"]["cpu"]}
    (folder / "done.json").write_text(json.dumps(done))
    (folder / "repaired").write_text("")
    study.work(cell, args)
    line, = json_lines(args.out / "results.jsonl")
    assert 1100 > line["seconds"]["dit"] > 1000 > line["seconds"]["tokenizer"]
    assert line["cpu_seconds"]["dit"] >= 100


def test_names_of_folders_and_files_stand_for_their_paths(fake, monkeypatch):
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
def test_a_stage_names_the_file_that_it_shares_with_all_cells(stage, file):
    args = Namespace(work=Path("work"), judge=Path("work/judge.safetensors"))
    for known in ((), ("REAL", "HALF")):
        command = stages(Cell("", "ALL", 1), "/photographs", False, known)[stage]
        assert study.made_for_all_cells(command, args) == (Path("work", file) if file else None)


# ---------------------------------------------------------------- all cells
@pytest.fixture
def drive(tmp_path, monkeypatch):
    """The driver from its command line on, with fake commands -> its exit status"""
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


def test_a_finished_cell_that_lacks_a_measure_is_reported(drive, monkeypatch, capsys):
    drive()
    known = study.stages
    monkeypatch.setattr(study, "stages", lambda *rest: known(*rest) | {"halved": "added later"})
    assert drive() == 0
    assert "finished without halved; delete its line" in capsys.readouterr().out


def test_the_second_start_finds_everything_finished(drive, tmp_path):
    results = tmp_path / "my results" / "results.jsonl"
    assert drive() == 0
    before = results.read_text()
    assert drive() == 0 and results.read_text() == before and len(before.splitlines()) == 2


def test_one_classifier_judges_all_cells_and_all_their_stages(drive, tmp_path, monkeypatch):
    fake_stages = {s: f"{tmp_path}/fake.py {s} RUN classifier"
                   for s in ("tokenizer", "recon", "judge")}
    monkeypatch.setattr(study, "stages", lambda *rest: fake_stages)
    assert drive() == 0
    work = tmp_path / "runs" / "my results" / "shapes-quick"
    name, = (work / "trained").read_text().split()
    assert (work / "judge.safetensors").read_text() == f"trained in {name}"


def test_a_broken_cell_stops_no_other(drive, tmp_path):
    folder = tmp_path / "runs" / "my results" / "shapes-quick" / "AE-750"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{half")
    assert drive() == 1
    done = json_lines(tmp_path / "my results" / "results.jsonl")
    assert [line["cell"] for line in done] == ["AE-250"]


def test_other_flags_are_not_mixed_with_earlier_results(drive):
    drive()
    with pytest.raises(ValueError, match="take another --out"):
        drive(also="--set w_koleo=0")


def test_finished_cells_of_other_constants_are_refused_without_the_work_folder_too(
        drive, tmp_path, monkeypatch):
    drive()
    study.shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ValueError, match="other images, constants or --also.*AE-250"):
        drive(also="--set w_koleo=0", list=True)
    monkeypatch.setitem(study.TABLE, "dit", (4000, 1, "ours"))
    with pytest.raises(ValueError, match="other images, constants"):
        drive()


def test_results_with_flags_in_place_of_settings_are_continued():
    """The published results were made with --head-hidden 256, now --set head_hidden=256"""
    results = json_lines(Path(study.__file__).parent / "results.jsonl")
    constants = {"training_pictures": 50_000, "also": ""}
    constants |= {name: str(value[0]) for name, value in study.TABLE.items()}
    wanted = study.spelled_alike(constants)
    assert all(study.spelled_alike(r["constants"]) == wanted for r in results if not r["quick"])
    assert study.spelled_alike({"recipe": "--ema 0.9"}) != study.spelled_alike(
        {"recipe": "--set ema=0.98"})


def test_a_line_cut_by_a_full_disk_is_named(drive, tmp_path):
    drive()
    with open(tmp_path / "my results" / "results.jsonl", "a") as f:
        f.write('{"cell": "AE-')
    with pytest.raises(ValueError, match="results.jsonl has an incomplete line"):
        drive()


def test_a_pattern_that_fits_nothing_is_refused_with_the_names_of_all_cells(drive):
    with pytest.raises(ValueError, match="fits no cell; there are: AE-750, ALL-250"):
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


def test_spearman_is_one_for_whatever_rises_and_pearson_for_lines_alone():
    x = np.arange(1.0, 9)
    assert figures.correlation(x, 3 * x + 1) == pytest.approx((1, 1))
    pearson, spearman = figures.correlation(x, np.exp(x))
    assert spearman == pytest.approx(1) and pearson < 0.9
    assert figures.correlation(x, -np.exp(x))[1] == pytest.approx(-1)
    assert figures.ranks([5, 1, 5]).tolist() == [1.5, 0, 1.5]


def test_a_missing_measure_does_not_enter_a_correlation():
    x, y = [1, 2, np.nan, 3, 4], [2, 4, 100, 6, np.nan]
    assert figures.correlation(x, y) == pytest.approx((1, 1))


def test_within_objectives_needs_two_objectives_of_two_points():
    rows = [row("AE", 1, 0.1, 9.0), row("AE", 3, 0.2, 8.0), row("ALL", 1, 0.3, 5.0)]
    x, y = metric(rows, "linear probe latent"), metric(rows, "FD-classifier")
    assert np.isnan(figures.within(rows, x, y))
    rows.append(row("ALL", 3, 0.4, 4.0))
    x, y = metric(rows, "linear probe latent"), metric(rows, "FD-classifier")
    assert figures.within(rows, x, y) == pytest.approx(-1)
    assert figures.within(rows, x + [0, 0, 5, 5], y) == pytest.approx(-1)


def test_seeds_are_averaged_before_anything_is_correlated():
    one, other = row("AE", 3, 0.1, 8.0), row("AE", 3, 0.3, 6.0, seed=1)
    mean, = figures.over_seeds([one, other])
    assert mean["metrics"]["linear probe latent"] == pytest.approx(0.2)
    assert mean["metrics"]["FD-classifier"] == 7 and mean["steps"] == 3
    others = [row("AE", 3, 0.9, 99.0, pictures=100), row("ALL", 3, 0.9, 99.0)]
    lines = [line.split() for line in figures.spread([one, other, *others])]
    found, = [words for words in lines if "FD-classifier" in words]
    assert found == "AE 3 steps, 2 seeds FD-classifier 7 from 6 to 8".split()


def test_figures_are_drawn_of_what_is_there_and_the_others_are_named(tmp_path, capsys):
    rows = [row("AE", 1, 0.1, 9.0), row("ALL", 1, 0.3, 5.0), row("AE", 3, 0.1, 9.5),
            row("ALL", 1, 0.2, 6.0, pictures=100)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures.main(tmp_path)
    drawn = ("scaling", "objectives", "prediction", "by_pictures")
    assert {p.name for p in tmp_path.glob("*.png")} == {f"shapes-quick-{name}.png"
                                                        for name in drawn}
    assert "shapes-quick-by_size.png is left out" in capsys.readouterr().out
