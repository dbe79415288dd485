"""``python -m lightning_compress.cli VERB``."""

from lightning_compress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
