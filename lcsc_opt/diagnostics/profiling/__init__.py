"""Where the time of a study's trials goes, how near this is to the machine's limits, and which settings would help.

``trials`` runs real trials in a database that is thrown away, and listens to their spans; ``work`` counts operations;
``machine`` measures limits. ``parts`` divides the time, and ``advice`` draws a conclusion; both are pure. ``trace``
writes what happened for other programs; ``settings`` tries other ways to sample.
"""

from lcsc_opt.diagnostics.profiling.parts import Part, Profile
from lcsc_opt.diagnostics.profiling.settings import Tried, described, recommended, try_settings, yaml_text
from lcsc_opt.diagnostics.profiling.study import plan_to_profile, profile_study
from lcsc_opt.diagnostics.profiling.trace import check_trace_file
from lcsc_opt.diagnostics.profiling.trials import folder_of

__all__ = [
    "Part",
    "Profile",
    "Tried",
    "check_trace_file",
    "described",
    "folder_of",
    "plan_to_profile",
    "profile_study",
    "recommended",
    "try_settings",
    "yaml_text",
]
