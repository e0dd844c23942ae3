"""The means of a run's metrics; resuming, stopping and saving are in test_resume.py and others."""

import torch

from infra.run import Meters


def test_meters_average_windows_and_the_epoch():
    meters = Meters()
    for value in (1.0, 2.0):
        meters.update({"loss": torch.tensor(value)})
    assert meters.read() == {"loss": [1.0, 2.0]}
    assert meters.means() == {"loss": 1.5}
    meters.update({"loss": torch.tensor(6.0)})
    assert meters.read() == {"loss": [6.0]}
    assert meters.means() == {"loss": 6.0}
    assert meters.averages() == {"loss": 3.0}
    assert meters.read() == {"loss": []} and meters.means() == {}


def test_meters_do_not_depend_on_when_they_are_read():
    """Bit for bit, though sums of floats depend on their order; also through a checkpoint."""
    values = torch.rand(50).tolist()

    def means(reads):
        meters = Meters()
        for i, value in enumerate(values):
            meters.update({"loss": torch.tensor(value)})
            if i in reads:
                meters.read()
                state, meters = meters.state_dict(), Meters()
                meters.load_state_dict(state)
        meters.read()
        return meters.means(), meters.averages()

    assert means([]) == means([3, 4, 30]) == means(range(50))


def test_meters_average_over_ranks(two_ranks):
    assert two_ranks["one"]["meters"] == {"loss": 1.5}
    assert two_ranks["rank0"]["meters"] == two_ranks["rank1"]["meters"] == {"loss": 2.0}
