import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from errors import Unfinished, UserError
from model.checkpoint import link, load_checkpoint, save_checkpoint
from pipeline.spec import Batch
from rundir import RunLog, lock
from settings import Settings
from tests.commands import run_command
from tests.small_runs import (
    CPU,
    assert_ended_alike,
    assert_same,
    keeper_of,
    last_checkpoint,
    metrics,
    options,
    small,
)
from training.saving import Keeper


@pytest.mark.parametrize("mode", ["di", "dir", "dira"])
def test_a_run_leaves_everything_that_design_promises(
    shard_folder: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small(shard_folder, tmp_path / "run", mode)
    train.pretrain(settings, CPU)
    files = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    expected = {"config.json", "metrics.jsonl", "curves.png", "checkpoints/last.pt", "checkpoints/best.pt"}
    expected |= {"export/resnet18.pth", "export/resnet18.safetensors"}
    if mode != "di":
        expected |= {"export/unet.pth", "export/unet/config.json", "reconstructions/step-0000010.png"}
    assert expected <= files
    assert any(name.startswith("tensorboard/events") for name in files)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {(line["phase"], line["step"]) for line in lines} >= {("train", 4), ("train", 10), ("val", 10)}
    assert all(set(train.TERMS[mode]) <= line.keys() for line in lines)
    assert lines[0].keys() >= {"lr", "images_per_second", "images_per_second_per_gpu", "data_wait_fraction"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Settings.from_dict(config["settings"], "config.json") == settings
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]

    last = last_checkpoint(tmp_path / "run")
    exported = torch.load(tmp_path / "run" / "export" / "resnet18.pth")
    assert all(torch.equal(tensor, last["model"][f"query.encoder.{name}"]) for name, tensor in exported.items())

    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "export").rglob("*")}
    train.pretrain(settings, CPU)
    assert "is finished at step 10" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "export").rglob("*")}


@pytest.mark.parametrize("killed_at", [5, 8])
def test_a_run_killed_in_mid_epoch_ends_as_if_nothing_had_happened(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    train.pretrain(small(shard_folder, tmp_path / "whole"), CPU)

    step = train.train_step

    def dies(run: train.Run, batch: Batch) -> torch.Tensor:
        if run.step == killed_at:
            raise KeyboardInterrupt
        return step(run, batch)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.pretrain(small(shard_folder, tmp_path / "killed"), CPU)
    monkeypatch.setattr(train, "train_step", step)
    assert 0 < last_checkpoint(tmp_path / "killed")["step"] < killed_at
    train.pretrain(small(shard_folder, tmp_path / "killed"), CPU)
    assert_ended_alike(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("when", ["in a step", "in validation", "in the last validation"])
def test_a_run_asked_to_stop_saves_at_the_end_of_its_step_and_goes_on_to_the_same_end(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    train.pretrain(small(shard_folder, tmp_path / "whole"), CPU)
    step, validate, last_step = train.train_step, train.validate, {"in validation": 7, "in the last validation": 10}

    def ask(keeper: Keeper) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        while not keeper.is_asked_to_stop:
            time.sleep(0.001)

    def asked_in_step(run: train.Run, batch: Batch) -> torch.Tensor:
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
        return step(run, batch)

    def asked_in_validation(run: train.Run, keeper: Keeper) -> tuple[dict[str, float] | None, list[torch.Tensor]]:
        if run.step == last_step[when]:
            ask(keeper)
        return validate(run, keeper)

    if when == "in a step":
        monkeypatch.setattr(train, "train_step", asked_in_step)
    else:
        monkeypatch.setattr(train, "validate", asked_in_validation)
    with pytest.raises(Unfinished, match=r"SIGUSR1 at step \d+ of 10: the same command goes on from .*last\.pt"):
        train.pretrain(small(shard_folder, tmp_path / "stopped"), CPU)
    assert last_checkpoint(tmp_path / "stopped")["step"] == last_step.get(when, 5)
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "validate", validate)
    train.pretrain(small(shard_folder, tmp_path / "stopped"), CPU)
    (tmp_path / "stopped" / "checkpoints" / "previous.pt").unlink()  # the stop's own checkpoint, or the one before it
    (tmp_path / "whole" / "checkpoints" / "previous.pt").unlink()
    assert_ended_alike(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("harm", ["cut", "flipped in place", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_run_ends_alike(
    shard_folder: Path, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "harmed"):
        train.pretrain(small(shard_folder, tmp_path / name, "dir"), CPU)
    checkpoints = tmp_path / "harmed" / "checkpoints"
    last = checkpoints / "last.pt"
    content = bytearray(last.read_bytes())
    if harm == "flipped in place":
        link(last, checkpoints / "best.pt")  # so the best is harmed as well
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    else:
        last.unlink()
        if harm == "cut":
            last.write_bytes(content[: len(content) // 2])
    train.pretrain(small(shard_folder, tmp_path / "harmed", "dir"), CPU)
    said = capsys.readouterr().out
    assert f"{checkpoints / 'previous.pt'} takes its place" in said
    assert "step 9 of 10" in said
    (checkpoints / "damaged.pt").unlink(missing_ok=harm == "missing")
    if harm == "flipped in place":
        assert "best.pt was damaged too: the best weights are sought anew" in said
        assert last_checkpoint(tmp_path / "harmed")["best_step"] == 10
    else:
        assert_ended_alike(tmp_path / "harmed", tmp_path / "whole")


def test_two_damaged_checkpoints_are_named(shard_folder: Path, tmp_path: Path) -> None:
    settings = small(shard_folder, tmp_path, "di", max_steps=4)
    train.pretrain(settings, CPU)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    assert "last.pt and" in refusal(settings)
    assert "previous.pt are damaged" in refusal(settings)


def test_what_a_checkpoint_lacks_or_has_in_another_shape_is_named(shard_folder: Path, tmp_path: Path) -> None:
    settings = small(shard_folder, tmp_path, "di", max_steps=2)
    train.pretrain(settings, CPU)
    last = tmp_path / "checkpoints" / "last.pt"
    state = load_checkpoint(last, CPU)
    save_checkpoint(last, {name: value for name, value in state.items() if name != "optimizer"})
    assert "last.pt: does not fit this run ('optimizer' is missing)" in refusal(settings)
    state["model"]["queue"] = state["model"]["queue"][1:]
    save_checkpoint(last, state)
    assert "size mismatch for queue" in refusal(settings)


def test_weights_that_are_not_finite_are_never_saved(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before the save ruins the weights, but its loss was computed before: no term tells."""
    step = train.train_step

    def ruins(run: train.Run, batch: Batch) -> torch.Tensor:
        terms = step(run, batch)
        if run.step == 5:
            with torch.no_grad():
                run.model.query.projection[0].bias[0] = float("inf")
        return terms

    monkeypatch.setattr(train, "train_step", ruins)
    wrong = refusal(small(shard_folder, tmp_path, log_every=100))
    last = tmp_path / "checkpoints" / "last.pt"
    assert "diverged by step 6: model.query.projection.0.bias" in wrong or "diverged by step 7" in wrong
    assert f"{last} is from before" in wrong
    assert last_checkpoint(tmp_path)["step"] == 3


def test_validation_changes_no_tensor_and_sees_the_same_images_each_time(shard_folder: Path, tmp_path: Path) -> None:
    run = train.build(small(shard_folder, tmp_path), CPU)
    for batch, _ in zip(run.loader, range(2), strict=False):
        train.train_step(run, batch)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    first, _ = train.validate(run, keeper_of(run))
    assert_same(dict(run.model.state_dict()), before)
    assert run.model.training
    second, _ = train.validate(run, keeper_of(run))
    assert first == second


def test_validation_is_the_mean_over_samples_whatever_the_batch(shard_folder: Path, tmp_path: Path) -> None:
    run = train.build(small(shard_folder, tmp_path), CPU)
    (batch,) = run.val_loader
    run.val_loader = [Batch(*(images[i : i + 1] for images in batch)) for i in range(len(batch.query))]
    one_by_one, _ = train.validate(run, keeper_of(run))
    run.val_loader = [batch]
    at_once, _ = train.validate(run, keeper_of(run))
    assert one_by_one == pytest.approx(at_once, rel=1e-5)
    assert tuple(at_once) == train.TERMS["dira"]


def test_the_discriminator_and_the_network_take_turns(shard_folder: Path, tmp_path: Path) -> None:
    run = train.build(small(shard_folder, tmp_path), CPU)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    train.train_step(run, next(iter(run.loader)))
    changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, parameter in run.model.named_parameters() if "num_batches" not in name}
    assert changed >= {name for name in parameters if not name.startswith("key.")}
    assert {"queue", "queue_ptr", "key.projection.0.weight"} <= changed


def test_dira_starts_from_dir_with_its_network_keys_and_queue(shard_folder: Path, tmp_path: Path) -> None:
    train.pretrain(small(shard_folder, tmp_path / "dir", "dir", max_steps=2), CPU)
    last = tmp_path / "dir" / "checkpoints" / "last.pt"
    run = train.build(small(shard_folder, tmp_path / "dira", init_from=str(last)), CPU)
    train.begin(run)
    state = run.model.state_dict()
    for name, tensor in last_checkpoint(tmp_path / "dir")["model"].items():
        assert torch.equal(state[name], tensor), name
    assert run.step == 0
    assert not any(state["momentum_buffer"].any() for state in run.optimizer.state.values())


def test_ranks_train_together_and_fewer_or_more_carry_on(shard_folder: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then four: same global batch, so as many keys each step, and the same learning rate."""
    settings = small(shard_folder, tmp_path / "run", "di", batch_size=8, epochs=4, max_steps=4, log_every=1)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    done = run_command(*torchrun, "2", "train.py", *options(settings), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    state = last_checkpoint(tmp_path / "run")
    assert (state["step"], len(state["loaders"])) == (4, 2)
    assert state["model"]["queue_ptr"].item() == 4 * 8 % 30, "every rank's keys are in the queue"

    for ranks, before, num_steps in ((1, 2, 6), (4, 1, 8)):
        launcher = (*torchrun, str(ranks)) if ranks > 1 else ()
        more = run_command(*launcher, "train.py", *options(replace(settings, max_steps=num_steps)), OMP_NUM_THREADS="1")
        assert more.returncode == 0, more.stderr
        assert f"is from {before} ranks, these are {ranks}: same step, schedule and global batch of 8" in more.stdout
        state = last_checkpoint(tmp_path / "run")
        assert (state["step"], len(state["loaders"])) == (num_steps, ranks)
        assert state["model"]["queue_ptr"].item() == num_steps * 8 % 30
    whole = small(shard_folder, tmp_path / "whole", "di", batch_size=8, epochs=4, max_steps=8, log_every=1)
    train.pretrain(whole, CPU)
    schedules = [
        [(line["step"], line["epoch"], line.get("lr")) for line in metrics(tmp_path / d)] for d in ("run", "whole")
    ]
    ours, theirs = ({entry for entry in schedule if entry[2] is not None} for schedule in schedules)
    assert ours == theirs, "only the main rank writes, and the schedule is the one of an unbroken run"


def test_a_run_resumed_in_another_folder_has_its_own_best_weights(shard_folder: Path, tmp_path: Path) -> None:
    train.pretrain(small(shard_folder, tmp_path / "first", "di", max_steps=2), CPU)
    last = tmp_path / "first" / "checkpoints" / "last.pt"
    train.pretrain(small(shard_folder, tmp_path / "second", "di", max_steps=3, resume=str(last)), CPU)
    assert last_checkpoint(tmp_path / "second")["best_step"] == 3
    assert (tmp_path / "second" / "export" / "resnet18.pth").exists()


def test_two_samples_are_enough_to_train(shard_folder: Path, tmp_path: Path) -> None:
    settings = small(shard_folder, tmp_path, batch_size=2, moco_k=65536, max_steps=2, log_every=50, key_bn_groups=4)
    train.pretrain(settings, CPU)
    assert last_checkpoint(tmp_path)["step"] == 2


def test_a_diverged_run_names_the_term_and_leaves_the_last_good_checkpoint(shard_folder: Path, tmp_path: Path) -> None:
    train.pretrain(small(shard_folder, tmp_path, max_steps=3), CPU)
    last = tmp_path / "checkpoints" / "last.pt"
    good = last.read_bytes()
    run = train.build(small(shard_folder, tmp_path, max_steps=6), CPU)
    meter = train.begin(run)
    with torch.no_grad():
        run.model.query.decoder.blocks[0].conv1[0].weight.fill_(float("nan"))
    log = RunLog(tmp_path, first_step=run.step, num_steps=run.num_steps, is_main=True)
    with pytest.raises(UserError, match=r"by step 4: total, mse, adversarial.* not finite; .*last\.pt is from before"):
        train.train(run, meter, log, keeper_of(run))
    assert last.read_bytes() == good


def refusal(settings: Settings) -> str:
    """Return the one line that a run under these settings ends with."""
    with pytest.raises(UserError) as error:
        train.pretrain(settings, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line_and_harms_nothing(shard_folder: Path, tmp_path: Path) -> None:
    good = small(shard_folder, tmp_path / "run", max_steps=2)
    train.pretrain(good, CPU)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")

    assert "--lr 0.03 there, 0.1 here" in refusal(replace(good, lr=0.1))
    assert "earlier run" in refusal(replace(good, resume="never"))
    with lock(tmp_path / "run"):
        assert "in use by another run" in refusal(good)
    other = replace(good, run_dir=str(tmp_path / "other"))
    assert "no checkpoint to resume from" in refusal(
        replace(other, resume=str(tmp_path / "run" / "export" / "resnet18.pth"))
    )
    assert "no such file" in refusal(replace(other, resume=str(tmp_path / "none.pt")))
    assert "its encoder is resnet18, this run's is resnet34" in refusal(
        replace(other, arch="resnet34", init_from=str(last))
    )
    assert "pass --moco-k 30" in refusal(replace(other, moco_k=32, init_from=str(last)))
    assert "not a checkpoint" in refusal(replace(other, init_from=str(text)))
    assert "is more than the" in refusal(replace(other, batch_size=4096))
    assert str(tmp_path) in refusal(replace(other, shards=(str(tmp_path),)))
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_the_command_ends_on_bad_input_with_one_line_and_on_bad_usage_with_status_2(
    shard_folder: Path, tmp_path: Path
) -> None:
    nowhere = run_command("train.py", tmp_path / "none", "--mode", "dir", "--run-dir", tmp_path / "run")
    assert (nowhere.returncode, len(nowhere.stderr.splitlines())) == (1, 1), nowhere.stderr
    assert str(tmp_path / "none") in nowhere.stderr
    odd = run_command("train.py", shard_folder, "--mode", "dir", "--crop-size", "100")
    assert (odd.returncode, len(odd.stderr.splitlines())) == (2, 1), odd.stderr
    assert run_command("train.py", shard_folder, "--mode", "gan").returncode == 2


def test_a_probe_scores_the_encoder_and_leaves_the_run_as_it_is(shard_folder: Path, tmp_path: Path) -> None:
    train.pretrain(small(shard_folder, tmp_path / "plain", "di"), CPU)
    train.pretrain(small(shard_folder, tmp_path / "probed", "di", probe_every=1), CPU)
    plain, probed = (last_checkpoint(tmp_path / name) for name in ("plain", "probed"))
    plain.pop("settings"), probed.pop("settings")
    assert_same(plain, probed)
    scores = {"probe_knn_auc", "probe_linear_auc"}
    lines = metrics(tmp_path / "probed")
    assert [scores <= line.keys() for line in lines] == [line["phase"] == "val" for line in lines]
    without = [{name: value for name, value in line.items() if name not in scores} for line in lines]
    assert without == metrics(tmp_path / "plain")
