"""Before tracing: recognize an MoE module's expert dispatch and give it the form that a compiler can trace."""

from moeca_compile.expert_dispatch.families.family import Family
from moeca_compile.expert_dispatch.families.registry import register, unregister
from moeca_compile.expert_dispatch.prepare import prepare, prepared, unprepare
from moeca_compile.expert_dispatch.report import PreparedModule, PrepareReport

__all__ = ["Family", "PrepareReport", "PreparedModule", "prepare", "prepared", "register", "unprepare", "unregister"]
