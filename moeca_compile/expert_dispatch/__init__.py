"""Before tracing: recognize an MoE module's expert dispatch and give it the form that a compiler can trace."""

from moeca_compile.expert_dispatch.families.family import Family, method_or_loop
from moeca_compile.expert_dispatch.families.registry import register, unregister
from moeca_compile.expert_dispatch.module_code import ModuleCode
from moeca_compile.expert_dispatch.prepare import prepare, prepared, unprepare
from moeca_compile.expert_dispatch.proof.candidate import NOT_NEEDED, Candidate, Entry, Rank, Rewrite, Unproven
from moeca_compile.expert_dispatch.proof.entries import entries
from moeca_compile.expert_dispatch.proof.harness import Harness
from moeca_compile.expert_dispatch.proof.layouts import FLAT, PAIRED, Layout
from moeca_compile.expert_dispatch.report import PreparedModule, PrepareReport
from moeca_compile.expert_dispatch.rewrite.one_loop import one_loop
from moeca_compile.expert_dispatch.rewrite.one_result import one_result
from moeca_compile.expert_dispatch.rewrite.whole_method import whole_method
from moeca_compile.expert_dispatch.routed import Routed
from moeca_compile.expert_dispatch.source.loop import Loop

__all__ = [
    "FLAT",
    "NOT_NEEDED",
    "PAIRED",
    "Candidate",
    "Entry",
    "Family",
    "Harness",
    "Layout",
    "Loop",
    "ModuleCode",
    "PrepareReport",
    "PreparedModule",
    "Rank",
    "Rewrite",
    "Routed",
    "Unproven",
    "entries",
    "method_or_loop",
    "one_loop",
    "one_result",
    "prepare",
    "prepared",
    "register",
    "unprepare",
    "unregister",
    "whole_method",
]
