"""`python -m dpo_cli` is `dpo-train`."""

from dpo_cli.cli.train import main

raise SystemExit(main())
