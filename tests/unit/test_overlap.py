"""The arithmetic of benchmarks/overlap.py on a trace whose shares are known."""

from benchmarks.overlap import PhaseTime, combine, intersection, length, measure_trace, union

TRAINING, BUILDER, GLOO = 1, 2, 3


def span(name: str, thread: int, start: float, stop: float) -> dict:
    return {"ph": "X", "name": name, "tid": thread, "ts": start, "dur": stop - start}


def test_intervals():
    assert union([(5, 7), (0, 2), (1, 3), (3, 4), (9, 9)]) == [(0, 4), (5, 7)]
    assert intersection([(0, 4), (5, 7)], [(1, 2), (3, 6), (7, 9)]) == [(1, 2), (3, 4), (5, 6)]
    assert length([(0, 4), (5, 7)]) == 6


def test_a_trace_of_one_step():
    trace = [
        {"ph": "M", "name": "thread_name", "tid": TRAINING},
        span("ProfilerStep#5", TRAINING, 0, 100),
        span("## start_sparse_data_dist 7 ##", TRAINING, 0, 5),
        span("## all2all_data:kjt splits ##", TRAINING, 2, 4),
        span("gloo:all_to_all", GLOO, 3, 15),  # to 5 while it is launched, to 10 in no phase, 5 within forward
        span("## build_batch ##", BUILDER, 8, 20),  # 10 within forward
        span("## forward 6 ##", TRAINING, 10, 50),
        span("## All2All_Pooled_fwd ##", TRAINING, 20, 22),
        span("gloo:all_to_all", GLOO, 21, 40),  # 8 until its wait begins
        span("## Request wait() ##", TRAINING, 30, 40),
        span("## build_batch ##", BUILDER, 45, 60),  # all of it
        span("## wait_sparse_data_dist 7 ##", TRAINING, 52, 54),
        span("## backward 6 ##", TRAINING, 50, 90),
        span("gloo:all_to_all", GLOO, 70, 75),  # launched by nobody we know
        span("## optimizer 6 ##", TRAINING, 90, 95),
        span("## build_batch ##", BUILDER, 95, 120),  # 5 within the step, which computes no more
    ]
    microseconds, phases = measure_trace(trace)
    assert microseconds == 100
    assert phases == {
        "batch_building": PhaseTime(12 + 15 + 5, 10 + 15),
        "input_all_to_all": PhaseTime(12, 5),
        "output_all_to_all": PhaseTime(19, 8),
    }


def test_a_collective_that_its_thread_begins_late_is_its_launch_s():
    trace = [
        span("ProfilerStep#5", TRAINING, 0, 100),
        span("shared_memory:meet", GLOO, 1, 8),  # launched before
        span("## forward 6 ##", TRAINING, 10, 50),
        span("## All2All_Pooled_fwd ##", TRAINING, 20, 22),
        span("shared_memory:meet", GLOO, 25, 40),
        span("shared_memory:meet", GLOO, 45, 48),
    ]
    assert measure_trace(trace)[1]["output_all_to_all"] == PhaseTime(15, 15)


def test_ranks_are_summed():
    phases = dict.fromkeys(("batch_building", "input_all_to_all", "output_all_to_all"), PhaseTime(10, 5))
    first = {"samples_per_second": 7.0, "traced_us": 100, "phases": phases}
    second = {"samples_per_second": 8.0, "traced_us": 50, "phases": dict.fromkeys(phases, PhaseTime(10, 10))}
    combined = combine([[first, second]])
    assert combined["samples_per_second"] == [7.0]
    assert combined["input_all_to_all_hidden"] == [0.75]
    assert combined["input_all_to_all_exposed_of_step"] == [5 / 150]
