"""A short form of tests/campaign.py: a few cases of every kind, and of every kind of kill.

    pytest tests/test_campaign.py
"""
import time

import campaign
import campaign_kills as kills
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process would wait for OpenMP threads that exist in its parent only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_corrupted_input_fails_or_is_wrongly_accepted(tmp_path):
    """Draws of seed 0; `python tests/campaign.py --minutes 60 --seed 1` draws others."""
    kinds = {name: kind for name, kind in campaign.KINDS.items() if name != "whole commands"}
    found = campaign.run_inputs(kinds, 240, 0, 2, tmp_path, most=3)
    assert all(sum(counts.values()) >= 3 for counts, _ in found.values())
    assert [note for _, notes in found.values() for note in notes] == []


def test_no_mutated_header_is_misread(tmp_path):
    """Refused, or read as the specification says."""
    assert campaign.run_headers(30, 0, tmp_path, most=1000) == 0


@pytest.mark.parametrize("kill", [kills.every_pair, kills.random_kills, kills.full_disk])
def test_kills_lose_nothing(tmp_path, kill):
    """A second of each: resumed, the weights are bit-identical to those of the run left alone."""
    result = kills.Kills()
    kill(tmp_path, result, time.monotonic() + 1, np.random.default_rng(0))
    assert result.cases > 0 and result.notes == []
