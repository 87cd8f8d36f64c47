"""Shard sets on a real S3 server, on loopback, that checks keys and signatures."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

from errors import UserError
from pipeline.loader import LoaderSpec, PretrainLoader
from pipeline.shardset import ShardSet, verify_shard_set
from pipeline.spec import DistortionSpec, ViewSpec
from settings import Settings
from tests.commands import ROOT, run_command
from train import pretrain

BUCKET = "radiographs"
ALLOW_S3 = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
PACK = ("--size", "64", "--samples-per-shard", "1", "--val-fraction", "0.2")


def start_server(port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start an S3 server that checks keys from the fifth request on."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "4"}
        )


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("the S3 server does not start")


def connect(service: str) -> Any:
    """Another client than the one that we test."""
    return boto3.Session().client(service)  # with the keys that are set now


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a user sets to reach the server; this process has it set too."""
    folder = tmp_path_factory.mktemp("s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anybody",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "TMPDIR": str(folder),
    }
    server = start_server(port, folder / "log.txt")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            wait_for(port)
            connect("s3").create_bucket(Bucket=BUCKET)
            iam = connect("iam")
            iam.create_user(UserName="reader")
            key = iam.create_access_key(UserName="reader")["AccessKey"]
            iam.put_user_policy(UserName="reader", PolicyName="s3", PolicyDocument=json.dumps(ALLOW_S3))
            key = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
            for name, value in key.items():
                patch.setenv(name, value)
            yield environment | key
        finally:
            server.terminate()
            server.wait()


@pytest.fixture
def client(environment: dict[str, str]) -> Any:
    assert environment
    return connect("s3")


def objects(client: Any, folder: str) -> dict[str, bytes]:
    """What lies in a folder of the bucket."""
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/").get("Contents", [])
    return {
        entry["Key"].removeprefix(f"{folder}/"): client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        for entry in found
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def uploaded(environment: dict[str, str], shard_folder: Path) -> str:
    """The shard set of `shard_folder`, copied into the bucket by another client."""
    assert environment
    client = connect("s3")
    for name, content in tree(shard_folder).items():
        client.put_object(Bucket=BUCKET, Key=f"shards/{name}", Body=content)
    return f"s3://{BUCKET}/shards"


@pytest.fixture(scope="module")
def images(shard_folder: Path) -> Path:
    return shard_folder.parent / "images"


@pytest.fixture(scope="module")
def packed_here(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("here") / "set"
    run_command("shard_cxr14.py", "pack", images, "--out", out, *PACK).check_returncode()
    return out


def pack(images: Path, out: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command("shard_cxr14.py", "pack", images, "--out", out, *PACK, *options, **environment)


# --- reading --------------------------------------------------------------------------------------------------------


def test_set_in_a_bucket_is_the_same_as_here(uploaded: str, shard_folder: Path) -> None:
    there, here = ShardSet.open(uploaded), ShardSet.open(f"{shard_folder}/")
    assert there.split("val").tar_paths == [f"{uploaded}/val/{path.name}" for path in shard_folder.glob("val/*.tar")]
    assert list(there.read_samples("train")) == list(here.read_samples("train"))
    assert verify_shard_set(uploaded, num_workers=3) == []


def test_loader_gives_the_same_batches_as_from_here(uploaded: str, shard_folder: Path) -> None:
    loaders = [
        PretrainLoader(
            LoaderSpec(
                shard_sets=(ShardSet.open(path),),
                view=ViewSpec(crop_size_px=32),
                distortion=DistortionSpec(),
                batch_size_per_rank=4,
                seed=1,
                device=torch.device("cpu"),
            )
        )
        for path in (uploaded, shard_folder)
    ]
    for _ in range(2):
        for there, here in zip(*loaders, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def test_training_from_a_bucket_is_the_same_as_from_here(uploaded: str, shard_folder: Path, tmp_path: Path) -> None:
    runs = []
    for name, shards in (("there", uploaded), ("here", str(shard_folder))):
        small = {"arch": "resnet18", "crop_size": 32, "batch_size": 4, "moco_k": 8, "max_steps": 2, "log_every": 1}
        settings = Settings(shards=(shards,), mode="di", run_dir=str(tmp_path / name), precision="fp32", **small)
        pretrain(settings, torch.device("cpu"))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        timed = ("images_per_second", "images_per_second_per_gpu", "data_wait_fraction")
        runs.append([{key: value for key, value in line.items() if key not in timed} for line in lines])
    assert len(runs[0]) == 3  # two steps and a validation
    assert runs[0] == runs[1]


def test_inspect_and_verify_read_a_bucket(uploaded: str, tmp_path: Path) -> None:
    done = run_command("shard_cxr14.py", "inspect", uploaded, "--image", tmp_path / "views.png")
    assert done.returncode == 0, done.stderr
    assert f"{uploaded}: 40 radiographs as raw, 64 px" in done.stdout
    assert (tmp_path / "views.png").exists()
    done = run_command("shard_cxr14.py", "verify", uploaded)
    assert (done.returncode, done.stdout) == (0, f"{uploaded}: good, 40 samples\n")


# --- packing --------------------------------------------------------------------------------------------------------


def test_pack_into_a_bucket_gives_what_it_gives_here(
    images: Path, packed_here: Path, client: Any, environment: dict[str, str]
) -> None:
    out = f"s3://{BUCKET}/new/set"
    done = pack(images, out)
    assert done.returncode == 0, done.stderr
    assert f"packed 40 images into {out}" in done.stdout
    assert objects(client, "new/set") == tree(packed_here)
    assert not list(Path(environment["TMPDIR"]).glob("dira-pack-*"))
    again = pack(images, out)
    assert again.stdout == f"{out} is packed already: nothing to do\n"
    other = pack(images, out, "--seed", "1")
    assert other.returncode == 1
    assert "seed 0 there, 1 here" in other.stderr
    assert objects(client, "new/set") == tree(packed_here)


def test_overwriting_in_a_bucket_leaves_nothing_of_the_old_set(images: Path, packed_here: Path, client: Any) -> None:
    out = f"s3://{BUCKET}/old"
    pack(images, out, "--val-fraction", "0", "--store", "png").check_returncode()
    pack(images, out, "--overwrite").check_returncode()
    assert objects(client, "old") == tree(packed_here)


def test_bucket_folder_with_anything_else_is_refused_and_left_alone(images: Path, client: Any) -> None:
    client.put_object(Bucket=BUCKET, Key="photos/train/photo.png", Body=b"")
    done = pack(images, f"s3://{BUCKET}/photos", "--overwrite")
    assert done.returncode == 1
    assert done.stderr == f"error: s3://{BUCKET}/photos: holds something else (train); give --out a new folder\n"
    assert objects(client, "photos") == {"train/photo.png": b""}


@pytest.mark.parametrize("is_work_lost", [False, True])
def test_interrupted_upload_carries_on(
    images: Path, packed_here: Path, client: Any, tmp_path: Path, is_work_lost: bool
) -> None:
    folder = f"cut-{is_work_lost}"
    out = f"s3://{BUCKET}/{folder}"
    command = [sys.executable, "shard_cxr14.py", "pack", str(images), "--out", out, *PACK]
    (tmp_path / "work").mkdir()
    work = {"TMPDIR": str(tmp_path / "work")}
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while client.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/train/")["KeyCount"] < 6:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = objects(client, folder)
    assert ".pack/begun" in before
    assert "manifest.json" not in before
    with pytest.raises(UserError, match=r"no shard set \(manifest.json is missing\)"):
        ShardSet.open(out)
    for name in before:
        client.put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=b"mark")
    if is_work_lost:
        (tmp_path / "other").mkdir()
        work = {"TMPDIR": str(tmp_path / "other")}
    done = pack(images, out, **work)
    assert done.returncode == 0, done.stderr
    expected, after = tree(packed_here), objects(client, folder)
    assert after.keys() == expected.keys()
    marked = {name for name in after if after[name] == b"mark"}  # was not uploaded again
    assert len(marked) == 0 if is_work_lost else len(marked) > 4
    assert all(after[name] == expected[name] for name in after.keys() - marked)


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_wrong_key_is_told_by_every_command(uploaded: str, images: Path) -> None:
    for wrong, command in (
        ("AWS_ACCESS_KEY_ID", ("shard_cxr14.py", "inspect", uploaded)),
        ("AWS_SECRET_ACCESS_KEY", ("shard_cxr14.py", "verify", uploaded)),
        ("AWS_SECRET_ACCESS_KEY", ("shard_cxr14.py", "pack", images, "--out", f"s3://{BUCKET}/set")),
        ("AWS_ACCESS_KEY_ID", ("train.py", uploaded, "--mode", "di", "--device", "cpu")),
    ):
        done = run_command(*command, **{wrong: "wrong"})
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: s3://{BUCKET}/")
        assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in done.stderr
        assert done.stderr.count("\n") == 1


def test_what_is_missing_in_a_bucket_is_told(uploaded: str, client: Any, tmp_path: Path) -> None:
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # "discard": nobody listens there
    no_keys = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
    shards = ShardSet.open(uploaded)
    client.put_object(Bucket=BUCKET, Key="half/manifest.json", Body=json.dumps(shards.manifest).encode())
    for path, variables, reason in (
        (f"s3://{BUCKET}/half", {}, "test/test-000000.idx: missing"),
        (f"s3://{BUCKET}/nothing", {}, "no such folder"),
        ("s3://no-such-bucket/set", {}, "no such folder"),
        (uploaded, nobody, "Could not connect"),
        (uploaded, no_keys, "credentials"),
    ):
        done = run_command("shard_cxr14.py", "inspect", path, **variables)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {path}")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1


def test_pack_into_a_bucket_that_is_not_there_fails_before_it_packs(images: Path) -> None:
    done = pack(images, "s3://no-such-bucket/set")
    assert done.returncode == 1
    assert "bucket does not exist" in done.stderr
    assert "packing:" not in done.stderr


def test_object_that_vanishes_while_it_is_read_is_told(shard_folder: Path, client: Any) -> None:
    for name, content in tree(shard_folder).items():
        client.put_object(Bucket=BUCKET, Key=f"vanishing/{name}", Body=content)
    path = f"s3://{BUCKET}/vanishing"
    shards = ShardSet.open(path)
    view = ViewSpec(crop_size_px=32)
    spec = LoaderSpec((shards,), view, None, batch_size_per_rank=4, seed=0, device=torch.device("cpu"))
    loader = PretrainLoader(spec)
    for tar_path in shards.split("train").tar_paths:
        client.delete_object(Bucket=BUCKET, Key=tar_path.removeprefix(f"s3://{BUCKET}/"))
    with pytest.raises(UserError, match=f"{path}: DALI cannot read on"):
        list(islice(chain.from_iterable(repeat(loader)), 30))
    with pytest.raises(UserError, match=r"train-000000\.tar: cannot be read"):
        list(shards.read_samples("train"))
    with pytest.raises(UserError, match="DALI cannot read on"):
        PretrainLoader(spec)
