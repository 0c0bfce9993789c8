"""`pirl plan`: its sizes against real banks, checkpoints, networks and messages, its times against closed forms."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import IMAGES, tiny_recipe
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from typer.testing import CliRunner

from pirl import world as pirl_world
from pirl.cli.plan import parse_count
from pirl.config import load_recipe
from pirl.errors import UsageError
from pirl.loader import Loader
from pirl.loss import Contrast
from pirl.memory import MemoryBank, RowsBank
from pirl.model import build_model
from pirl.optim import build_optimizer
from pirl.plan import Machine, growth, measure, plan_training, saved_storages
from pirl.plan_steps import measure_trunk, plan_dag, plan_evaluation, plan_sharding
from pirl.training.feed import deliver
from pirl.training.loop import train
from pirl.training.spec import Options
from pirl.training.state import TrainState
from pirl.training.step import train_step
from pirl.world import World

IMAGENET = 1_281_167
MIB = 2**20


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- sizes


@pytest.mark.parametrize(
    ("name", "parameters", "file_mib"),
    [("r50-200ep-linear", 24_180_160, 825.09), ("r50-200ep-mlp", 32_570_000, 889.13)],
)
def test_sizes_of_the_published_files(name: str, parameters: int, file_mib: float) -> None:
    """The zoo's files hold besides ours the reference's alias tables: a float and an int64 for each image."""
    plan = plan_training(load_recipe(name), 4, 8, IMAGENET)
    assert plan.gradient_bytes_per_rank / 4 == pytest.approx(parameters, rel=1e-3)
    assert (plan.checkpoint_bytes + 12 * IMAGENET) / MIB == pytest.approx(file_mib, rel=1e-3)


def test_convolution_values_of_a_resnet50() -> None:
    """11.11 M of a 224 view, as published for ResNet-50; a patch of 64 has 4/49 of it, and there are nine."""
    assert measure(load_recipe("r50-200ep-linear")).convolution_values == pytest.approx(
        11.11e6 * (1 + 36 / 49), rel=1e-3
    )


def test_what_a_real_pass_holds() -> None:
    recipe = tiny_recipe("model.width=0.5")
    model = build_model(recipe)
    views = recipe.views
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with saved_storages() as saved:
        model(torch.zeros(2, 3, 16, 16), torch.zeros(2 * views.grid**2, 3, 5, 5))
    held = sum(count for storage, count in saved.items() if storage not in weights)
    assert measure(recipe).saved_bytes == held / 2
    assert measure(tiny_recipe("model.width=0.5", "train.precision=bf16")).saved_bytes == held / 4


def test_a_real_checkpoint_and_bank(shards: str, tmp_path: Path) -> None:
    recipe = tiny_recipe("model.width=0.5", "train.epochs=1")
    train(recipe, Options(data=shards, out=str(tmp_path / "run")), World())
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    written = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    plan = plan_training(recipe, 1, 1, IMAGES)
    assert written == pytest.approx(plan.checkpoint_bytes, rel=0.02)  # names and alignment of a few hundred tensors
    bank = MemoryBank(IMAGES, recipe.model.embedding_dim, recipe.memory)
    assert bank.memory.nbytes == plan.bank_bytes_per_rank


def count_messages(world: World, data: str, cut: bool) -> dict[str, int]:
    """Bytes of one step: gradients that DDP sums, and what this rank gathers and gives out for the bank."""
    recipe = tiny_recipe("train.batch_size=10")
    counts = {"gradients": 0, "gathered": 0, "messages": 0, "returned": 0}
    gather, exchange = pirl_world.gather_single, dist.all_to_all_single

    def exchange_counted(out: torch.Tensor, mine: torch.Tensor) -> Any:
        counts["returned"] += mine.nbytes
        return exchange(out, mine)

    def gather_counted(out: torch.Tensor, mine: torch.Tensor) -> Any:
        counts["gathered"] += out.nbytes
        counts["messages"] += 1
        return gather(out, mine)

    def sum_counted(group, bucket):  # DDP would compare annotations with types, which they are not here
        counts["gradients"] += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    pirl_world.gather_single, dist.all_to_all_single = gather_counted, exchange_counted
    model = build_model(recipe)
    dim = recipe.model.embedding_dim
    bank = RowsBank(IMAGES, dim, recipe.memory, 0, world) if cut else MemoryBank(IMAGES, dim, recipe.memory)
    network = nn.parallel.DistributedDataParallel(model)
    network.register_comm_hook(None, sum_counted)
    criterion = Contrast(recipe.loss, world)
    state = TrainState(
        model, bank, criterion, build_optimizer(model, recipe), torch.amp.GradScaler("cpu", enabled=False)
    )
    _, _, share, batch = next(iter(Loader(data, recipe, world, workers=0).batches(0, 0)))
    train_step(recipe, network, state, world, 0, share, deliver(recipe, world, 0, batch))
    return counts


@pytest.mark.parametrize("placement", ["whole", "rows"])
def test_messages_of_a_real_step_on_two_ranks(placement: str, shards: str, tmp_path: Path) -> None:
    plan = plan_training(tiny_recipe("train.batch_size=10"), 2, 1, IMAGES, placement=placement)  # type: ignore[arg-type]
    assert plan.bank == placement
    for counts in ranks.run(count_messages, 2, tmp_path, shards, placement == "rows"):
        assert counts["returned"] == plan.returned_bytes_per_rank
        assert counts["gradients"] == plan.gradient_bytes_per_rank
        assert counts["gathered"] == plan.gathered_bytes_per_rank
        assert counts["messages"] == 1


# ---- times


def test_a_slow_network_a_slow_loader_and_neither() -> None:
    recipe = load_recipe("r50-200ep-linear")
    machine = Machine(images_per_s=1000, gpu_hours_between_failures=1e12, price=2)
    plan = plan_training(recipe, 4, 8, IMAGENET, machine)
    assert plan.limited_by == "gpu"
    assert plan.step_s == pytest.approx(32 / 1000)
    assert plan.hours == pytest.approx(200 * 1252 * 0.032 / 3600, rel=1e-4)
    assert plan.cost == pytest.approx(plan.hours * 32 * 2)
    assert plan.cost_per_epoch * 200 == pytest.approx(plan.cost)
    assert plan.workers_per_gpu == 4  # 1000 images/s by processes of 320
    # 24.18 M gradients of 4 bytes, twice 3/4 of them: 145 MB, and 3/4 of 1024 rows of 520 bytes
    assert plan.network_bytes_per_node == pytest.approx(2 * 0.75 * 4 * 24_180_160 + 0.75 * 1024 * 520)

    ethernet = Machine(images_per_s=1000, gpu_hours_between_failures=1e12, network_bytes_per_s=1e9)
    slower = plan_training(recipe, 4, 8, IMAGENET, ethernet)
    assert slower.limited_by == "network"
    assert slower.step_s == pytest.approx(0.032 / 3 + slower.network_bytes_per_node / 1e9)

    few_cores = Machine(images_per_s=1000, gpu_hours_between_failures=1e12, cpus=16)
    starved = plan_training(recipe, 4, 8, IMAGENET, few_cores)
    assert starved.limited_by == "decoding"
    assert starved.images_per_s == pytest.approx(4 * 16 * 320)
    assert starved.workers_per_gpu == 4

    alone = plan_training(load_recipe("r50-200ep-linear", ["train.batch_size=256"]), 1, 8, IMAGENET, machine)
    assert alone.network_bytes_per_node == 0


def test_the_checkpoint_interval_loses_least_in_a_simulation() -> None:
    """Machines that fail at random, against the formula: the share of time lost, and that other intervals lose more."""
    machine = Machine(images_per_s=1000, gpu_hours_between_failures=640, restart_s=120, copy_bytes_per_s=0.2e9)
    plan = plan_training(load_recipe("r50-200ep-linear"), 4, 8, IMAGENET, machine)
    between_s = 640 * 3600 / 32

    def lost(interval_s: float) -> float:
        lives = np.random.default_rng(1).exponential(between_s, 20_000)
        kept = np.floor(lives / (interval_s + plan.checkpoint_stall_s)) * interval_s
        return (lives.sum() + len(lives) * machine.restart_s) / kept.sum() - 1

    least = lost(plan.checkpoint_interval_s)
    assert plan.lost_share == pytest.approx(least, rel=0.1)
    assert all(lost(plan.checkpoint_interval_s * times) > least for times in (0.4, 2.5))
    assert plan.hours * 3600 == pytest.approx(200 * 1252 * plan.step_s * (1 + plan.lost_share))


def test_saves_are_no_closer_than_they_take_to_write() -> None:
    machine = Machine(copy_bytes_per_s=1e12, storage_bytes_per_s=1e6)
    plan = plan_training(load_recipe("r50-200ep-linear"), 4, 8, IMAGENET, machine)
    assert plan.checkpoint_interval_s == plan.checkpoint_write_s == plan.checkpoint_bytes / 1e6


def test_growth_tells_where_a_bank_no_longer_fits() -> None:
    plans = growth(load_recipe("r50-200ep-linear"), 8, 32, placement="whole")
    assert [plan.fits for plan in plans] == [True, True, True, False]
    largest = plans[-1]
    assert (largest.batch_size, largest.nodes) == (32 * 8 * 64, 64)
    assert largest.bank_bytes_per_rank == largest.whole_bank_bytes == 512e9
    assert largest.sharded_bank_bytes_per_rank == 1e9
    cut = growth(load_recipe("r50-200ep-linear"), 8, 32)
    assert [plan.bank for plan in cut] == ["whole", "whole", "rows", "rows"]
    assert all(plan.fits for plan in cut)
    assert cut[-1].bank_bytes_per_rank == 1e9
    assert largest.memory_bytes_per_rank - cut[-1].memory_bytes_per_rank == 511e9
    assert cut[-1].checkpoint_bytes == largest.checkpoint_bytes
    half = growth(load_recipe("r50-200ep-linear", ["memory.precision=bf16"]), 8, 32, placement="rows")
    assert half[-1].bank_bytes_per_rank == 0.5e9
    assert {plan.activation_bytes_per_rank for plan in plans} == {plans[0].activation_bytes_per_rank}


# ---- the other steps


def test_a_resnet50s_evaluation() -> None:
    """11.11 M values of a 224 view as published, and 2,048 features; the wide one has 4,096."""
    trunk = measure_trunk(load_recipe("r50-200ep-linear"))
    assert trunk.convolution_values == pytest.approx(11.11e6, rel=1e-3)
    assert trunk.features == 2048
    assert measure_trunk(load_recipe("r50w2-400ep-linear")).features == 4096


@pytest.mark.parametrize(("nodes", "gpus"), [(4, 8), (1, 1)])
def test_steps_by_closed_forms(nodes: int, gpus: int) -> None:
    recipe = load_recipe("r50-200ep-linear", ["train.batch_size=64"])
    slow = Machine(images_per_s=10, image_bytes=100e3, price=2)  # so slow that the GPU limits each step
    training = plan_training(recipe, nodes, gpus, 1_000_000, slow)
    shard, pretrain, fast = plan_dag(recipe, training, 50_000, 8, slow)
    assert (shard.seconds, shard.limited_by) == (pytest.approx(1_050_000 / (8 * 1100)), "checking")
    assert shard.storage_bytes == 1_050_000 * 100e3
    assert (pretrain.seconds, pretrain.cost) == (training.hours * 3600, training.cost)
    # a forward pass of one view is 4 of 14 passes over 1 of 1 + 36/49 of the values of a step
    forward_s = 4 / 14 / (1 + 36 / 49) / 10
    assert fast.limited_by == "gpu"
    assert fast.seconds * nodes * gpus == pytest.approx(2 * 1_050_000 * forward_s, rel=0.02)
    assert fast.storage_bytes == 2 * 1_050_000 * 2048 * 2  # both backbones, in half precision
    assert fast.memory_bytes_per_rank == 1.5e9 + fast.storage_bytes / (nodes * gpus)
    assert fast.cost == pytest.approx(fast.seconds / 3600 * nodes * gpus * 2)
    zoo = plan_evaluation(recipe, training, 50_000, slow, "zoo")
    assert zoo.seconds * nodes * gpus == pytest.approx((28 * 1_000_000 + 50_000) * forward_s, rel=1e-3)
    assert zoo.storage_bytes == 0


def test_what_limits_the_other_steps() -> None:
    recipe = load_recipe("r50-200ep-linear")
    slow_disk = Machine(storage_bytes_per_s=1e8)
    assert plan_sharding(IMAGENET, 64, slow_disk).limited_by == "writing"
    assert plan_sharding(IMAGENET, 64, Machine(network_bytes_per_s=1e8)).limited_by == "reading"
    few_cores = Machine(cpus=4)
    training = plan_training(recipe, 4, 8, IMAGENET, few_cores)
    starved = plan_evaluation(recipe, training, 50_000, few_cores, "fast")
    assert starved.limited_by == "decoding"
    assert starved.seconds == pytest.approx((IMAGENET + 50_000) / (4 * 4 * 320))


# ---- the command


def test_the_command(tiny_toml: Path) -> None:
    from pirl.cli import app

    arguments = ["plan", str(tiny_toml), "--nodes", "2", "--gpus", "1", "--images", "70k"]
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert printed["plan"]["images"] == 70_000
    assert printed["plan"]["bank_bytes_per_rank"] == 70_000 * 8 * 4
    assert len(printed["growth"]) == 4
    assert [step["step"] for step in printed["steps"]] == ["shard", "pretrain", "evaluate (fast)"]
    text = CliRunner().invoke(app, [*arguments, "--gpu-gb", "0.1"]).output
    assert "DOES NOT FIT" not in text
    assert "2.24 MB" in text  # the bank
    assert "pod of 1 GPU: cpu 9: 1 rank x (1 + 8 loading processes)" in text
    refused = CliRunner().invoke(app, ["plan", str(tiny_toml), "--nodes", "4", "--gpus", "8"])
    assert isinstance(refused.exception, UsageError)
    assert "train.batch_size=1024" in refused.exception.hint


def test_counts_of_images() -> None:
    texts = ["1281167", "1_281_167", "1,281,167", "70k", "1.28M", "1B", " 2.5m "]
    assert [parse_count(text) for text in texts] == [IMAGENET] * 3 + [70_000, 1_280_000, 10**9, 2_500_000]
    for text in ("", "many", "-3", "0", "1.28X", "1e6"):
        with pytest.raises(UsageError):
            parse_count(text)
