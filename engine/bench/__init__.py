"""The benchmark: the engine beside the limit of the host and beside its peers, in one run.

    python -m engine.bench --quick     # two minutes, a table on the terminal
    make bench                         # everything, with the figures of docs/perf.md

Theory of operation.  Every figure is a `record.Sample`: one subject, in one setting, in one round.  Subjects take turns
within each round, in another order each time, so that other load on the host affects all of them.  Pure code (`noise`,
`goals`, `report`, `charts`) computes the results from samples, at once or from the JSON later.

`savers` and `loaders` hold the peers, each used as its documentation says.  `limits` is fio and memcpy.  `measure`,
`footprint` and `slowdown` make the samples.  Only the public API of the engine is used.
"""
