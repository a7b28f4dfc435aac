"""Which metrics make a chart, what it is called, and what it shows."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.report.drawing import CHOSEN, INK, MARGIN, OTHER, REJECTED


@dataclass(frozen=True)
class Curve:
    """A metric, what it is called beside others of its figure, and its colour."""

    metric: str
    label: str
    color: str


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    text: str
    curves: tuple[Curve, ...]
    percent: bool = False
    log: bool = False


def one(name: str, title: str, text: str, metric: str, color: str = CHOSEN, **how: bool) -> Chart:
    return Chart(name, title, text, (Curve(metric, "", color),), **how)


CHARTS = (
    one("loss", "Loss", "Mean over pairs, with every term of the loss.", "loss", INK),
    one(
        "margin",
        "Reward margin",
        "Reward of the chosen response less that of the rejected one.",
        "rewards/margins",
        MARGIN,
    ),
    one(
        "accuracy",
        "Reward accuracy",
        "Share of pairs whose chosen response has the higher reward.",
        "rewards/accuracies",
        MARGIN,
        percent=True,
    ),
    Chart(
        "rewards",
        "Rewards",
        "Of DPO: beta times log(policy / reference).",
        (Curve("rewards/chosen", "chosen", CHOSEN), Curve("rewards/rejected", "rejected", REJECTED)),
    ),
    Chart(
        "logps",
        "Log-probs",
        "Of whole responses under the policy, in nats.",
        (Curve("logps/chosen", "chosen", CHOSEN), Curve("logps/rejected", "rejected", REJECTED)),
    ),
    one(
        "task",
        "Task accuracy",
        "Problems that the policy solves by itself, of those asked at evaluations.",
        "task/accuracy",
        OTHER,
        percent=True,
    ),
    Chart(
        "terms",
        "Terms of the loss",
        "Before their weights.",
        (
            Curve("loss/dpo", "DPO", CHOSEN),
            Curve("loss/generator", "generator", OTHER),
            Curve("loss/nll", "NLL", REJECTED),
        ),
    ),
    Chart(
        "generator_shares",
        "What the generator writes",
        "Samples that end by themselves, and those ranked below their ground truth.",
        (Curve("generator/eos_rate", "ended", CHOSEN), Curve("generator/active_fraction", "below truth", REJECTED)),
        percent=True,
    ),
    one(
        "generator_kl",
        "KL of samples",
        "Mean of log(policy / reference) of what the policy writes, in nats a sample.",
        "generator/kl",
        OTHER,
    ),
    one(
        "generator_gap",
        "Reward gap of samples",
        "Reward of the ground truth less that of the sample.",
        "generator/reward_gap",
        OTHER,
    ),
    one("generator_length", "Length of samples", "In tokens.", "generator/length", OTHER),
    one("entropy", "Entropy", "Of the policy's next token, in nats, at the responses' tokens.", "entropy", INK),
    one(
        "token_accuracy",
        "Token accuracy",
        "Chosen tokens that are the policy's most probable one: its language.",
        "mean_token_accuracy",
        INK,
        percent=True,
    ),
    one("grad_norm", "Gradient norm", "Before clipping, of the last step of each line.", "grad_norm", INK, log=True),
    one("learning_rate", "Learning rate", "", "learning_rate", INK),
    one(
        "throughput",
        "Tokens per second",
        "Training steps alone, without evaluation and saving.",
        "perf/tokens_per_second",
        INK,
    ),
    one("memory", "Memory", "In GiB: the most on a GPU so far, or what the process takes.", "perf/memory_gib", INK),
    one("utilisation", "MFU", "In % of the GPU's stated peak.", "perf/mfu_pct", INK),
)
