"""The benchmarks: each one runs, ends in one JSON line, and has no speed for a wrong result."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lox_stream import plan

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def benchmark(name):
    """A module of benchmarks/, imported as the scripts there import each other."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def smoke(script, *options):
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)


def last_line(text):
    return json.loads(text.splitlines()[-1])


def test_the_stream_benchmark_measures_everything_and_leaves_nothing(tmp_path):
    work, results = tmp_path / "work", tmp_path / "figures.md"
    ran = smoke("bench_stream.py", "--work", str(work), "--results", str(results))
    assert ran.returncode == 0, ran.stderr
    figures = last_line(ran.stdout)
    assert figures["benchmark"] == "bench_stream"
    assert figures == json.loads(results.with_suffix(".json").read_text())
    pair = figures["pairs"]["smoke"]
    assert pair["identical_to_oracle"] >= 0.9995
    assert pair["input_bytes"] > pair["output_bytes"] > 0
    for timing in ("alone", "floor", "run"):
        assert pair[timing]["median_s"] > 0
    assert set(pair["naive_shapes"]) == {"300x128", "128x160", "160x128", "48x128", "128x128"}
    assert min(pair["peak_anon_bytes"].values()) > 10 << 20, "a process with torch holds more"
    assert figures["command"] in results.read_text()
    assert list(work.iterdir()) == []


@pytest.mark.torture
def test_the_svd_benchmark_goes_on_where_it_was_and_writes_every_result(tmp_path):
    results = tmp_path / "new" / "svd.md"
    ran = smoke("bench_svd.py", "--work", str(tmp_path / "work"), "--results", str(results))
    assert ran.returncode == 0, ran.stderr
    figures = last_line(ran.stdout)
    assert figures == json.loads(results.with_suffix(".json").read_text())
    assert set(figures["verdicts"]) == {"0.9995", "0.9999"}
    assert len(figures["verdicts"]["0.9995"]) == 2
    assert len(list((tmp_path / "work").glob("*.pt"))) == 2
    with results.with_suffix(".csv").open() as file:
        assert {row["solver"] for row in csv.DictReader(file)} >= {"lox-stream", "full", "svds-arpack"}
    assert all(results.with_suffix(suffix).stat().st_size > 10_000 for suffix in (".png", ".svg"))
    again = smoke("bench_svd.py", "--work", str(tmp_path / "work"), "--only", "power*")
    assert "the exact result" not in again.stderr
    assert len(last_line(again.stdout)["verdicts"]["0.9995"]) == 1
    assert smoke("bench_svd.py", "--only", "no such case").returncode == 2


def test_planted_spectra_are_what_their_names_say():
    bench_svd = benchmark("bench_svd")
    s = bench_svd.spikes(700, 500, 6).double()
    assert len(s) == 500
    assert float(s[6] / s[5]) == pytest.approx(bench_svd.SPIKE_RATIO, abs=1e-3)
    assert float(s[:6].square().sum() / s.square().sum()) == pytest.approx(bench_svd.SPIKE_ENERGY, abs=0.02)
    for name, law in bench_svd.SPECTRA.items():
        s = law(300, 200, 6)
        assert len(s) == 200, name
        assert bool((s[1:] <= s[:-1] + 1e-6).all()), name
    for ratio in ("0.9", "0.97", "0.998"):
        s = bench_svd.SPECTRA[f"ratio {ratio}"](300, 200, 6)
        assert float(s[6] / s[5]) == pytest.approx(float(ratio), rel=1e-5)
    assert len(bench_svd.one_at_a_time()) == 26
    assert len(bench_svd.crossed()) == 11 * 6 * 3 * 4


def test_the_kernel_benchmark_measures_each_kernel():
    ran = smoke("bench_kernels.py")
    assert ran.returncode == 0, ran.stderr
    for timings in last_line(ran.stdout)["seconds"]["160x96"].values():
        assert len(timings) == 7
        assert all(timing["median_s"] > 0 for timing in timings.values())


def test_the_profile_accounts_for_the_whole():
    ran = smoke("profile_stream.py")
    assert ran.returncode == 0, ran.stderr
    record = last_line(ran.stdout)
    known = sum(timing["median_s"] for timing in record["seconds"].values())
    assert 0.3 * record["whole"]["median_s"] < known <= record["whole"]["median_s"]


def test_small_matrices_side_by_side_are_measured_for_every_solver_that_gets_there():
    ran = smoke("bench_small.py")
    assert ran.returncode == 0, ran.stderr
    for case in last_line(ran.stdout)["cases"]:
        assert {"lox-stream", "full", "gram-eigh"} <= set(case["solvers"])
        assert all(solver["differing"] <= 5e-4 and solver["all"]["median_s"] > 0 for solver in case["solvers"].values())


def test_several_outputs_of_one_solve_are_timed_once_they_are_right(monkeypatch, tmp_path):
    ran = smoke("bench_outputs.py")
    assert ran.returncode == 0, ran.stderr
    (case,) = last_line(ran.stdout)["cases"]
    assert {"one", "each", "together", "with adapter", "adapter", "apply"} == case["seconds"].keys()
    assert 0 < case["adapter_bytes"] < case["output_bytes"]
    bench = benchmark("bench_outputs")
    monkeypatch.setattr(bench, "_same", lambda folder, other: False)
    with pytest.raises(bench.WrongResult, match="the merged adapter is another output"):
        bench.main(["--smoke"])


@pytest.mark.parametrize("kernel", ["delta_matmul", "delta_rmatmul", "delta_normal"])
def test_a_wrong_kernel_has_no_speed(monkeypatch, capsys, kernel):
    bench = benchmark("bench_kernels")
    right = getattr(bench, kernel)

    def wrong(*args, **options):
        found = right(*args, **options)
        return (found[0], found[1] * (1 + 1e-4)) if isinstance(found, tuple) else found * (1 + 1e-4)

    monkeypatch.setattr(bench, kernel, wrong)
    assert bench.main(["--smoke"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert kernel in printed.err


def test_a_wrong_tensor_has_no_speed(monkeypatch, capsys, tmp_path):
    bench = benchmark("bench_stream")
    monkeypatch.setattr(bench, "ALPHA", 1.0)
    right = bench.agreement
    monkeypatch.setattr(bench, "agreement", lambda *args: right(*args[:-1], 1.25))
    assert bench.main(["--smoke", "--work", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "oracle" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_pair_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark("bench_stream").main(["--only", "135m,70b"])
    assert ended.value.code == 2
    assert "1.1b" in capsys.readouterr().err


def test_a_timing_tells_its_middle():
    timing = benchmark("harness").Timing([4.0, 1.0, 2.0, 3.0, 100.0])
    assert timing.median == 3.0
    assert timing.quantile(0.5) == 3.0
    assert timing.quantile(0.2) == pytest.approx(1.8)
    assert str(timing) == "3.00 s (1.80 to 23.20)"


def test_works_take_turns():
    seen = []
    benchmark("harness").alternate(2, {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, warm_up=False)
    assert seen == ["a", "b", "a", "b"]


def test_other_work_is_seen():
    spinning = "import time; end = time.monotonic() + 5\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", spinning])
    try:
        harness = benchmark("harness")
        assert harness.others_share(0.4) > 0.5 / harness.os.cpu_count()
    finally:
        other.kill()
        other.wait()


def test_a_watched_program_is_seen_at_its_peak():
    disk = benchmark("disk")
    code = "import time; data = b'x' * (64 << 20); time.sleep(0.3); del data; time.sleep(0.1); raise SystemExit(3)"
    ran = disk.watched([sys.executable, "-c", code])
    assert ran.code == 3
    assert 64 << 20 <= ran.peak_anon_bytes < 128 << 20
    assert ran.elapsed_s > 0.4


def test_the_floor_writes_what_a_run_writes(tmp_path):
    sizes = {"a": 5 << 20, "b": 1000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    side = [tmp_path / name for name in sizes]
    benchmark("disk").floor([side, side], tmp_path / "out")
    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == sizes
    assert all(b"\0" * 100 not in (tmp_path / "out" / name).read_bytes() for name in sizes), (
        "written, not only reserved"
    )


def test_the_naive_way_agrees_with_the_oracle():
    oracle = benchmark("oracle")
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(40, 30, generator=generator).bfloat16()
    w1 = (w0.float() + 0.01 * torch.randn(40, 30, generator=generator)).bfloat16()
    out = benchmark("naive").naive(w1, w0, 3, 1.25)
    assert oracle.agreement("w", w1, w0, out, 3, 1.25).share >= 0.999


def test_the_kernels_compile_for_each_processor_within_its_limits():
    pytest.importorskip("triton")
    ran = smoke("compile_kernels.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = last_line(ran.stdout)
    assert {one["target"] for one in figures["kernels"]} == {"sm_80", "sm_90", "sm_100"}
    assert all(one["registers"] > 0 for one in figures["kernels"])


def test_products_in_parts_are_as_accurate_as_their_bits():
    ran = smoke("bench_split.py")
    assert ran.returncode == 0, ran.stderr
    errors = {row["products"].rsplit(" ", 1)[1]: float(row["product"]) for row in last_line(ran.stdout)["rows"]}
    assert errors["tf32x3"] < 3 * errors["float32"] < errors["bf16x3"] < errors["tf32"]


@pytest.mark.torture
def test_the_memory_of_a_small_giant_is_measured():
    ran = smoke("bench_memory.py")
    assert ran.returncode == 0, ran.stderr
    assert {layers: peak > 1 << 20 for layers, peak in last_line(ran.stdout)["peaks"].items()} == {"2": True, "4": True}


def gpu_day(folder, *options, seconds=480):
    command = ["bash", str(BENCHMARKS / "gpu_day.sh"), "--smoke", str(folder), *options]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "SECONDS_IN_ALL": str(seconds)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=seconds + 30)


def test_the_day_of_the_gpu_works_as_far_as_a_cpu_can_tell(tmp_path):
    pytest.importorskip("triton")
    ran = gpu_day(tmp_path)
    assert ran.returncode == 0, ran.stderr
    figures = last_line(ran.stdout)
    assert figures == json.loads((tmp_path / "gpu.json").read_text())
    assert (figures["left_out"], figures["to_come"], figures["wrong"]) == ([], [], [])
    told, kernels, solvers, small, layer, runs = figures["tables"].values()
    assert [row[1] for row in told] == ["pass", "pass"]
    assert "passed" in (tmp_path / "tests.txt").read_text()
    swept = {tuple(row[0].split(", ")[:2]) for row in kernels}
    products = {(name, f"{lanes} columns") for name in ("delta_matmul", "delta_rmatmul") for lanes in (16, 32, 64)}
    assert swept == products | {("lowrank_update", "rank 6")}
    assert len(kernels) == 2 * len(products) + 3, "what is launched, and another tile of each"
    assert not any("-" in row[1:3] for row in kernels), "every candidate ran"
    ours = [row for row in solvers if row[0].startswith("lox-stream") and "against" not in row[0]]
    assert [float(row[2]) < 1e-3 for row in ours] == [True, True]
    assert [row[1].endswith("x faster") for row in solvers if "against" in row[0]] == [True, True]
    assert [row[0].split(",")[0].split(":")[0] for row in small] == [
        "eigenvectors of 16 x 16",
        "eigenvectors of 32 x 32",
        "a step's launches",
        "two matrices of 48 x 64",
    ]
    assert layer[-1][0] == "80 layers"
    assert [row[0].split(",")[0] for row in runs] == ["from /dev/shm", "from /dev/shm", "from disk"]
    assert all(float(row[4].split("updates ")[1].split("%")[0]) > 0 for row in runs), "all went over the card"
    assert all("reading " in row[4] for row in runs)
    measured = [figure["what"] for figure in figures["targets"].values() if figure["measured"] != "not measured"]
    assert len(measured) == len(figures["targets"]), "the leading table has them all"
    markdown = (tmp_path / "gpu.md").read_text()
    assert markdown.index("## Targets") < markdown.index("## Tests")


@pytest.mark.torture
def test_a_gpu_day_that_is_short_says_what_it_left_out_and_one_whose_tests_fail_fails(tmp_path):
    pytest.importorskip("triton")
    failing = tmp_path / "test_failing.py"
    failing.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    assert False\n")
    results = tmp_path / "gpu.md"
    ran = smoke("gpu_day.py", "--seconds", "40", "--tests", str(failing), "--results", str(results))
    figures = last_line(ran.stdout)
    assert ran.returncode == 1, ran.stderr
    assert figures["tables"]["Tests"][0][1] == "FAIL"
    assert figures["targets"]["tests"]["met"] is False
    assert "assert False" in (tmp_path / "tests.txt").read_text()
    ran = smoke("gpu_day.py", "--seconds", "1", "--results", str(results))
    figures = last_line(ran.stdout)
    assert ran.returncode == 0, "nothing failed"
    rows = [row for table in figures["tables"].values() for row in table]
    assert {row[-1] for row in rows} == {"left out: the time is up"}
    assert figures["left_out"] == [row[0] for row in rows]
    assert {figure["measured"] for name, figure in figures["targets"].items() if name != "day"} == {"not measured"}
    assert results.read_text().count("| not measured |\n") == len(figures["targets"]) - 1


def test_pending_has_every_figure_of_the_gpu_day_with_its_target():
    pending = (BENCHMARKS / "results" / "PENDING.md").read_text()
    for figure in benchmark("gpu_day_basis").figures().values():
        assert f"| {figure.what} | {figure.target} | `benchmarks/gpu_day.sh` |" in pending
    assert "to be written" not in pending


def test_the_best_other_solver_is_one_that_is_as_right():
    best_other = benchmark("gpu_day_basis").best_other
    found = {"ours": (2.0, 0.9997), "careless": (1.0, 0.9996), "slow": (9.0, 0.9999), "next": (8.0, 0.9997)}
    assert best_other(found, "ours") == (4.0, "next")
    assert best_other({"ours": (2.0, 0.9997), "careless": (1.0, 0.9)}, "ours") is None


def test_the_pair_of_a_gpu_day_is_as_large_as_space_and_time_allow(tmp_path, monkeypatch):
    basis, runs = benchmark("gpu_day_basis"), benchmark("gpu_day_runs")
    day = basis.Day(torch.device("cpu"), replace(basis.SMOKE, most_layers=9), basis.Clock(torch.device("cpu"), 1), 0.0)
    sizes = [2 * sum(map(math.prod, runs._shard(day, number).values())) for number in range(4)]
    for most, until, layers, ended_by in (
        (sum(sizes[:3]), math.inf, 2, "space"),
        (math.inf, 0.0, 1, "time"),
        (math.inf, math.inf, 9, ""),
        (sizes[0], math.inf, 0, "space"),
    ):
        pair = runs.Pair(tmp_path / f"{layers}{ended_by}")
        pair.folder.mkdir()
        pair.make(day, most, until)
        assert (pair.layers, pair.ended_by) == (layers, ended_by)
        made = plan(pair.folder / "base", pair.folder / "aligned")
        assert sum(step.aligned.n_bytes for step in made.steps) == pair.n_bytes <= most
    free = shutil.disk_usage(tmp_path).free
    assert 5 * runs._most_bytes(tmp_path, "disk") < free
    monkeypatch.setattr(runs, "_available_bytes", lambda: 1000)
    assert 5 * runs._most_bytes(tmp_path, "/dev/shm") < 500


def test_gpu_memory_beyond_the_budget_is_seen(monkeypatch):
    basis, runs = benchmark("gpu_day_basis"), benchmark("gpu_day_runs")
    day = basis.Day(torch.device("cuda"), basis.SMOKE, basis.Clock(torch.device("cpu"), 1), 0.0)
    beside = 5 * runs.COMPUTE_LANES * runs.LIBRARY_BYTES
    peaks = {"max_memory_allocated": 10**9 + 100, "max_memory_reserved": 10**9 + 100 + beside}
    for name in peaks:
        monkeypatch.setattr(torch.cuda, name, lambda name=name: peaks[name])
    assert runs._peaks(day, 100, 10**9, 5)[1]
    assert not runs._peaks(day, 99, 10**9, 5)[1], "a byte more than that is too much"
    assert runs._peaks(day, 100, 10**9, 5)[0] == f"1.00 GB used, {1 + beside / 1e9:.2f} GB kept of 1.00 GB"


def test_results_that_cannot_be_written_leave_the_earlier_ones(tmp_path):
    harness = benchmark("harness")
    table = harness.Table("Figures", ("what", "time"), (("a", "1 s"),))
    harness.save(tmp_path / "gpu.md", harness.record_of("gpu_day", {}), [table])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"gpu.md", "gpu.json"}
    with pytest.raises(TypeError):
        harness.save(tmp_path / "gpu.md", harness.record_of("gpu_day", {"figure": object()}), [table, table])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_time_of_a_disk_is_known_or_said_to_be_unknown(tmp_path):
    disk = benchmark("disk")
    assert disk.busy_s(Path("/proc")) is None
    before = disk.busy_s(tmp_path)
    assert before is None or 0 <= before <= disk.busy_s(tmp_path)


@pytest.mark.torture
def test_the_cost_model_is_held_against_a_model_that_it_was_not_fitted_to():
    ran = smoke("check_model.py")
    assert ran.returncode == 0, ran.stderr
    errors = last_line(ran.stdout)["errors"]
    assert errors.keys() == {"135m", "1.1b", "4096", "70B in small"}
    assert all(one.keys() == {"computation", "run", "memory"} for one in errors.values())
    assert all(one["memory"] <= 1 for one in errors.values()), "what is predicted is the most"


def test_the_docs_tell_the_error_of_the_cost_model_as_it_was_measured():
    errors = json.loads((BENCHMARKS / "results" / "model.json").read_text())["errors"]
    sentence = (ROOT / "docs" / "cli.md").read_text().split("the\ncomputation is off by ")[1].split("Whole runs")[0]
    assert re.findall(r"[+-]\d+ %", sentence) == [f"{100 * one['computation']:+.0f} %" for one in errors.values()]


def test_what_the_benchmark_of_the_cloud_times_fetches_every_byte_once(monkeypatch):
    """Its servers and fsspec belong to no environment of ours, so the rest of it is only imported here."""
    bench_cloud = benchmark("bench_cloud")
    monkeypatch.setattr(bench_cloud, "PIECE_BYTES", 1000)
    data = os.urandom(4500)
    asked = []

    def fetch(start, end):
        asked.append((start, end))
        return data[start:end]

    elapsed_s, found, _ = bench_cloud.fetch_all(fetch, len(data))
    assert found == hashlib.sha256(data).hexdigest()
    assert sorted(asked) == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 4000), (4000, 4500)]
    assert elapsed_s > 0
    ran = subprocess.run([sys.executable, str(BENCHMARKS / "bench_cloud.py"), "--help"], capture_output=True, text=True)
    assert (ran.returncode, "--mib" in ran.stdout) == (0, True), ran.stderr


@pytest.mark.torture
def test_the_benchmark_of_ray_holds_the_output_against_that_of_one_machine():
    ran = smoke("bench_ray.py", "--rate", "1e6", "--files", "4")
    assert ran.returncode == 0, ran.stderr
    figures = last_line(ran.stdout)
    assert figures["benchmark"] == "bench_ray"
    assert figures["efficiency"]["1"] == 1.0
    assert figures["run_s"]["1"] >= figures["moved_bytes"] / 1e6
