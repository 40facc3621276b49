"""`python -m surgery` is `surgery`."""

from .cli import main

raise SystemExit(main())
