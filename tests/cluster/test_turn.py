"""One stage at a time works in the driver's process; while it waits for the cluster, others do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nightseg.cluster.shortage import mended
from nightseg.cluster.turn import is_shared, turn, waiting
from nightseg.data.class_list import taxonomy
from nightseg.segmenter.settings import Network
from nightseg.segmenter.start import starting_network
from nightseg.storage import sha256_of

SOON = 20.0  # seconds that a thread of a busy machine may need


def test_others_have_their_turn_while_one_waits() -> None:
    told, has_waited = list[str](), threading.Event()

    def other() -> None:
        with turn():
            told.append("other")
            has_waited.set()

    thread = threading.Thread(target=other)
    with turn():
        thread.start()
        with turn():  # nested: still one turn
            told.append("first")
            assert not has_waited.wait(0.05)
        with waiting():
            assert has_waited.wait(SOON)
        told.append("again")
    thread.join()
    assert told == ["first", "other", "again"]


def test_without_a_turn_there_is_nothing_to_hand_on() -> None:
    with waiting(), waiting():
        assert not is_shared()
    with pytest.raises(KeyError), turn():
        raise KeyError
    with turn(), waiting():
        pass


def test_a_shortage_names_the_stages_beside_it() -> None:
    assert mended("no memory", "Lower the batch") == "no memory. Lower the batch"
    began, ends = threading.Event(), threading.Event()

    def other() -> None:
        with turn(), waiting():
            began.set()
            ends.wait(SOON)

    thread = threading.Thread(target=other)
    thread.start()
    assert began.wait(SOON)
    with turn():
        assert mended("no memory", "Lower the batch").endswith("compute.concurrent: other stages run at the same time")
    ends.set()
    thread.join()


def test_networks_of_branches_begin_with_the_same_weights_as_one_after_the_other() -> None:
    """They follow from PyTorch's random state, of which a process has one."""
    network = Network(encoder="efficientnet_lite0", pyramid_channels=8, head_channels=8)

    def begin(seed: int) -> list[str]:
        hashes = []
        for _ in range(3):
            with turn():
                built = starting_network("scratch", network, taxonomy("camvid11"), seed=seed)
                hashes.append(sha256_of(b"".join(p.numpy().tobytes() for p in built.state_dict().values())))
            with waiting():
                pass
        return hashes

    alone = [begin(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(begin, (0, 1))) == alone
    assert alone[0] != alone[1] and len(set(alone[0])) == 1


def test_a_thread_has_as_many_threads_of_pytorch_as_the_process() -> None:
    """So what is computed in the driver's process is rounded as in its main thread."""
    own = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == own
    torch.set_num_threads(own + 1)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == own + 1
    finally:
        torch.set_num_threads(own)
