"""Before tracing: recognise an MoE module's expert dispatch and give it the form that a compiler can trace."""

from moeca_compile.expert_dispatch.prepare import prepare, prepared, unprepare
from moeca_compile.expert_dispatch.report import PreparedModule, PrepareReport

__all__ = ["PrepareReport", "PreparedModule", "prepare", "prepared", "unprepare"]
