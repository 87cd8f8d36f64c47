from pathlib import Path

import pytest

from tests.commands import run_command


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 phantoms of 64 px, packed raw: 28 to 32 to train on, some to validate, some to test."""
    folder = tmp_path_factory.mktemp("phantoms")
    run_command("-m", "pipeline.phantom", folder, "--num-images", "40", "--size-px", "64").check_returncode()
    done = run_command(
        *("shard_cxr14.py", "pack", folder / "images", "--out", folder / "shards", "--size", "64"),
        *("--labels", folder / "Data_Entry_2017.csv", "--boxes", folder / "BBox_List_2017.csv"),
        *("--train-val-list", folder / "train_val_list.txt", "--test-list", folder / "test_list.txt"),
        *("--val-fraction", "0.2", "--samples-per-shard", "8"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "shards"
