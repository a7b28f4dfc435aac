"""`python -m dpo_cli` is `dpo-train`."""

from dpo_cli.cli.train import main

# Worker processes import this module again, under another name.
if __name__ == "__main__":
    raise SystemExit(main())
