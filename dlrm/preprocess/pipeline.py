"""Raw Criteo text to binary days, in bounded memory: parse, count, encode, shuffle, check."""

from dlrm.preprocess.layout import Layout
from dlrm.preprocess.run import Run
from dlrm.preprocess.stages.checking import check
from dlrm.preprocess.stages.encoding import count, encode
from dlrm.preprocess.stages.parsing import parse
from dlrm.preprocess.stages.shuffling import shuffle


def run_stages(run: Run, estimated_rows: int) -> Layout:
    """Runs all stages, and then gives the output its name. Collective.

    Args:
        estimated_rows: for the progress bar.
    """
    layout = parse(run, estimated_rows)
    count(run, layout)
    encode(run, layout)
    days = shuffle(run, layout)
    check(run, layout, days)
    if run.ranks.is_main:
        run.workspace.publish()
    run.meet()
    return layout
