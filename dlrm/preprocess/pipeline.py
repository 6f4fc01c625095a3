"""Raw Criteo text to binary days, in bounded memory: parse, count, encode, shuffle, verify."""

from dlrm.preprocess.layout import Layout
from dlrm.preprocess.run import Run
from dlrm.preprocess.stages.encoding import count, encode
from dlrm.preprocess.stages.parsing import parse
from dlrm.preprocess.stages.shuffling import shuffle
from dlrm.preprocess.stages.verifying import verify


def run_stages(run: Run, estimated_rows: int) -> Layout:
    """All stages; then the output has its name. Collective."""
    layout = parse(run, estimated_rows)
    count(run, layout)
    encode(run, layout)
    days = shuffle(run, layout)
    verify(run, layout, days)
    if run.ranks.is_main:
        run.workspace.publish()
    run.meet()
    return layout
