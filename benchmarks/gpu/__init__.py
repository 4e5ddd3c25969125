"""Everything that needs a GPU, in eight minutes: `make gpu`, or `python -m benchmarks.gpu --out FOLDER`.

Each stage of `plan.py` runs in a separate process, with its share of the time. After every stage, the folder contains
`<gpu>.json`, `<gpu>.txt` (the table so far, and the failures) and `log.txt` (all output), so that a run that is cut
short keeps its results. This needs torch, triton, pytest and numpy, but no network; pytest-xdist is used if it is
installed.

    plan.py       the stages: their order, shares and commands
    run.py        runs them: deadlines, interrupts, saved results
    stage.py      collects the results of a stage's items in its process
    clock.py      the device and its clock, and their substitutes in a rehearsal
    build.py passes.py versus.py steps.py tuning.py     the stages that are not tests
    table.py      the printed table, and the targets

`--rehearse` goes through all of it without a GPU, with small shapes, the host's clock and a few tests.
"""
