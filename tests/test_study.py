"""The study compares tokenizers and nothing else: what is common is the same to the letter, what is finished is not done again."""
import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import figures
import study
from test_readme import PARSERS
from study import OBJECTIVES, Cell, cells, link_pictures, stages

SHAPES = "shapes:objects=1,size=0.6-0.9"


def commands(cell, data="/photographs", quick=False):
    return stages(cell, data, quick)


# ---------------------------------------------------------------- the protocol
@pytest.mark.parametrize("data, quick", [("/photographs", False), (SHAPES, True)])
def test_all_cells_have_the_same_decoder_training_dit_sampler_and_measures(data, quick):
    first, *others = (commands(cell, data, quick) for cell in cells(quick) if not cell.dit)
    for other in others:
        for stage in first.keys() & other.keys() - {"tokenizer"}:
            assert other[stage] == first[stage]


@pytest.mark.parametrize("data, quick", [("/photographs", False), (SHAPES, True)])
def test_every_command_of_every_cell_is_one_that_its_script_knows(data, quick, monkeypatch):
    for cell in cells(quick):
        for command in commands(cell, data, quick).values():
            script, *flags = shlex.split(command)
            monkeypatch.setattr(sys, "argv", [script, *flags])
            PARSERS[script]()


def test_objectives_differ_by_their_weights_alone():
    whole = commands(Cell("", "ALL", 100))["tokenizer"].split()
    for objective, weights in OBJECTIVES.items():
        one = commands(Cell("", objective, 100))["tokenizer"].split()
        at = whole.index("--perceptual")
        assert one == whole[:at] + weights.split() + whole[at:]


def test_a_longer_dit_is_the_same_cell_up_to_that_command():
    short, long = commands(Cell("", "ALL", 9)), commands(Cell("", "ALL", 9, dit=12_000))
    assert {stage for stage in short if short[stage] != long[stage]} == {"dit"} and long["dit"] == short["dit"].replace("--steps 4000", "--steps 12000")
    assert Cell("", "ALL", 9, dit=12_000).name == "ALL-9-dit12000"


def test_only_a_tokenizer_that_learned_words_is_asked_for_names():
    assert {objective for objective in OBJECTIVES if "zeroshot" in commands(Cell("", objective, 1))} == {"CLIP+AE", "ALL"}


def test_a_share_of_the_pictures_is_for_the_tokenizer_alone():
    few = commands(Cell("", "AE", 1, pictures=100))
    assert [stage for stage, command in few.items() if "RUN/pictures" in command] == ["tokenizer"]
    assert all("DATA" in few[stage] for stage in ("decoder", "latents", "probe", "recon", "fid"))


@pytest.mark.parametrize("quick", [False, True])
def test_no_two_cells_share_a_name_and_no_name_hides_what_differs(quick):
    assert len({cell.name for cell in cells(quick)}) == len(cells(quick))
    assert Cell("", "ALL", 9, size="micro", decoder="pico", pictures=100, seed=2).name == "ALL-9-micro-decoder_pico-n100-seed2"


def test_every_constant_of_the_protocol_reaches_a_command(monkeypatch):
    for name, values in study.TABLE.items():
        if name == "base":                                                 # that of the cells
            continue
        before = commands(Cell("", "ALL", 1)) | {"shapes": commands(Cell("", "ALL", 1), SHAPES)}
        with monkeypatch.context() as m:
            m.setitem(study.TABLE, name, ("987654",) * 3)
            assert commands(Cell("", "ALL", 1)) | {"shapes": commands(Cell("", "ALL", 1), SHAPES)} != before


# ---------------------------------------------------------------- the data
def test_linked_pictures_are_evenly_spread_over_classes_and_validation_is_whole(tmp_path):
    data = tmp_path / "data"
    for k in range(4):
        for split, n in (("train", 10), ("val", 3)):
            (data / split / f"class{k}").mkdir(parents=True)
            for j in range(n):
                (data / split / f"class{k}" / f"{j}.png").write_text("")
    (data / "classnames.txt").write_text("class0\ta\n")
    for _ in range(2):                                                     # a second time changes nothing
        link_pictures(data, tmp_path / "few", 8)
    assert [len(list((tmp_path / "few" / "train" / f"class{k}").iterdir())) for k in range(4)] == [2, 2, 2, 2]
    assert len(list((tmp_path / "few" / "val").glob("*/*"))) == 12 and (tmp_path / "few" / "classnames.txt").exists()


# ---------------------------------------------------------------- going on
PLAY = """import json, pathlib, sys
stage, run = sys.argv[1], pathlib.Path(sys.argv[2])
with open(run / "calls", "a") as f:
    f.write(stage + "\\n")
if stage == "dit" and not (run / "repaired").exists():
    sys.exit("a disk is full")
for folder in ("tokenizer", "decoder", "dit", "samples"):
    (run / folder).mkdir(exist_ok=True)
    (run / folder / "log.jsonl").write_text("".join(json.dumps({"step": k, "loss": 1 / k}) + "\\n" for k in range(1, 100)))
(run / "samples" / "grid.png").write_text("a picture")
if "classifier" in sys.argv and not (run / "judge.safetensors").exists():
    (run / "judge.safetensors").write_text("taught in " + run.name)
    with open(run.parent / "taught", "a") as f:
        f.write(run.name + "\\n")
with open(run / "metrics.jsonl", "a") as f:
    f.write(json.dumps({"name": stage, "value": 1.0, "protocol": f"of {stage} on /photographs"}) + "\\n")
"""


@pytest.fixture
def played(tmp_path, monkeypatch):
    """The driver's ways, with a play of three commands in place of hours"""
    (tmp_path / "play.py").write_text(PLAY)
    monkeypatch.setattr(study, "stages", lambda cell, *rest: {s: f"{tmp_path}/play.py {s} {tmp_path}/work/{cell.name}" for s in ("tokenizer", "dit", "fid")})
    (tmp_path / "work").mkdir()
    return Cell("1", "AE", 10), Namespace(work=tmp_path / "work", out=tmp_path, data="/photographs", shown="photographs", prefix="photographs", quick=False, also="", constants={},
                                          judge=tmp_path / "judge.safetensors")


def test_a_failed_cell_goes_on_where_it_failed_and_leaves_a_line_and_a_log_alone(played):
    cell, args = played
    folder = args.work / cell.name
    with pytest.raises(RuntimeError, match="a disk is full"):
        study.work(cell, args)
    assert not (args.out / "results.jsonl").exists()
    (folder / "repaired").write_text("")
    study.work(cell, args)
    assert (folder / "calls").read_text().split() == ["tokenizer", "dit", "dit", "fid"]
    line, = (json.loads(line) for line in (args.out / "results.jsonl").read_text().splitlines())
    assert line["metrics"] == {"tokenizer": 1.0, "dit": 1.0, "fid": 1.0} and line["protocol"]["fid"] == "of fid on DATA"
    log = [json.loads(line) for line in (args.out / "logs" / "photographs-AE-10.jsonl").read_text().splitlines()]
    assert len(log) <= 40 and {x["step"] for x in log} >= {1, 99}
    assert not any((folder / name).exists() for name in ("tokenizer", "decoder", "dit", "samples"))
    assert not list(args.out.rglob("*.png")) or list(args.out.rglob("*.png")) == [folder / "grid.png"]           # of photographs: in the work folder alone


def test_two_drivers_do_not_work_on_the_same_cell(played):
    cell, args = played
    (args.work / cell.name).mkdir()
    with open(args.work / cell.name / "lock", "w") as lock:
        study.fcntl.flock(lock, study.fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another driver"):
            study.work(cell, args)
    assert not (args.work / cell.name / "calls").exists()


# ---------------------------------------------------------------- the whole
@pytest.fixture
def drive(tmp_path, monkeypatch):
    """The driver from its command line on, with the play in place of the commands -> what it said, its exit status"""
    (tmp_path / "play.py").write_text(PLAY)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "stages", lambda *_: {s: f"{tmp_path}/play.py {s} RUN" for s in ("tokenizer", "fid")})
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)

    def go(**flags):
        args = Namespace(quick=True, data=SHAPES, only="AE-*", jobs=2, list=False, also="", out=tmp_path / "my results")
        with pytest.raises(SystemExit) as end:
            study.main(Namespace(**vars(args) | flags))
        return end.value.code
    return go


def test_a_finished_cell_that_lacks_a_measure_is_said(drive, monkeypatch, capsys):
    drive()
    known = study.stages
    monkeypatch.setattr(study, "stages", lambda *a: known(*a) | {"halved": "a later idea"})
    assert drive() == 0 and "finished without halved; delete its line" in capsys.readouterr().out


def test_the_second_start_finds_everything_done(drive, tmp_path):
    assert drive() == 0
    before = (tmp_path / "my results" / "results.jsonl").read_text()
    assert drive() == 0 and (tmp_path / "my results" / "results.jsonl").read_text() == before and len(before.splitlines()) == 2


def test_one_classifier_judges_all_cells_and_all_their_stages(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "stages", lambda *_: {s: f"{tmp_path}/play.py {s} RUN classifier" for s in ("tokenizer", "recon", "judge")})
    assert drive() == 0
    work = tmp_path / "runs" / "my results" / "shapes-quick"
    name, = (work / "taught").read_text().split()
    assert (work / "judge.safetensors").read_text() == f"taught in {name}"


def test_a_broken_cell_stops_no_other(drive, tmp_path):
    (tmp_path / "runs" / "my results" / "shapes-quick" / "AE-750").mkdir(parents=True)
    (tmp_path / "runs" / "my results" / "shapes-quick" / "AE-750" / "done.json").write_text("{half")
    assert drive() == 1
    assert [json.loads(line)["cell"] for line in (tmp_path / "my results" / "results.jsonl").read_text().splitlines()] == ["AE-250"]


def test_other_flags_do_not_mix_with_what_was_begun(drive):
    drive()
    with pytest.raises(ValueError, match="take another --out"):
        drive(also="--w-koleo 0")


def test_finished_cells_of_other_constants_are_refused_even_where_the_work_folder_is_gone(drive, tmp_path, monkeypatch):
    drive()
    study.shutil.rmtree(tmp_path / "runs")
    with pytest.raises(ValueError, match="other pictures, constants or --also.*AE-250.*take another --out"):
        drive(also="--w-koleo 0", list=True)
    monkeypatch.setitem(study.TABLE, "dit", (4000, 1, "ours"))
    with pytest.raises(ValueError, match="other pictures, constants"):
        drive()


def test_a_line_cut_by_a_full_disk_is_named(drive, tmp_path):
    drive()
    with open(tmp_path / "my results" / "results.jsonl", "a") as f:
        f.write('{"cell": "AE-')
    with pytest.raises(ValueError, match="results.jsonl has a line that is not whole"):
        drive()


def test_times_of_a_stopped_stage_are_those_of_all_its_parts(played):
    cell, args = played
    folder = args.work / cell.name
    with pytest.raises(RuntimeError):
        study.work(cell, args)
    done = json.loads((folder / "done.json").read_text())
    done["dit"] = {"exit": 1, "seconds": 1000 + done["dit"]["seconds"], "cpu": 100 + done["dit"]["cpu"]}            # as if its first part had been long
    (folder / "done.json").write_text(json.dumps(done))
    (folder / "repaired").write_text("")
    study.work(cell, args)
    line = json.loads((args.out / "results.jsonl").read_text())
    assert 1100 > line["seconds"]["dit"] > 1000 > line["seconds"]["tokenizer"] and line["cpu_seconds"]["dit"] >= 100


def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is(drive):
    with pytest.raises(ValueError, match="fits no cell; there are: AE-750, ALL-250"):
        drive(only="nope*")


# ---------------------------------------------------------------- the figures
def row(objective, steps, probe, fd, **more):
    metrics = {"linear probe latent": probe, "PSNR": 20.0 + steps, "rFD-classifier": 1.0, "FD-classifier": fd, "samples recognised": 0.5}
    return {"cell": f"{objective}-{steps}", "questions": "1", "objective": objective, "steps": steps, "size": "nano", "decoder": "", "pictures": 0, "dit": 0, "seed": 0, "data": "shapes",
            "quick": True, "constants": {"training_pictures": 50_000, "samples": "2500", "dit": "4000"}, "metrics": metrics, "gflops_a_step": {"tokenizer": 25.0}, "cpu_seconds": {"tokenizer": float(steps)}} | more


def test_spearman_is_one_for_whatever_rises_and_pearson_for_lines_alone():
    x = np.arange(1.0, 9)
    assert figures.correlation(x, 3 * x + 1) == pytest.approx((1, 1))
    pearson, spearman = figures.correlation(x, np.exp(x))
    assert spearman == pytest.approx(1) and pearson < 0.9
    assert figures.correlation(x, -np.exp(x))[1] == pytest.approx(-1)
    assert figures.ranks([5, 1, 5]).tolist() == [1.5, 0, 1.5]
    assert figures.correlation([1, 2, np.nan, 3, 4], [2, 4, 100, 6, np.nan]) == pytest.approx((1, 1))          # a measure that was not made says nothing


def test_within_objectives_needs_two_objectives_of_two_points():
    alone = [row("AE", 1, 0.1, 9.0), row("AE", 3, 0.2, 8.0), row("ALL", 1, 0.3, 5.0)]
    x, y = (np.array([r["metrics"][name] for r in alone]) for name in ("linear probe latent", "FD-classifier"))
    assert np.isnan(figures.within(alone, x, y))
    both, x, y = alone + [row("ALL", 3, 0.4, 4.0)], np.append(x, 0.4), np.append(y, 4.0)
    assert figures.within(both, x, y) == pytest.approx(-1) and figures.within(both, x + 5 * np.array([0, 0, 1, 1]), y) == pytest.approx(-1)


def test_seeds_become_their_mean_before_anything_is_correlated():
    one, other = row("AE", 3, 0.1, 8.0), row("AE", 3, 0.3, 6.0, seed=1)
    mean, = figures.over_seeds([one, other])
    assert mean["metrics"]["linear probe latent"] == pytest.approx(0.2) and mean["metrics"]["FD-classifier"] == 7 and mean["steps"] == 3
    said, = [line.split() for line in figures.spread([one, other, row("AE", 3, 0.9, 99.0, pictures=100), row("ALL", 3, 0.9, 99.0)]) if "FD-classifier" in line.split()]
    assert said == "AE 3 steps, 2 seeds FD-classifier 7 from 6 to 8".split()


def test_figures_are_drawn_of_what_is_there_and_name_what_is_not(tmp_path, capsys):
    rows = [row("AE", 1, 0.1, 9.0), row("ALL", 1, 0.3, 5.0), row("AE", 3, 0.1, 9.5), row("ALL", 1, 0.2, 6.0, pictures=100)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    figures.main(tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {f"shapes-quick-{name}.png" for name in ("scaling", "objectives", "prediction", "by_pictures")}
    assert "shapes-quick-by_size.png is left out" in capsys.readouterr().out
