"""Everything that needs a GPU, in one go and in eight minutes: `make gpu`, or `python -m benchmarks.gpu --out FOLDER`.

The stages of `plan.py`, each in a process of its own, with a share of the time. After every stage the folder holds
`<gpu>.json`, `<gpu>.txt` (the table so far, and what failed) and `log.txt` (all output), so that a run that is cut
brings home what it had. Needs torch, triton, pytest and numpy, and no network; pytest-xdist is used where it is there.

    plan.py       the stages: their order, shares and commands
    run.py        runs them: deadlines, interrupts, what is kept
    stage.py      what a stage's process does with the results of its items
    clock.py      the device, its clock, and what stands in for them in a rehearsal
    build.py passes.py versus.py steps.py tuning.py     the stages that are no tests
    table.py      what is printed, and what was to be reached

`--rehearse` goes through all of it without a GPU: small shapes, events of the host's clock, a few tests.
"""
