"""dpo-eval: what a policy can do, how it ranks given responses, and whether two policies differ."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cli.cli.command import Command, main_of

EVAL = Command(
    name="dpo-eval",
    config_name="eval",
    doing="evaluating",
    introduction="""\
dpo-eval: what a policy can do, how it ranks given responses, and whether two policies differ.

  dpo-eval model=local model.path=outputs/RUN prompts=test.jsonl verifier=gsm8k out=result.json
  dpo-eval ... sampling.samples_per_prompt=16 sampling.temperature=1 pass_at=[1,8] maj_at=[16]
  dpo-eval ... compare=my-base                     another policy on the same questions, with McNemar's test
  dpo-eval mode=compare compare=[a.json,b.json]    two results of the same questions
  dpo-eval mode=preferences model=local model.path=outputs/RUN data=heldout.jsonl
  dpo-eval mode=rewards model=local model.path=outputs/RUN data=pairs.jsonl out=rewards.jsonl
  dpo-eval ... hardware=deepspeed_zero1            all GPUs of this machine, each with the whole model

model.path may be a run folder of dpo-train: its final model is meant, and its reference and beta are known.
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-eval with these arguments, those of the process by default; returns the exit code."""
    return main_of(EVAL, argv)


if __name__ == "__main__":
    raise SystemExit(main())
