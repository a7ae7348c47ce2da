"""python -m fused_optim: see fused_optim.cli."""

from fused_optim.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
