"""Requests form batches: full ones at once, others when no more come and none is generated."""

import anyio
import pytest

from lorasweep.evaluation.request_batches import join_batch


class Model:
    """Stands for a model: notes the size of the batch of each request, and how many are generated at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.running = 0
        self.most = 0

    async def ask(self, limit: int, seconds: float = 0.0) -> None:
        async with join_batch(self, limit) as size:
            self.sizes.append(size)
            self.running += 1
            self.most = max(self.most, self.running)
            await anyio.sleep(seconds)
            self.running -= 1


def test_a_batch_is_full_or_takes_all_that_wait() -> None:
    model = Model()

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(model.ask, 4)

    anyio.run(run)
    assert sorted(model.sizes) == [2, 2, *[4] * 8]


def test_requests_wait_while_others_are_generated() -> None:
    model = Model()

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(model.ask, 8, 0.5)
            await anyio.sleep(0.3)
            assert model.running == 1
            for _ in range(3):
                group.start_soon(model.ask, 8)
                await anyio.sleep(0.05)

    anyio.run(run)
    assert model.sizes == [1, 3, 3, 3]
    assert model.most == 3


def test_models_do_not_wait_for_each_other() -> None:
    models = [Model(), Model()]

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for model in models:
                group.start_soon(model.ask, 1)

    anyio.run(run)
    assert [model.sizes for model in models] == [[1], [1]]


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_cancelled_request_holds_up_no_other(leaves: int) -> None:
    model = Model()
    ended = []

    async def ask(number: int, scopes: list[anyio.CancelScope]) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await model.ask(8)
            ended.append(number)

    async def run() -> None:
        scopes: list[anyio.CancelScope] = []
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for number in range(3):
                    group.start_soon(ask, number, scopes)
                    await anyio.sleep(0.01)
                scopes[leaves].cancel()
            await model.ask(8)

    anyio.run(run)
    assert sorted(ended) == sorted({0, 1, 2} - {leaves})


def test_a_failed_request_is_not_counted_as_being_generated() -> None:
    model = Model()

    async def run() -> None:
        with pytest.raises(ZeroDivisionError):
            async with join_batch(model, 8):
                raise ZeroDivisionError
        with anyio.fail_after(30):
            await model.ask(8)

    anyio.run(run)
    assert model.sizes == [1]
