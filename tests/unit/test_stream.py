"""Episodes in time: a thread that holds some ready changes neither them, nor their order, nor their errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from cml_dist.config.schema import SinusoidConfig
from cml_dist.data.sinusoid import SinusoidDomain
from cml_dist.errors import DataError
from cml_dist.run.stream import episode_stream

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


class Counting(SinusoidDomain):
    """Knows which episodes were made, and cannot make one of them."""

    def __init__(self, damaged: int = -1) -> None:
        super().__init__(SinusoidConfig(name="sinusoid"), {"train": 0})
        self.damaged, self.made = damaged, []

    def episode(self, split, index):
        if index == self.damaged:
            raise DataError(f"episode {index} is damaged", "mend it")
        self.made.append(index)
        return super().episode(split, index)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("episodes")]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_episodes_in_the_same_order(workers):
    order = [3, 1, 1, 7, 0, 2]
    plain, ahead = (
        list(episode_stream(Counting(), "train", order, workers=workers, ahead=count, **CPU)) for count in (0, 4)
    )
    assert [episode.index for episode in ahead] == order and not threads()
    for one, other in zip(plain, ahead, strict=True):
        for batch, same in zip(one.batches, other.batches, strict=True):
            assert torch.equal(batch.inputs, same.inputs) and torch.equal(batch.targets, same.targets)


def test_so_many_are_made_before_they_are_asked_for():
    domain = Counting()
    stream = episode_stream(domain, "train", range(100), ahead=3, **CPU)
    next(stream)
    end_s = time.monotonic() + 60
    while len(domain.made) < 4:
        assert time.monotonic() < end_s, domain.made
        time.sleep(0.01)
    time.sleep(0.1)
    assert domain.made == [0, 1, 2, 3]
    stream.close()  # what a run that ends early leaves behind
    assert not threads()


def test_an_error_is_raised_where_its_episode_is_asked_for():
    stream = episode_stream(Counting(damaged=2), "train", range(100), ahead=4, **CPU)
    assert [next(stream).index for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="episode 2 is damaged"):
        next(stream)
    assert not threads()
