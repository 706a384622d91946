"""Why Slurm says that a job waits, in other words, and what to type. The same table stands in docs/cluster.md."""

import re

CHANGE = "'cancel', then 'launch' with"

REASONS = (  # Slurm's word -> what it means, what to type; the first that matches
    ("Dependency", "earlier jobs of the study come first: no more than launch.max_running at once", None),
    ("DependencyNeverSatisfied", "Slurm has lost the jobs that it waits for", "'cancel', then the same command"),
    ("JobArrayTaskLimit", "launch.max_running jobs run", None),
    ("JobHeldUser", "it was held (scontrol hold)", "scontrol release JOBID"),
    ("JobHeldAdmin", "an administrator holds it", "ask them"),
    ("launch failed requeued held|JobHoldMaxRequeue", "Slurm holds it after failed starts", "scontrol release JOBID"),
    ("PartitionTimeLimit", "it asks for more time than its partition gives", f"{CHANGE} another launch.timeout_min"),
    (
        "PartitionNodeLimit|PartitionConfig",
        "no node of its partition has what one job asks for, or as many of them",
        f"{CHANGE} other launch.nodes, gpus_per_node, cpus_per_task or memory_gb, or another launch.partition",
    ),
    ("PartitionDown|PartitionInactive", "its partition is closed for now", None),
    (
        "ReqNodeNotAvail.*|Nodes required for job are DOWN.*|NodeDown",
        "its nodes are down or reserved, as for maintenance",
        "nothing; if it ends before that, 'launch' with a smaller launch.timeout_min",
    ),
    ("BadConstraints|FeatureNotFound", "no node has launch.constraint", f"{CHANGE} another launch.constraint"),
    ("Reservation.*", "it waits for its reservation", f"{CHANGE} another launch.sbatch"),
    ("BeginTime", "it was requeued, and waits a moment", None),
    ("Licenses", "it waits for a licence", None),
    ("InvalidAccount|AccountNotAllowed", "the account may not use this", f"{CHANGE} another launch.account"),
    ("InvalidQOS|QOSNotAllowed", "the QOS is not allowed here", f"{CHANGE} another launch.qos"),
    (
        r"(Assoc|QOS)Grp\w*(Minutes|RunMinutes)\w*",
        "the group has spent its hours",
        f"{CHANGE} another launch.account or launch.qos",
    ),
    (r"(Assoc|QOS)Grp\w*", "the group as a whole uses what it may", "nothing: it goes on when a job of theirs ends"),
    (
        r"(QOS|Assoc)(Max|Min)\w*(PerJob|PerNode)\w*|QOSMin\w*",
        "one job alone asks for more, or for less, than it may",
        f"{CHANGE} other launch.nodes, gpus_per_node, cpus_per_task, memory_gb or timeout_min, or another launch.qos",
    ),
    (
        r"(QOS|Assoc)Max\w*",
        "you use what you may",
        f"nothing: it goes on when a job of yours ends; if one alone is above the limit, {CHANGE} less per job",
    ),
    (r"QOSResourceLimit|AssociationJobLimit|AssociationResourceLimit", "you use what you may", None),
    (r"Resources|Priority|None", "Slurm has no place yet", None),
)


def explain(remark: str) -> str | None:
    """What the reason at the end of a waiting job's remark means and what to type; None for one that is not known."""
    reason = remark.rsplit("), ", 1)[-1]
    for pattern, meaning, advice in REASONS:
        if re.fullmatch(pattern, reason, re.IGNORECASE):
            return meaning + (f": {advice}" if advice else "")
    return None
