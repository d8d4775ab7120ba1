"""What `bigtrain doctor` looks at where there is SLURM: the settings on which requeueing and preemption depend."""

from __future__ import annotations

import re
import shutil

from launchers.steps import ask

_LEAST_KILL_WAIT_S = 30
OK, WARNING = "ok", "warning"


def check_cluster() -> list[tuple[str, str, str, str]]:
    """Findings: level, what, text, remedy; none where there is no SLURM."""
    if shutil.which("scontrol") is None:
        return []
    text = ask("scontrol", "show", "config")
    if not text:
        return [(WARNING, "SLURM", "its controller does not answer", "see whether `sinfo` works here")]
    settings = dict(re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", text, re.MULTILINE))
    partitions = ask("sinfo", "--noheader", "--format=%P %D %G").splitlines()
    found = [(OK, "SLURM", f"version {settings.get('SLURM_VERSION', '?')}; {'; '.join(partitions)}", "")]
    found += [*_requeueing(settings), *_preemption(settings), *_ending(settings)]
    return found


def _requeueing(settings: dict[str, str]) -> list[tuple[str, str, str, str]]:
    if settings.get("JobRequeue") == "0":
        text = "jobs are not requeued unless they ask for it (JobRequeue=0)"
        return [(OK, "requeueing", text, "profiles ask for it; keep requeue: true")]
    return [(OK, "requeueing", "jobs may be requeued", "")]


def _preemption(settings: dict[str, str]) -> list[tuple[str, str, str, str]]:
    kind, mode = settings.get("PreemptType", ""), settings.get("PreemptMode", "OFF")
    if kind in ("", "preempt/none", "(null)"):
        return [(OK, "preemption", "none", "")]
    if "REQUEUE" not in mode:
        text = f"a preempted job is not requeued (PreemptMode={mode})"
        return [(WARNING, "preemption", text, "go on by hand with bigtrain runs resume NAME, or use another partition")]
    if "preempt_send_user_signal" not in settings.get("SlurmctldParameters", ""):
        text = "a preemption is not announced (no preempt_send_user_signal in SlurmctldParameters)"
        return [(WARNING, "preemption", text, "the run goes on from its last checkpoint: lower checkpoint.every_steps")]
    graces = dict(re.findall(r"PartitionName=(\S+).*?GraceTime=(\d+)", ask("scontrol", "show", "partition"), re.DOTALL))
    words = ", ".join(f"{name} {seconds} s" for name, seconds in graces.items())
    return [(OK, "preemption", f"announced, and requeued; time to save: {words}", "")]


def _ending(settings: dict[str, str]) -> list[tuple[str, str, str, str]]:
    seconds = re.match(r"\d+", settings.get("KillWait", ""))
    if seconds and int(seconds[0]) < _LEAST_KILL_WAIT_S:
        text = f"{seconds[0]} s between scancel and the end (KillWait)"
        return [(WARNING, "ending", text, "bigtrain runs stop NAME saves first, however long that takes")]
    return [(OK, "ending", f"{seconds[0] if seconds else '?'} s between scancel and the end (KillWait)", "")]
