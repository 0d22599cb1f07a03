"""The benchmark: the engine beside the limit of the host and beside its peers, in one run.

    python -m engine.bench --quick     # two minutes, a table on the terminal
    make bench                         # everything, and what docs/perf.md shows

Theory of operation.  Every figure is a `record.Sample`: one subject, in one setting, in one round.  Subjects take turns
within each round, in another order each time, so that whatever the host does meanwhile falls on all of them.  What is
reported is computed from samples by pure code (`noise`, `goals`, `report`, `charts`), now or from the JSON later.

`savers` and `loaders` hold the peers, each used as its documentation says; `limits` is fio and memcpy; `measure`,
`footprint` and `slowdown` make the samples.  Only the public API of the engine is used.
"""
