"""What torch does anew for every compile or export with the same result, or for nobody: done once, or not at all.

It saves about a fifth of the tests' time. Each part is left out where a version of torch hasn't got it.
"""

from __future__ import annotations

import gc
import importlib
import logging


def import_without_collector() -> None:
    """Until `collect_rarely`: what imports make lives for ever."""
    gc.disable()


def collect_rarely() -> None:
    """What was imported lives for ever: the collector needn't look at it, neither by itself nor when a test asks.

    Dynamo would also run it after every compile.
    """
    dynamo = importlib.import_module("torch._dynamo.config")
    if hasattr(dynamo, "run_gc_after_compile"):
        dynamo.run_gc_after_compile = False
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)
    gc.enable()


def forget_sizes() -> None:
    """Dynamo remembers for all instances of a class which sizes of their inputs changed, and traces these as symbols,
    which takes much longer. The next test's models begin anew."""
    try:
        importlib.import_module("torch._dynamo.pgo").reset_code_state()
    except (ImportError, AttributeError):
        return


def measure_no_guards() -> None:
    """Dynamo empties the processor's cache to measure each graph's guards, and logs the time."""
    guards = importlib.import_module("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


def trace_for_nobody() -> None:
    """pytest listens to every logger, so torch would write down all graphs and code for its own trace."""
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()
    trace.addHandler = lambda handler: None  # type: ignore[method-assign]


def log_no_settings() -> None:
    """Dynamo writes all its settings and Inductor's as JSON for the log of each compile."""
    utils = importlib.import_module("torch._dynamo.utils")
    for name in ("_get_dynamo_config_for_logging", "_scrubbed_inductor_config_for_logging"):
        if hasattr(utils, name):
            setattr(utils, name, lambda: None)
