"""The tests nearest to a source file, and the mutations that no test could notice.

Theory of operation.  `make mutants` runs the tests of the first row whose prefix the file's path has, in the given
order: quick ones first, because the first failure ends the run.  A mutation that they do
not notice may still be noticed by another test; it is listed all the same, because a fault should be noticed near its
code.  A row names files or folders, so that a test which moves within its folder is still found.

The rows below `engine/` name the files that run most lines of a source file (`coverage run`, one test file at a time),
and that take a few seconds each: a mutation whose tests take over half a minute without it stays undecided.
"""

from __future__ import annotations

NEAREST: dict[str, tuple[str, ...]] = {
    "engine/format/layout": ("tests/format/test_layout.py", "tests/format/test_plan.py"),
    "engine/format/plan": ("tests/format/test_plan.py",),
    "engine/format/manifest": ("tests/format/test_manifest.py", "tests/format/test_format.py"),
    "engine/format/values": ("tests/state/test_extra.py", "tests/format/test_manifest.py"),
    "engine/format/": ("tests/format",),
    "engine/io/backend": ("tests/io/test_backend.py",),
    "engine/io/binding": ("tests/io/test_binding.py", "tests/io/test_native_jobs.py"),
    "engine/io/descriptor": ("tests/io/test_descriptor.py",),
    "engine/io/guard": ("tests/io/test_guard.py",),
    "engine/io/job": ("tests/io/test_native_jobs.py", "tests/session/test_facts.py"),
    "engine/io/packing": ("tests/io/test_native_jobs.py", "tests/session/test_facts.py"),
    "engine/io/pipeline": ("tests/io/test_native_jobs.py", "tests/io/test_native_close.py"),
    "engine/io/": ("tests/io/test_native_jobs.py", "tests/io/test_native_known.py", "tests/session/test_facts.py"),
    "engine/store/access": ("tests/session/test_arguments.py", "tests/monitor"),
    "engine/store/catalog": ("tests/store/test_catalog.py",),
    "engine/store/committer": (
        "tests/session/test_split.py",
        "tests/session/test_facts.py",
        "tests/session/test_failures.py",
    ),
    "engine/store/commit": ("tests/store/test_commit.py", "tests/session/test_facts.py"),
    "engine/store/directory": ("tests/store/test_directory.py", "tests/session/test_run.py"),
    "engine/store/facts": ("tests/session/test_facts.py", "tests/store/test_retention.py"),
    "engine/store/filesystem": (
        "tests/store/test_directory.py",
        "tests/store/test_commit.py",
        "tests/session/test_facts.py",
    ),
    "engine/store/info": ("tests/session/test_facts.py", "tests/session/test_arguments.py"),
    "engine/store/lock": ("tests/session/test_arguments.py", "tests/store/test_catalog.py"),
    "engine/store/owner": (
        "tests/session/test_failures.py",
        "tests/session/test_facts.py",
        "tests/monitor",
    ),
    "engine/store/reader": ("tests/store/test_store.py", "tests/session/test_resume.py", "tests/session/test_run.py"),
    "engine/store/retention": ("tests/store/test_retention.py", "tests/session/test_facts.py"),
    "engine/store/rule_file": ("tests/session/test_facts.py", "tests/store/test_retention.py"),
    "engine/store/spares": ("tests/session/test_facts.py", "tests/store/test_catalog.py"),
    "engine/store/stamps": ("tests/session/test_resume.py", "tests/session/test_trust.py"),
    "engine/store/unchanged": ("tests/session/test_split.py",),
    "engine/store/verify": ("tests/session/test_facts.py", "tests/session/test_run.py"),
    "engine/store/writer": (
        "tests/store/test_store.py",
        "tests/session/test_failures.py",
        "tests/session/test_facts.py",
    ),
    "engine/store/": ("tests/store/test_store.py", "tests/session/test_facts.py", "tests/session/test_run.py"),
    "engine/state/adopted": ("tests/state/test_adopted.py",),
    "engine/state/arena": ("tests/state/test_arena.py", "tests/session/test_matching.py"),
    "engine/state/arrangement": ("tests/session/test_extra_state.py", "tests/session/test_arguments.py"),
    "engine/state/choice": ("tests/state/test_choice.py",),
    "engine/state/components": ("tests/state/test_components.py",),
    "engine/state/extra_state": ("tests/session/test_extra_state.py",),
    "engine/state/fence": ("tests/state/test_fence.py",),
    "engine/state/generators": ("tests/state/test_options.py",),
    "engine/state/inventory": ("tests/state/test_inventory.py", "tests/state/test_choice.py"),
    "engine/state/late": ("tests/session/test_matching.py", "tests/session/test_optimizers.py"),
    "engine/state/memory": ("tests/state/test_memory.py", "tests/state/test_mirrors.py"),
    "engine/state/mirrors": ("tests/state/test_mirrors.py",),
    "engine/state/modules": ("tests/state/test_modules.py",),
    "engine/state/optimizers": ("tests/state/test_options.py", "tests/session/test_matching.py"),
    "engine/state/rng": ("tests/state/test_rng.py",),
    "engine/state/select": ("tests/session/test_select.py", "tests/session/test_arguments.py"),
    "engine/state/steps": ("tests/state/test_adopted.py", "tests/state/test_fence.py"),
    "engine/state/tensors": ("tests/state/test_extra.py", "tests/state/test_options.py"),
    "engine/state/versions": ("tests/session/test_snapshot.py",),
    "engine/state/watch": ("tests/state/test_watch.py",),
    "engine/state/": ("tests/state/test_arena.py", "tests/state/test_options.py"),
    "engine/session/checkpoint": (
        "tests/session/test_facts.py",
        "tests/session/test_arguments.py",
        "tests/session/test_failures.py",
    ),
    "engine/session/failures": ("tests/session/test_failures.py",),
    "engine/session/gate": (
        "tests/session/test_arguments.py",
        "tests/session/test_facts.py",
        "tests/session/test_failures.py",
    ),
    "engine/session/in_flight": (
        "tests/session/test_arguments.py",
        "tests/session/test_facts.py",
        "tests/session/test_failures.py",
    ),
    "engine/session/matching": ("tests/session/test_matching.py", "tests/session/test_extra_state.py"),
    "engine/session/reading": ("tests/session/test_arguments.py", "tests/session/test_facts.py"),
    "engine/session/restore": (
        "tests/session/test_select.py",
        "tests/session/test_matching.py",
        "tests/session/test_arguments.py",
    ),
    "engine/session/resume": ("tests/session/test_resume.py",),
    "engine/session/run": ("tests/session/test_run.py",),
    "engine/session/save": (
        "tests/session/test_failures.py",
        "tests/session/test_facts.py",
        "tests/session/test_arguments.py",
    ),
    "engine/session/preemption": ("tests/session/test_preemption.py",),
    "engine/session/snapshot": ("tests/session/test_guards.py",),
    "engine/session/": (
        "tests/session/test_arguments.py",
        "tests/session/test_facts.py",
        "tests/session/test_failures.py",
    ),
    "engine/monitor/begin": ("tests/monitor/test_hostile.py",),
    "engine/monitor/client": ("tests/monitor/test_saves.py", "tests/monitor/test_signals.py"),
    "engine/monitor/forks": ("tests/monitor/test_forks.py",),
    "engine/monitor/listener": ("tests/monitor/test_asking.py", "tests/monitor/test_saves.py"),
    "engine/monitor/process": ("tests/monitor/test_stopped.py", "tests/monitor/test_signals.py"),
    "engine/monitor/protocol": ("tests/monitor/test_forks.py", "tests/monitor/test_hostile.py"),
    "engine/monitor/server": ("tests/monitor/test_hostile.py", "tests/monitor/test_saves.py"),
    "engine/monitor/shared_memory": ("tests/monitor/test_forks.py", "tests/monitor/test_serving.py"),
    "engine/monitor/status": ("tests/monitor/test_asking.py",),
    "engine/monitor/": ("tests/monitor/test_saves.py",),
    "engine/options": ("tests/session/test_arguments.py",),
    "engine/errors": ("tests/session/test_failures.py", "tests/session/test_arguments.py"),
    "engine/tuning/tune": ("tests/tuning/test_tune.py",),
    "engine/tuning/": (
        "tests/tuning/test_interval.py",
        "tests/tuning/test_device.py",
        "tests/tuning/test_decide.py",
        "tests/tuning/test_cache.py",
        "tests/tuning/test_tune.py",
    ),
    "engine/integrations/": ("tests/integrations",),
    "engine/": ("tests/session/test_arguments.py", "tests/session/test_facts.py", "tests/session/test_run.py"),
    "native/guarding/": ("tests/io/test_guard.py", "tests/io/test_native_release.py"),
    "native/moving/serve": ("tests/monitor/test_serving.py", "tests/monitor/test_hostile.py"),
    "native/moving/shared": ("tests/monitor/test_serving.py",),
    "native/moving/": ("tests/io/test_native_faults.py", "tests/io/test_backend.py"),
    "native/staging/stager": ("tests/io/test_native_staging.py",),
    "native/pipeline/progress": (
        "tests/io/test_native.py",
        "tests/io/test_native_release.py",
        "tests/io/test_guard.py",
    ),
    "native/pipeline/turns": ("tests/io/test_native_turns.py",),
    "native/": ("tests/io/test_native_jobs.py", "tests/io/test_native.py", "tests/io/test_native_faults.py"),
}

# By path, and the mutation as the report shows it: the reason why nothing observable changes.
EQUIVALENT: dict[tuple[str, str], str] = {}


def tests_for(path: str) -> tuple[str, ...]:
    return next(tests for prefix, tests in NEAREST.items() if path.startswith(prefix))
