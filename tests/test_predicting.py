"""What a dry run predicts, against arithmetic by hand and lists of tensors of the largest open models."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lox_stream import Options, plan
from lox_stream.costs import CARD_THREADS, PINNED_BYTES, bytes_on_card, part_rows, step_bytes, thread_bytes
from lox_stream.errors import DeviceError, MemoryBudgetError, OptionError
from lox_stream.predicting import OTHER_S, Machine, parse_machine, predict
from lox_stream.rendering import plan_tables
from lox_stream.synthetic import write_pair

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PUBLISHED = {  # bytes and shards of the model.safetensors.index.json on the hub
    "llama-3.1-70b": (141_107_412_992, 30),
    "llama-3.1-405b": (811_706_777_600, 191),
    "qwen2.5-72b": (145_412_407_296, 37),
    "mixtral-8x22b": (281_260_142_592, 59),
}
MEASURED = """if True:
    import atexit, pathlib, sys
    from lox_stream.cli import main
    status = pathlib.Path("/proc/self/status")
    atexit.register(lambda: print(status.read_text().split("VmHWM:")[1].split()[0], file=sys.stderr))
    main()
"""


@pytest.fixture(scope="module")
def giants():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import giants
    finally:
        sys.path.remove(str(BENCHMARKS))
    return giants


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    shapes = {"a.weight": (2000, 1000), "b.weight": (300, 200), "norm.weight": (64,)}
    return write_pair(tmp_path_factory.mktemp("pair"), shapes)


@pytest.mark.parametrize("model", PUBLISHED)
def test_lists_of_tensors_have_the_size_of_what_is_published(giants, model):
    shapes, most = giants.MODELS[model]
    shards = giants.shards_of(shapes(), most)
    total = sum(giants.size_of(name, shape) for shard in shards for name, shape in shard.items())
    assert (total, len(shards)) == PUBLISHED[model]


def test_deepseek_v3_has_671_billion_parameters_and_a_layer_for_prediction(giants):
    counts = {True: 0, False: 0}
    for name, shape in giants.MODELS["deepseek-v3"][0]():
        counts[".layers.61." in name] += giants.size_of(name, shape) // (4 if name.endswith(giants.BIAS) else 2)
    assert counts[False] == pytest.approx(671e9, rel=1e-3)
    assert counts[True] == pytest.approx(13.5e9, rel=1e-2)


@pytest.mark.parametrize("model", ["llama-3.1-405b", "deepseek-v3"])
def test_a_dry_run_of_the_largest_models_takes_little_memory(giants, model, tmp_path):
    assert giants.main([model, str(tmp_path)]) == 0
    sides = ["--base", str(tmp_path / "base"), "--aligned", str(tmp_path / "aligned"), "--out", str(tmp_path / "out")]
    given = ["run", *sides, "--dry-run", "--json", "--device", "cuda", "--assume", "disk=7GB/s,pcie=25GB/s,gpu=2TB/s"]
    ran = subprocess.run([sys.executable, "-c", MEASURED, *given], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stderr.splitlines()[-1]) < 300_000, "KiB"
    document = json.loads(ran.stdout)
    prediction, total = document["prediction"], document["totals"]["bytes"]
    assert prediction["written_bytes"] == total
    assert 1.9 * total < prediction["read_bytes"] <= 2 * total
    assert prediction["elapsed_s"] == pytest.approx(3 * total / 7e9, rel=0.02), "the disk is what is slowest"
    assert any("no space" in warning for warning in document["warnings"]), "these are larger than this disk"
    assert not (tmp_path / "out").exists()


def test_what_is_predicted_is_what_arithmetic_gives(pair):
    steps = plan(*pair).steps
    large, small, norm = 2000 * 1000 * 2, 300 * 200 * 2, 64 * 2
    machine = Machine(disk=1e6, pcie=1e7, gpu=1e8, cores=4, core=1e6, passes=5)
    here = predict(plan(*pair), machine)
    assert (here.read_bytes, here.written_bytes) == (2 * (large + small) + norm, large + small + norm)
    assert here.gpu_bytes == 0
    assert set(here.busy_s) == {"disk", "cores"}
    assert here.busy_s["disk"] == pytest.approx((here.read_bytes + here.written_bytes) / 1e6)
    assert here.busy_s["cores"] == pytest.approx(2 * (large + small) * 5 / 1e6 / 4, rel=0.01)
    away = predict(plan(*pair, options=Options(device="cuda")), machine)
    assert away.busy_s["pcie"] == pytest.approx(2 * large / 1e7)
    assert away.busy_s["gpu"] == pytest.approx((2 * 5 * 2 * large + 2 * large) / 1e8)
    assert away.busy_s["cores"] == pytest.approx(2 * small * 5 / 1e6 / 4, rel=0.01)
    assert away.gpu_bytes == bytes_on_card(2000, 1000, 6, (2, 2))
    small_bytes = step_bytes(300, 200, 6, "randomized")
    assert here.host_bytes == step_bytes(2000, 1000, 6, "randomized") + small_bytes + thread_bytes(4)
    assert away.host_bytes == small_bytes + PINNED_BYTES + thread_bytes(CARD_THREADS)
    assert away.elapsed_s == max(away.busy_s.values())
    assert len(steps) == 3
    assert OTHER_S < 1e-8, "small beside the passes above"


def test_a_card_that_is_too_small_gets_a_matrix_in_blocks_with_each_pass(pair):
    machine = Machine(disk=1e6, pcie=1e7, passes=5)
    large = 2000 * 1000 * 2
    whole, blocks = (bytes_on_card(2000, 1000, 6, (2, 2), rows) for rows in (0, part_rows(2000, 1000)))
    for options, assumed in (
        (Options(device="cuda", gpu_memory_bytes=whole - 1), machine),
        (Options(device="cuda"), replace(machine, card=(whole - 1) / 0.8)),
    ):
        found = predict(plan(*pair, options=options), assumed)
        assert (found.in_blocks, found.gpu_bytes) == (1, whole - 1)
        assert found.busy_s["pcie"] == pytest.approx((2 * large + 4 * 2 * large + large) / 1e7)
    assert predict(plan(*pair, options=Options(device="cuda", gpu_memory_bytes=whole)), machine).in_blocks == 0
    with pytest.raises(
        DeviceError,
        match=rf"takes {blocks} bytes of GPU memory in the smallest blocks, expected at most the {blocks - 1} ",
    ):
        predict(plan(*pair, options=Options(device="cuda", gpu_memory_bytes=blocks - 1)), machine)


def test_several_gpus_share_the_work_and_torch_moves_more(pair):
    machine = Machine(disk=1e6, pcie=1e7, gpu=1e8, passes=5)

    def busy(**options):
        found = predict(plan(*pair, options=Options(threads=1, **options)), machine)
        return found.busy_s["pcie"], found.busy_s["gpu"], found.host_bytes

    one, two, torch = busy(device="cuda"), busy(device="cuda:0,1"), busy(device="cuda", kernels="torch")
    assert two[:2] == (one[0] / 2, one[1] / 2)
    assert two[2] - one[2] == PINNED_BYTES + thread_bytes(CARD_THREADS)
    assert torch[:2] == (one[0], 4 * one[1])


def test_a_full_svd_and_wide_blocks_take_longer(pair):
    def seconds(**options):
        return predict(plan(*pair, options=Options(**options)), Machine(cores=1)).busy_s["cores"]

    usual = seconds()
    assert seconds(svd="exact") > 20 * usual
    assert seconds(rank=64) > 2 * usual
    assert seconds(rank=0) < usual / 2


def test_passes_are_told_where_there_are_any(pair):
    for options in ({"rank": 0}, {"alpha": 0.0}, {"svd": "exact"}):
        found = predict(plan(*pair, options=Options(device="cuda", threads=1, **options)), Machine())
        nothing = found.host_bytes == thread_bytes(1)
        assert (found.passes, nothing or options == {"svd": "exact"}) == (0.0, True)


def test_the_memory_of_a_prediction_is_that_of_all_that_is_in_work_and_within_the_budget(pair):
    def bytes_of(cores, **options):
        return predict(plan(*pair, options=Options(**options)), Machine(cores=cores)).host_bytes

    large = step_bytes(2000, 1000, 6, "randomized")
    both = large + step_bytes(300, 200, 6, "randomized")
    assert bytes_of(2.5) == both + thread_bytes(3)
    assert bytes_of(2.5, threads=1) == both + thread_bytes(1)
    assert bytes_of(1, memory_bytes=large + thread_bytes(1)) == large + thread_bytes(1), "one waits for the other"
    assert bytes_of(1, memory_bytes=large) == large + thread_bytes(1), "one is always admitted"


def test_a_plan_for_a_gpu_tells_what_the_host_holds(pair):
    def told(**options):
        console = Console(width=200, file=io.StringIO())
        console.print(*plan_tables(plan(*pair, options=Options(**options))))
        return next(line for line in console.file.getvalue().splitlines() if "of a budget" in line)

    assert "for copies over the GPU" not in told()
    assert "128 MiB for copies over the GPU, of a budget" in told(device="cuda", skip=("b.weight",))
    assert " 0 B" not in told(device="cuda", skip=("b.weight",))
    assert "for b.weight and 128 MiB for copies" in told(device="cuda")
    assert "tiles alone, of a budget" in told(rank=0)


def test_more_gpu_memory_than_the_card_has_is_refused(pair):
    with pytest.raises(DeviceError, match="--gpu-memory is 2000000000, expected at most 900000000 of card=1000000000"):
        predict(plan(*pair, options=Options(device="cuda", gpu_memory_bytes=2 * 10**9)), Machine(card=1e9))


def test_the_slots_of_the_cards_have_to_fit_the_budget(pair):
    with pytest.raises(MemoryBudgetError, match=r"cuda:0,1: .* take 268435456 bytes .*--memory 256MiB"):
        plan(*pair, options=Options(device="cuda:0,1", memory_bytes=255 << 20))
    plan(*pair, options=Options(device="cuda:0,1", memory_bytes=256 << 20))


def test_what_is_not_assumed_is_not_predicted(pair):
    assert predict(plan(*pair), Machine()).busy_s == {}
    assert predict(plan(*pair), Machine()).elapsed_s is None
    assert predict(plan(*pair), parse_machine("cores=8")).elapsed_s is None, "without a disk"


def test_full_rank_takes_one_pass(pair):
    machine = Machine(cores=1, core=1e6)
    once = predict(plan(*pair, options=Options(rank=0)), machine).busy_s["cores"]
    assert once == pytest.approx(2 * (2000 * 1000 + 300 * 200) * 2 / 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("disc=7GB/s", "expected one of card, core, cores, disk, gpu, passes, pcie"),
        ("disk", "expected one of"),
        ("disk=fast", "a rate such as 7GB/s"),
        ("disk=-1", "a rate such as 7GB/s"),
        ("cores=0", "a number over 0"),
        ("disk=7", "a rate such as 7GB/s"),
        ("card=24", "a size such as 24GB"),
        ("card=24GB/s", "a size such as 24GB"),
        ("disk=1GB/s,disk=2GB/s", "disk is given twice"),
        ("passes=nan", "a number over 0"),
    ],
)
def test_a_machine_that_means_nothing_is_refused(text, told):
    with pytest.raises(OptionError, match=told):
        parse_machine(text)


def test_a_machine_is_read_as_people_write_it():
    machine = parse_machine(" disk=7GB/s, pcie=25GiB/s ,cores=2.5,passes=20")
    assert machine == Machine(disk=7e9, pcie=25 * 2**30, cores=2.5, passes=20)
    assert parse_machine("") == Machine()


def test_nodes_share_the_files_of_a_giant(giants, tmp_path, capsys):
    words = ["llama-3.1-405b", str(tmp_path), "--nodes", "1,8,64", "--assume", "disk=7GB/s,cores=64"]
    assert giants.main(words) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [
        "1 nodes, each with disk=7GB/s,cores=64: 5 min 48 s, 191 parts at most on one",
        "8 nodes, each with disk=7GB/s,cores=64: 43.7 s, 24 parts at most on one",
        "64 nodes, each with disk=7GB/s,cores=64: 5.5 s, 3 parts at most on one",
    ]
