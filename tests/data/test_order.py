"""Orders of rows and of tasks: frozen, resumable, and in the proportions that they promise."""

import json

import numpy
import pytest

from megarl.config.schema import SamplingConfig
from megarl.data.order import RowSampler, SuccessRates, TaskChooser
from megarl.errors import CheckpointError

SHUFFLE = SamplingConfig()
PRIORITISED = SamplingConfig(order="prioritised", priority_floor=0.1)


def as_saved(sampler):
    return json.loads(json.dumps(sampler.state()))


def test_each_epoch_is_another_permutation():
    sampler = RowSampler(50, 1, SHUFFLE)
    epochs = [sampler.next(50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    assert RowSampler(50, 2, SHUFFLE).next(50) != epochs[0]
    assert RowSampler(50, 1, SHUFFLE, task=1).next(50) != epochs[0]


def test_order_is_frozen():
    # A changed order would break the resumption of runs saved before the change.
    assert RowSampler(8, 0, SHUFFLE).next(12) == [6, 3, 5, 0, 7, 2, 1, 4, 3, 1, 0, 4]


def test_without_shuffling_rows_come_in_order_across_epochs():
    assert RowSampler(3, 0, SamplingConfig(order="sequential")).next(8) == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 20])
@pytest.mark.parametrize("order", ["shuffle", "sequential", "curriculum", "prioritised"])
def test_resumed_order_equals_uninterrupted(order, taken):
    settings = SamplingConfig(order=order)
    difficulties = numpy.array([3.0, 1, 1, 2, 5, 4, 0])

    def sampler():
        return RowSampler(7, 3, settings, difficulties=difficulties)

    whole = sampler()
    whole.record([(row, row / 7) for row in whole.next(taken)])
    resumed = sampler()
    resumed.record([(row, 0.5) for row in resumed.next(5)])
    resumed.restore(as_saved(whole))
    for _ in range(3):
        rows = whole.next(5)
        assert resumed.next(5) == rows
        whole.record([(row, 1.0) for row in rows])
        resumed.record([(row, 1.0) for row in rows])
    assert as_saved(resumed) == as_saved(whole)


def test_restoring_for_other_data_is_an_error():
    state = RowSampler(7, 3, SHUFFLE).state()
    with pytest.raises(CheckpointError, match=r"num_rows = 7 for data.train but this run has 8"):
        RowSampler(8, 3, SHUFFLE).restore(state)
    with pytest.raises(CheckpointError, match="seed = 3"):
        RowSampler(7, 4, SHUFFLE).restore(state)
    with pytest.raises(CheckpointError, match="order = shuffle"):
        RowSampler(7, 3, PRIORITISED).restore(state)
    with pytest.raises(CheckpointError, match="lacks epoch"):
        RowSampler(7, 3, SHUFFLE).restore({name: value for name, value in state.items() if name != "epoch"})


def test_curriculum_goes_from_easy_to_hard_and_shuffles_equals():
    difficulties = numpy.repeat([2.0, 0.0, 1.0], 20)
    sampler = RowSampler(60, 5, SamplingConfig(order="curriculum"), difficulties=difficulties)
    first, second = sampler.next(60), sampler.next(60)
    for rows in (first, second):
        assert sorted(rows) == list(range(60))
        assert [difficulties[row] for row in rows] == [0.0] * 20 + [1.0] * 20 + [2.0] * 20
    assert first[:20] != second[:20] != list(range(20, 40))


def test_prioritised_draws_in_proportion_to_failure_after_a_first_pass():
    sampler = RowSampler(4, 0, PRIORITISED)
    assert sorted(sampler.next(4)) == [0, 1, 2, 3]
    sampler.record([(0, 1.0), (1, 0.0), (2, 0.5), (3, 0.75)])
    counts = numpy.zeros(4)
    for _ in range(6000):
        (row,) = sampler.next(1)
        counts[row] += 1
        sampler.record([])
    expected = 6000 * numpy.array([0.1, 1.0, 0.5, 0.25]) / 1.85  # the solved one at the floor
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 99.9 % of chi-square with 3 degrees of freedom


def test_prioritised_repeats_no_row_before_a_step_is_recorded_while_others_are_left():
    sampler = RowSampler(6, 1, PRIORITISED)
    sampler.record([(row, 1.0 if row else 0.0) for row in sampler.next(6)])
    rows = sampler.next(2) + sampler.next(3)
    assert len(set(rows)) == 5
    assert sorted(rows + sampler.next(1)) == list(range(6))
    assert len(set(sampler.next(8))) == 6, "and when none are left they come again"


def test_success_rates_forget_and_are_kept_compactly():
    rates = SuccessRates(3, update=0.25)
    for share in (0.5, 1.0, 0.0):
        rates.record(1, share)
    assert rates.rates[1] == pytest.approx(((0.5 + 0.25 * 0.5) * 0.75), rel=1e-6)
    assert numpy.isnan(rates.rates[[0, 2]]).all()
    generator = numpy.random.RandomState(0)
    large = SuccessRates(1_000_000, update=0.5)
    large.rates[:] = generator.randint(0, 65, size=large.rates.size) / 64
    saved = large.state()
    assert len(saved) < 2_000_000
    copy = SuccessRates(1_000_000, update=0.5)
    copy.restore(saved)
    assert numpy.array_equal(copy.rates, large.rates)
    copy.record(0, 1.0)  # what was restored can be written


def test_tasks_are_drawn_by_their_weights_and_depend_on_seed_and_position_alone():
    chooser = TaskChooser([3.0, 1.0, 2.0], 7, balanced=False)
    tasks = chooser.choose(0, 6000, [0, 0, 0])
    counts = numpy.bincount(tasks, minlength=3)
    expected = 6000 * numpy.array([3, 1, 2]) / 6
    assert float(((counts - expected) ** 2 / expected).sum()) < 13.8  # 99.9 % with 2 degrees of freedom
    assert TaskChooser([3.0, 1.0, 2.0], 7, balanced=False).choose(1500, 40, [9, 0, 0]) == tasks[1500:1540]
    assert TaskChooser([3.0, 1.0, 2.0], 8, balanced=False).choose(0, 40, [0, 0, 0]) != tasks[:40]
    assert TaskChooser([0.1], 7, balanced=False).choose(0, 3, [0]) == [0, 0, 0]


def test_balanced_tasks_fill_up_what_the_step_holds():
    chooser = TaskChooser([5.0, 1.0, 1.0], 7, balanced=True)
    assert sorted(chooser.choose(0, 9, [0, 0, 0])) == [0] * 3 + [1] * 3 + [2] * 3
    assert sorted(chooser.choose(9, 4, [3, 1, 1])) == [1, 1, 2, 2]
    one_by_one = [chooser.choose(location, 1, [0, 0, 0])[0] for location in range(6)]
    assert one_by_one == [0, 1, 2, 0, 1, 2]
