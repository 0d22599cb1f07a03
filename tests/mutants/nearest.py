"""The tests nearest to a source file, and the mutations that no test could notice.

Theory of operation.  `make mutants` runs the tests of the first row whose prefix the file's path has, in the given
order: quick ones first, because the first failure ends the run.  A mutation that they do
not notice may still be noticed by another test; it is listed all the same, because a fault should be noticed near its
code.  A row names files or folders, so that a test which moves within its folder is still found.
"""

from __future__ import annotations

NEAREST: dict[str, tuple[str, ...]] = {
    "engine/format/layout": ("tests/format/test_layout.py", "tests/format/test_plan.py"),
    "engine/format/plan": ("tests/format/test_plan.py",),
    "engine/format/manifest": ("tests/format/test_manifest.py", "tests/format/test_format.py"),
    "engine/format/values": ("tests/state/test_extra.py", "tests/format/test_manifest.py"),
    "engine/format/": ("tests/format",),
    "engine/io/backend": ("tests/io/test_backend.py",),
    "engine/io/guard": ("tests/io/test_guard.py",),
    "engine/io/": ("tests/io/test_native_jobs.py", "tests/io/test_native.py", "tests/io/test_native_lifecycle.py"),
    "engine/store/catalog": ("tests/store/test_catalog.py",),
    "engine/store/directory": ("tests/store/test_directory.py", "tests/session/test_run.py"),
    "engine/store/filesystem": ("tests/store/test_faults.py",),
    "engine/store/commit": ("tests/store/test_commit.py",),
    "engine/store/retention": ("tests/store/test_retention.py",),
    "engine/store/spares": ("tests/store/test_catalog.py",),
    "engine/store/": ("tests/store/test_store.py", "tests/store/test_corruption.py", "tests/session/test_run.py"),
    "engine/state/fence": ("tests/state/test_fence.py",),
    "engine/state/inventory": ("tests/state/test_inventory.py", "tests/state/test_arena.py"),
    "engine/state/optimizers": ("tests/state/test_options.py", "tests/state/test_arena.py"),
    "engine/state/rng": ("tests/state/test_rng.py",),
    "engine/state/tensors": ("tests/state/test_extra.py", "tests/state/test_options.py"),
    "engine/state/watch": ("tests/state/test_watch.py", "tests/state/test_refresh.py"),
    "engine/state/": ("tests/state",),
    "engine/session/snapshot": ("tests/session/test_guards.py",),
    "engine/tuning/tune": ("tests/tuning/test_tune.py",),
    "engine/tuning/": (
        "tests/tuning/test_interval.py",
        "tests/tuning/test_device.py",
        "tests/tuning/test_decide.py",
        "tests/tuning/test_cache.py",
        "tests/tuning/test_tune.py",
    ),
    "engine/": ("tests/session/test_arguments.py", "tests/session/test_run.py", "tests/session/test_engine.py"),
    "native/guarding/": ("tests/io/test_guard.py",),
    "native/moving/": ("tests/io/test_native_faults.py", "tests/io/test_backend.py"),
    "native/staging/stager": ("tests/io/test_native_staging.py",),
    "native/": ("tests/io/test_native_jobs.py", "tests/io/test_native.py", "tests/io/test_native_faults.py"),
}

# By path, and the mutation as the report shows it: the reason why nothing observable changes.
EQUIVALENT: dict[tuple[str, str], str] = {}


def tests_for(path: str) -> tuple[str, ...]:
    return next(tests for prefix, tests in NEAREST.items() if path.startswith(prefix))
