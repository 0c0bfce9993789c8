"""What a GPU is given, shown without one: the order of the calls, their number, and that none of them waits.

The CUDA form runs on PyTorch's meta device: the same calls without values, where reading a value raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGES, tiny_recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pirl import device as pirl_device
from pirl.config import Recipe, load_recipe
from pirl.data import Batch
from pirl.errors import TrainingError
from pirl.loader import PREFETCH, Loader, slots_of
from pirl.loss import Contrast
from pirl.memory import MemoryBank
from pirl.model import build_model, memory_format
from pirl.training import feed as pirl_feed
from pirl.training.feed import Feed, deliver
from pirl.training.state import TrainState
from pirl.training.step import train_step
from pirl.views import apply_photometrics, draw_photometrics, open_pretext
from pirl.views.operations import hue_table
from pirl.views.wide import move_stages, stage_arrays
from pirl.world import World, report_stragglers

META = torch.device("meta")
MOST_CALLS, MOST_COPIES = 600, 2


class Calls(TorchDispatchMode):
    """Count of the calls, and of those that a GPU would make the host wait for."""

    def __init__(self, locked: set[int]) -> None:
        super().__init__()
        self.launches = self.copies = 0
        self.waits: Counter[str] = Counter()
        self.locked = locked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor)]
        devices = {each.device.type for each in [*tensors, *made]}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal"):
            self.waits[name] += 1
        if "meta" in devices and not func.is_view:
            self.launches += 1
        if devices == {"cpu", "meta"}:
            sources = [each for each in tensors if each.device.type == "cpu" and each.dim()]
            self.copies += len(sources)
            pageable = [each for each in sources if each.untyped_storage().data_ptr() not in self.locked]
            self.waits["copy from pageable memory"] += len(pageable)
        return result


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of the memory that would be page-locked."""
    addresses: set[int] = set()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        addresses.add(tensor.untyped_storage().data_ptr())
        return tensor

    page_locked = pirl_device.page_locked
    monkeypatch.setattr(pirl_device, "page_locked", lambda count, device: note(page_locked(count, device)))
    monkeypatch.setattr(pirl_feed, "lock_copy", lambda pixels: note(pixels.clone()))
    monkeypatch.setattr("pirl.loader.lock_pages", lambda tensors: [note(each) for each in tensors])
    monkeypatch.setattr("pirl.loader.unlock_pages", lambda tensors: None)
    return addresses


# ---- photometrics


def random_batch(recipe: Recipe, count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    elements = open_pretext(recipe.views).shape
    shapes = (count, *recipe.views.image_shape), (count * elements[0], *elements[1:])
    images, second = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes)
    return Batch(torch.arange(count), torch.arange(count), images, second)


@pytest.mark.parametrize("name", ["r50-200ep-linear", "r50-200ep-mlp"])
def test_few_calls_make_the_views(name: str, locked: set[int]) -> None:
    """3,440 calls and 170 copies before: each run of elements with equal plans had calls of its own."""
    recipe = load_recipe(name)
    batch = random_batch(recipe, 32)
    hue_table(META)  # made once
    with Calls(locked) as calls:
        inputs = deliver(recipe, World(device=META), 0, batch)
        apply_photometrics(inputs.images, inputs.image_photometrics, recipe.views)
        apply_photometrics(inputs.elements, inputs.element_photometrics, recipe.views)
    assert calls.launches <= MOST_CALLS
    assert calls.copies - 2 <= MOST_COPIES, "besides images and second views"
    assert not +calls.waits


@pytest.mark.parametrize("overrides", [[], ["views.hue=0"], ["views.brightness=0", "views.contrast=0"]])
@pytest.mark.parametrize("photometric", ["base", "blur"])
def test_the_form_for_gpus_has_the_same_values(photometric: str, overrides: list[str]) -> None:
    cfg = tiny_recipe(f"views.photometric={photometric}", "views.blur_sigma=[0.1,6]", *overrides).views
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (150, 24, 20, 3), dtype=torch.uint8, generator=generator)
    pixels[:50] = pixels[:50] // 5 + 80  # little contrast
    params = draw_photometrics(cfg, 3, 1, np.arange(150), [0])
    (stages,) = move_stages([stage_arrays(params, cfg)], torch.device("cpu"))
    assert torch.equal(apply_photometrics(pixels, stages, cfg), apply_photometrics(pixels, params, cfg))
    one = np.array([7])
    (stages,) = move_stages([stage_arrays(params[one], cfg)], torch.device("cpu"))
    assert torch.equal(apply_photometrics(pixels[7:8], stages, cfg), apply_photometrics(pixels[7:8], params[one], cfg))


# ---- the step


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["nce", "cross_entropy"])
def test_no_step_reads_the_device(kind: str, workers: int, shards: str, locked: set[int]) -> None:
    """From the loader to the optimiser, but for the first step, which estimates Z and makes tables."""
    recipe = tiny_recipe(f"loss.kind={kind}", "model.width=0.5")
    world = World(device=META)
    with META:
        model = build_model(recipe)
    model = model.to(memory_format=memory_format(model.trunk))
    bank = MemoryBank(IMAGES, recipe.model.embedding_dim, recipe.memory, blank=True).to(META)
    criterion = Contrast(recipe.loss, world)
    criterion.z_is_set = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # a fused one knows no meta device
    state = TrainState(model, bank, criterion, optimizer, torch.amp.GradScaler(enabled=False))
    steps = 0
    loader = Loader(shards, recipe, world, workers)
    batches = Feed(loader, recipe, world).batches(0, 0)
    while steps < 4:
        with Calls(locked if steps else set()) as calls:
            epoch, _, share, inputs = next(batches)
            train_step(recipe, model, state, world, epoch, share, inputs)
        assert calls.launches > 100
        steps += 1
        if steps > 1:
            assert not +calls.waits, "the host would wait"
    batches.close()


def test_a_step_that_reads_the_device_is_seen(locked: set[int]) -> None:
    with Calls(locked) as calls, pytest.raises(RuntimeError, match="item"):
        torch.ones(3).to(META).sum().item()
    assert calls.waits["copy from pageable memory"] == 1


# ---- the order of the calls


class Recorder:
    """Stream and events that note what is done with them; an event is reached once the host has asked twice."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.copied = 0

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.calls.append(f"copy {self.copied}")
        yield

    def mark(self) -> Mark:
        mark = Mark(self, self.copied)
        self.copied += 1
        return mark

    def hand_over(self, copied: Mark, tensors: Iterable[Tensor]) -> None:
        self.calls.append(f"hand over {copied.number}")


class Mark:
    def __init__(self, recorder: Recorder, number: int) -> None:
        self.recorder, self.number = recorder, number

    def query(self) -> bool:
        self.recorder.calls.append(f"wait {self.number}")
        return True


def test_a_slot_is_waited_for_by_its_copy_two_batches_later(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the copy of a batch, its step and the wait for the end of that step followed each other."""
    recorder = Recorder()
    monkeypatch.setattr(pirl_feed, "open_stream", lambda device: recorder)
    recipe, world, workers = tiny_recipe(), World(), 2
    for number, _ in enumerate(Feed(Loader(shards, recipe, world, workers), recipe, world).batches(0, 0)):
        recorder.calls.append(f"STEP {number}")
    calls = recorder.calls
    count = number + 1
    assert count == 15
    ahead = workers * PREFETCH
    assert slots_of(workers) == ahead + 2
    for step in range(count):
        assert calls.index(f"copy {step}") < calls.index(f"hand over {step}") < calls.index(f"STEP {step}")
    for step in range(1, count):  # the host goes from one step to the copy for the next, and waits for no step
        between = calls[calls.index(f"STEP {step - 1}") + 1 : calls.index(f"STEP {step}")]
        waited = [call for call in between if call.startswith("wait")]
        reused = step - 2
        assert waited == ([f"wait {reused}"] if reused >= 0 and step + ahead < count else [])


# ---- a device that stalls


class Stalled:
    def query(self) -> bool:
        return False


def load_and_stall(loader: Loader, world: World) -> None:
    with report_stragglers(world):
        for _, _, _, batch in loader.batches(0, 0):
            batch.slot.copied = Stalled()


def test_a_stalled_device_is_reported_and_not_waited_for(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's copy is never done: an error in time, and nothing asks the device for anything afterwards."""
    touched: list[str] = []
    monkeypatch.setattr("pirl.loader.lock_pages", lambda tensors: touched.append("lock"))
    monkeypatch.setattr("pirl.loader.unlock_pages", lambda tensors: touched.append("unlock"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: touched.append("synchronize"))
    world = World(timeout_s=300, moment="step 7")
    loader = Loader(shards, tiny_recipe(), world, 1)
    monkeypatch.setattr("pirl.loader.wait_for", lambda event, _: pirl_device.wait_for(event, 0.1))
    with pytest.raises(TrainingError, match="device of rank 0 has not finished its work") as error:
        load_and_stall(loader, world)
    assert "at step 7" in error.value.what
    assert "nvidia-smi" in error.value.hint
    assert touched == ["lock"]


def test_waiting_for_a_device_has_an_end() -> None:
    with pytest.raises(pirl_device.DeviceTimeoutError, match="Timed out waiting"):
        pirl_device.wait_for(Stalled(), 0.01)


def test_arrays_arrive_as_they_are() -> None:
    arrays = [np.arange(5), np.array([], np.int64), np.float32([1.5, 2]), np.uint8([[1, 2], [3, 4]]), np.int32([7])]
    for array, tensor in zip(arrays, pirl_device.to_device(arrays, torch.device("cpu"))):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
