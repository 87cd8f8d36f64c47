import json
from pathlib import Path

from benchmarks.bench_big_set import write_set
from pipeline.shardset import ShardSet, verify_shard_set
from tests.commands import run_command


def test_set_of_noise_is_a_good_shard_set(tmp_path: Path) -> None:
    write_set(tmp_path / "set", size_px=32, num_samples=25, samples_per_shard=10)
    assert verify_shard_set(tmp_path / "set") == []
    assert [shard.samples for shard in ShardSet.open(tmp_path / "set").shards] == [10, 10, 5]
    keys = [key for key, _, _ in ShardSet.open(tmp_path / "set").read_samples("train")]
    assert keys == [f"{i:08d}" for i in range(25)]


def test_last_line_holds_the_figures(tmp_path: Path) -> None:
    done = run_command("-m", "benchmarks.bench_big_set", "--quick", "--work", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (row,) = result["rows"]
    assert (result["benchmark"], row["name"], row["samples"]) == ("bench_big_set", "raw-32-10k", 10_000)
    assert 0 < row["open_seconds"] + row["build_seconds"] < row["first_batch_seconds"]
    assert 0 < row["loader_memory_mib"] < 2048
    assert [path.name for path in tmp_path.iterdir()] == ["raw-32-10k"]


def test_unknown_row_is_bad_usage() -> None:
    done = run_command("-m", "benchmarks.bench_big_set", "--rows", "raw-7")
    assert done.returncode == 2
    assert "there are raw-32-10k" in done.stderr
