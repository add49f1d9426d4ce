"""The paper's comparison under a fixed budget of training FLOPs: sparse or dense, by objective, by size.

The names below are imported on first use: a plan is made without importing what trains.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.study.findings import Finding, findings
    from lion_st.study.fits import Fit, PowerLaw, bootstrap_fit, fit_power_law
    from lion_st.study.grid import Cell, Plan, plan_study
    from lion_st.study.jobs import contrastive_entropies
    from lion_st.study.report import write_report
    from lion_st.study.results import Results
    from lion_st.study.run import StudyIncomplete, run_study
    from lion_st.study.settings import Study, parse_study, read_study

__all__ = [
    "Cell",
    "Finding",
    "Fit",
    "Plan",
    "PowerLaw",
    "Results",
    "Study",
    "StudyIncomplete",
    "bootstrap_fit",
    "contrastive_entropies",
    "findings",
    "fit_power_law",
    "parse_study",
    "plan_study",
    "read_study",
    "run_study",
    "write_report",
]

__getattr__, __dir__ = attach(__name__)
