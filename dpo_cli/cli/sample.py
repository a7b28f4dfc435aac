"""dpo-sample: from a policy and prompts to responses, and to preference pairs that dpo-train reads."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.cli.command import Command, main_of

SAMPLE = Command(
    name="dpo-sample",
    config_name="sample",
    doing="sampling",
    introduction="""\
dpo-sample: responses of a policy to prompts, and preference pairs made of them.

  dpo-sample model=local model.path=my-model prompts=questions.jsonl out=samples.jsonl
  dpo-sample model=local model.path=outputs/RUN prompts=gsm8k.jsonl out=pairs.jsonl verifier=gsm8k pairs=verified
  dpo-sample ... pairs=verified chosen=answers.jsonl             chosen responses of a file against wrong samples
  dpo-sample ... pairs=best_worst model.reference=my-base        best against worst by implicit reward
  dpo-sample ... hardware=deepspeed_zero1                        all GPUs of this machine, each with the whole model
  dpo-train data=local data.train=pairs.jsonl ...                train on the pairs

model.path may be a run folder of dpo-train; its final model is meant.
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-sample with these arguments, those of the process by default; returns the exit code."""
    return main_of(SAMPLE, argv)


if __name__ == "__main__":
    raise SystemExit(main())
