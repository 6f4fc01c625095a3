import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.loader.partition import Partition, Span

partitions = st.builds(
    Partition,
    num_rows=st.integers(0, 2000),
    batch_size=st.integers(1, 64),
    world_size=st.integers(1, 9),
    drop_last=st.booleans(),
    limit=st.none() | st.integers(1, 40),
)
quick = settings(deadline=None, max_examples=300)


@quick
@given(partitions)
def test_spans_cover_the_used_rows_once_and_in_order(partition):
    spans = [partition.span(step, rank) for step in range(partition.num_steps) for rank in range(partition.world_size)]
    covered = 0
    for span in spans:
        assert span.start == covered
        assert span.rows >= 0
        covered = span.stop
    assert covered == partition.num_used_rows
    for rank in range(partition.world_size):
        assert list(partition.spans(rank)) == spans[rank :: partition.world_size]
        assert [span.step for span in partition.spans(rank)] == list(range(partition.num_steps))


@quick
@given(partitions)
def test_which_rows_are_used(partition):
    wanted = partition.num_rows
    if partition.drop_last:
        wanted -= wanted % partition.global_batch_size
    if partition.limit is not None:
        wanted = min(wanted, partition.limit * partition.global_batch_size)
    assert partition.num_used_rows == wanted
    assert partition.num_steps == -(-wanted // partition.global_batch_size)


@quick
@given(partitions)
def test_batches_are_of_one_size_over_ranks(partition):
    for step in range(partition.num_steps):
        spans = [partition.span(step, rank) for rank in range(partition.world_size)]
        assert len({span.padded_rows for span in spans}) == 1
        assert all(span.padded_rows - 1 <= span.rows <= span.padded_rows for span in spans)
        assert spans[0].padded_rows == spans[0].rows <= partition.batch_size
        assert {span.global_rows for span in spans} == {sum(span.rows for span in spans)}
        if step < partition.num_steps - 1 or partition.drop_last:
            assert all(span.rows == partition.batch_size for span in spans)


@quick
@given(partitions)
def test_rows_of_a_step_do_not_depend_on_the_world_size(partition):
    alone = Partition(partition.num_rows, partition.global_batch_size, 1, partition.drop_last, partition.limit)
    assert alone.num_steps == partition.num_steps
    for span in alone.spans(0):
        first, last = partition.span(span.step, 0), partition.span(span.step, partition.world_size - 1)
        assert (first.start, last.stop, first.global_rows) == (span.start, span.stop, span.rows)


@pytest.mark.parametrize(
    ("rank", "last_span"),
    [(0, Span(2, 24, 27, 3, 8)), (1, Span(2, 27, 30, 3, 8)), (2, Span(2, 30, 32, 3, 8))],
)
def test_by_hand(rank, last_span):
    """32 rows over 3 ranks of batch 4: two full steps, and 8 rows left."""
    full = [Span(0, 4 * rank, 4 * rank + 4, 4, 12), Span(1, 12 + 4 * rank, 16 + 4 * rank, 4, 12)]
    assert list(Partition(32, 4, 3).spans(rank)) == [*full, last_span]
    assert list(Partition(32, 4, 3, drop_last=True).spans(rank)) == full
    assert list(Partition(32, 4, 3, limit=1).spans(rank)) == full[:1]


@st.composite
def journeys(draw):
    """An epoch's rows, and legs of (steps to train, batch size, world size); the last leg takes what is left."""
    legs = st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 9))
    return draw(st.integers(0, 1500)), draw(st.lists(legs, min_size=1, max_size=7)), draw(st.booleans())


@quick
@given(journeys())
def test_any_sequence_of_resumes_sees_each_row_once(journey):
    num_rows, legs, drops_last = journey
    row = step = 0
    seen = []
    for number, (steps, batch_size, world_size) in enumerate(legs):
        partition = Partition(num_rows, batch_size, world_size, drops_last).resumed(row, step)
        stop = partition.num_steps if number == len(legs) - 1 else min(step + steps, partition.num_steps)
        spans = [list(partition.spans(rank)) for rank in range(world_size)]
        assert len({len(of_rank) for of_rank in spans}) == 1
        for spans_of_step in list(zip(*spans, strict=True))[: stop - step]:
            assert {span.step for span in spans_of_step} == {step}
            for span in spans_of_step:
                seen += range(span.start, span.stop)
            step += 1
        row = partition.rows_before(step)
        assert seen == list(range(row))
    left = num_rows - row
    assert left == 0 or (drops_last and left < partition.global_batch_size)


@quick
@given(partitions, st.integers(0, 50))
def test_a_resume_at_the_same_batch_is_the_rest_of_the_pass(partition, step):
    step = min(step, partition.num_steps)
    rest = partition.resumed(partition.rows_before(step), step)
    assert rest.is_regular
    assert rest.num_steps == partition.num_steps
    for rank in range(partition.world_size):
        assert list(rest.spans(rank)) == list(partition.spans(rank))[step:]


def test_where_a_resumed_pass_is_not_regular():
    assert Partition(100, 8, 2).resumed(48, 3).is_regular
    assert not Partition(100, 8, 2).resumed(48, 6).is_regular  # saved at a batch of 8 in all
    assert Partition(100, 8, 2).resumed(100, 7).is_regular
